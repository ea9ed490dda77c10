// AVX-512 without BF16: bfloat16 is widened to float32 before it is multiplied.
#include <immintrin.h>

#define RD_ISA_NAME "avx512"
#define RD_VECTOR_BYTES 64
// 28 accumulators, 2 weights, 1 broadcast of 32 registers.
#define RD_TILE_PIXELS 14
#define RD_TILE_BLOCKS 2
#define RD_MULTIPLY_ADD(a, w, sum) _mm512_fmadd_ps(a, w, sum)
#include "generic.h"

namespace rd {
const Kernels *avx512_kernels(bool bf16) { return bf16 ? &kBf16 : &kFp32; }
}  // namespace rd
