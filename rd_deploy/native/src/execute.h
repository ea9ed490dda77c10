// How the operations of a plan run.
#pragma once

#include "plan.h"

namespace rd {

struct Run {
    const Plan *plan;
    std::byte *arena;
    const float *images;
    float *logits;
};

// One item of an operation, on one thread.
void execute(const Run &run, const Operation &operation, int item, int thread);

}  // namespace rd
