#include "rdp.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "error.h"

namespace rd::rdp {
namespace {

constexpr std::size_t kHeaderWords = sizeof(Header) / 8;
constexpr std::size_t kLanes = 1024;  // rows that are long enough for NumPy and lie in the first-level cache
constexpr std::uint64_t kFactor = 0x9e3779b97f4a7c15;
constexpr std::uint64_t kMaxJsonBytes = std::uint64_t{256} << 20;

using Lanes = std::array<std::uint64_t, kLanes>;

// Invertible in `state` and in `word`, so that no change of a single word is lost.
inline std::uint64_t absorb(std::uint64_t state, std::uint64_t word) {
    state = (state ^ word) * kFactor;
    return state ^ (state >> 32);
}

void absorb_words(Lanes &lanes, std::size_t first_lane, const std::byte *words, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        lanes[first_lane + i] = absorb(lanes[first_lane + i], load64(words + 8 * i));
    }
}

std::size_t round_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

[[noreturn]] void refuse(const std::string &what) { throw Error(RD_ERROR_FORMAT, what); }

void check_machine(const std::byte *data) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    throw Error(RD_ERROR_UNSUPPORTED, "this machine is big-endian; .rdp files are little-endian and read in place");
#endif
    if (reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) {
        throw Error(RD_ERROR_ARGUMENT, "a .rdp file in memory must be 64-byte aligned");
    }
}

void check_header(const Header &header, std::size_t bytes) {
    if (header.version != kVersion) {
        refuse("the .rdp file is of version " + std::to_string(header.version) + ", this library reads version " +
               std::to_string(kVersion) + "; export it again with the rd-export of this version");
    }
    if (header.file_bytes != bytes) {
        refuse("the .rdp file has " + std::to_string(bytes) + " bytes, its header says " +
               std::to_string(header.file_bytes) + ": it is truncated or damaged; copy or export it again");
    }
    if (header.json_bytes > kMaxJsonBytes) {
        refuse("the .rdp file's description has " + std::to_string(header.json_bytes) + " bytes, more than 256 MiB");
    }
    // json_bytes is small now, so that no sum below can overflow.
    const std::uint64_t weights_offset = round_up(sizeof(Header) + header.json_bytes);
    if (header.reserved != 0 || header.json_offset != sizeof(Header) || header.weights_offset != weights_offset ||
        weights_offset > bytes || header.weights_bytes != bytes - weights_offset || bytes % kAlignment != 0) {
        refuse("the .rdp file is damaged: the sections in its header do not fit; copy or export it again");
    }
}

}  // namespace

std::uint64_t checksum(const std::byte *data, std::size_t bytes) {
    Lanes lanes;
    for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = i;
    Header header;
    std::memcpy(&header, data, sizeof header);
    header.checksum = 0;
    absorb_words(lanes, 0, reinterpret_cast<const std::byte *>(&header), kHeaderWords);

    const std::size_t words = bytes / 8;
    absorb_words(lanes, kHeaderWords, data + sizeof header, std::min(words, kLanes) - kHeaderWords);
    for (std::size_t at = kLanes; at < words; at += kLanes) {
        absorb_words(lanes, 0, data + 8 * at, std::min(words - at, kLanes));
    }
    std::uint64_t sum = 0;
    for (const std::uint64_t lane : lanes) sum = absorb(sum, lane);
    return sum;
}

bool all_finite(const std::byte *values, std::size_t bytes, Precision precision) {
    // An exponent of all ones plus one at its lowest place carries into the sign's place; no other value does.
    const bool wide = precision == Precision::fp32;
    const std::uint64_t exponent = wide ? 0x7f8000007f800000 : 0x7f807f807f807f80;
    const std::uint64_t one = wide ? 0x0080000000800000 : 0x0080008000800080;
    std::uint64_t carries = 0;
    for (std::size_t at = 0; at < bytes; at += 8) carries |= (load64(values + at) & exponent) + one;
    return (carries & (wide ? 0x8000000080000000 : 0x8000800080008000)) == 0;
}

Sections sections(const std::byte *data, std::size_t bytes) {
    check_machine(data);
    Header header;
    if (bytes < sizeof header || std::memcmp(data, kMagic, std::min(bytes, sizeof kMagic)) != 0) {
        refuse("not a .rdp file; make one with rd-export --native");
    }
    std::memcpy(&header, data, sizeof header);
    check_header(header, bytes);
    if (checksum(data, bytes) != header.checksum) {
        refuse("the .rdp file is damaged: its checksum does not match; copy or export it again");
    }
    const std::byte *gap = data + sizeof header + header.json_bytes;
    if (std::any_of(gap, data + header.weights_offset, [](std::byte b) { return b != std::byte{0}; })) {
        refuse("the .rdp file is wrong: something stands between its description and its weights; export it again");
    }
    const char *json = reinterpret_cast<const char *>(data + sizeof header);
    return {{json, header.json_bytes}, data + header.weights_offset, header.weights_bytes};
}

}  // namespace rd::rdp
