// AVX2 with FMA.
#include <immintrin.h>

#define RD_ISA_NAME "avx2"
#define RD_VECTOR_BYTES 32
// A block of 16 outputs is two registers: 12 accumulators, 2 weights, 1 broadcast of 16.
#define RD_TILE_PIXELS 6
#define RD_TILE_BLOCKS 1
#define RD_STEPS_UNROLLED 4
#define RD_FETCH_NEXT
#define RD_MULTIPLY_ADD(a, w, sum) _mm256_fmadd_ps(a, w, sum)
#include "generic.h"

namespace rd {
const Kernels *avx2_kernels(bool bf16) { return bf16 ? &kBf16 : &kFp32; }
}  // namespace rd
