// The CUDA kernel on the host, thread by thread, under AddressSanitizer and UndefinedBehaviorSanitizer where the
// compiler has them: its indexing, its 16-byte accesses and its tails, with no GPU. Every element is compared with the
// formula evaluated alone; every buffer is as large as it must be and no larger.
#define __global__
#define __launch_bounds__(threads)
#define __grid_constant__
struct Index {
  unsigned x, y;
};
static Index blockIdx, threadIdx, gridDim;

#include "branch_rows.cuh"

#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

namespace {

using namespace egrpo;

uint32_t random_state = 1;
uint32_t draw(uint32_t below) { return (random_state = random_state * 1664525u + 1013904223u) / 65536 % below; }
float uniform() { return static_cast<float>(draw(2000)) / 1000.0f - 1.0f; }

template <class T>
struct Buffer {  // begins at a multiple of 16 bytes, ends where its last element does
  T* data;
  size_t size;
  explicit Buffer(size_t size)
      : data(static_cast<T*>(operator new(size * sizeof(T), std::align_val_t{16}))), size(size) {}
  ~Buffer() { operator delete(data, std::align_val_t{16}); }
  Buffer(const Buffer&) = delete;
};

template <class Velocity, class Model>
void check(int64_t length, int64_t gap, bool packets, bool hostile) {
  constexpr bool copied = !std::is_same_v<Model, None>;
  using Copy = std::conditional_t<copied, Model, float>;
  const std::vector<int32_t> sources{4, 0, 2}, offsets{0, 5, 6, 8}, slots{0, 1, 0, 1, 0, 1, 0, 0};
  std::vector<int32_t> destinations{4, 1, 3, 5, 8, 0, 6, 7};
  if (hostile) destinations[1] = -1, destinations[6] = 9;
  const int64_t num_rows = 9, num_sources = 3, num_edges = 8, stride = length + gap;
  const std::vector<int64_t> draws{1, 2, 3, 4, 5, 6, 7, 0xFFFFFFFF}, prompts{7, 0xFFFFFFF0};
  std::vector<float> coefficients;
  for (int e = 0; e < num_edges; ++e) {
    coefficients.insert(coefficients.end(), {uniform(), uniform(), e % 3 ? 0.25f * static_cast<float>(e) : 0.0f});
  }
  const auto extent = [&](int64_t rows) { return static_cast<size_t>((rows - 1) * stride + length); };
  Buffer<float> latents(extent(num_rows));
  Buffer<Velocity> velocity(extent(num_sources));
  Buffer<Copy> copy(copied ? extent(num_rows) : 0);
  for (size_t i = 0; i < latents.size; ++i) latents.data[i] = uniform();
  for (size_t i = 0; i < velocity.size; ++i) velocity.data[i] = from_float<Velocity>(uniform());
  for (size_t i = 0; i < copy.size; ++i) copy.data[i] = from_float<Copy>(-7.0f);
  const std::vector<float> before(latents.data, latents.data + latents.size);

  BranchRows rows{};
  rows.latents = latents.data, rows.velocity = velocity.data, rows.model_latents = copied ? copy.data : nullptr;
  rows.latents_stride = rows.velocity_stride = rows.model_stride = stride;
  rows.sources = sources.data(), rows.offsets = offsets.data(), rows.destinations = destinations.data();
  rows.coefficients = coefficients.data(), rows.draws = draws.data(), rows.slots = slots.data();
  rows.prompts = prompts.data(), rows.num_prompts = 2;
  rows.num_rows = num_rows, rows.length = length, rows.num_sources = num_sources, rows.num_edges = num_edges;
  rows.seed = 0x123456789ABCDEF0, rows.iteration = 6, rows.packets = packets;

  gridDim = {static_cast<unsigned>((length + kThreads * kTile - 1) / (kThreads * kTile)), 2};  // y loops over sources
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) branch_rows_kernel<Velocity, Model>(rows);

  std::vector<float> expected = before;
  std::vector<bool> written(latents.size, false);
  for (int64_t i = 0; i < num_sources; ++i) {
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
      if (!inside(destinations[e], num_rows)) continue;
      for (int64_t p = 0; p < length; ++p) {
        float next = coefficients[3 * e] * before[sources[i] * stride + p] +
                     coefficients[3 * e + 1] * to_float(velocity.data[i * stride + p]);
        if (coefficients[3 * e + 2] > 0) {
          float eps[4];
          philox_normal(eps, static_cast<uint32_t>(p / 4), 6, static_cast<uint32_t>(prompts[slots[e]]),
                        static_cast<uint32_t>(draws[e]), rows.seed);
          next = next + coefficients[3 * e + 2] * eps[p % 4];
        }
        expected[destinations[e] * stride + p] = next;
        written[destinations[e] * stride + p] = true;
      }
    }
  }
  for (size_t i = 0; i < latents.size; ++i) {
    const Copy want = from_float<Copy>(written[i] ? expected[i] : -7.0f);
    const bool copy_right = !copied || memcmp(&copy.data[i], &want, sizeof want) == 0;
    if (bits_of(latents.data[i]) != bits_of(expected[i]) || !copy_right) {
      std::printf("element %zu, rows of %lld, gap %lld: %a, expected %a\n", i, static_cast<long long>(length),
                  static_cast<long long>(gap), latents.data[i], expected[i]);
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  int checks = 0;
  for (const int64_t length : {1, 3, 7, 8, 9, 1024, 1025, 2056}) {
    for (const int64_t gap : {0, 1, 8}) {
      for (const bool hostile : {false, true}) {
        for (const Dtype velocity : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
          for (const Dtype model : {Dtype::none, Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
            with_types(velocity, model, [&](auto v, auto m) {
              check<decltype(v), decltype(m)>(length, gap, false, hostile);
              if (length % 8 == 0 && gap % 8 == 0) check<decltype(v), decltype(m)>(length, gap, true, hostile);
            });
            ++checks;
          }
        }
      }
    }
  }
  std::printf("%d waves, every element right\n", checks);
}
