// The tile instructions in plain C++, for tests on machines without AMX: as Intel's manual describes them (but
// denormals count), for tiles of up to 16 rows of up to 64 bytes. TDPBF16PS sums the products of even and of odd k
// apart, each in ascending order, before both are added to what was there.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace rd {
namespace {

struct EmulatedTile {
    alignas(64) char rows[16][64];
    int height, width;  // rows, and bytes of one; 0: not configured, and instructions fault
};
thread_local EmulatedTile emulated_tiles[8];

// The manual's layout: palette, first row, 14 reserved bytes, bytes per row of 16 tiles in two bytes each, rows.
inline void emulated_configure(const void *configuration) {
    const unsigned char *const bytes = static_cast<const unsigned char *>(configuration);
    memset(emulated_tiles, 0, sizeof emulated_tiles);
    for (int tile = 0; tile < 8; tile++) {
        emulated_tiles[tile].width = bytes[16 + 2 * tile] + 256 * bytes[17 + 2 * tile];
        emulated_tiles[tile].height = bytes[48 + tile];
        if (emulated_tiles[tile].width > 64 || emulated_tiles[tile].height > 16) __builtin_trap();
    }
}
inline EmulatedTile &emulated_tile(int tile) {
    if (emulated_tiles[tile].height == 0) __builtin_trap();
    return emulated_tiles[tile];
}
// Rows and bytes beyond the tile's become zero.
inline void emulated_zero(int tile) { memset(emulated_tile(tile).rows, 0, sizeof emulated_tiles[tile].rows); }
inline void emulated_load(int tile, const void *from, ptrdiff_t step) {
    emulated_zero(tile);
    EmulatedTile &to = emulated_tile(tile);
    for (int row = 0; row < to.height; row++)
        memcpy(to.rows[row], static_cast<const char *>(from) + row * step, static_cast<size_t>(to.width));
}
inline void emulated_store(int tile, void *to, ptrdiff_t step) {
    const EmulatedTile &from = emulated_tile(tile);
    for (int row = 0; row < from.height; row++)
        memcpy(static_cast<char *>(to) + row * step, from.rows[row], static_cast<size_t>(from.width));
}
inline float emulated_bf16(const char *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
// A row's elements, the even and the odd ones apart.
struct EmulatedHalves {
    float of[2][16];
    EmulatedHalves(const EmulatedTile &tile, int row) {
        for (int i = 0; i < tile.width / 2; i++) of[i % 2][i / 2] = emulated_bf16(&tile.rows[row][i * 2]);
    }
};
inline void emulated_multiply(int sum, int a, int b) {
    EmulatedTile &sums = emulated_tile(sum);
    const EmulatedTile &left = emulated_tile(a), &right = emulated_tile(b);
    const bool fit = sums.height == left.height && sums.width == right.width && left.width == 4 * right.height;
    if (!fit) __builtin_trap();
    float halves[16][2][16] = {};  // of a pixel: the sums over even and over odd k, of each output
    for (int k = 0; k < right.height; k++) {
        const EmulatedHalves w(right, k);
        for (int m = 0; m < sums.height; m++)
            for (int half = 0; half < 2; half++) {
                const float x = emulated_bf16(&left.rows[m][k * 4 + half * 2]);
                for (int n = 0; n < sums.width / 4; n++) halves[m][half][n] += x * w.of[half][n];
            }
    }
    for (int m = 0; m < sums.height; m++)
        for (int n = 0; n < sums.width / 4; n++) {
            float total;
            memcpy(&total, &sums.rows[m][n * 4], 4);
            total += halves[m][0][n] + halves[m][1][n];
            memcpy(&sums.rows[m][n * 4], &total, 4);
        }
}

#define _tile_loadconfig(configuration) emulated_configure(configuration)
#define _tile_release() memset(emulated_tiles, 0, sizeof emulated_tiles)
#define _tile_zero(tile) emulated_zero(tile)
#define _tile_loadd(tile, from, step) emulated_load(tile, from, step)
#define _tile_stored(tile, to, step) emulated_store(tile, to, step)
#define _tile_dpbf16ps(sum, a, b) emulated_multiply(sum, a, b)

}  // namespace
}  // namespace rd
