// One caller's threads and memory, and the run itself.
#pragma once

#include <memory>

#include "plan.h"
#include "threads.h"

namespace rd {

class Context {
  public:
    // `arena` null: the context's own. Raises rd::Error.
    Context(std::shared_ptr<const Plan> plan, void *arena, std::size_t arena_bytes);
    ~Context();
    Context(const Context &) = delete;
    Context &operator=(const Context &) = delete;

    // images: float32 (batch, channels, height, width); logits: float32 (batch, classes); seconds: one per operation,
    // or null. Allocates nothing. Raises rd::Error in a child of the process that made the context.
    void run(const float *images, float *logits, double *seconds);

    const Plan &plan() const { return *plan_; }

  private:
    std::shared_ptr<const Plan> plan_;
    Memory own_;
    std::byte *arena_;
    std::unique_ptr<Threads> threads_;
};

}  // namespace rd
