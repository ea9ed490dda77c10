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

    template <bool Lower>
    static RD_INLINE void multiply(const Product &p, int group, const char *w, Writing &writing, Fetching &fetching) {
        const int last = p.k_pitch % kDepth, whole = p.k_pitch / kDepth * kRowBytes;
        const ptrdiff_t step = p.step;
        for (int t = 0; t < p.taps; t++) {
            const void *const *const listed = p.a + static_cast<size_t>(t) * p.a_pitch + group;
            const char *const upper = static_cast<const char *>(listed[0]);
            const char *const lower = Lower ? static_cast<const char *>(listed[1]) : nullptr;
            for (int byte = 0; byte < whole; byte += kRowBytes, w += kTileBytes) {
                _tile_loadd(RD_WEIGHTS, w, kRowBytes);
                _tile_loadd(RD_PIXELS, upper + byte, step);
                _tile_dpbf16ps(RD_UPPER, RD_PIXELS, RD_WEIGHTS);
                fetching.step();
                if constexpr (Lower) {
                    _tile_loadd(RD_PIXELS, lower + byte, step);
                    _tile_dpbf16ps(RD_LOWER, RD_PIXELS, RD_WEIGHTS);
                }
                writing.step();
                fetching.step();
            }
            if (last > 0) {
                _tile_zero(RD_PIXELS);
                _tile_zero(RD_WEIGHTS);
                _tile_loadd(RD_LAST_WEIGHTS, w, kRowBytes);
                _tile_loadd(RD_LAST_PIXELS, upper + whole, step);
                _tile_dpbf16ps(RD_UPPER, RD_LAST_PIXELS, RD_LAST_WEIGHTS);
                fetching.step();
                if constexpr (Lower) {
                    _tile_loadd(RD_LAST_PIXELS, lower + whole, step);
                    _tile_dpbf16ps(RD_LOWER, RD_LAST_PIXELS, RD_LAST_WEIGHTS);
                }
                _tile_zero(RD_LAST_PIXELS);
                _tile_zero(RD_LAST_WEIGHTS);
                writing.step();
                fetching.step();
                w += last * 32;
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
