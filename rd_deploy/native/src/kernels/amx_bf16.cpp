// AMX on bfloat16: products of 16 x 32 by 32 x 16 elements.
#include "tiles.h"

namespace rd {
namespace {

struct Plain {
    static constexpr int fetches = 2;  // per step of k: spread over its products

    template <int Blocks>
    static RD_INLINE void finish(const Ending &ending, Floats (&sums)[1][Blocks]) {
        rd::finish<Bf16, 1, Blocks>(ending, sums);
    }

// Of 32 k, or of those that are left: of a pixel so many bytes from `at` on. Tiles go by literals, hence a macro.
#define RD_PRODUCTS(pixels, weights, at, bytes)    \
    _tile_loadd(weights, w, kRowBytes);            \
    _tile_loadd(pixels, upper + (at), step);       \
    _tile_dpbf16ps(RD_UPPER, pixels, weights);     \
    fetching.step();                               \
    if constexpr (Lower) {                         \
        _tile_loadd(pixels, lower + (at), step);   \
        _tile_dpbf16ps(RD_LOWER, pixels, weights); \
    }                                              \
    writing.step();                                \
    fetching.step();                               \
    w += kRows * (bytes)

    template <bool Lower>
    static RD_INLINE void multiply(const Product &p, int group, const char *w, Writing &writing, Fetching &fetching) {
        const int last = p.k_pitch % kDepth, whole = p.k_pitch / kDepth * kRowBytes;
        const ptrdiff_t step = p.step;
        for (int t = 0; t < p.taps; t++) {
            const void *const *const listed = p.a + static_cast<size_t>(t) * p.a_pitch + group;
            const char *const upper = static_cast<const char *>(listed[0]);
            const char *const lower = Lower ? static_cast<const char *>(listed[1]) : nullptr;
            for (int byte = 0; byte < whole; byte += kRowBytes) {
                RD_PRODUCTS(RD_PIXELS, RD_WEIGHTS, byte, kRowBytes);
            }
            if (last > 0) {
                _tile_zero(RD_PIXELS);
                _tile_zero(RD_WEIGHTS);
                RD_PRODUCTS(RD_LAST_PIXELS, RD_LAST_WEIGHTS, whole, 2 * last);
                _tile_zero(RD_LAST_PIXELS);
                _tile_zero(RD_LAST_WEIGHTS);
            }
        }
    }
};

constexpr Kernels kBf16Tiles = {"amx_bf16",     true,          2 * kRows,        kRows, {},  tiled_product<Plain>,
                                max_pool<Bf16>, average<Bf16>, interleave<Bf16>, begin, end, nullptr,
                                nullptr};

}  // namespace

const Kernels *amx_bf16_kernels(bool bf16) { return bf16 ? &kBf16Tiles : nullptr; }

}  // namespace rd
