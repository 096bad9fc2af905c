// latents[destinations[e]] = ((c_x x) + (c_v v)) + (s eps_e) for every edge e of every source row, read once.
//
// The whole op but for its loops over rows and tiles, for host and device: `branch_rows_cpu.cpp` calls `branch_tile`
// from threads with a tile that fills vector registers and the first cache, `branch_rows.cuh` from a CUDA thread with a
// tile that fits its registers. Each operation is rounded in the order written (see philox.h).
#pragma once

#include <type_traits>

#include "floats.h"
#include "philox.h"

namespace egrpo {

// Arguments of one wavefront step. A row is `length` contiguous elements, the next one begins a stride (in elements)
// later; the tables are in compressed rows: the edges of source i are offsets[i] to offsets[i + 1] (egrpo_fast/ops.py).
struct BranchRows {
  float* latents;               // [num_rows, length], written
  void* model_latents;          // the same rows in the model's dtype, written; null: none
  const void* velocity;         // [num_sources, length]
  const int32_t* sources;       // [num_sources]
  const int32_t* offsets;       // [num_sources + 1]
  const int32_t* destinations;  // [num_edges]
  const float* coefficients;    // [num_edges, 3]: c_x, c_v, s
  const int64_t* draws;         // [num_edges], counter word 3
  const int32_t* slots;         // [num_edges], index into prompts
  const int64_t* prompts;       // [num_prompts], counter word 2
  int64_t num_rows, length, num_sources, num_edges, num_prompts;
  int64_t latents_stride, model_stride, velocity_stride;
  uint64_t seed;                // key
  uint32_t iteration;           // counter word 1
  bool packets;                 // every tile is whole and starts at a multiple of its packet's bytes
};

enum class Dtype { none, float32, bfloat16, float16 };

struct None {};  // dtype of absent model latents

// run(Velocity{}, Model{}) with the element types of the two dtypes.
template <class Run>
auto with_types(Dtype velocity, Dtype model, Run run) {
  const auto with_velocity = [&](auto v) {
    switch (model) {
      case Dtype::float32: return run(v, float{});
      case Dtype::bfloat16: return run(v, BFloat16{});
      case Dtype::float16: return run(v, Float16{});
      default: return run(v, None{});
    }
  };
  switch (velocity) {
    case Dtype::bfloat16: return with_velocity(BFloat16{});
    case Dtype::float16: return with_velocity(Float16{});
    default: return with_velocity(float{});
  }
}

// What a CUDA thread moves by one instruction: four elements, 16 bytes of float32, 8 of 16-bit floats. The threads of a
// warp take neighbouring packets, so that each of its accesses is of whole 32-byte sectors.
template <class T>
struct alignas(4 * sizeof(T)) Packet {
  static constexpr int size = 4;
  T lane[size];
};

template <class T>
EGRPO_FN void store_packet(T* to, const Packet<T>& packet) {
#if defined(__CUDA_ARCH__)
  // An assignment would be taken apart into its four elements.
  using Word = std::conditional_t<sizeof(packet) == 16, uint4, uint2>;
  static_assert(sizeof(Word) == sizeof(packet));
  Word word;
  memcpy(&word, &packet, sizeof word);
  __stwb(reinterpret_cast<Word*>(to), word);
#else
  *reinterpret_cast<Packet<T>*>(to) = packet;
#endif
}

template <class T, int TILE>
EGRPO_FN void load(float (&tile)[TILE], const T* from, int count, bool packets) {
  if (packets) {
    EGRPO_UNROLL
    for (int i = 0; i < TILE; i += Packet<T>::size) {
      const Packet<T> packet = *reinterpret_cast<const Packet<T>*>(from + i);
      EGRPO_UNROLL
      for (int j = 0; j < Packet<T>::size; ++j) tile[i + j] = to_float(packet.lane[j]);
    }
  } else if (count == TILE) {
    EGRPO_UNROLL
    for (int j = 0; j < TILE; ++j) tile[j] = to_float(from[j]);
  } else {
    EGRPO_UNROLL
    for (int j = 0; j < TILE; ++j) tile[j] = j < count ? to_float(from[j]) : 0.0f;
  }
}

template <class T, int TILE>
EGRPO_FN void store(T* to, const float (&tile)[TILE], int count, bool packets) {
  if (packets) {
    EGRPO_UNROLL
    for (int i = 0; i < TILE; i += Packet<T>::size) {
      Packet<T> packet;
      EGRPO_UNROLL
      for (int j = 0; j < Packet<T>::size; ++j) packet.lane[j] = from_float<T>(tile[i + j]);
      store_packet(to + i, packet);
    }
  } else if (count == TILE) {
    EGRPO_UNROLL
    for (int j = 0; j < TILE; ++j) to[j] = from_float<T>(tile[j]);
  } else {
    EGRPO_UNROLL
    for (int j = 0; j < TILE; ++j)
      if (j < count) to[j] = from_float<T>(tile[j]);
  }
}

EGRPO_FN bool inside(int64_t index, int64_t size) { return 0 <= index && index < size; }

// Elements begin to begin + TILE - 1 of source i: its own next state and that of all its branches. Read before written,
// so that a source may be its own destination. A table entry that points outside is passed over: tables are checked
// where they are made (tables.h), and this keeps an unchecked one from writing where it must not.
template <class Velocity, class Model, int TILE>
EGRPO_FN void branch_tile(const BranchRows& rows, int64_t i, int64_t begin) {
  const int64_t source = rows.sources[i];
  if (!inside(source, rows.num_rows)) return;
  const int count = rows.length - begin < TILE ? static_cast<int>(rows.length - begin) : TILE;
  float x[TILE], v[TILE], next[TILE];
  load(x, rows.latents + source * rows.latents_stride + begin, count, rows.packets);
  load(v, static_cast<const Velocity*>(rows.velocity) + i * rows.velocity_stride + begin, count, rows.packets);

  const int64_t last = rows.offsets[i + 1] < rows.num_edges ? rows.offsets[i + 1] : rows.num_edges;
  for (int64_t e = rows.offsets[i] > 0 ? rows.offsets[i] : 0; e < last; ++e) {
    const int64_t destination = rows.destinations[e], slot = rows.slots[e];
    if (!inside(destination, rows.num_rows) || !inside(slot, rows.num_prompts)) continue;
    const float c_x = rows.coefficients[3 * e], c_v = rows.coefficients[3 * e + 1], s = rows.coefficients[3 * e + 2];
    EGRPO_UNROLL
    for (int j = 0; j < TILE; ++j) next[j] = c_x * x[j] + c_v * v[j];
    if (s > 0.0f) {
      float eps[TILE];
      philox_normal(eps, static_cast<uint32_t>(begin / 4), rows.iteration, static_cast<uint32_t>(rows.prompts[slot]),
                    static_cast<uint32_t>(rows.draws[e]), rows.seed);
      EGRPO_UNROLL
      for (int j = 0; j < TILE; ++j) next[j] = next[j] + s * eps[j];
    }
    store(rows.latents + destination * rows.latents_stride + begin, next, count, rows.packets);
    if constexpr (!std::is_same_v<Model, None>) {
      Model* copy = static_cast<Model*>(rows.model_latents) + destination * rows.model_stride + begin;
      store(copy, next, count, rows.packets);
    }
  }
}

void branch_rows_cpu(const BranchRows& rows, Dtype velocity, Dtype model);

// Launches on the stream (a cudaStream_t) of the current device. Returns the launch's error message; null: none.
const char* branch_rows_cuda(const BranchRows& rows, Dtype velocity, Dtype model, void* stream);

}  // namespace egrpo
