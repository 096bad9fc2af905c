// float <-> bfloat16 and float16, rounded to nearest even as PyTorch does; branch-free on the host, so that loops
// vectorise without the CPU's own conversions.
#pragma once

#include "philox.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace egrpo {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

EGRPO_FN float to_float(float value) { return value; }

EGRPO_FN float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

EGRPO_FN float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Exponent and fraction moved into a float's fields are the value times 2^-112: an exact scaling mends them.
  const uint32_t magnitude = (value.bits & 0x7FFFu) << 13;
  const uint32_t special = magnitude >= (0x7C00u << 13) ? 0x7F800000u : 0u;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  return float_of(bits_of(float_of(magnitude) * 0x1p112f) | special | sign);
#endif
}

template <class To>
EGRPO_FN To from_float(float value);

template <>
EGRPO_FN float from_float<float>(float value) {
  return value;
}

template <>
EGRPO_FN BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
#endif
}

template <>
EGRPO_FN Float16 from_float<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-14 the result counts units of 2^-24, which is what adding 1/2 leaves in the fraction, rounded.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t rounded = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t normal = rounded < 0x7C00u ? rounded : 0x7C00u;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t result = magnitude > 0x7F800000u ? 0x7E00u : finite;
  return {static_cast<uint16_t>(result | bits >> 31 << 15)};
#endif
}

}  // namespace egrpo
