// The ops of torch.ops.egrpo_fast on PyTorch's stable ABI: schemas, argument checks, CPU or CUDA.
//
// No Python.h: the library is loaded by torch.ops.load_library, so one binary serves every Python.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "branch_rows.h"
#include "tables.h"

namespace egrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype model_dtype(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": dtype ",
          torch::headeronly::toString(type), ", allowed: Float, BFloat16, Half");
  return type == ScalarType::Float ? Dtype::float32 : type == ScalarType::BFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

void require_device(const Tensor& tensor, const char* name, const Tensor& like) {
  require(tensor.device() == like.device(), name, ": on another device than latents");
}

// A contiguous table of `dtype` with `size` elements (any number: -1), on the device of `like`.
template <class T>
const T* table(const Tensor& tensor, const char* name, ScalarType dtype, int64_t size, const Tensor& like) {
  require_device(tensor, name, like);
  require(tensor.scalar_type() == dtype, name, ": dtype ", torch::headeronly::toString(tensor.scalar_type()),
          ", expected ", torch::headeronly::toString(dtype));
  require(size < 0 || tensor.numel() == size, name, ": ", tensor.numel(), " elements, expected ", size);
  require(tensor.is_contiguous(), name, ": not contiguous");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// `count` rows of `length` elements, each contiguous in itself, a stride apart.
struct Rows {
  const Tensor& tensor;
  const char* name;
  int64_t count, stride;

  Rows(const Tensor& tensor, const char* name, const Tensor& like)
      : tensor(tensor), name(name), count(tensor.dim() ? tensor.size(0) : 0), stride(count ? tensor.stride(0) : 0) {
    require_device(tensor, name, like);
    require(tensor.dim() >= 2, name, ": ", tensor.dim(), " dimensions, expected rows of at least one");
    int64_t step = 1;
    for (int64_t dim = tensor.dim() - 1; dim > 0; step *= tensor.size(dim--)) {
      require(tensor.size(dim) == 1 || tensor.stride(dim) == step, name, ": rows not contiguous in themselves");
    }
  }

  int64_t length() const { return count ? tensor.numel() / count : 0; }
  const char* begin() const { return static_cast<const char*>(tensor.const_data_ptr()); }
  const char* end() const { return begin() + ((count - 1) * stride + length()) * tensor.element_size(); }

  // Accesses of 4 elements at a time meet whole packets and nothing else.
  bool in_packets() const {
    return reinterpret_cast<uintptr_t>(begin()) % 16 == 0 && stride % 4 == 0 && length() % 4 == 0;
  }

  void require_shape(int64_t rows, int64_t elements) const {
    require(count == rows && length() == elements, name, ": ", count, " rows of ", length(), " elements, expected ",
            rows, " of ", elements);
  }
  void require_writable() const {
    require(count <= 1 || stride >= length(), name, ": rows overlap, and are written in place");
  }
  void require_apart(const Rows& other) const {
    require(end() <= other.begin() || other.end() <= begin(), name, ": overlaps the memory of ", other.name);
  }
};

// Edge tables and the numbers of rows that they may name.
BranchRows make_tables(const Tensor& sources, const Tensor& offsets, const Tensor& destinations, const Tensor& draws,
                       const Tensor& slots, int64_t num_rows, int64_t num_prompts, const Tensor& like) {
  BranchRows rows{};
  rows.num_rows = num_rows;
  rows.num_prompts = num_prompts;
  rows.num_sources = sources.numel();
  rows.num_edges = destinations.numel();
  check_sizes(rows);
  rows.sources = table<int32_t>(sources, "sources", ScalarType::Int, -1, like);
  rows.offsets = table<int32_t>(offsets, "offsets", ScalarType::Int, rows.num_sources + 1, like);
  rows.destinations = table<int32_t>(destinations, "destinations", ScalarType::Int, -1, like);
  rows.draws = table<int64_t>(draws, "draws", ScalarType::Long, rows.num_edges, like);
  rows.slots = table<int32_t>(slots, "slots", ScalarType::Int, rows.num_edges, like);
  return rows;
}

// The values of tables that lie on the CPU; a plan's are checked once, before their copies go to a GPU.
void check_tables_op(Tensor sources, Tensor offsets, Tensor destinations, Tensor draws, Tensor slots, int64_t num_rows,
                     int64_t num_prompts) {
  require(num_rows >= 0 && num_prompts >= 0, "num_rows, num_prompts: ", num_rows, ", ", num_prompts, ", below 0");
  check_tables(make_tables(sources, offsets, destinations, draws, slots, num_rows, num_prompts, sources));
}

void branch_rows(Tensor latents, std::optional<Tensor> model_latents, Tensor velocity, Tensor sources, Tensor offsets,
                 Tensor destinations, Tensor coefficients, Tensor draws, Tensor slots, Tensor prompts,
                 int64_t iteration, int64_t seed) {
  const Rows x(latents, "latents", latents), v(velocity, "velocity", latents);
  require(latents.scalar_type() == ScalarType::Float, "latents: dtype ",
          torch::headeronly::toString(latents.scalar_type()), ", expected Float (other dtypes: the reference backend)");
  BranchRows rows = make_tables(sources, offsets, destinations, draws, slots, x.count, prompts.numel(), latents);
  rows.prompts = table<int64_t>(prompts, "prompts", ScalarType::Long, -1, latents);
  rows.coefficients = table<float>(coefficients, "coefficients", ScalarType::Float, 3 * rows.num_edges, latents);
  require(0 <= iteration && iteration <= std::numeric_limits<uint32_t>::max(), "iteration: ", iteration,
          ", not a 32-bit counter word");
  rows.iteration = static_cast<uint32_t>(iteration);
  rows.seed = static_cast<uint64_t>(seed);

  constexpr int64_t longest = int64_t{1} << 34;  // what the noise contract numbers: four positions a counter word
  rows.length = x.length();
  require(0 < rows.length && rows.length <= longest, "latents: rows of ", rows.length, " elements, allowed: 1 to 2^34");
  x.require_writable();
  v.require_shape(rows.num_sources, rows.length);
  v.require_apart(x);
  rows.latents = static_cast<float*>(latents.mutable_data_ptr());
  rows.latents_stride = x.stride;
  rows.velocity = velocity.const_data_ptr();
  rows.velocity_stride = v.stride;
  const Dtype velocity_dtype = model_dtype(velocity, "velocity");
  Dtype copy_dtype = Dtype::none;
  [[maybe_unused]] bool packets = x.in_packets() && v.in_packets();  // the host's vectors need no alignment
  if (model_latents) {
    const Rows copy(*model_latents, "model_latents", latents);
    copy.require_shape(x.count, rows.length);
    copy.require_writable();
    copy.require_apart(x);
    copy.require_apart(v);
    rows.model_latents = model_latents->mutable_data_ptr();
    rows.model_stride = copy.stride;
    copy_dtype = model_dtype(*model_latents, "model_latents");
    packets = packets && copy.in_packets();
  }

#if defined(USE_CUDA)
  if (latents.is_cuda()) {
    rows.packets = packets;
    const int32_t device = latents.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    // The macros that check a shim's status are named anew between torch 2.10 and 2.14; its status is not.
    const bool found = aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS;
    STD_TORCH_CHECK(found, "no current CUDA stream on device ", device);
    const char* error = branch_rows_cuda(rows, velocity_dtype, copy_dtype, stream);
    STD_TORCH_CHECK(error == nullptr, "CUDA launch of branch_rows failed: ", error);
    return;
  }
#endif
  check_tables(rows);
  branch_rows_cpu(rows, velocity_dtype, copy_dtype);
}

// For tests: the words of counters (block, *stream) [N, num_blocks, 4], and the two normals of word pairs.
Tensor philox_words(Tensor streams, int64_t num_blocks, int64_t seed) {
  const int64_t count = streams.numel() / 3;
  const auto* word = table<int64_t>(streams, "streams", ScalarType::Long, 3 * count, streams);
  Tensor words = torch::stable::new_empty(streams, {count, num_blocks, 4});
  auto* out = static_cast<int64_t*>(words.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i, word += 3) {
    for (int64_t block = 0; block < num_blocks; ++block, out += 4) {
      const Words w = philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(word[0]),
                                  static_cast<uint32_t>(word[1]), static_cast<uint32_t>(word[2])},
                                 static_cast<uint64_t>(seed));
      out[0] = w.w0, out[1] = w.w1, out[2] = w.w2, out[3] = w.w3;
    }
  }
  return words;
}

