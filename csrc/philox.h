// eps(seed, stream, position): Philox4x32-10 words and the Box-Muller normals made from them, for host and device.
//
// One set of bits everywhere. The functions use IEEE additions, multiplications and square roots only, each rounded on
// its own: never libm, never a fused multiply-add (-ffp-contract=off on the host, -fmad=false on the device). The same
// normals therefore come out of every CPU, vector width and GPU. The words are the noise contract's
// (egrpo_fast/noise.py); the normals are within 4 units in the last place of its float64 evaluation: the radius within
// 1, cosine and sine within 1.5 (each takes 2^24 values, and tests/extension/test_noise.py tries them all), and their
// product rounds once more.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define EGRPO_FN __host__ __device__ __forceinline__
#define EGRPO_UNROLL _Pragma("unroll")  // arrays indexed by constants alone stay in registers
#else
#define EGRPO_FN inline __attribute__((always_inline))  // so that a body takes the instruction set of its caller's loop
#define EGRPO_UNROLL                                    // loops become vectors
#endif

namespace egrpo {

EGRPO_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

EGRPO_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Words {
  uint32_t w0, w1, w2, w3;
};

// Ten rounds on a 128-bit counter under a 64-bit key. Source: Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011).
EGRPO_FN Words philox4x32(Words counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.w0;
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.w2;
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// `-2 ln u`, u = n / 2^24, n in [1, 2^24]. With u = 2^k m and m in [sqrt(1/2), sqrt(2)), f = m - 1 is exact and
// `ln u = k ln 2 + f - f^2 / 2 + f^3 Q(f)`; ln 2 is split so that its leading product with k is exact.
EGRPO_FN float minus_two_log(uint32_t n) {
  const uint32_t bits = bits_of(static_cast<float>(static_cast<int32_t>(n)));
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3) >> 23;  // of sqrt(1/2) and above
  const float f = float_of(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float k = static_cast<float>(exponent - 24);
  float q = -0.07634495943784714f;
  q = q * f + 0.1276157945394516f;
  q = q * f - 0.13160184025764465f;
  q = q * f + 0.14201757311820984f;
  q = q * f - 0.16623356938362122f;
  q = q * f + 0.20001226663589478f;
  q = q * f - 0.2500081956386566f;
  q = q * f + 0.3333333134651184f;
  const float square = f * f;
  const float rest = square * f * q + k * 1.428606765330187e-6f;
  return -2.0f * (k * 0.693145751953125f + (f - (0.5f * square - rest)));
}

// `(cos, sin)(2 pi n / 2^24)`, n in [0, 2^24). The quadrant and f = the rest of the turn, |f| <= 1/8, are exact; 6 f is
// exact too, so that only the small part of `2 pi f = 6 f + 0.283... f` is rounded before the last addition.
EGRPO_FN void cos_sin_turn(uint32_t n, float& cos, float& sin) {
  const uint32_t quadrant = (n + (1u << 21)) >> 22;
  const float f = static_cast<float>(static_cast<int32_t>(n - (quadrant << 22))) * 0x1p-24f;
  const float z = f * f;
  const float s = 6.0f * f + f * (0.28318530321121216f +
                                  z * (-41.341670989990234f + z * (81.59346771240234f - z * 75.43453216552734f)));
  const float c = 1.0f - z * (19.739208221435547f -
                              z * (64.93932342529297f - z * (85.4432373046875f - z * 59.229244232177734f)));
  const bool odd = quadrant & 1;
  cos = float_of(bits_of(odd ? s : c) ^ ((quadrant + 1) & 2) << 30);
  sin = float_of(bits_of(odd ? c : s) ^ (quadrant & 2) << 30);
}

// `(sqrt(-2 ln u1) cos 2 pi u2, sqrt(-2 ln u1) sin 2 pi u2)`, u1 = ((a >> 8) + 1) / 2^24, u2 = (b >> 8) / 2^24.
EGRPO_FN void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float radius = sqrtf(minus_two_log((a >> 8) + 1));
  float cos, sin;
  cos_sin_turn(b >> 8, cos, sin);
  first = radius * cos;
  second = radius * sin;
}

// Normals of positions 4 block to 4 block + COUNT - 1 of a stream (counter words 1 to 3).
template <int COUNT>
EGRPO_FN void philox_normal(float (&eps)[COUNT], uint32_t block, uint32_t iteration, uint32_t prompt, uint32_t draw,
                            uint64_t seed) {
  static_assert(COUNT % 4 == 0, "a counter gives four normals");
  EGRPO_UNROLL
  for (int i = 0; i < COUNT / 4; ++i) {
    const Words words = philox4x32({block + static_cast<uint32_t>(i), iteration, prompt, draw}, seed);
    box_muller(words.w0, words.w1, eps[4 * i], eps[4 * i + 1]);
    box_muller(words.w2, words.w3, eps[4 * i + 2], eps[4 * i + 3]);
  }
}

}  // namespace egrpo
