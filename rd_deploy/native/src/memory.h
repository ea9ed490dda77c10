// Where each buffer of a run lies in the one arena.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace rd {

constexpr std::size_t kAlignment = 64;
inline std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// A buffer that is needed from step `first` to step `last`, both included.
struct Buffer {
    std::string name;
    std::size_t bytes = 0;
    int first = 0, last = 0;
    bool scratch = false;
    std::size_t offset = 0;  // set by `place`
};

// Give every buffer an offset so that no two that live at the same step overlap; returns the arena's bytes.
// Largest first, each at the lowest place that is free throughout its life (Pisarchyk & Lee 2020, "greedy by size");
// while that wastes memory, again with what lay topmost placed first.
std::size_t place(std::vector<Buffer> &buffers);

// Sizes of what lives at one step.
struct Live {
    std::size_t maps = 0, scratch = 0;
};
Live live_at(const std::vector<Buffer> &buffers, int step);

// One line to stderr for each new maximum of the live set, in the order of the steps: what lives, and how large it is.
void trace_maxima(const std::vector<Buffer> &buffers, const std::vector<std::string> &steps, std::size_t arena);

}  // namespace rd
