#include "context.h"

#include <chrono>
#include <cstdint>

#include "error.h"
#include "execute.h"
#include "floating_point.h"

namespace rd {
namespace {

std::byte *checked_arena(const Plan &plan, void *arena, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(arena) % kAlignment != 0)
        throw Error(RD_ERROR_ARGUMENT, "the arena must be 64-byte aligned");
    if (bytes < plan.info.arena_bytes)
        throw Error(RD_ERROR_ARGUMENT, "the arena has " + std::to_string(bytes) + " bytes, and the plan needs " +
                                           std::to_string(plan.info.arena_bytes));
    return static_cast<std::byte *>(arena);
}

struct Task {
    const Run *run;
    const Operation *operation;
};

void work(void *state, int item, int thread) {
    const Task &task = *static_cast<const Task *>(state);
    execute(*task.run, *task.operation, item, thread);
}

}  // namespace

Context::Context(std::shared_ptr<const Plan> plan, void *arena, std::size_t arena_bytes)
    : plan_(std::move(plan)),
      own_(arena ? nullptr : allocate(plan_->info.arena_bytes).release()),
      arena_(arena ? checked_arena(*plan_, arena, arena_bytes) : own_.get()),
      threads_(std::make_unique<Threads>(plan_->options.threads, plan_->kernels->begin, plan_->kernels->end)) {}

Context::~Context() {
    if (threads_->lost()) static_cast<void>(threads_.release());  // to end them would wait for ever
}

void Context::run(const float *images, float *logits, double *seconds) {
    using Clock = std::chrono::steady_clock;
    if (threads_->lost())
        throw Error(RD_ERROR_ARGUMENT,
                    "this context was made before the process forked, without its threads: create another one");
    const DefaultMode mode;
    const Kernels &kernels = *plan_->kernels;
    const Run run{plan_.get(), arena_, images, logits};
    if (kernels.begin) kernels.begin();
    for (const Operation &operation : plan_->operations) {
        const Clock::time_point start = seconds ? Clock::now() : Clock::time_point();
        Task task{&run, &operation};
        threads_->run(work, &task, operation.items());
        if (seconds) *seconds++ = std::chrono::duration<double>(Clock::now() - start).count();
    }
    if (kernels.end) kernels.end();
}

}  // namespace rd
