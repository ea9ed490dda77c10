// How fast this machine multiplies and reads: the limits that a step's time is judged by.
#pragma once

#include <cstddef>

namespace rd {

// Floating-point operations per second, 2 per multiply-accumulate, of the product of an instruction set (null: as for a
// plan) on operands in the L1 cache, `threads` threads at once.
double measure_product(const char *isa, bool bf16, int threads);

// Bytes per second that `threads` threads read at once, each over and over its own share of `bytes`.
double measure_read(std::size_t bytes, int threads);

}  // namespace rd
