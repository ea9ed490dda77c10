#include "fields.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "error.h"

namespace rd {

std::string quoted(std::string_view text) {
    constexpr std::size_t longest = 80;
    std::size_t bytes = std::min(text.size(), longest);
    const auto continues = [](char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; };
    while (bytes > 0 && bytes < text.size() && continues(text[bytes])) --bytes;  // not within a character
    return "'" + printable(text.substr(0, bytes)) + (bytes < text.size() ? "...'" : "'");
}

void refuse(const std::string &what) { throw Error(RD_ERROR_FORMAT, "wrong .rdp file: " + what + "; export it again"); }

Fields::Fields(json::Value object, std::string where, const std::vector<std::string_view> &keys)
    : where_(std::move(where)) {
    if (object.kind() != json::Kind::object) fail("is not an object");
    for (const auto &[key, value] : object.members()) {
        if (std::find(keys.begin(), keys.end(), key) == keys.end()) fail("has an unknown entry " + quoted(key));
        members_.emplace(key, value);
    }
    for (const std::string_view key : keys) {
        if (members_.count(key) == 0) fail("lacks its entry " + quoted(key));
    }
}

void Fields::fail(const std::string &what) const { refuse(where_ + " " + what); }

json::Value Fields::get(std::string_view key, json::Kind kind) const {
    const json::Value value = members_.at(key);
    if (value.kind() != kind) fail("has a " + quoted(key) + " of the wrong type");
    return value;
}

bool Fields::is_null(std::string_view key) const { return members_.at(key).kind() == json::Kind::null; }

bool Fields::flag(std::string_view key) const { return get(key, json::Kind::boolean).boolean(); }

std::string Fields::text(std::string_view key) const { return text_of(get(key, json::Kind::string), key); }

int Fields::whole(std::string_view key, int least, int most) const {
    return whole_of(get(key, json::Kind::number), key, least, most);
}

std::vector<json::Value> Fields::list(std::string_view key, std::size_t count) const {
    const std::vector<json::Value> items = get(key, json::Kind::array).items();
    if (items.size() != count) {
        fail("has " + std::to_string(items.size()) + " entries in " + quoted(key) + ", not " + std::to_string(count));
    }
    return items;
}

std::vector<int> Fields::wholes(std::string_view key, std::size_t count, int least, int most) const {
    std::vector<int> found;
    for (const json::Value item : list(key, count)) found.push_back(whole_of(item, key, least, most));
    return found;
}

std::vector<std::string> Fields::texts(std::string_view key, std::size_t count) const {
    std::vector<std::string> found;
    for (const json::Value item : list(key, count)) found.push_back(text_of(item, key));
    return found;
}

std::string Fields::text_of(json::Value value, std::string_view key) const {
    if (value.kind() != json::Kind::string) fail("has a " + quoted(key) + " of the wrong type");
    if (value.text().find('\0') != std::string_view::npos) {  // it would end the C string early
        fail("has a zero character in " + quoted(key));
    }
    return std::string(value.text());
}

int Fields::whole_of(json::Value value, std::string_view key, int least, int most) const {
    const std::optional<std::int64_t> found = value.whole();
    if (!found || *found < least || *found > most) {
        const std::string limits = std::to_string(least) + " to " + std::to_string(most);
        fail("needs for " + quoted(key) + " a whole number from " + limits);
    }
    return static_cast<int>(*found);
}

}  // namespace rd
