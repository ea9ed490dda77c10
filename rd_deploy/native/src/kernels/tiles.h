// Matrix products on AMX tiles, 1024 floating-point operations a cycle; amx_bf16.cpp and amx_bf16x2.cpp include this.
//
// Everything but the products is vector code, and there is no Winograd: its transforms would take longer than the
// products that they save. A tile's rows are 16 pixels at a constant distance, read in place. RD_EMULATE_TILES replaces
// the tile instructions by plain code, so that these files can be tested on any machine.
//
// Only four or five of the eight tiles are used at a time: two of sums, one or two of pixels and one of weights. Where
// two threads share a core and both are at work, products with eight tiles in use take twice as long as with four, or
// longer; on a core of its own a thread does not notice. docs/engine.md has the figures and our reading of them.
#pragma once

#if defined(RD_EMULATE_TILES)
#include "tiles_emulated.h"
#else
#include <immintrin.h>
#define RD_DOT_BF16(sum, a, w) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(w))
#define RD_POSITIVE(x) _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), x)
#define RD_TO_BF16(to, x) store(to, _mm512_cvtneps_pbh(x))
#define RD_TO_BF16_TWICE(to, first, second) store(to, _mm512_cvtne2ps_pbh(second, first))
#endif

#define RD_ISA_NAME "amx"  // of generic.h's own tables, which are not used
#define RD_VECTOR_BYTES 64
#define RD_TILE_PIXELS 32
#define RD_TILE_BLOCKS 2
#include "generic.h"

namespace rd {
namespace {

constexpr int kRows = 16;      // of a tile: pixels of a, pairs of k of w
constexpr int kRowBytes = 64;  // of a tile: 32 elements of k of a pixel, or a pair of them for each of 16 outputs
constexpr int kDepth = 32;     // elements of k in a tile
constexpr int kTileBytes = kRows * kRowBytes;
// Weights that all pixels meet before the next ones: they stay in the second-level cache meanwhile.
#ifndef RD_GROUP_BYTES
#define RD_GROUP_BYTES (160 << 10)
#endif

// The tiles by number, as the instructions take them: literals.
#define RD_UPPER 0  // sums of 16 pixels
#define RD_LOWER 1  // and of the next 16
#define RD_PIXELS 2
#define RD_WEIGHTS 3
#define RD_LOWER_PIXELS 4  // where both groups' are kept
#define RD_LAST_PIXELS 5   // the same three where a tap ends within a tile
#define RD_LAST_WEIGHTS 6
#define RD_LAST_LOWER_PIXELS 7

struct alignas(64) TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

thread_local int configured = -1;  // the depth of the last tiles of a tap, 0: none

// Taps are as many whole tiles deep as there are, and then `last` elements.
void configure(int last) {
    if (configured == last) return;
    TileConfiguration configuration{};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; tile++) {  // those that are not used as well: they must be zeroed
        configuration.row_bytes[tile] = kRowBytes;
        configuration.rows[tile] = kRows;
    }
    if (last > 0) {
        configuration.row_bytes[RD_LAST_PIXELS] = static_cast<uint16_t>(last * 2);
        configuration.row_bytes[RD_LAST_LOWER_PIXELS] = static_cast<uint16_t>(last * 2);
        configuration.rows[RD_LAST_WEIGHTS] = static_cast<uint8_t>(last / 2);
    }
    // GCC 12 believes that the instruction reads 8 bytes only, and would drop the other stores.
    asm volatile("" ::"r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
    configured = last;
}

// Zeroed tiles do not count as in use, and a thread that was interrupted seems to come back with all its tiles in use.
template <bool Lower>
RD_INLINE void free_tiles(int last) {
    if constexpr (!Lower) _tile_zero(RD_LOWER);
    _tile_zero(RD_LOWER_PIXELS);
    if (last == 0) {
        _tile_zero(RD_LAST_PIXELS);
        _tile_zero(RD_LAST_WEIGHTS);
    }
    _tile_zero(RD_LAST_LOWER_PIXELS);
}

void begin() {
    configured = -1;  // whatever another user of tiles left behind
    configure(0);
}

void end() {
    _tile_release();
    configured = -1;
}

// A product of up to 32 pixels and 32 outputs that waits to be written.
struct Sums {
    alignas(64) float values[2 * kRows][2][16];  // of a pixel's one or two blocks
    int pixels;
    int written;  // pixels that are done
    int blocks;
    const float *bias;
    Ending ending;  // where the first pixel goes
    void (*write)(const Sums &, int first, int last);
};

template <class Form, int Blocks, bool Raw, bool Add, bool Relu>
void write_pixels(const Sums &s, int first, int last) {
    const Ending e = s.ending;
    Floats bias[Blocks];
    RD_UNROLL
    for (int j = 0; j < Blocks; j++) bias[j] = s.bias ? load<Floats>(s.bias + j * 16) : Floats{};
    for (int i = first; i < last; i++) {
        Floats x[1][Blocks];
        RD_UNROLL
        for (int j = 0; j < Blocks; j++) x[0][j] = load<Floats>(s.values[i][j]) + bias[j];
        const Ending ending{
            Add ? e.add + i : nullptr, e.out + i, e.offset, e.out_pitch, e.add_offset, e.add_pitch, Relu};
        if constexpr (Raw)
            finish_raw(ending, x);
        else
            Form::finish(ending, x);
    }
}

template <class Form, int Blocks>
auto writer(const Product &p) {
    if (p.raw) return write_pixels<Form, Blocks, true, false, false>;
    if (p.add)
        return p.relu ? write_pixels<Form, Blocks, false, true, true> : write_pixels<Form, Blocks, false, true, false>;
    return p.relu ? write_pixels<Form, Blocks, false, false, true> : write_pixels<Form, Blocks, false, false, false>;
}

// Writes some pixels of the sums that wait, every so many steps of the product that is computed meanwhile.
struct Writing {
    Sums &sums;
    int every, most;  // steps, and pixels at a time
    int steps = 0;

