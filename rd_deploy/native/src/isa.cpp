#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "error.h"
#if defined(RD_HAVE_AMX_BF16) && (defined(__linux__) || defined(RD_EMULATE_TILES))
#define RD_OFFER_AMX
#endif
#if defined(RD_OFFER_AMX) && !defined(RD_EMULATE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rd {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
// CPUID leaf 7: compilers differ in which of the newer names __builtin_cpu_supports knows.
[[maybe_unused]] unsigned leaf7(int subleaf, int part) {
    unsigned registers[4] = {0, 0, 0, 0};
    asm volatile("cpuid"
                 : "=a"(registers[0]), "=b"(registers[1]), "=c"(registers[2]), "=d"(registers[3])
                 : "a"(7), "c"(subleaf));
    return registers[part];
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && (leaf7(1, 0) >> 5 & 1u) != 0; }
#endif

#if defined(RD_OFFER_AMX) && defined(RD_EMULATE_TILES)
bool has_amx_bf16() { return true; }  // plain code, for tests
#elif defined(RD_OFFER_AMX)
// Tiles are 8 KiB of state per thread, which Linux saves only for processes that asked before their threads start.
bool tiles_permitted() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    static const bool permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return permitted;
}
bool has_amx_bf16() {
    const unsigned features = leaf7(0, 3);
    return has_avx512_bf16() && (features >> 22 & 1u) != 0 && (features >> 24 & 1u) != 0 && tiles_permitted();
}
#endif

struct Isa {
    const char *name;
    bool (*runs_here)();
    const Kernels *(*tables)(bool bf16);
    // Only taken by its name: its results differ from the precision's by more than an order of additions does.
    bool by_name = false;
};

// Best first. What the compiler could not build is not here.
constexpr Isa kIsas[] = {
#if defined(RD_OFFER_AMX)
    {"amx_bf16", has_amx_bf16, amx_bf16_kernels},
#endif
#if defined(RD_HAVE_AVX512_BF16)
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_kernels},
#endif
#if defined(RD_HAVE_AVX512)
    {"avx512", has_avx512, avx512_kernels},
#endif
#if defined(RD_HAVE_AVX2)
    {"avx2", has_avx2, avx2_kernels},
#endif
    {"portable", always, portable_kernels},
#if defined(RD_OFFER_AMX) && defined(RD_HAVE_AMX_BF16X2)
    {"amx_bf16x2", has_amx_bf16, amx_bf16x2_kernels, true},
#endif
};

std::string listed() {
    std::string names;
    for (const Isa &isa : kIsas)
        if (isa.runs_here()) names += (names.empty() ? "" : ",") + std::string(isa.name);
    return names;
}

}  // namespace

const char *available_isas() {
    static const std::string names = listed();
    return names.c_str();
}

const Kernels &choose_kernels(const char *name, bool bf16) {
    if (!name || !*name) name = std::getenv("RD_ISA");
    const bool any = !name || !*name;
    for (const Isa &isa : kIsas) {
        if (any ? isa.by_name : std::strcmp(isa.name, name) != 0) continue;
        if (!isa.runs_here()) {
            if (any) continue;
            throw Error(RD_ERROR_UNSUPPORTED, "this CPU cannot run instruction set " + std::string(name) +
                                                  ": choose one of " + available_isas());
        }
        if (const Kernels *tables = isa.tables(bf16)) return *tables;
        if (!any)
            throw Error(RD_ERROR_UNSUPPORTED, "instruction set " + std::string(name) + " has no " +
                                                  (bf16 ? "bf16" : "fp32") + " kernels: choose another one");
    }
    throw Error(RD_ERROR_UNSUPPORTED,
                "unknown instruction set '" + std::string(name) + "': choose one of " + available_isas());
}

}  // namespace rd
