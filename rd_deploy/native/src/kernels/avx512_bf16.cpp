// AVX-512 with BF16: one instruction multiplies 32 pairs of bfloat16 and adds them into 16 floats.
#include <immintrin.h>

#define RD_ISA_NAME "avx512_bf16"
#define RD_VECTOR_BYTES 64
// 28 accumulators, 2 weights, 1 broadcast of 32 registers.
#define RD_TILE_PIXELS 14
#define RD_TILE_BLOCKS 2
#define RD_DOT_BF16(sum, a, w) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(w))
#define RD_TO_BF16(to, x) store(to, _mm512_cvtneps_pbh(x))
#define RD_TO_BF16_TWICE(to, first, second) store(to, _mm512_cvtne2ps_pbh(second, first))
#define RD_PAIRS_TO_BF16(to, even, odd) store(to, interleaved((__m512i)_mm512_cvtne2ps_pbh(odd, even)))

// Elements 0, 16, 1, 17, ... of 32 halves.
static inline __m512i interleaved(__m512i halves) {
    static const unsigned short order[32]
        __attribute__((aligned(64))) = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}

#include "generic.h"

namespace rd {
const Kernels *avx512_bf16_kernels(bool bf16) { return bf16 ? &kBf16 : nullptr; }
}  // namespace rd
