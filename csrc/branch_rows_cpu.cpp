// branch_rows on the CPU: the tile of branch_rows.h over threads, in the widest vectors the CPU has.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string_view>

#include "branch_rows.h"

namespace egrpo {
namespace {

constexpr int kTile = 256;         // elements; x, v, next and eps fill a quarter of the first cache
constexpr int64_t kChunk = 4096;   // elements of one row that a thread takes at a time
constexpr int64_t kGrain = 65536;  // elements below which a second thread costs more than it saves

using Loop = void (*)(const BranchRows&, int64_t, int64_t);

// Chunks first to last - 1, counted over the sources first: a thread gets the same stretch of every row, so one source
// with many branches does not hold up the rest.
template <class Velocity, class Model>
EGRPO_FN void loop(const BranchRows& rows, int64_t first, int64_t last) {
  for (int64_t work = first; work < last; ++work) {
    const int64_t source = work % rows.num_sources, begin = work / rows.num_sources * kChunk;
    const int64_t end = begin + kChunk < rows.length ? begin + kChunk : rows.length;
    for (int64_t at = begin; at < end; at += kTile) branch_tile<Velocity, Model, kTile>(rows, source, at);
  }
}

template <class Velocity, class Model>
void loop_default(const BranchRows& rows, int64_t first, int64_t last) {
  loop<Velocity, Model>(rows, first, last);
}

// The same source for wider vectors: no intrinsics, and no fused operation (philox.h), so the same bits.
#if defined(__x86_64__)
template <class Velocity, class Model>
__attribute__((target("avx2"))) void loop_avx2(const BranchRows& rows, int64_t first, int64_t last) {
  loop<Velocity, Model>(rows, first, last);
}

template <class Velocity, class Model>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void loop_avx512(
    const BranchRows& rows, int64_t first, int64_t last) {
  loop<Velocity, Model>(rows, first, last);
}

// ATEN_CPU_CAPABILITY (default, avx2, avx512) caps the width, as it does for PyTorch's own kernels.
int capability() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view widest = cap ? cap : "avx512";
  if (widest == "default" || !__builtin_cpu_supports("avx2")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return widest == "avx2" || !wide ? 1 : 2;
}

template <class Velocity, class Model>
Loop widest_loop() {
  static const Loop choices[] = {loop_default<Velocity, Model>, loop_avx2<Velocity, Model>,
                                 loop_avx512<Velocity, Model>};
  static const int chosen = capability();
  return choices[chosen];
}
#else
template <class Velocity, class Model>
Loop widest_loop() {
  return loop_default<Velocity, Model>;
}
#endif

}  // namespace

void branch_rows_cpu(const BranchRows& rows, Dtype velocity, Dtype model) {
  const Loop loop = with_types(velocity, model, [](auto v, auto m) { return widest_loop<decltype(v), decltype(m)>(); });
  const int64_t chunks = (rows.length + kChunk - 1) / kChunk;
  const int64_t grain = kGrain / (rows.length < kChunk ? rows.length : kChunk);
  torch::stable::parallel_for(0, chunks * rows.num_sources, grain,
                              [&](int64_t first, int64_t last) { loop(rows, first, last); });
}

}  // namespace egrpo
