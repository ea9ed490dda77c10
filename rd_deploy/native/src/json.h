// A strict JSON reader (RFC 8259) for untrusted text: UTF-8 is validated, duplicate keys, lone surrogates and numbers
// beyond a double are refused, depth and the number of values are limited. Memory is bounded by that
// number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rd::json {

enum class Kind : std::uint8_t { null, boolean, number, string, array, object };

constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxValues = std::size_t{1} << 21;  // keys included

struct Node {
    Kind kind;
    bool truth;                    // of a boolean; of a number: it is a whole one that `whole` holds exactly
    std::uint32_t end;             // index after the last node below this one
    std::uint32_t offset, length;  // of a string, decoded, in Document::strings
    double number;
    std::int64_t whole;
};

struct Document {
    std::vector<Node> nodes;  // in the order of the text: a container, then what it holds; a key, then its value
    std::string strings;
};

// Raises rd::Error (RD_ERROR_FORMAT), whose message gives the byte, for anything but one JSON value.
Document parse(std::string_view text);

// One value of a document, which must outlive it.
class Value {
  public:
    explicit Value(const Document &document, std::uint32_t index = 0) : document_(&document), index_(index) {}

    Kind kind() const { return node().kind; }
    bool boolean() const { return node().truth; }
    double number() const { return node().number; }
    std::optional<std::int64_t> whole() const;  // nothing unless the number is written as an integer of 64 bits
    std::string_view text() const;              // decoded UTF-8, may hold zero bytes
    std::vector<Value> items() const;           // of an array
    std::vector<std::pair<std::string_view, Value>> members() const;  // of an object

  private:
    const Node &node() const { return document_->nodes[index_]; }

    const Document *document_;
    std::uint32_t index_;
};

}  // namespace rd::json
