// The CUDA kernel: a thread takes one tile of a source row. Which one is all that happens here; the rest is
// `branch_tile`. Plain index arithmetic, so that a host can run it too (tests/extension/emulated_kernel.cpp).
#pragma once

#include "branch_rows.h"

namespace egrpo {

constexpr int kThreads = 128;
constexpr int kTile = 4;               // elements of a thread: one packet, one Philox counter
constexpr int64_t kMaxGridY = 65535;

template <class Velocity, class Model>
__global__ void __launch_bounds__(kThreads) branch_rows_kernel(const __grid_constant__ BranchRows rows) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kTile;
  if (begin >= rows.length) return;
  for (int64_t source = blockIdx.y; source < rows.num_sources; source += gridDim.y) {
    branch_tile<Velocity, Model, kTile>(rows, source, begin);
  }
}

}  // namespace egrpo
