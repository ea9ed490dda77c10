// The tile instructions in plain C++, for tests on machines without AMX: as Intel's manual describes them, for tiles of
// 16 rows of 64 bytes. TDPBF16PS sums the products of a pair's two elements one after the other, in ascending k.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace rd {
namespace {

struct EmulatedTile {
    alignas(64) char rows[16][64];
};
thread_local EmulatedTile emulated_tiles[8];
thread_local bool tiles_configured = false;

inline void emulated_load(int tile, const void *from, ptrdiff_t step) {
    for (int row = 0; row < 16; row++)
        memcpy(emulated_tiles[tile].rows[row], static_cast<const char *>(from) + row * step, 64);
}
inline void emulated_store(int tile, void *to, ptrdiff_t step) {
    for (int row = 0; row < 16; row++) memcpy(static_cast<char *>(to) + row * step, emulated_tiles[tile].rows[row], 64);
}
inline float emulated_bf16(const char *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline void emulated_multiply(int sum, int a, int b) {
    if (!tiles_configured) __builtin_trap();  // the instruction faults then
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float total;
            memcpy(&total, &emulated_tiles[sum].rows[m][n * 4], 4);
            for (int k = 0; k < 16; k++)
                for (int half = 0; half < 2; half++)
                    total += emulated_bf16(&emulated_tiles[a].rows[m][k * 4 + half * 2]) *
                             emulated_bf16(&emulated_tiles[b].rows[k][n * 4 + half * 2]);
            memcpy(&emulated_tiles[sum].rows[m][n * 4], &total, 4);
        }
}

#define _tile_loadconfig(configuration) ((void)(configuration), tiles_configured = true)
#define _tile_release() (tiles_configured = false)
#define _tile_zero(tile) memset(&emulated_tiles[tile], 0, sizeof(EmulatedTile))
#define _tile_loadd(tile, from, step) emulated_load(tile, from, step)
#define _tile_stored(tile, to, step) emulated_store(tile, to, step)
#define _tile_dpbf16ps(sum, a, b) emulated_multiply(sum, a, b)

}  // namespace
}  // namespace rd