std::tuple<Tensor, Tensor> box_muller_op(Tensor a, Tensor b) {
  const auto* words_a = table<int64_t>(a, "a", ScalarType::Long, -1, a);
  const auto* words_b = table<int64_t>(b, "b", ScalarType::Long, a.numel(), a);
  Tensor first = torch::stable::new_empty(a, {a.numel()}, ScalarType::Float);
  Tensor second = torch::stable::new_empty(a, {a.numel()}, ScalarType::Float);
  auto* out_first = static_cast<float*>(first.mutable_data_ptr());
  auto* out_second = static_cast<float*>(second.mutable_data_ptr());
  for (int64_t i = 0; i < a.numel(); ++i) {
    box_muller(static_cast<uint32_t>(words_a[i]), static_cast<uint32_t>(words_b[i]), out_first[i], out_second[i]);
  }
  return {first, second};
}

}  // namespace
}  // namespace egrpo

STABLE_TORCH_LIBRARY(egrpo_fast, m) {
  m.def(
      "branch_rows(Tensor(a!) latents, Tensor(b!)? model_latents, Tensor velocity, Tensor sources, Tensor offsets, "
      "Tensor destinations, Tensor coefficients, Tensor draws, Tensor slots, Tensor prompts, int iteration, int seed) "
      "-> ()");
  m.def(
      "check_tables(Tensor sources, Tensor offsets, Tensor destinations, Tensor draws, Tensor slots, int num_rows, "
      "int num_prompts) -> ()");
  m.def("philox_words(Tensor streams, int num_blocks, int seed) -> Tensor");
  m.def("box_muller(Tensor a, Tensor b) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(egrpo_fast, CPU, m) {
  m.impl("branch_rows", TORCH_BOX(&egrpo::branch_rows));
  m.impl("check_tables", TORCH_BOX(&egrpo::check_tables_op));
  m.impl("philox_words", TORCH_BOX(&egrpo::philox_words));
  m.impl("box_muller", TORCH_BOX(&egrpo::box_muller_op));
}

#if defined(USE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(egrpo_fast, CUDA, m) {
  m.impl("branch_rows", TORCH_BOX(&egrpo::branch_rows));
}
#endif
