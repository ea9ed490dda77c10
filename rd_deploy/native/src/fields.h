// Reading JSON objects of a .rdp file: exactly the expected entries, each of its type and within its limits.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "json.h"

namespace rd {

// Text of the file for a message: in quotes, on one line, not too long.
std::string quoted(std::string_view text);

// The file is not what rd-export writes: raises rd::Error with RD_ERROR_FORMAT.
[[noreturn]] void refuse(const std::string &what);

// A JSON object that has the given keys and no others. `where` begins its messages. The document must outlive it.
class Fields {
  public:
    Fields(json::Value object, std::string where, const std::vector<std::string_view> &keys);

    [[noreturn]] void fail(const std::string &what) const;

    json::Value get(std::string_view key, json::Kind kind) const;
    bool is_null(std::string_view key) const;
    bool flag(std::string_view key) const;
    std::string text(std::string_view key) const;
    int whole(std::string_view key, int least, int most) const;
    // Arrays of exactly `count` entries.
    std::vector<json::Value> list(std::string_view key, std::size_t count) const;
    std::vector<int> wholes(std::string_view key, std::size_t count, int least, int most) const;
    std::vector<std::string> texts(std::string_view key, std::size_t count) const;

  private:
    std::string text_of(json::Value value, std::string_view key) const;
    int whole_of(json::Value value, std::string_view key, int least, int most) const;

    std::string where_;
    std::unordered_map<std::string_view, json::Value> members_;
};

}  // namespace rd
