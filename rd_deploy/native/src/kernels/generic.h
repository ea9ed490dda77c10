// The kernels, written once on GCC's vector extensions; each instruction set's file includes this with its own flags.
//
// Before including it, a file defines RD_ISA_NAME (a string), RD_VECTOR_BYTES (of a register: 16, 32 or 64) and
// RD_TILE_PIXELS and RD_TILE_BLOCKS (the register tile), so that accumulators, weights and one broadcast fit into the
// registers. It may define RD_MULTIPLY_ADD, RD_POSITIVE, RD_DOT_BF16 and RD_TO_BF16 to have its own instructions used,
// RD_STEPS_UNROLLED (steps of the inner loop, where its own instructions are many beside those of a step), and
// RD_FETCH_NEXT (with RD_TILE_BLOCKS of 1) to have weights fetched as `Fetch` says.
//
// Everything is in an unnamed namespace: two files' copies of one function must never be merged by the linker.
#pragma once

#include <string.h>

#include "kernels.h"

namespace rd {
namespace {

#define RD_INLINE inline __attribute__((always_inline))
#define RD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define RD_UNROLL RD_PRAGMA(clang loop unroll(full))
#define RD_UNROLL_BY(count) RD_PRAGMA(clang loop unroll_count(count))
#else
#define RD_UNROLL RD_PRAGMA(GCC unroll 64)
#define RD_UNROLL_BY(count) RD_PRAGMA(GCC unroll count)
#endif
#ifdef RD_STEPS_UNROLLED
#define RD_UNROLL_STEPS RD_UNROLL_BY(RD_STEPS_UNROLLED)
#else
#define RD_UNROLL_STEPS
#endif

constexpr int kLanes = RD_VECTOR_BYTES / 4;  // floats in a register
constexpr int kParts = 16 / kLanes;          // registers in a block of 16 outputs

typedef float Floats __attribute__((vector_size(RD_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(RD_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(RD_VECTOR_BYTES / 2)));
typedef int16_t Shorts __attribute__((vector_size(RD_VECTOR_BYTES)));

template <class T>
RD_INLINE T load(const void *from) {
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
RD_INLINE void store(void *to, T value) {
    memcpy(to, &value, sizeof(T));
}

RD_INLINE Floats as_floats(Words words) {
    Floats floats;
    memcpy(&floats, &words, sizeof floats);
    return floats;
}
RD_INLINE Words as_words(Floats floats) {
    Words words;
    memcpy(&words, &floats, sizeof words);
    return words;
}
// Four bytes in every lane. As an integer sum, which compilers drop: a sum of floats with 0 they must compute.
RD_INLINE Floats spread_word(const void *from) { return as_floats(Words{} + load<uint32_t>(from)); }
// Fused where a file says how, and never fused otherwise: were it left to the compiler, it would fuse in some tiles and
// not in others, and a pixel's result would depend on how many pixels are computed with it.
RD_INLINE Floats multiply_add(Floats sum, Floats a, Floats w) {
#ifdef RD_MULTIPLY_ADD
    return RD_MULTIPLY_ADD(a, w, sum);
#else
    return sum + a * w;
#endif
}
// NaN stays NaN, as in x86's maximum when its second operand is one: compilers make a comparison and a choice of this.
RD_INLINE Floats positive(Floats x) {
#ifdef RD_POSITIVE
    return RD_POSITIVE(x);
#else
    return Floats{} > x ? Floats{} : x;
#endif
}

// Elements of a map in float32 and bfloat16: how a vector of them is read, written and multiplied.
struct Fp32 {
    static constexpr int bytes = 4;
    static constexpr int per_step = 1;  // elements of k in one step of the inner loop
    static RD_INLINE Floats read(const void *from) { return load<Floats>(from); }
    static RD_INLINE void write(void *to, Floats x) { store(to, x); }
    template <int Count>
    static RD_INLINE void write_row(void *to, const Floats *x) {
        RD_UNROLL
        for (int j = 0; j < Count; j++) store(static_cast<Floats *>(to) + j, x[j]);
    }
    static RD_INLINE void write_one(void *to, float x) { store(to, x); }
    static RD_INLINE Floats spread(const void *a) { return spread_word(a); }
    static RD_INLINE Floats dot(Floats sum, Floats a, Floats w) { return multiply_add(sum, a, w); }
};

struct Bf16 {
    static constexpr int bytes = 2;
    static constexpr int per_step = 2;
    static RD_INLINE Floats read(const void *from) {
        return as_floats(__builtin_convertvector(load<Halves>(from), Words) << 16);
    }
    // To nearest, ties to even.
    static RD_INLINE void write(void *to, Floats x) {
#ifdef RD_TO_BF16
        RD_TO_BF16(to, x);
#else
        const Words bits = as_words(x);
        store(to, __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves));
#endif
    }
    // Two neighbouring vectors at a time where there is an instruction for it.
    template <int Count>
    static RD_INLINE void write_row(void *to, const Floats *x) {
        RD_UNROLL
        for (int j = 0; j < Count; j++) {
#ifdef RD_TO_BF16_TWICE
            if (j + 1 < Count) {
                RD_TO_BF16_TWICE(static_cast<Halves *>(to) + j, x[j], x[j + 1]);
                j++;
                continue;
            }
#endif
            write(static_cast<Halves *>(to) + j, x[j]);
        }
    }
    // Elements 0, 2, 4, ... and 1, 3, 5, ... of two neighbouring vectors: cheaper to take apart than one half each.
    static RD_INLINE void read_pairs(const void *from, Floats &even, Floats &odd) {
        const Words pairs = load<Words>(from);
        even = as_floats(pairs << 16);
        odd = as_floats(pairs & 0xffff0000u);
    }
    static RD_INLINE void write_pairs(void *to, Floats even, Floats odd) {
#ifdef RD_PAIRS_TO_BF16
        RD_PAIRS_TO_BF16(to, even, odd);
#else
        const Words low = as_words(even), high = as_words(odd);
        store(to,
              ((low + 0x7fffu + ((low >> 16) & 1u)) >> 16) | ((high + 0x7fffu + ((high >> 16) & 1u)) & 0xffff0000u));
#endif
    }
    static RD_INLINE void write_one(void *to, float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        const uint32_t rounded = x != x ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);  // any NaN stays one
        store(to, static_cast<uint16_t>(rounded >> 16));
    }
    static RD_INLINE Floats spread(const void *a) { return spread_word(a); }
    // Each 32-bit lane of `a` and `w` holds two elements, the first one low.
    static RD_INLINE Floats dot(Floats sum, Floats a, Floats w) {
#ifdef RD_DOT_BF16
        return RD_DOT_BF16(sum, a, w);
#else
        const Words x = as_words(a), y = as_words(w);
        sum = multiply_add(sum, as_floats(x << 16), as_floats(y << 16));
        return multiply_add(sum, as_floats(x & 0xffff0000u), as_floats(y & 0xffff0000u));
#endif
    }
};

// --- matrix products

// What a tile's pixels are written through. A copy in registers: the compiler must assume that stores change `p`
// itself.
struct Ending {
    const void *const *add;
    void *const *out;
    int offset, out_pitch;
    int add_offset, add_pitch;
    bool relu;

    // Of a product's outputs from the given pixel and block on.
    static RD_INLINE Ending of(const Product &p, int pixel, int block) {
        return {p.add ? p.add + pixel : nullptr,
                p.out + pixel,
                p.offset + block * 16,
                p.out_pitch,
                p.add_offset + block * 16,
                p.add_pitch,
                p.relu};
    }
};

template <class Element, int Pixels, int Blocks>
RD_INLINE void finish(const Ending &e, Floats (&sum)[Pixels][Blocks * kParts]) {
    RD_UNROLL
    for (int i = 0; i < Pixels; i++) {
        char *const out = static_cast<char *>(e.out[i]) + e.offset * Element::bytes;
        if (e.add) {
            const char *const add = static_cast<const char *>(e.add[i]) + e.add_offset * Element::bytes;
            RD_UNROLL
            for (int j = 0; j < Blocks * kParts; j++) sum[i][j] += Element::read(add + j * kLanes * Element::bytes);
        }
        if (e.relu) {
            RD_UNROLL
            for (int j = 0; j < Blocks * kParts; j++) sum[i][j] = positive(sum[i][j]);
        }
        Element::template write_row<Blocks * kParts>(out, sum[i]);
    }
}

template <int Pixels, int Registers>
RD_INLINE void finish_raw(const Ending &e, Floats (&sum)[Pixels][Registers]) {
    RD_UNROLL
    for (int i = 0; i < Pixels; i++) Fp32::write_row<Registers>(static_cast<float *>(e.out[i]) + e.offset, sum[i]);
}

// Weights come from memory once per run: in each step of the inner loop some are asked for before they are needed.
#ifdef RD_FETCH_NEXT
// Those that come next, spread over the time in which all pixels meet the present blocks, into the second-level
// cache. Were each block's own weights fetched a little ahead, its first tile of few pixels would have to wait for all
// of them, and the other tiles would ask again for what is there.
struct Fetch {
    static_assert(RD_TILE_BLOCKS == 1, "blocks lie apart, and a step asks for one line only");
    const char *at;
    int stride;  // bytes per step: a line in as many steps as there are tiles, rounded up

    Fetch(const Product &p, int block, int blocks, int tiles) : stride((64 + tiles - 1) / tiles) {
        const char *const own = static_cast<const char *>(p.w) + block * p.w_block;
        const char *const next = p.next ? static_cast<const char *>(p.next) : own;
        at = block + blocks < p.blocks ? own + blocks * p.w_block : next;
    }
    template <int Blocks>
    RD_INLINE void step(const char *, size_t) {
        __builtin_prefetch(at, 0, 2);
        at += stride;
    }
};
#else
// The tile's own weights a little ahead: each block is a stream of its own that crosses pages.
struct Fetch {
    static constexpr int ahead = 2048;  // bytes: 512 to 4096 made no difference

    Fetch(const Product &, int, int, int) {}
    template <int Blocks>
    RD_INLINE void step(const char *w, size_t w_block) {
        RD_UNROLL
        for (int j = 0; j < Blocks; j++) __builtin_prefetch(w + j * w_block + ahead);
    }
};
#endif

// The register tile: Pixels x (16 * Blocks) outputs, each weight read once for all pixels.
template <class Element, int Pixels, int Blocks>
void tile(const Product &p, int pixel, int block, Fetch &state) {
    Fetch fetch = state;  // a copy: written in each step, `state` might be what the pointers point to
    constexpr int registers = Blocks * kParts;
    Floats sum[Pixels][registers];
    RD_UNROLL
    for (int j = 0; j < registers; j++) {
        const Floats bias = p.bias ? load<Floats>(p.bias + block * 16 + j * kLanes) : Floats{};
        RD_UNROLL
        for (int i = 0; i < Pixels; i++) sum[i][j] = bias;
    }
    const int steps = (p.k + Element::per_step - 1) / Element::per_step;
    const size_t tap_bytes = static_cast<size_t>(p.k_pitch) * 16 * Element::bytes, w_block = p.w_block;
    const char *const first = static_cast<const char *>(p.w) + block * p.w_block;
    for (int t = 0; t < p.taps; t++) {
        const char *a[Pixels];
        RD_UNROLL
        for (int i = 0; i < Pixels; i++)
            a[i] = static_cast<const char *>(p.a[static_cast<size_t>(t) * p.a_pitch + pixel + i]);
        const char *w = first + t * tap_bytes;
        RD_UNROLL_STEPS
        for (int s = 0; s < steps; s++, w += 64) {
            Floats weights[registers];
            RD_UNROLL
            for (int j = 0; j < registers; j++)
                weights[j] = load<Floats>(w + (j / kParts) * w_block + (j % kParts) * RD_VECTOR_BYTES);
            fetch.step<Blocks>(w, w_block);
            RD_UNROLL
            for (int i = 0; i < Pixels; i++) {
                const Floats x = Element::spread(a[i] + s * 4);
                RD_UNROLL
                for (int j = 0; j < registers; j++) sum[i][j] = Element::dot(sum[i][j], x, weights[j]);
            }
        }
    }
    state = fetch;
    const Ending ending = Ending::of(p, pixel, block);
    if (p.raw)
        finish_raw(ending, sum);
    else
        finish<Element, Pixels, Blocks>(ending, sum);
}

// Lists that are no multiple of the tile are cut into nearly equal tiles; `pixels` is from 1 to RD_TILE_PIXELS.
template <class Element, int Blocks, int Pixels = RD_TILE_PIXELS>
RD_INLINE void tile_of(int pixels, const Product &p, int pixel, int block, Fetch &fetch) {
    if constexpr (Pixels > 1) {
        if (pixels < Pixels) return tile_of<Element, Blocks, Pixels - 1>(pixels, p, pixel, block, fetch);
    }
    tile<Element, Pixels, Blocks>(p, pixel, block, fetch);
}

template <class Element, int Blocks>
void columns(const Product &p, int block) {
    int tiles = (p.pixels + RD_TILE_PIXELS - 1) / RD_TILE_PIXELS;
    Fetch fetch(p, block, Blocks, tiles);
    for (int pixel = 0; pixel < p.pixels; tiles--) {
        const int pixels = (p.pixels - pixel + tiles - 1) / tiles;
        tile_of<Element, Blocks>(pixels, p, pixel, block, fetch);
        pixel += pixels;
    }
}

// Weights of a few blocks stay in the cache while all pixels pass by.
template <class Element>
void product(const Product &p) {
    int block = 0;
    for (; block + RD_TILE_BLOCKS <= p.blocks; block += RD_TILE_BLOCKS) columns<Element, RD_TILE_BLOCKS>(p, block);
    if constexpr (RD_TILE_BLOCKS > 1)
        for (; block < p.blocks; block++) columns<Element, 1>(p, block);
}

// --- Winograd's convolution: out = A^T [(G w G^T) . (B^T in B)] A, the dot summed over channels by matrix products

// F(2 x 2, 3 x 3): interpolation points 0, 1, -1 and infinity. Its transforms only add, so bfloat16 survives them.
struct Two {
    static constexpr int m = 2, t = 4;
    static RD_INLINE void input(const Floats *d, int step, Floats *out) {
        const Floats d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
        out[0] = d0 - d2;
        out[step] = d1 + d2;
        out[2 * step] = d2 - d1;
        out[3 * step] = d1 - d3;
    }
    static RD_INLINE void output(const Floats *d, int step, Floats *out, int out_step) {
        out[0] = d[0] + d[step] + d[2 * step];
        out[out_step] = d[step] - d[2 * step] - d[3 * step];
    }
    static RD_INLINE void weight(const Floats *g, int step, Floats *out, int out_step) {
        const Floats sum = (g[0] + g[2 * step]) * 0.5f, half = g[step] * 0.5f;
        out[0] = g[0];
        out[out_step] = sum + half;
        out[2 * out_step] = sum - half;
        out[3 * out_step] = g[2 * step];
    }
};

// F(4 x 4, 3 x 3): points 0, 1, -1, 2, -2 and infinity. Rounding errors grow about tenfold: for float32 only.
struct Four {
    static constexpr int m = 4, t = 6;
    static RD_INLINE void input(const Floats *d, int step, Floats *out) {
        const Floats d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
        const Floats even = d4 - d2 * 4.0f, odd = d3 - d1 * 4.0f, even2 = d4 - d2, odd2 = (d3 - d1) * 2.0f;
        out[0] = d0 * 4.0f - d2 * 5.0f + d4;
        out[step] = even + odd;
        out[2 * step] = even - odd;
        out[3 * step] = even2 + odd2;
        out[4 * step] = even2 - odd2;
        out[5 * step] = d1 * 4.0f - d3 * 5.0f + d5;
    }
    static RD_INLINE void output(const Floats *d, int step, Floats *out, int out_step) {
        const Floats sum1 = d[step] + d[2 * step], difference1 = d[step] - d[2 * step];
        const Floats sum2 = d[3 * step] + d[4 * step], difference2 = d[3 * step] - d[4 * step];
        out[0] = d[0] + sum1 + sum2;
        out[out_step] = difference1 + difference2 * 2.0f;
        out[2 * out_step] = sum1 + sum2 * 4.0f;
        out[3 * out_step] = difference1 + difference2 * 8.0f + d[5 * step];
    }
    static RD_INLINE void weight(const Floats *g, int step, Floats *out, int out_step) {
        const Floats g0 = g[0], g1 = g[step], g2 = g[2 * step];
        const Floats sum1 = (g0 + g2) * (-1.0f / 6), sum2 = g0 * (1.0f / 24) + g2 * (1.0f / 6);
        out[0] = g0 * 0.25f;
        out[out_step] = sum1 - g1 * (1.0f / 6);
        out[2 * out_step] = sum1 + g1 * (1.0f / 6);
        out[3 * out_step] = sum2 + g1 * (1.0f / 12);
        out[4 * out_step] = sum2 - g1 * (1.0f / 12);
        out[5 * out_step] = g2;
    }
};

template <class Form>
RD_INLINE void transform_in(Floats *d) {
    constexpr int t = Form::t;
    Floats e[t * t];
    RD_UNROLL
    for (int i = 0; i < t; i++) Form::input(d + i, t, e + i);
    RD_UNROLL
    for (int i = 0; i < t; i++) Form::input(e + i * t, 1, d + i * t);
}

template <class Form>
RD_INLINE void transform_channels(Fp32, const void *const *in, int byte, char *out, size_t plane) {
    constexpr int spots = Form::t * Form::t;
    Floats d[spots];
    RD_UNROLL
    for (int i = 0; i < spots; i++) d[i] = load<Floats>(static_cast<const char *>(in[i]) + byte);
    transform_in<Form>(d);
    RD_UNROLL
    for (int i = 0; i < spots; i++) store(out + i * plane, d[i]);
}

template <class Form>
RD_INLINE void transform_channels(Bf16, const void *const *in, int byte, char *out, size_t plane) {
    constexpr int spots = Form::t * Form::t;
    Floats even[spots], odd[spots];
    RD_UNROLL
    for (int i = 0; i < spots; i++) Bf16::read_pairs(static_cast<const char *>(in[i]) + byte, even[i], odd[i]);
    transform_in<Form>(even);
    transform_in<Form>(odd);
    RD_UNROLL
    for (int i = 0; i < spots; i++) Bf16::write_pairs(out + i * plane, even[i], odd[i]);
}

// A register of elements at a time. Where that is 32 bfloat16 and 16 channels are left, they go half by half.
template <class Element, class Form>
void input_transform(const InputTransform &p) {
    constexpr int t = Form::t;
    const size_t pixel = static_cast<size_t>(p.channels) * Element::bytes, plane = pixel * static_cast<size_t>(p.tiles);
    const int bytes = p.channels * Element::bytes;
    for (int tile = 0; tile < p.tiles; tile++) {
        const void *const *const in = p.in + static_cast<size_t>(tile) * t * t;
        char *const out = static_cast<char *>(p.out) + static_cast<size_t>(tile) * pixel;
        int byte = 0;
        for (; byte + RD_VECTOR_BYTES <= bytes; byte += RD_VECTOR_BYTES)
            transform_channels<Form>(Element(), in, byte, out + byte, plane);
        for (; byte < bytes; byte += kLanes * Element::bytes) {
            Floats d[t * t];
            RD_UNROLL
            for (int i = 0; i < t * t; i++) d[i] = Element::read(static_cast<const char *>(in[i]) + byte);
            transform_in<Form>(d);
            RD_UNROLL
            for (int i = 0; i < t * t; i++) Element::write(out + byte + i * plane, d[i]);
        }
    }
}

template <class Element, class Form>
void output_transform(const OutputTransform &p) {
    constexpr int m = Form::m, t = Form::t;
    const size_t plane = static_cast<size_t>(p.tiles) * p.in_pitch;
    for (int tile = 0; tile < p.tiles; tile++) {
        for (int n = 0; n < p.blocks * 16; n += kLanes) {
            const float *in = p.in + static_cast<size_t>(tile) * p.in_pitch + n;
            Floats d[t * t], e[m * t], out[m * m];
            RD_UNROLL
            for (int i = 0; i < t * t; i++) d[i] = load<Floats>(in + i * plane);
            RD_UNROLL
            for (int i = 0; i < t; i++) Form::output(d + i, t, e + i, t);
            RD_UNROLL
            for (int i = 0; i < m; i++) Form::output(e + i * t, 1, out + i * m, 1);
            const Floats bias = load<Floats>(p.bias + n);
            RD_UNROLL
            for (int i = 0; i < m * m; i++) {
                Floats x = out[i] + bias;
                const size_t at = static_cast<size_t>(tile) * m * m + i;
                const int byte = (p.offset + n) * Element::bytes;
                if (p.add) x += Element::read(static_cast<const char *>(p.add[at]) + byte);
                if (p.relu) x = positive(x);
                Element::write(static_cast<char *>(p.out[at]) + byte, x);
            }
        }
    }
}

// One vector of weights per step of the transform: in bfloat16 the two elements of a lane, one after the other.
template <class Element>
struct Weights;
template <>
struct Weights<Fp32> {
    static RD_INLINE Floats read(const char *w, int) { return load<Floats>(w); }
    static RD_INLINE void write(char *w, int, Floats x) { store(w, x); }
};
template <>
struct Weights<Bf16> {
    static RD_INLINE Floats read(const char *w, int half) {
        const Words pair = load<Words>(w);
        return as_floats(half ? pair & 0xffff0000u : pair << 16);
    }
    static RD_INLINE void write(char *w, int half, Floats x) {  // the low half first
        const Words bits = as_words(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        store(w, half ? load<Words>(w) | (rounded << 16) : rounded);
    }
};

template <class Element, class Form>
void weight_transform(const WeightTransform &p) {
    constexpr int t = Form::t;
    const size_t tap = static_cast<size_t>(p.k_pitch) * 16 * Element::bytes;
    for (size_t at = 0; at < tap; at += RD_VECTOR_BYTES) {
        for (int half = 0; half < Element::per_step; half++) {
            Floats g[9], e[t * 3], out[t * t];
            RD_UNROLL
            for (int i = 0; i < 9; i++)
                g[i] = Weights<Element>::read(static_cast<const char *>(p.w) + i * tap + at, half);
            RD_UNROLL
            for (int i = 0; i < 3; i++) Form::weight(g + i, 3, e + i, 3);
            RD_UNROLL
            for (int i = 0; i < t; i++) Form::weight(e + i * 3, 1, out + i * t, 1);
            RD_UNROLL
            for (int i = 0; i < t * t; i++)
                Weights<Element>::write(static_cast<char *>(p.out) + i * p.plane_bytes + at, half, out[i]);
        }
    }
}

// --- pooling and images

// As integers, a register of bfloat16 at a time: where the sign is set, the other bits are inverted, which makes their
// order that of the numbers. NaN wins. Returns how many bytes of the pixel are done.
RD_INLINE int max_pool_halves(const MaxPool &p, int pixel, char *out) {
    const auto turned = [](Shorts x) { return x ^ ((x >> 15) & 0x7fff); };
    const auto larger = [](Shorts x, Shorts y) { return x > y ? x : y; };
    int byte = 0;
    for (; byte + RD_VECTOR_BYTES <= p.channels * Bf16::bytes; byte += RD_VECTOR_BYTES) {
        const Shorts first = load<Shorts>(static_cast<const char *>(p.a[pixel]) + byte);
        Shorts largest = turned(first), magnitude = first & 0x7fff;
        for (int t = 1; t < p.taps; t++) {
            const Shorts x = load<Shorts>(static_cast<const char *>(p.a[t * p.pixels + pixel]) + byte);
            largest = larger(largest, turned(x));
            magnitude = larger(magnitude, x & 0x7fff);
        }
        const Shorts infinity = Shorts{} + 0x7f80, nan = Shorts{} + 0x7fc0;
        store(out + byte, magnitude > infinity ? nan : turned(largest));
    }
    return byte;
}

template <class Element>
void max_pool(const MaxPool &p) {
    for (int pixel = 0; pixel < p.pixels; pixel++) {
        char *const out = static_cast<char *>(p.out[pixel]);
        int first = 0;
        if constexpr (Element::bytes == 2) first = max_pool_halves(p, pixel, out);
        for (int c = first; c < p.channels * Element::bytes; c += kLanes * Element::bytes) {
            Floats largest = Element::read(static_cast<const char *>(p.a[pixel]) + c);
            for (int t = 1; t < p.taps; t++) {
                const Floats x = Element::read(static_cast<const char *>(p.a[t * p.pixels + pixel]) + c);
                largest = ((x > largest) | (x != x)) ? x : largest;  // NaN wins
            }
            Element::write(out + c, largest);
        }
    }
}

template <class Element>
void average(const Average &p) {
    const float share = 1.0f / static_cast<float>(p.pixels);
    for (int c = 0; c < p.channels * Element::bytes; c += kLanes * Element::bytes) {
        Floats sum{};
        for (int pixel = 0; pixel < p.pixels; pixel++) sum += Element::read(static_cast<const char *>(p.a[pixel]) + c);
        Element::write(static_cast<char *>(p.out) + p.offset * Element::bytes + c, sum * share);
    }
}

// Three channels of bfloat16, a vector of pixels at a time, each stored as 8 bytes of which the last two are the next
// pixel's; returns how many pixels are done. The last pixel is not among them: nothing behind it may be written.
RD_INLINE int interleave_three(const Interleave &p) {
    int x = 0;
    for (; x + kLanes < p.width; x += kLanes) {
        uint32_t halves[3][kLanes];
        RD_UNROLL
        for (int c = 0; c < 3; c++) {
            const Floats values = load<Floats>(p.in + c * p.plane + x);
            const Words bits = as_words(values), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
            store(halves[c], values != values ? Words{} + 0x7fc0u : rounded);  // any NaN stays one
        }
        char *out = static_cast<char *>(p.out) + x * 6;
        for (int i = 0; i < kLanes; i++, out += 6)
            store(out,
                  halves[0][i] | static_cast<uint64_t>(halves[1][i]) << 16 | static_cast<uint64_t>(halves[2][i]) << 32);
    }
    return x;
}

template <class Element>
void interleave(const Interleave &p) {
    int first = 0;
    if constexpr (Element::bytes == 2) {
        if (p.channels == 3) first = interleave_three(p);
    }
    for (int c = 0; c < p.channels; c++) {
        const float *const in = p.in + c * p.plane;
        char *out = static_cast<char *>(p.out) + (first * p.channels + c) * Element::bytes;
        for (int x = first; x < p.width; x++, out += p.channels * Element::bytes) Element::write_one(out, in[x]);
    }
}

template <class Element, class Form>
constexpr Winograd winograd() {
    return {Form::m, input_transform<Element, Form>, output_transform<Element, Form>, weight_transform<Element, Form>};
}

template <class Element>
constexpr Kernels table(bool bf16, Winograd large) {
    return {RD_ISA_NAME,
            bf16,
            RD_TILE_PIXELS,
            1,
            {winograd<Element, Two>(), large},
            product<Element>,
            max_pool<Element>,
            average<Element>,
            interleave<Element>,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
}

[[maybe_unused]] constexpr Kernels kFp32 = table<Fp32>(false, winograd<Fp32, Four>());
[[maybe_unused]] constexpr Kernels kBf16 = table<Bf16>(true, {});

}  // namespace
}  // namespace rd
