// What a tile product takes on this CPU, by how many of the eight tiles are in use. Built and run by amx_tiles.py.
//
// There are two states, which change within milliseconds. Our reading: a core gives tiles new registers as instructions
// pass, and when its other hardware thread is at work too, few are left. No counter of a virtual machine tells the
// states apart, so a probe does: with eight tiles in use, at most 30 cycles a product in the fast one, at least 50 in
// the slow one. Each pattern is timed between two probes, and counts where these agree.
//
// Cycles are nominal: seconds times the clock that a chain of dependent multiplications, 3 cycles each, shows.
// Argument: seconds. Output: a line per pattern with its name, and for the fast and the slow state the number of
// samples and median cycles per product.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct alignas(64) TileConfiguration {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};

void configure() {
    TileConfiguration configuration;
    for (int tile = 0; tile < 8; tile++) {
        configuration.row_bytes[tile] = 64;
        configuration.rows[tile] = 16;
    }
    asm volatile("" ::"r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
}

alignas(4096) std::uint16_t operands[8 << 10];  // in the first-level cache; bfloat16, not zero

// GCC's tile instructions are statements, not calls.
#define RD_LOAD(tile, number) _tile_loadd(tile, operands + 512 * (number), 64)
#define RD_REPEAT for (int i = 0; i < kRepeats; i++)
constexpr int kRepeats = 500;

void use_all() {
    RD_LOAD(0, 0);
    RD_LOAD(1, 0);
    RD_LOAD(2, 0);
    RD_LOAD(3, 0);
    RD_LOAD(4, 0);
    RD_LOAD(5, 0);
    RD_LOAD(6, 0);
    RD_LOAD(7, 0);
}
// All zeroed, as a new configuration leaves them: what a pattern does not touch stays so.
void use_none() { configure(); }
void use_four() {
    configure();
    RD_LOAD(0, 0);
    RD_LOAD(1, 0);
    RD_LOAD(2, 0);
    RD_LOAD(3, 2);
}

void two_by_two() {
    RD_REPEAT {
        RD_LOAD(4, 0);
        RD_LOAD(5, 1);
        RD_LOAD(6, 2);
        RD_LOAD(7, 3);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}
void two_by_two_zeroed() {
    RD_REPEAT {
        RD_LOAD(4, 0);
        RD_LOAD(6, 2);
        _tile_dpbf16ps(0, 4, 6);
        RD_LOAD(7, 3);
        _tile_dpbf16ps(1, 4, 7);
        _tile_zero(4);
        RD_LOAD(5, 1);
        _tile_dpbf16ps(2, 5, 6);
        _tile_zero(6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_zero(5);
        _tile_zero(7);
    }
}
void three_by_one() {
    RD_REPEAT {
        RD_LOAD(4, 3);
        RD_LOAD(3, 0);
        _tile_dpbf16ps(0, 3, 4);
        RD_LOAD(3, 1);
        _tile_dpbf16ps(1, 3, 4);
        RD_LOAD(3, 2);
        _tile_dpbf16ps(2, 3, 4);
    }
}
void two_by_one() {
    RD_REPEAT {
        RD_LOAD(3, 2);
        RD_LOAD(2, 0);
        _tile_dpbf16ps(0, 2, 3);
        RD_LOAD(2, 1);
        _tile_dpbf16ps(1, 2, 3);
    }
}
void products_of_eight() {
    RD_REPEAT {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}
void products_of_four() {
    RD_REPEAT {
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 3);
    }
}

struct Pattern {
    const char *name;
    void (*prepare)();
    void (*run)();
    int products;  // per repeat
};
constexpr Pattern kPatterns[] = {
    {"2x2: eight tiles", use_all, two_by_two, 4},
    {"2x2: eight tiles, operands zeroed after use", use_all, two_by_two_zeroed, 4},
    {"3x1: five tiles, the others zeroed", use_none, three_by_one, 3},
    {"2x1: four tiles, the others zeroed", use_none, two_by_one, 2},
    {"2x1: four tiles, the others loaded", use_all, two_by_one, 2},
    {"products alone: eight tiles", use_all, products_of_eight, 4},
    {"products alone: four tiles, the others zeroed", use_four, products_of_four, 2},
};

double cycles(const Pattern &pattern, double hertz) {
    configure();
    pattern.prepare();
    const double start = now();
    pattern.run();
    return (now() - start) * hertz / (kRepeats * pattern.products);
}

double measured_hertz() {
    double best = 0;
    for (int round = 0; round < 20; round++) {
        constexpr int length = 100000;
        std::uint64_t x = 3;
        const double start = now();
        for (int i = 0; i < length; i++) asm volatile("imul %0, %0" : "+r"(x));
        best = std::max(best, 3 * length / (now() - start));
    }
    return best;
}

double median(std::vector<double> &values) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

}  // namespace

int main(int count, char **arguments) {
    constexpr long request_permission = 0x1023, tile_data = 18;
    if (count != 2 || syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 2;
    std::fill(std::begin(operands), std::end(operands), std::uint16_t{0x3C00});  // 0.0078
    const double hertz = measured_hertz(), end = now() + std::atof(arguments[1]);
    constexpr std::size_t patterns = sizeof kPatterns / sizeof *kPatterns;
    std::vector<double> fast[patterns], slow[patterns];
    while (now() < end)
        for (std::size_t i = 0; i < patterns; i++) {
            const double before = cycles(kPatterns[0], hertz), value = cycles(kPatterns[i], hertz),
                         after = cycles(kPatterns[0], hertz);
            if (std::max(before, after) < 30) fast[i].push_back(value);
            if (std::min(before, after) > 50) slow[i].push_back(value);
        }
    _tile_release();
    std::printf("%.4g\n", hertz);
    for (std::size_t i = 0; i < patterns; i++)
        std::printf("%s\t%zu\t%.1f\t%zu\t%.1f\n", kPatterns[i].name, fast[i].size(), median(fast[i]), slow[i].size(),
                    median(slow[i]));
}
