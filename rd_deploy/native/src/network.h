// A network as it stands in a .rdp file: validated, with pointers to its weights in the mapped file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "rd.h"

namespace rd {

enum class Precision : std::uint8_t { fp32, bf16 };

inline std::size_t element_bytes(Precision precision) { return precision == Precision::fp32 ? 4 : 2; }

// Channels of a map in memory, and outputs of a packed weight: whole vectors of 16. What is added is zero.
constexpr int kLane = 16;
inline int padded(int channels) { return (channels + kLane - 1) / kLane * kLane; }

enum class StepKind : std::uint8_t { conv, max_pool, average_pool, linear };

constexpr int kImages = -1;  // the source that is the caller's images
constexpr int kNothing = -2;

// One step of the chain (rd_deploy/chain.py). `source` and `add` are indices of earlier steps.
//
// Packed weights, `blocks` = padded(out_channels) / 16 blocks of 16 outputs, missing outputs and inputs zero:
//   fp32: [block][tap][k_pitch][16 outputs]      bf16: [block][tap][k_pitch / 2][16 outputs][2 k]
// A convolution of a feature map has kernel_h * kernel_w taps (row by row) of k = k_pitch = padded(in_channels).
// A convolution of the images has kernel_h taps of k = kernel_w * in_channels values, as they lie in a row of an
// interleaved image, k_pitch = k rounded up to 32. A linear layer is one tap of k = k_pitch = padded(in_channels).
// The bias is float32, padded(out_channels) long.
struct Step {
    StepKind kind = StepKind::conv;
    std::string name;
    int source = kImages;
    int add = kNothing;
    int in_channels = 0, out_channels = 0;
    int kernel_h = 1, kernel_w = 1, stride = 1, padding = 0;
    bool relu = false;
    int taps = 0, k = 0, k_pitch = 0;
    const std::byte *weight = nullptr;  // 64-byte aligned
    const float *bias = nullptr;        // 64-byte aligned

    int blocks() const { return padded(out_channels) / kLane; }
    std::size_t block_bytes(Precision precision) const {
        return static_cast<std::size_t>(taps) * k_pitch * kLane * element_bytes(precision);
    }
};

struct Network {
    std::string name, json;
    Precision precision = Precision::fp32;
    int channels = 0, height = 0, width = 0;
    std::vector<Step> steps;  // topological; the last one is the linear layer that gives the logits
    std::vector<std::string> classes;
    rd_preprocessing preprocessing{};
    std::uint64_t weight_bytes = 0;
    std::shared_ptr<const void> storage;  // keeps the mapped file alive
};

// Both raise rd::Error with RD_ERROR_FILE, RD_ERROR_FORMAT, RD_ERROR_UNSUPPORTED or RD_ERROR_MEMORY.
std::shared_ptr<const Network> load_network(const char *path);
std::shared_ptr<const Network> parse_network(const void *data, std::size_t bytes, std::shared_ptr<const void> storage);

}  // namespace rd
