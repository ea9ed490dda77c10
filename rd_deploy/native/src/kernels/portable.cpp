// Whatever vectors the compiler's default target has: SSE2 on x86-64, NEON on Arm.
#define RD_ISA_NAME "portable"
#define RD_VECTOR_BYTES 16
// A block of 16 outputs is four registers: 24 accumulators, 4 weights, 1 broadcast of 32, or 8, 4 and 1 of 16.
#if defined(__aarch64__)
#include <arm_neon.h>
#define RD_MULTIPLY_ADD(a, w, sum) ((Floats)vfmaq_f32((float32x4_t)(sum), (float32x4_t)(a), (float32x4_t)(w)))
#define RD_TILE_PIXELS 6
#else
#define RD_TILE_PIXELS 2
#endif
#define RD_TILE_BLOCKS 1
#include "generic.h"

namespace rd {
const Kernels *portable_kernels(bool bf16) { return bf16 ? &kBf16 : &kFp32; }
}  // namespace rd
