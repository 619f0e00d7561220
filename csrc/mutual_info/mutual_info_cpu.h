// mutual_info on the CPU. See mutual_info.h.
#pragma once

#include "../common/cpu.h"
#include "mutual_info.h"

namespace csg {

// Threads share the features; every feature is worked on by one thread.
void mutual_info_cpu(const MutualInfo& p, ParallelFor parallel_for);
void binned_mutual_info_cpu(const BinnedMutualInfo& p, ParallelFor parallel_for);

}  // namespace csg
