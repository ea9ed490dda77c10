// AMX for float32 networks: each number is the sum of two bfloat16, and products are summed in float32.
//
// x = h + l: h is x rounded to bfloat16, and l what is left, rounded likewise. At most 2^-17 of x is lost, where
// bfloat16 alone loses 2^-8. Of a product's four parts the smallest, l l', is left out: at most 2^-16 of it (Henry,
// Tang & Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations";
// oneMKL calls it float_to_bf16x2). The instructions take what is below 2^-126 for zero, so that more may be lost
// of an |x| under 2^-109. What is not finite, or becomes infinite when it is rounded (from 3.396e38 on), becomes NaN.
//
// A pixel's elements take as many bytes as in float32: of each 32 channels a line with h and then one with l; of 16
// that are left at the end, half a line each. So a tile is read in place, and packed weights are alike.
#include "tiles.h"

namespace rd {
namespace {

// x in bfloat16, to nearest, ties to even. NaN stays NaN.
RD_INLINE Halves to_halves(Floats x) {
#if defined(RD_EMULATE_TILES)
    const Words bits = as_words(x);
    return __builtin_convertvector(x != x ? Words{} + 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
#else
    return (Halves)_mm512_cvtneps_pbh(x);
#endif
}

// 16 numbers' h and l.
struct Parts {
    Halves high, low;
};
RD_INLINE Floats widened(Halves x) { return as_floats(__builtin_convertvector(x, Words) << 16); }
RD_INLINE Parts parts_of(Floats x) {
    const Halves high = to_halves(x);
    return {high, to_halves(x - widened(high))};
}

// A block of 16 of a pixel's elements: where its parts are, in bytes.
struct Place {
    int high, low;

    RD_INLINE Place(int first, int pitch) {
        const int block = first / 16, in_line = block % 2;
        high = block / 2 * 128 + in_line * 32;
        low = high + (in_line == 0 && first + 16 == pitch ? 32 : 64);
    }
};

RD_INLINE Floats read(const void *pixel, Place place) {
    const char *const at = static_cast<const char *>(pixel);
    return Bf16::read(at + place.high) + Bf16::read(at + place.low);
}
RD_INLINE void write(void *pixel, Place place, Floats x) {
    char *const at = static_cast<char *>(pixel);
    const Parts parts = parts_of(x);
    store(at + place.high, parts.high);
    store(at + place.low, parts.low);
}

struct Twice {
    static constexpr int fetches = 3;  // per step of k: spread over its products

    template <int Blocks>
    static RD_INLINE void finish(const Ending &e, Floats (&sums)[1][Blocks]) {
        RD_UNROLL
        for (int j = 0; j < Blocks; j++) {
            Floats x = sums[0][j];
            if (e.add) x += read(e.add[0], Place(e.add_offset + j * 16, e.add_pitch));
            write(e.out[0], Place(e.offset + j * 16, e.out_pitch), e.relu ? positive(x) : x);
        }
    }

// Of 32 k, or of the 16 that are left: l h', h h' and h l', where `bytes` are those of a pixel's h, and its l lies
// behind them. Tiles go by literals, hence a macro. Two products in a row never add to the same sums.
#define RD_THREE_PRODUCTS(pixels, lower_pixels, weights, at, bytes)       \
    _tile_loadd(weights, w, kRowBytes);                                   \
    _tile_loadd(pixels, upper + (at) + (bytes), step);                    \
    _tile_dpbf16ps(RD_UPPER, pixels, weights);                            \
    if constexpr (Lower) {                                                \
        _tile_loadd(lower_pixels, lower + (at) + (bytes), step);          \
        _tile_dpbf16ps(RD_LOWER, lower_pixels, weights);                  \
    }                                                                     \
    fetching.step();                                                      \
    _tile_loadd(pixels, upper + (at), step);                              \
    _tile_dpbf16ps(RD_UPPER, pixels, weights);                            \
    if constexpr (Lower) {                                                \
        _tile_loadd(lower_pixels, lower + (at), step);                    \
        _tile_dpbf16ps(RD_LOWER, lower_pixels, weights);                  \
    }                                                                     \
    fetching.step();                                                      \
    w += kRowBytes / 4 * (bytes);                                         \
    _tile_loadd(weights, w, kRowBytes);                                   \
    _tile_dpbf16ps(RD_UPPER, pixels, weights);                            \
    if constexpr (Lower) _tile_dpbf16ps(RD_LOWER, lower_pixels, weights); \
    fetching.step();                                                      \
    w += kRowBytes / 4 * (bytes);                                         \
    writing.step()

    template <bool Lower>
    static RD_INLINE void multiply(const Product &p, int group, const char *w, Writing &writing, Fetching &fetching) {
        const int last = p.k_pitch % kDepth, whole = p.k_pitch / kDepth * 2 * kRowBytes;
        const ptrdiff_t step = p.step;
        for (int t = 0; t < p.taps; t++) {
            const void *const *const listed = p.a + static_cast<size_t>(t) * p.a_pitch + group;
            const char *const upper = static_cast<const char *>(listed[0]);
            const char *const lower = Lower ? static_cast<const char *>(listed[1]) : nullptr;
            for (int byte = 0; byte < whole; byte += 2 * kRowBytes) {
                RD_THREE_PRODUCTS(RD_PIXELS, RD_LOWER_PIXELS, RD_WEIGHTS, byte, kRowBytes);
            }
            if (last > 0) {
                _tile_zero(RD_PIXELS);
                _tile_zero(RD_LOWER_PIXELS);
                _tile_zero(RD_WEIGHTS);
                RD_THREE_PRODUCTS(RD_LAST_PIXELS, RD_LAST_LOWER_PIXELS, RD_LAST_WEIGHTS, whole, kRowBytes / 2);
                _tile_zero(RD_LAST_PIXELS);
                _tile_zero(RD_LAST_LOWER_PIXELS);
                _tile_zero(RD_LAST_WEIGHTS);
            }
        }
    }
};

void max_pool(const MaxPool &p) {
    for (int pixel = 0; pixel < p.pixels; pixel++)
        for (int c = 0; c < p.channels; c += 16) {
            const Place place(c, p.channels);
            Floats largest = read(p.a[pixel], place);
            for (int t = 1; t < p.taps; t++) {
                const Floats x = read(p.a[t * p.pixels + pixel], place);
                largest = ((x > largest) | (x != x)) ? x : largest;  // NaN wins
            }
            write(p.out[pixel], place, largest);
        }
}

void average(const Average &p) {
    const float share = 1.0f / static_cast<float>(p.pixels);
    for (int c = 0; c < p.channels; c += 16) {
        Floats sum{};
        for (int pixel = 0; pixel < p.pixels; pixel++) sum += read(p.a[pixel], Place(c, p.channels));
        write(p.out, Place(p.offset + c, p.out_pitch), sum * share);
    }
}

void place(const float *from, int count, void *to) {
    for (int c = 0; c < count; c += 16) write(to, Place(c, count), load<Floats>(from + c));
}

RD_INLINE Words pairs(Halves first, Halves second) {
    return __builtin_convertvector(first, Words) | __builtin_convertvector(second, Words) << 16;
}

// From [k][16 outputs] to, of each 32 k or the 16 that are left, [k / 2][16 outputs][2 k] of h and then of l.
void pack(const float *w, int taps, int k_pitch, void *to) {
    char *at = static_cast<char *>(to);
    for (int t = 0; t < taps; t++)
        for (int k = 0; k < k_pitch;) {
            const int depth = k_pitch - k < kDepth ? k_pitch - k : kDepth;
            for (int i = 0; i < depth; i += 2, k += 2, w += 32, at += kRowBytes) {
                const Parts first = parts_of(load<Floats>(w)), second = parts_of(load<Floats>(w + 16));
                store(at, pairs(first.high, second.high));
                store(at + depth * 32, pairs(first.low, second.low));
            }
            at += depth * 32;
        }
}

constexpr Kernels kBf16x2Tiles = {"amx_bf16x2", false,   2 * kRows,        kRows, {},  tiled_product<Twice>,
                                  max_pool,     average, interleave<Fp32>, begin, end, place,
                                  pack};

}  // namespace

const Kernels *amx_bf16x2_kernels(bool bf16) { return bf16 ? nullptr : &kBf16x2Tiles; }

}  // namespace rd
