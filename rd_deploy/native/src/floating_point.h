// The mode of a thread's floating-point arithmetic.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rd {

// While it lives: rounding to nearest, denormals kept, nothing trapped, whatever the caller had set (torch and some
// libraries have denormals flushed). Results must not depend on which thread does an item.
class DefaultMode {
  public:
#if defined(__x86_64__)
    DefaultMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~DefaultMode() { _mm_setcsr(static_cast<unsigned>(before_)); }
#elif defined(__aarch64__)
    DefaultMode() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(std::uint64_t{0}));
    }
    ~DefaultMode() { asm volatile("msr fpcr, %0" : : "r"(before_)); }
#else
    DefaultMode() {}  // not defaulted: one that does nothing would be an unused variable
    ~DefaultMode() {}
#endif
    DefaultMode(const DefaultMode &) = delete;
    DefaultMode &operator=(const DefaultMode &) = delete;

  private:
    [[maybe_unused]] std::uint64_t before_ = 0;
};

}  // namespace rd
