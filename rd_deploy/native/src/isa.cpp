#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

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
bool nothing_to_ask() { return true; }

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
bool ask_for_tiles() { return true; }
#elif defined(RD_OFFER_AMX)
constexpr long kSupported = 0x1021, kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, in asm/prctl.h
// Tiles are 8 KiB of state per thread, which Linux saves only for processes that asked before their threads start. It
// cannot be taken back, and signals then need larger stacks: asked for when a plan is to use tiles, not before.
bool ask_for_tiles() {
    static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
}
bool system_knows_tiles() {
    unsigned long long features = 0;
    return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1u) != 0;
}
bool has_amx_bf16() {
    const unsigned features = leaf7(0, 3);
    return has_avx512_bf16() && (features >> 22 & 1u) != 0 && (features >> 24 & 1u) != 0 && system_knows_tiles();
}
#endif

struct Isa {
    const char *name;
    bool (*runs_here)();
    const Kernels *(*tables)(bool bf16);
    bool (*ask)() = nothing_to_ask;  // the system for it; false when it refuses
    // Only taken by its name: its results differ from the precision's by more than an order of additions does.
    bool by_name = false;
};

// Best first. What the compiler could not build is not here.
constexpr Isa kIsas[] = {
#if defined(RD_OFFER_AMX)
    {"amx_bf16", has_amx_bf16, amx_bf16_kernels, ask_for_tiles},
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
    {"amx_bf16x2", has_amx_bf16, amx_bf16x2_kernels, ask_for_tiles, true},
#endif
};

// The longest list, with its commas and zero.
struct Names {
    char text[128] = "";
};

Names listed() {
    Names names;
    char *end = names.text;
    for (const Isa &isa : kIsas) {
        if (!isa.runs_here()) continue;
        if (end != names.text) *end++ = ',';
        const std::size_t length = std::strlen(isa.name);
        std::memcpy(end, isa.name, length + 1);
        end += length;
    }
    return names;
}

constexpr std::size_t all_names() {
    std::size_t length = 0;
    for (const Isa &isa : kIsas) length += std::char_traits<char>::length(isa.name) + 1;
    return length;
}
static_assert(all_names() <= sizeof(Names::text));

[[noreturn]] void refuse_isa(const std::string &what, const std::string &advice) {
    throw Error(RD_ERROR_UNSUPPORTED, what + ": choose " + advice);
}

}  // namespace

const char *available_isas() {
    static const Names names = listed();
    return names.text;
}

const Kernels &choose_kernels(const char *name, bool bf16) {
    if (!name || !*name) name = std::getenv("RD_ISA");
    const std::string others = std::string("one of ") + available_isas();
    if (!name || !*name) {
        for (const Isa &isa : kIsas)
            if (const Kernels *tables = isa.by_name ? nullptr : isa.tables(bf16))
                if (isa.runs_here() && isa.ask()) return *tables;
        refuse_isa("this build has nothing that runs here", "another build");  // not reached: portable code does
    }
    const std::string shown = printable(name);
    for (const Isa &isa : kIsas) {
        if (std::strcmp(isa.name, name) != 0) continue;
        if (!isa.runs_here()) refuse_isa("this CPU cannot run instruction set " + shown, others);
        const Kernels *tables = isa.tables(bf16);
        if (!tables)
            refuse_isa("instruction set " + shown + " has no " + (bf16 ? "bf16" : "fp32") + " kernels", "another one");
        if (!isa.ask()) refuse_isa("the system does not let this process use " + shown, others);
        return *tables;
    }
    refuse_isa("unknown instruction set '" + shown + "'", others);
}

}  // namespace rd
