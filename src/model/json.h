// JSON from outside: bounded in depth, each key once, quoted in errors at a bounded length.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace moefuse {

// Throws std::invalid_argument "[where] what: ..." on what is not one JSON object, is nested deeper
// than 32 levels or names a key twice.
nlohmann::json parse_object(const std::string& where, const std::string& what,
                            const std::string& text);

// The value as ASCII JSON, for an error's text: its first 80 characters.
std::string excerpt(const nlohmann::json& value);

}  // namespace moefuse
