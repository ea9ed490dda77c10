#include "json.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <system_error>

#include "error.h"

namespace rd::json {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string &out, std::uint32_t code) {
    const auto push = [&out](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
    if (code < 0x80) return push(code);
    if (code < 0x800) {
        push(0xc0 | code >> 6);
    } else if (code < 0x10000) {
        push(0xe0 | code >> 12);
        push(0x80 | (code >> 6 & 0x3f));
    } else {
        push(0xf0 | code >> 18);
        push(0x80 | (code >> 12 & 0x3f));
        push(0x80 | (code >> 6 & 0x3f));
    }
    push(0x80 | (code & 0x3f));
}

// Recursive descent. `at_` never passes `text_.size()`; peek() gives 0 there, which no rule accepts.
class Parser {
  public:
    explicit Parser(std::string_view text) : text_(text) {}

    Document run() {
        value(0);
        skip_space();
        if (at_ != text_.size()) fail("something follows the value");
        return std::move(document_);
    }

  private:
    [[noreturn]] void fail(const char *what) const {
        throw Error(RD_ERROR_FORMAT, "wrong JSON at byte " + std::to_string(at_) + ": " + what);
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool accept(char wanted) {
        if (at_ == text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }

    void skip_space() {
        while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') ++at_;
    }

    std::uint32_t add(Kind kind) {
        if (document_.nodes.size() == kMaxValues) fail("too many values");
        const auto index = static_cast<std::uint32_t>(document_.nodes.size());
        document_.nodes.push_back({kind, false, index + 1, 0, 0, 0.0, 0});
        return index;
    }

    void value(int depth) {
        skip_space();
        switch (peek()) {
            case '{':
                return container(Kind::object, '}', depth + 1);
            case '[':
                return container(Kind::array, ']', depth + 1);
            case '"':
                return string();
            case 't':
                return word("true", Kind::boolean, true);
            case 'f':
                return word("false", Kind::boolean, false);
            case 'n':
                return word("null", Kind::null, false);
            default:
                return number();
        }
    }

    void word(std::string_view wanted, Kind kind, bool truth) {
        if (text_.substr(at_, wanted.size()) != wanted) fail("expected a value");
        at_ += wanted.size();
        document_.nodes[add(kind)].truth = truth;
    }

    void container(Kind kind, char close, int depth) {
        if (depth > kMaxDepth) fail("nested too deeply");
        const std::uint32_t index = add(kind);
        ++at_;
        skip_space();
        if (!accept(close)) {
            do {
                if (kind == Kind::object) key();
                value(depth);
                skip_space();
            } while (accept(','));
            if (!accept(close)) fail(kind == Kind::object ? "expected ',' or '}'" : "expected ',' or ']'");
        }
        document_.nodes[index].end = static_cast<std::uint32_t>(document_.nodes.size());
        if (kind == Kind::object) refuse_duplicates(index);
    }

    void key() {
        skip_space();
        if (peek() != '"') fail("expected a key in quotes");
        string();
        skip_space();
        if (!accept(':')) fail("expected ':'");
    }

    void refuse_duplicates(std::uint32_t index) const {
        std::vector<std::string_view> keys;
        for (const auto &member : Value(document_, index).members()) keys.push_back(member.first);
        std::sort(keys.begin(), keys.end());
        if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) fail("a key stands twice in an object");
    }

    void number() {
        const std::size_t start = at_;
        accept('-');
        if (!accept('0')) digits();
        bool whole = true;
        if (accept('.')) {
            whole = false;
            digits();
        }
        if (accept('e') || accept('E')) {
            whole = false;
            if (!accept('+')) accept('-');
            digits();
        }
        Node &node = document_.nodes[add(Kind::number)];
        const char *first = text_.data() + start, *last = text_.data() + at_;
        if (std::from_chars(first, last, node.number).ec != std::errc()) fail("a number is out of range");
        node.truth = whole && std::from_chars(first, last, node.whole).ec == std::errc();
    }

    void digits() {
        if (!is_digit(peek())) fail("expected a value");
        while (is_digit(peek())) ++at_;
    }

    void string() {
        std::string &strings = document_.strings;
        const std::uint32_t index = add(Kind::string);
        const std::size_t start = strings.size();
        ++at_;
        while (!accept('"')) {
            if (at_ == text_.size()) fail("a string does not end");
            const auto byte = static_cast<unsigned char>(text_[at_]);
            if (byte < 0x20) fail("a control character in a string");
            if (byte == '\\') {
                escape();
            } else {
                const std::size_t bytes = character_bytes();
                strings.append(text_, at_, bytes);
                at_ += bytes;
            }
        }
        Node &node = document_.nodes[index];
        node.offset = static_cast<std::uint32_t>(start);
        node.length = static_cast<std::uint32_t>(strings.size() - start);
    }

    // Bytes of the UTF-8 character at `at_`: Unicode 15, table 3-7 (no surrogates, nothing overlong).
    std::size_t character_bytes() const {
        const auto byte = [this](std::size_t i) -> unsigned {
            return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0u;
        };
        const unsigned first = byte(0);
        if (first < 0x80) return 1;
        const std::size_t bytes = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
        const unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
        const unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
        bool valid = first >= 0xc2 && first <= 0xf4 && byte(1) >= low && byte(1) <= high;
        for (std::size_t i = 2; i < bytes; ++i) valid = valid && byte(i) >= 0x80 && byte(i) <= 0xbf;
        if (!valid) fail("not UTF-8");
        return bytes;
    }

    void escape() {
        constexpr std::string_view codes = "\"\\/bfnrt", characters = "\"\\/\b\f\n\r\t";
        ++at_;
        if (accept('u')) return append_utf8(document_.strings, unicode());
        const std::size_t which = at_ < text_.size() ? codes.find(text_[at_]) : std::string_view::npos;
        if (which == std::string_view::npos) fail("an unknown escape in a string");
        document_.strings.push_back(characters[which]);
        ++at_;
    }

    // What follows `\u`, with the second half of a surrogate pair.
    std::uint32_t unicode() {
        const std::uint32_t code = hex4();
        if (code < 0xd800 || code > 0xdfff) return code;
        if (code > 0xdbff || !accept('\\') || !accept('u')) fail("half a surrogate pair");
        const std::uint32_t second = hex4();
        if (second < 0xdc00 || second > 0xdfff) fail("half a surrogate pair");
        return 0x10000 + ((code - 0xd800) << 10) + (second - 0xdc00);
    }

    std::uint32_t hex4() {
        const std::string_view four = text_.substr(at_, 4);
        std::uint32_t code = 0;
        const auto result = std::from_chars(four.data(), four.data() + four.size(), code, 16);
        if (four.size() != 4 || result.ptr != four.data() + 4) fail("an escape \\u needs four hexadecimal digits");
        at_ += 4;
        return code;
    }

    std::string_view text_;
    std::size_t at_ = 0;
    Document document_;
};

}  // namespace

Document parse(std::string_view text) {
    if (text.size() > std::numeric_limits<std::uint32_t>::max()) throw Error(RD_ERROR_FORMAT, "JSON of 4 GiB or more");
    return Parser(text).run();
}

std::optional<std::int64_t> Value::whole() const {
    if (kind() != Kind::number || !node().truth) return std::nullopt;
    return node().whole;
}

std::string_view Value::text() const {
    return std::string_view(document_->strings).substr(node().offset, node().length);
}

std::vector<Value> Value::items() const {
    std::vector<Value> found;
    for (std::uint32_t at = index_ + 1; at < node().end; at = document_->nodes[at].end) {
        found.emplace_back(*document_, at);
    }
    return found;
}

std::vector<std::pair<std::string_view, Value>> Value::members() const {
    std::vector<std::pair<std::string_view, Value>> found;
    for (std::uint32_t at = index_ + 1; at < node().end; at = document_->nodes[at + 1].end) {
        found.emplace_back(Value(*document_, at).text(), Value(*document_, at + 1));
    }
    return found;
}

}  // namespace rd::json
