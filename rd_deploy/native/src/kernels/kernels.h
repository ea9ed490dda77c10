// What a file of kernels/ offers: matrix products over lists of pixels, and the transforms of Winograd's convolution.
//
// One file per instruction set, each compiled with its own flags and reached only through this table, so that nothing
// but the table's functions may run on a CPU that lacks the instructions. For the same reason those files include no
// header with inline functions of external linkage (no <vector>, no <algorithm>): the linker may keep any file's copy.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace rd {

// A convolution (or one of Winograd's products, or a linear layer) on a list of pixels:
//   out[p][n] = relu?(bias[n] + sum over t, i of a[t][p][i] * w[n][t][i] (+ add[p][n])),  n = 0 .. 16 * blocks - 1
// in float32, summed over t, then i, in ascending order (in tiles 32 of i at a time, and the bias last) whatever the
// number of pixels, so that a pixel's result does not depend on its neighbours in the list. Elements of a, add and out
// are of the table's kind. Tables may read up to k_pitch elements of a, where those beyond k meet zero weights: they
// must be finite. Where an element lies may depend on how many its pixel has: with a table that has `place`, pixels of
// `a` have exactly k_pitch, and those of pools exactly `channels`.
//
// Vector units take any pixels: `a` lists each one, and `group` of the table is 1. Tiles are read row by row at a
// constant distance: `a` lists the first of each `group` pixels, and the others follow `step` bytes apart each. The
// last group is read as a whole, even if `pixels` ends within it, and what it computes for the others is dropped.
struct Product {
    const void *const *a;    // [taps][a_pitch], pointers to k elements each; padding is a pointer to zeros
    int a_pitch;             // at least as many as are listed
    ptrdiff_t step;          // bytes from one pixel of a group to the next; 0 where a group is one pixel
    int taps, k;             // k: elements per tap that count
    int k_pitch;             // elements per tap in the weights, even
    int pixels;              // at least 1
    const void *w;           // packed as network.h says, or by the table's `pack`, the first of `blocks` blocks
    size_t w_block;          // bytes from one block to the next
    int blocks;              // of 16 outputs
    const float *bias;       // 16 * blocks, 64-byte aligned; null: zeros
    const void *const *add;  // [pixels], pointers to the pixel's elements; null: none
    void *const *out;        // [pixels], likewise
    // Output n is element offset + n of a pixel in `out`, which has out_pitch of them, and likewise in `add`. Weights
    // and bias begin with the first output.
    int offset, out_pitch;
    int add_offset, add_pitch;
    bool relu;
    bool raw;  // out is float32 whatever the precision; nothing is added and relu does not count
    // The weights that are multiplied after these, which may be fetched meanwhile; null: none, or not known.
    const void *next;
};

// Winograd's F(m x m, 3 x 3) on tiles; t = m + 2. Lavin & Gray 2016, "Fast algorithms for convolutional neural
// networks".
struct InputTransform {
    const void *const *in;  // [tiles][t * t] pointers to `channels` elements: the tile's input pixels, row by row
    int tiles, channels;    // channels: multiple of 16
    void *out;              // [t * t][tiles][channels], of the table's kind
};
struct OutputTransform {
    const float *in;  // [t * t][tiles][in_pitch]
    int tiles, in_pitch;
    int blocks;  // of 16 outputs
    const float *bias;
    const void *const *add;  // [tiles][m * m], as in Product
    void *const *out;        // [tiles][m * m]
    int offset;
    bool relu;
};
struct WeightTransform {
    const void *w;  // one block of a 3 x 3 convolution, packed: [9][k_pitch (/ 2)][16]([2])
    int k_pitch;
    void *out;  // [t * t] planes, plane_bytes apart, each packed as a block of one tap
    size_t plane_bytes;
};

// Pooling on lists of pixels. What is outside the map must not be listed as zeros: list an inside pixel twice.
struct MaxPool {
    const void *const *a;  // [taps][pixels]
    int taps, pixels;
    int channels;      // multiple of 16
    void *const *out;  // [pixels]
};
struct Average {
    const void *const *a;   // [pixels]
    int pixels, channels;   // channels: multiple of 16
    void *out;              // a pixel of out_pitch elements
    int offset, out_pitch;  // of the first mean among them; the means are summed in float32 in the list's order
};
// A row of float32 planes to elements with the channels together: float32 where the table has `place`.
struct Interleave {
    const float *in;  // the row in the first plane
    size_t plane;     // elements from one plane to the next
    int channels, width;
    void *out;  // [width][channels]
};

// Transforms of one F(m x m, 3 x 3).
struct Winograd {
    int m;
    void (*input)(const InputTransform &);
    void (*output)(const OutputTransform &);
    void (*weight)(const WeightTransform &);
};

struct Kernels {
    const char *isa;
    bool bf16;
    int pixels;            // of one register tile: lists of a multiple of this run best
    int group;             // pixels for each pointer of a product's list
    Winograd winograd[2];  // m = 0: none
    void (*product)(const Product &);
    void (*max_pool)(const MaxPool &);
    void (*average)(const Average &);
    void (*interleave)(const Interleave &);
    void (*begin)();  // before a thread's first product, and after its last; null: nothing to do
    void (*end)();
    // Where the elements of maps are others than those of the network's file, which are float32 then; else null.
    void (*place)(const float *from, int count, void *to);          // a pixel; count: multiple of 16
    void (*pack)(const float *w, int taps, int k_pitch, void *to);  // a block of weights, to as many bytes
};

// Each file's tables; null when this build or this file has none for the precision.
const Kernels *portable_kernels(bool bf16);
const Kernels *avx2_kernels(bool bf16);
const Kernels *avx512_kernels(bool bf16);
const Kernels *avx512_bf16_kernels(bool bf16);
const Kernels *amx_bf16_kernels(bool bf16);
const Kernels *amx_bf16x2_kernels(bool bf16);

}  // namespace rd
