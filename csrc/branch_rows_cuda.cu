// branch_rows on CUDA: the launch. No PyTorch header, so that each architecture compiles in seconds.
#include <cuda_runtime.h>

#include "branch_rows.cuh"

namespace egrpo {

const char* branch_rows_cuda(const BranchRows& rows, Dtype velocity, Dtype model, void* stream) {
  constexpr int64_t elements = kThreads * kTile;
  const int64_t num_blocks = (rows.length + elements - 1) / elements;
  const int64_t num_sources = rows.num_sources < kMaxGridY ? rows.num_sources : kMaxGridY;
  const dim3 grid(static_cast<unsigned>(num_blocks), static_cast<unsigned>(num_sources));
  with_types(velocity, model, [&](auto v, auto m) {
    branch_rows_kernel<decltype(v), decltype(m)><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rows);
  });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace egrpo