    // Spread over so many steps.
    Writing(Sums &before, int total) : sums(before) {
        constexpr int most_times = 4;  // each takes time to begin
        every = total > most_times ? total / most_times : 1;
        const int times = total / every;
        most = (before.pixels + times - 1) / times;
    }
    RD_INLINE void step() {
        if (++steps < every) return;
        steps = 0;
        some(most);
    }
    RD_INLINE void some(int count) {
        const int first = sums.written, last = sums.pixels - first < count ? sums.pixels : first + count;
        if (first == last) return;
        sums.written = last;
        sums.write(sums, first, last);
    }
};

// Weights are asked for before they are needed: tiles' loads are too few at once to keep a memory busy. While all
// pixels meet some blocks, the next ones, which may be another product's, are fetched, spread over that time.
struct Fetching {
    const char *at = nullptr, *end = nullptr;
    int lines = 0;  // per step

    // What comes after the blocks from `first` to `last`, which take so many steps.
    Fetching(const Product &p, int first, int last, int64_t steps) {
        const char *const own = static_cast<const char *>(p.w);
        const bool ends = last == p.blocks;
        if (ends && !p.next) return;
        const int following = last - first < p.blocks - last ? last - first : p.blocks - last;
        const size_t bytes = static_cast<size_t>(ends ? last - first : following) * p.w_block;
        at = ends ? static_cast<const char *>(p.next) : own + last * p.w_block;
        end = at + bytes;
        lines = static_cast<int>((static_cast<int64_t>(bytes / 64) + steps - 1) / steps);
    }
    RD_INLINE void step() {
        if (at >= end) return;
        for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// One or two groups of pixels by a block of outputs, whose sums go to `sums`; Form says how. Meanwhile the last ones
// that are complete are written: tile products and vector instructions run at once, but the processor does not look far
// enough ahead to find that by itself.
template <class Form, bool Lower>
RD_INLINE void multiply_block(const Product &p, int group, const char *w, float *sums, Writing &writing,
                              Fetching &fetching) {
    free_tiles<Lower>(p.k_pitch % kDepth);
    _tile_zero(RD_UPPER);
    if constexpr (Lower) _tile_zero(RD_LOWER);
    Form::template multiply<Lower>(p, group, w, writing, fetching);
    constexpr ptrdiff_t row = sizeof(Sums::values) / (2 * kRows);
    _tile_stored(RD_UPPER, sums, row);
    if constexpr (Lower) _tile_stored(RD_LOWER, sums + kRows * 32, row);
}

// Of a block, for one or two groups of pixels.
inline int block_steps(const Product &p) { return p.taps * ((p.k_pitch + kDepth - 1) / kDepth); }

// One or two groups of pixels by one or two blocks of outputs.
template <class Form, bool Lower>
void multiply_groups(const Product &p, int group, int block, Sums &now, Sums &before, Fetching &fetching) {
    Writing writing(before, now.blocks * block_steps(p));
    for (int j = 0; j < now.blocks; j++) {
        const char *const w = static_cast<const char *>(p.w) + (block + j) * p.w_block;
        multiply_block<Form, Lower>(p, group, w, now.values[0][j], writing, fetching);
    }
}

template <class Form>
void tiled_product(const Product &p) {
    configure(p.k_pitch % kDepth);
    Sums sums[2];
    for (Sums &s : sums) {  // nothing waits; the values stay as they are
        s.pixels = s.blocks = s.written = 0;
        s.bias = nullptr;
        s.ending = {};
        s.write = nullptr;
    }
    int turn = 0;
    const int fitting = static_cast<int>(RD_GROUP_BYTES / p.w_block) / 2 * 2, most = fitting > 2 ? fitting : 2;
    for (int first = 0; first < p.blocks; first += most) {
        const int end = p.blocks - first < most ? p.blocks : first + most;
        const int64_t steps =
            int64_t{(p.pixels + 2 * kRows - 1) / (2 * kRows)} * (end - first) * block_steps(p) * Form::fetches;
        Fetching fetching(p, first, end, steps);
        for (int pixel = 0; pixel < p.pixels; pixel += 2 * kRows) {
            for (int block = first; block < end; block += 2) {
                Sums &now = sums[turn], &before = sums[turn = 1 - turn];
                now.pixels = p.pixels - pixel < 2 * kRows ? p.pixels - pixel : 2 * kRows;
                now.blocks = end - block < 2 ? 1 : 2;
                now.pixels > kRows ? multiply_groups<Form, true>(p, pixel / kRows, block, now, before, fetching)
                                   : multiply_groups<Form, false>(p, pixel / kRows, block, now, before, fetching);
                now.written = 0;
                now.bias = p.bias ? p.bias + block * 16 : nullptr;
                now.ending = Ending::of(p, pixel, block);
                now.write = now.blocks == 2 ? writer<Form, 2>(p) : writer<Form, 1>(p);
            }
        }
    }
    Writing(sums[1 - turn], 1).some(2 * kRows);
}

}  // namespace
}  // namespace rd
