// Which instruction sets this build has and this CPU can run.
#pragma once

#include <string>

#include "kernels/kernels.h"

namespace rd {

// Names, best first, and last what is only taken by name, separated by commas.
const char *available_isas();

// The tables of an instruction set. `name` null: the environment's RD_ISA, else the best that has tables for the
// precision. Raises rd::Error when the name is unknown, not in this build, or not for this CPU.
const Kernels &choose_kernels(const char *name, bool bf16);

}  // namespace rd
