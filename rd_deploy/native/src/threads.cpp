#include "threads.h"

#include <unistd.h>

#include <chrono>
#include <system_error>

#include "error.h"
#include "floating_point.h"

namespace rd {
namespace {

// How often a thread looks before it gives up the core: some tens of microseconds, about as long as waking takes. More
// would steal time from whatever else runs on the machine, less would put threads to sleep between a run's steps.
constexpr int kSpins = 2000;
// How often the caller then offers its core before it sleeps as well.
constexpr int kYields = 100;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

std::uint64_t packed(std::uint32_t round, int items) {
    return (static_cast<std::uint64_t>(round) << 32) | static_cast<std::uint32_t>(items);
}

}  // namespace

Threads::Threads(int count, void (*begin)(), void (*end)()) : begin_(begin), end_(end), process_(::getpid()) {
    try {
        workers_.reserve(static_cast<std::size_t>(count - 1));
        for (int thread = 1; thread < count; thread++) workers_.emplace_back([this, thread] { serve(thread); });
    } catch (const std::system_error &) {
        stop();
        throw Error(RD_ERROR_MEMORY,
                    "the system refuses to start " + std::to_string(count) + " threads: ask for fewer");
    } catch (...) {  // threads that run must be joined, whatever happened
        stop();
        throw;
    }
}

Threads::~Threads() { stop(); }

bool Threads::lost() const { return !workers_.empty() && ::getpid() != process_; }

void Threads::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread &worker : workers_) worker.join();
    workers_.clear();
}

void Threads::run(Work work, void *state, int items) {
    if (workers_.empty() || items == 1) {
        for (int item = 0; item < items; item++) work(state, item, 0);
        return;
    }
    const std::uint32_t round = round_.load(std::memory_order_relaxed) + 1;
    work_.store(work, std::memory_order_relaxed);
    state_.store(state, std::memory_order_relaxed);
    unfinished_.store(items, std::memory_order_relaxed);
    unclaimed_.store(packed(round, items), std::memory_order_release);
    round_.store(round);  // sequentially consistent with sleeping_: one of the two sides sees the other
    if (sleeping_.load() > 0) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
        }
        wake_.notify_all();
    }
    take_items(0, round);
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) > 0; spins++) {
        if (spins < kSpins)
            relax();
        else if (spins < kSpins + kYields)
            std::this_thread::yield();
        else  // another thread is held up in the middle of its item
            std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}

// A late thread may read the next round's work here, but then its claim fails: while an item of a round is unclaimed
// the round has not ended, and only its end lets `run` change work_ and state_.
void Threads::take_items(int thread, std::uint32_t round) {
    std::uint64_t seen = unclaimed_.load(std::memory_order_acquire);
    for (;;) {
        const Work work = work_.load(std::memory_order_relaxed);
        void *const state = state_.load(std::memory_order_relaxed);
        const auto left = static_cast<std::uint32_t>(seen);
        if ((seen >> 32) != round || left == 0) return;
        if (!unclaimed_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire))
            continue;
        work(state, static_cast<int>(left) - 1, thread);
        unfinished_.fetch_sub(1, std::memory_order_release);
        seen = unclaimed_.load(std::memory_order_acquire);
    }
}

void Threads::serve(int thread) {
    const DefaultMode mode;
    if (begin_) begin_();
    for (std::uint32_t seen = 0; wait_for_round(seen);) {
        seen = round_.load(std::memory_order_acquire);
        take_items(thread, seen);
    }
    if (end_) end_();
}

// False when the threads are to end.
bool Threads::wait_for_round(std::uint32_t seen) {
    for (int spins = 0; spins < kSpins; spins++) {
        if (round_.load(std::memory_order_acquire) != seen) return true;
        if (stop_.load(std::memory_order_relaxed)) return false;
        relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return stop_ || round_.load() != seen; });
    sleeping_.fetch_sub(1);
    return !stop_;
}

}  // namespace rd
