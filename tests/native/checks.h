// What the C++ tests share: checks that say what failed, seeded random numbers, exactly sized memory, elements of maps.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace test {

// What a check is about, printed when it fails: the seed and the parameters of a case.
inline thread_local char current[512] = "";

__attribute__((format(printf, 1, 2))) inline void describe(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(current, sizeof current, format, arguments);
    va_end(arguments);
}

[[noreturn]] inline void failed(const char *file, int line, const char *what) {
    std::fprintf(stderr, "%s:%d: %s does not hold%s%s\n", file, line, what, *current ? " for " : "", current);
    std::abort();
}

#define CHECK(holds) ((holds) ? void() : test::failed(__FILE__, __LINE__, #holds))

// SplitMix64 (Steele, Lea & Flood 2014): the same numbers with every compiler and standard library.
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int below(int limit) { return static_cast<int>(next() % static_cast<std::uint64_t>(limit)); }
    int between(int least, int most) { return least + below(most - least + 1); }
    bool flip() { return below(2) == 1; }
    float value() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1; }  // from -1 to 1
    template <class T, std::size_t N>
    T any(const T (&choices)[N]) {
        return choices[below(static_cast<int>(N))];
    }

  private:
    std::uint64_t state_;
};

// 64-byte aligned and no longer than asked for, so that a sanitizer sees the first element beyond it.
template <class T>
class Array {
  public:
    explicit Array(std::size_t size = 0, T value = T())
        : size_(size), memory_(static_cast<T *>(::operator new(size * sizeof(T), kAligned))) {
        for (std::size_t i = 0; i < size; i++) memory_.get()[i] = value;
    }

    T *data() const { return memory_.get(); }
    std::size_t size() const { return size_; }
    T &operator[](std::size_t i) const { return memory_.get()[i]; }

  private:
    static constexpr std::align_val_t kAligned{64};
    struct Freed {
        void operator()(T *memory) const { ::operator delete(memory, kAligned); }
    };
    std::size_t size_;
    std::unique_ptr<T, Freed> memory_;
};

// To nearest, ties to even; for finite values.
inline std::uint16_t to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t half = 0x8000, rest = bits & 0xffff;
    bits >>= 16;
    if (rest > half || (rest == half && (bits & 1) != 0)) bits++;
    return static_cast<std::uint16_t>(bits);
}

inline float from_bf16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A number as two bfloat16: itself rounded, and the rest rounded. Both are NaN where the first is not finite.
inline float upper_part(float value) { return from_bf16(to_bf16(value)); }
inline float lower_part(float value) { return from_bf16(to_bf16(value - upper_part(value))); }

enum class Format { fp32, bf16, bf16x2 };

// Elements of maps. In bf16x2 a pixel has `pitch` of them, whose parts lie apart: of each 32 channels 32 upper ones and
// then 32 lower ones, of 16 that are left 16 and 16.
class Elements {
  public:
    Elements(Format format, std::size_t size, std::size_t pitch = 16)
        : format_(format), pitch_(pitch), bytes_(size * width()) {}

    std::size_t width() const { return format_ == Format::bf16 ? 2 : 4; }
    std::size_t size() const { return bytes_.size() / width(); }
    // In bf16x2 of a pixel's first element only.
    std::byte *at(std::size_t i) const { return bytes_.data() + i * width(); }
    void set(std::size_t i, float value) const {  // rounds it
        if (format_ == Format::fp32) {
            std::memcpy(at(i), &value, sizeof value);
            return;
        }
        put(upper(i), value);
        if (format_ == Format::bf16x2) put(lower(i), value - upper_part(value));
    }
    double get(std::size_t i) const {
        if (format_ == Format::fp32) {
            float value;
            std::memcpy(&value, at(i), sizeof value);
            return static_cast<double>(value);
        }
        const double value = part(upper(i));
        return format_ == Format::bf16x2 ? value + part(lower(i)) : value;
    }
    bool is_same(const Elements &other, std::size_t i) const {
        if (format_ == Format::fp32) return std::memcmp(at(i), other.at(i), 4) == 0;
        const bool first = std::memcmp(upper(i), other.upper(i), 2) == 0;
        return first && (format_ == Format::bf16 || std::memcmp(lower(i), other.lower(i), 2) == 0);
    }
    void randomise(Random &random) const {
        for (std::size_t i = 0; i < size(); i++) set(i, random.value());
    }
    void copy(const Elements &other) const { std::memcpy(bytes_.data(), other.bytes_.data(), bytes_.size()); }

  private:
    static void put(std::byte *at, float value) {
        const std::uint16_t half = to_bf16(value);
        std::memcpy(at, &half, sizeof half);
    }
    static double part(const std::byte *at) {
        std::uint16_t half;
        std::memcpy(&half, at, sizeof half);
        return static_cast<double>(from_bf16(half));
    }
    std::byte *upper(std::size_t i) const {
        if (format_ == Format::bf16) return at(i);
        const std::size_t channel = i % pitch_, first = i - channel + channel / 32 * 32;
        return bytes_.data() + first * 4 + channel % 32 * 2;
    }
    std::byte *lower(std::size_t i) const {
        const std::size_t channel = i % pitch_, left = pitch_ - channel / 32 * 32;
        return upper(i) + (left < 32 ? 32 : 64);
    }

    Format format_;
    std::size_t pitch_;
    Array<std::byte> bytes_;
};

}  // namespace test
