#include <stdexcept>

#include "ops/checks.h"

namespace moefuse {

void fail(const std::string& op, const std::string& what, const std::string& expected,
          const std::string& got) {
  std::string text = "[" + op + "] " + what + ": expected " + expected + ", got " + got;
  // A name from a file may hold anything; a zero byte would end the message, an escape is obeyed.
  for (char& c : text)
    if ((c >= 0 && c < ' ') || c == 0x7f) c = '?';
  throw std::invalid_argument(text);
}

}  // namespace moefuse
