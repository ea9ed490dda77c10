// A context's threads: they share out the items of one step, then wait for the next.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace rd {

class Threads {
  public:
    using Work = void (*)(void *state, int item, int thread);

    // `count` includes the thread that calls `run`. `begin` and `end` (null: nothing) frame each started thread's life.
    // Raises rd::Error when the system refuses a thread.
    Threads(int count, void (*begin)(), void (*end)());
    ~Threads();
    Threads(const Threads &) = delete;
    Threads &operator=(const Threads &) = delete;

    // Whether this is a child of the process that started threads: it has none of them, and can neither run nor end.
    bool lost() const;

    // Call work(state, item, thread) once for each item from 0 to items - 1, on all threads; returns when all are done.
    // Items are claimed one at a time, so a thread that the system holds up delays no more than its own item.
    void run(Work work, void *state, int items);

  private:
    void serve(int thread);
    void take_items(int thread, std::uint32_t round);
    bool wait_for_round(std::uint32_t seen);
    void stop();

    std::vector<std::thread> workers_;
    void (*begin_)();
    void (*end_)();
    const pid_t process_;
    std::atomic<Work> work_{nullptr};
    std::atomic<void *> state_{nullptr};
    // Round in the high half, items not yet claimed in the low half: a claim succeeds only in the round it is meant
    // for.
    alignas(64) std::atomic<std::uint64_t> unclaimed_{0};
    alignas(64) std::atomic<int> unfinished_{0};
    alignas(64) std::atomic<std::uint32_t> round_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace rd
