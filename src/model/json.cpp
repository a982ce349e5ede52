#include "model/json.h"

#include <set>
#include <vector>

#include "ops/checks.h"

namespace moefuse {

namespace {

using nlohmann::json;

// The parser itself needs no stack for depth, but whoever prints or copies a value does.
constexpr int kDeepest = 32;
constexpr size_t kLongest = 80;

}  // namespace

json parse_object(const std::string& where, const std::string& what, const std::string& text) {
  std::vector<std::set<std::string>> keys;  // of the object that is open at each depth
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kDeepest)
      fail(where, what, "JSON of at most " + std::to_string(kDeepest) + " levels", "a deeper one");
    if (event == json::parse_event_t::object_start) {
      keys.resize(depth);
      keys.emplace_back();
    } else if (event == json::parse_event_t::key &&
               !keys[depth - 1].insert(parsed.get<std::string>()).second) {
      fail(where, what, "each key once", "a second " + excerpt(parsed));
    }
    return true;
  };
  json parsed;
  try {
    parsed = json::parse(text, watch);
  } catch (const json::parse_error& error) {
    fail(where, what, "JSON", "an error at byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    fail(where, what, "JSON", "a number out of range");
  }
  if (!parsed.is_object()) fail(where, what, "a JSON object", excerpt(parsed));
  return parsed;
}

std::string excerpt(const json& value) {
  std::string text = value.dump(-1, ' ', true);
  if (text.size() > kLongest) text.replace(kLongest - 3, std::string::npos, "...");
  return text;
}

}  // namespace moefuse
