// AMX: products of 16 x 32 by 32 x 16 bfloat16 tiles, 1024 floating-point operations a cycle.
//
// Everything but the products is AVX-512's, and there is no Winograd: its transforms would take longer than the
// products that they save. A tile's rows are pixels; a list of 16 pixels at a constant distance, as most are, is read
// in place, any other is copied to 1 KiB of scratch first. RD_EMULATE_TILES replaces the tile instructions by plain
// code, so that this file can be tested on any machine.
#if defined(RD_EMULATE_TILES)
#include "tiles_emulated.h"
#else
#include <immintrin.h>
#define RD_DOT_BF16(sum, a, w) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(w))
#define RD_TO_BF16(to, x) store(to, _mm512_cvtneps_pbh(x))
#define RD_TO_BF16_TWICE(to, first, second) store(to, _mm512_cvtne2ps_pbh(second, first))
#endif

#define RD_ISA_NAME "amx_bf16"
#define RD_VECTOR_BYTES 64
#define RD_TILE_PIXELS 32
#define RD_TILE_BLOCKS 2
#include "generic.h"

namespace rd {
namespace {

constexpr int kRows = 16;   // of a tile: pixels of a, pairs of k of w
constexpr int kDepth = 32;  // elements of k in a tile
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

// GCC takes the tile loads for ones that read no memory: it may move stores past them, or drop them, but for this.
RD_INLINE void keep_order() { asm volatile("" ::: "memory"); }

// 16 pixels of one tap. `step`: the bytes from each to the next when that is always the same, else -1.
struct Rows {
    const void *const *pixels;
    intptr_t step;
};
RD_INLINE Rows rows_of(const void *const *pixels) {
    const auto distance = [pixels](int i) {
        return reinterpret_cast<intptr_t>(pixels[i]) - reinterpret_cast<intptr_t>(pixels[i - 1]);
    };
    const intptr_t first = distance(1);
    intptr_t differences = 0;
    for (int i = 2; i < kRows; i++) differences |= distance(i) ^ first;
    return {pixels, differences == 0 && first >= 0 ? first : -1};
}

// Where the tile of these rows' elements from `byte` on can be loaded from.
struct Place {
    const char *first;
    intptr_t step;
};
RD_INLINE Place place(const Rows &rows, int byte, char *scratch) {
    if (rows.step >= 0) return {static_cast<const char *>(rows.pixels[0]) + byte, rows.step};
    keep_order();
    for (int i = 0; i < kRows; i++) memcpy(scratch + i * 64, static_cast<const char *>(rows.pixels[i]) + byte, 64);
    keep_order();
    return {scratch, 64};
}

// A product of up to 32 pixels and 32 outputs that waits to be written, the bias already added.
struct Sums {
    alignas(64) float values[2 * kRows][2][16];  // of a pixel's one or two blocks
    int pixels, blocks;
    int written;    // pixels that are done
    Ending ending;  // where the first pixel goes
    bool raw;
};

template <int Blocks>
RD_INLINE void write_pixels(const Sums &s, int first, int last) {
    const Ending e = s.ending;
    const bool raw = s.raw;
    for (int i = first; i < last; i++) {
        Floats x[1][Blocks];
        RD_UNROLL
        for (int j = 0; j < Blocks; j++) x[0][j] = load<Floats>(s.values[i][j]);
        const Ending ending{e.add ? e.add + i : nullptr, e.out + i, e.offset, e.relu};
        raw ? finish_raw(ending, x) : finish<Bf16, 1, Blocks>(ending, x);
    }
}

// The next pixels, at most `count`.
RD_INLINE void write_some(Sums &s, int count) {
    const int first = s.written, last = s.pixels - first < count ? s.pixels : first + count;
    s.written = last;
    s.blocks == 2 ? write_pixels<2>(s, first, last) : write_pixels<1>(s, first, last);
}

// Two tiles of pixels by one or two of outputs: sums in tiles 0 to 3, pixels in 4 and 5, weights in 6 and 7. The
// instructions take a literal for the tile's number.
template <int Blocks>
RD_INLINE void begin_sums(const float *bias) {
    if (!bias) {
        _tile_zero(0);
        _tile_zero(2);
        if constexpr (Blocks == 2) {
            _tile_zero(1);
            _tile_zero(3);
        }
        return;
    }
    _tile_loadd(0, bias, 0);  // the same in all rows: they are at no distance
    _tile_loadd(2, bias, 0);
    if constexpr (Blocks == 2) {
        _tile_loadd(1, bias + 16, 0);
        _tile_loadd(3, bias + 16, 0);
    }
}

template <int Blocks>
RD_INLINE void store_sums(Sums &s) {
    constexpr intptr_t step = sizeof s.values[0];
    _tile_stored(0, s.values[0][0], step);
    _tile_stored(2, s.values[kRows][0], step);
    if constexpr (Blocks == 2) {
        _tile_stored(1, s.values[0][1], step);
        _tile_stored(3, s.values[kRows][1], step);
    }
}

// The product of 32 pixels (of fewer where the list ends) and one or two blocks. Meanwhile `before`, the last one, is
// written: tile products and vector instructions run at once, but the processor does not look far enough ahead to find
// that by itself.
template <int Blocks>
void tile_product(const Product &p, int pixel, int block, Sums &now, Sums &before) {
    alignas(64) char scratch[2][kTileBytes];
    begin_sums<Blocks>(p.bias ? p.bias + block * 16 : nullptr);
    const int taps = p.taps, bytes = p.k_pitch * 2, steps = taps * (bytes / 64);
    const int pace = (before.pixels + steps - 1) / steps;
    const size_t w_block = p.w_block;
    const char *w = static_cast<const char *>(p.w) + block * w_block;
    for (int t = 0; t < taps; t++) {
        const void *padded[2 * kRows];
        const void *const *listed = p.a + static_cast<size_t>(t) * p.a_pitch + pixel;
        if (now.pixels < 2 * kRows) {  // go on with the last pixel, whose sums are computed again and dropped
            for (int i = 0; i < 2 * kRows; i++) padded[i] = listed[i < now.pixels ? i : now.pixels - 1];
            listed = padded;
        }
        const Rows upper = rows_of(listed), lower = rows_of(listed + kRows);
        for (int byte = 0; byte < bytes; byte += 64, w += kTileBytes) {
            const Place first = place(upper, byte, scratch[0]), second = place(lower, byte, scratch[1]);
            _tile_loadd(4, first.first, first.step);
            _tile_loadd(5, second.first, second.step);
            _tile_loadd(6, w, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Blocks == 2) {
                _tile_loadd(7, w + w_block, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
            write_some(before, pace);
        }
    }
    store_sums<Blocks>(now);
}

void tiled_product(const Product &p) {
    Sums sums[2];
    for (Sums &s : sums) {  // nothing waits; the values stay as they are
        s.pixels = s.blocks = s.written = 0;
        s.ending = {};
        s.raw = false;
    }
    int turn = 0;
    for (int block = 0; block < p.blocks; block += 2) {
        for (int pixel = 0; pixel < p.pixels; pixel += 2 * kRows) {
            Sums &now = sums[turn], &before = sums[turn = 1 - turn];
            now.pixels = p.pixels - pixel < 2 * kRows ? p.pixels - pixel : 2 * kRows;
            now.blocks = p.blocks - block < 2 ? 1 : 2;
            now.blocks == 2 ? tile_product<2>(p, pixel, block, now, before)
                            : tile_product<1>(p, pixel, block, now, before);
            now.written = 0;
            now.ending = {p.add ? p.add + pixel : nullptr, p.out + pixel, p.offset + block * 16, p.relu};
            now.raw = p.raw;
        }
    }
    write_some(sums[1 - turn], 2 * kRows);
}

constexpr Kernels kTiles = {RD_ISA_NAME,    true,          2 * kRows,        {},    supports, tiled_product,
                            max_pool<Bf16>, average<Bf16>, interleave<Bf16>, begin, end};

}  // namespace

const Kernels *amx_bf16_kernels(bool bf16) { return bf16 ? &kTiles : nullptr; }

}  // namespace rd
