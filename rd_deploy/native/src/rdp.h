// The container of a .rdp file: header, JSON, weights, checksum. docs/rdp.md is its specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "network.h"

namespace rd::rdp {

constexpr std::size_t kAlignment = 64;
constexpr std::uint32_t kVersion = 1;
constexpr unsigned char kMagic[8] = {0x89, 'R', 'D', 'P', '\r', '\n', 0x1a, '\n'};

struct Header {  // as it lies in the file, little-endian
    unsigned char magic[8];
    std::uint32_t version, reserved;
    std::uint64_t json_offset, json_bytes, weights_offset, weights_bytes, file_bytes, checksum;
};
static_assert(sizeof(Header) == kAlignment, "the header has no gaps");

struct Sections {
    std::string_view json;
    const std::byte *weights;
    std::size_t weights_bytes;
};

// The sections of a file whose header, sizes and checksum are right; rd::Error for any other. `data`: 64-byte aligned.
Sections sections(const std::byte *data, std::size_t bytes);

// Of `bytes` (a multiple of 8, at least one header) that start with a header, whose checksum field counts as zero.
std::uint64_t checksum(const std::byte *data, std::size_t bytes);

// Whether none of the values is NaN or infinite. `bytes`: a multiple of 8.
bool all_finite(const std::byte *values, std::size_t bytes, Precision precision);

inline std::uint64_t load64(const std::byte *from) {
    std::uint64_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return word;
}

}  // namespace rd::rdp
