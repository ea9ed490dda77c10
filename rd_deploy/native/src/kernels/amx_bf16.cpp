// AMX: products of 16 x 32 by 32 x 16 bfloat16 tiles, 1024 floating-point operations a cycle.
//
// Everything but the products is AVX-512's, and there is no Winograd: its transforms would take longer than the products
// that they save. A tile's rows are pixels; a list of 16 pixels at a constant distance, as most are, is read in place,
// any other is copied to 1 KiB of scratch first. RD_EMULATE_TILES replaces the tile instructions by plain code, so that
// this file can be tested on any machine.
#if defined(RD_EMULATE_TILES)
#include "tiles_emulated.h"
#else
#include <immintrin.h>
#define RD_DOT_BF16(sum, a, w) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(w))
#define RD_TO_BF16(to, x) store(to, _mm512_cvtneps_pbh(x))
#endif

#define RD_ISA_NAME "amx_bf16"
#define RD_VECTOR_BYTES 64
#define RD_TILE_PIXELS 32
#define RD_TILE_BLOCKS 2
#include "generic.h"

namespace rd {
namespace {

constexpr int kRows = 16;        // of a tile: pixels of a, pairs of k of w
constexpr int kDepth = 32;       // elements of k in a tile
constexpr int kTileBytes = 1024;

struct alignas(64) TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

void begin() {
    TileConfiguration configuration{};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        configuration.row_bytes[tile] = 64;
        configuration.rows[tile] = kRows;
    }
    // GCC 12 believes that the instruction reads 8 bytes only, and would drop the other stores.
    asm volatile("" ::"r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
}

void end() { _tile_release(); }

// Taps must be whole tiles deep. Elements beyond k meet zero weights.
bool supports(const Product &p) { return p.k_pitch % kDepth == 0; }

// The bytes from each pixel to the next when they are the same for 16 pixels, else -1.
RD_INLINE ptrdiff_t distance(const char *const *pixels) {
    const ptrdiff_t first = pixels[1] - pixels[0];
    bool same = true;
    for (int i = 2; i < kRows; i++) same = same && pixels[i] - pixels[i - 1] == first;
    return same && first >= 0 ? first : -1;
}

// 16 pixels of one tap, ready to be read as tiles.
struct Rows {
    const char *const *pixels;
    ptrdiff_t step;
};

// Where the tile of these rows' elements from `byte` on can be loaded from.
struct Place {
    const char *first;
    ptrdiff_t step;
};
RD_INLINE Place place(const Rows &rows, int byte, char *scratch) {
    if (rows.step >= 0) return {rows.pixels[0] + byte, rows.step};
    for (int i = 0; i < kRows; i++) memcpy(scratch + i * 64, rows.pixels[i] + byte, 64);
    return {scratch, 64};
}

// Bias, addition and ReLU for the pixels of one product of 32 x (16 * Blocks), which stands in `sums` tile by tile.
template <int Blocks> RD_INLINE void finish_tiles(const Product &p, const float *sums, int pixel, int pixels, int block) {
    for (int i = 0; i < pixels; i++) {
        RD_UNROLL
        for (int j = 0; j < Blocks; j++) {
            const int n = p.offset + (block + j) * 16;
            Floats x = load<Floats>(sums + ((i / kRows) * Blocks + j) * 256 + (i % kRows) * 16);
            if (p.bias) x += load<Floats>(p.bias + (block + j) * 16);
            if (p.add) x += Bf16::read(static_cast<const char *>(p.add[pixel + i]) + n * 2);
            if (p.relu) x = positive(x);
            if (p.raw)
                store(static_cast<float *>(p.out[pixel + i]) + n, x);
            else
                Bf16::write(static_cast<char *>(p.out[pixel + i]) + n * 2, x);
        }
    }
}

// Two tiles of pixels by one or two of outputs: sums in tiles 0 to 3, pixels in 4 and 5, weights in 6 and 7.
template <int Blocks> void tile_product(const Product &p, int pixel, int pixels, int block) {
    alignas(64) char scratch[2][kTileBytes];
    alignas(64) float sums[2 * Blocks * 256];
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (Blocks == 2) {
        _tile_zero(1);
        _tile_zero(3);
    }
    const char *w = static_cast<const char *>(p.w) + block * p.w_block;
    for (int t = 0; t < p.taps; t++) {
        const char *rows[2 * kRows];
        const void *const *const listed = p.a + static_cast<size_t>(t) * p.a_pitch + pixel;
        // A short list goes on with its last pixel, whose sums are computed again and dropped.
        for (int i = 0; i < 2 * kRows; i++) rows[i] = static_cast<const char *>(listed[i < pixels ? i : pixels - 1]);
        const Rows upper{rows, distance(rows)}, lower{rows + kRows, distance(rows + kRows)};
        for (int byte = 0; byte < p.k_pitch * 2; byte += kDepth * 2, w += kTileBytes) {
            // The instructions take a literal for the tile's number.
            const Place first = place(upper, byte, scratch[0]), second = place(lower, byte, scratch[1]);
            _tile_loadd(4, first.first, first.step);
            _tile_loadd(5, second.first, second.step);
            _tile_loadd(6, w, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Blocks == 2) {
                _tile_loadd(7, w + p.w_block, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + Blocks * 256, 64);
    if constexpr (Blocks == 2) {
        _tile_stored(1, sums + 256, 64);
        _tile_stored(3, sums + 768, 64);
    }
    finish_tiles<Blocks>(p, sums, pixel, pixels, block);
}

void tiled_product(const Product &p) {
    for (int block = 0; block < p.blocks; block += 2) {
        for (int pixel = 0; pixel < p.pixels; pixel += 2 * kRows) {
            const int pixels = p.pixels - pixel < 2 * kRows ? p.pixels - pixel : 2 * kRows;
            if (block + 2 <= p.blocks)
                tile_product<2>(p, pixel, pixels, block);
            else
                tile_product<1>(p, pixel, pixels, block);
        }
    }
}

constexpr Kernels kTiles = {
    RD_ISA_NAME, true, 2 * kRows, {}, supports, tiled_product, max_pool<Bf16>, average<Bf16>, interleave<Bf16>, begin, end};

}  // namespace

const Kernels *amx_bf16_kernels(bool bf16) { return bf16 ? &kTiles : nullptr; }

}  // namespace rd
