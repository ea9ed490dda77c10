// AVX-512 with BF16: one instruction multiplies 32 pairs of bfloat16 and adds them into 16 floats.
#include <immintrin.h>

#define RD_ISA_NAME "avx512_bf16"
#define RD_VECTOR_BYTES 64
// 28 accumulators, 2 weights, 1 broadcast of 32 registers.
#define RD_TILE_PIXELS 14
#define RD_TILE_BLOCKS 2
#define RD_DOT_BF16(sum, a, w) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(w))
#define RD_TO_BF16(to, x) store(to, _mm512_cvtneps_pbh(x))
#include "generic.h"

namespace rd {
const Kernels *avx512_bf16_kernels(bool bf16) { return bf16 ? &kBf16 : nullptr; }
}  // namespace rd
