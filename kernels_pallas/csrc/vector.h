// Vectors of float32 as wide as the processor's registers, and their exponential.

#ifndef RUVJAX_VECTOR_H_
#define RUVJAX_VECTOR_H_

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ruvjax {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// The first `count` lanes; the others are 0, and are not written.
inline Floats load(const float* from, int64_t count) {
  Floats v{};
  if (count == kLanes)
    std::memcpy(&v, from, sizeof(v));
  else
    std::memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void store(float* to, Floats v, int64_t count) {
  if (count == kLanes)
    std::memcpy(to, &v, sizeof(v));
  else
    std::memcpy(to, &v, count * sizeof(float));
}

// e^x within 1.5 units in the last place: x = n ln 2 + r, and a polynomial in r. 1 at 0, 0 at -inf, inf at inf, NaN at
// NaN. What is below 2^-125 may become 0.
inline Floats exp(Floats x) {
#if defined(__AVX512F__)
  // Of a NaN and a bound these give the second operand.
  x = (Floats)_mm512_min_ps(_mm512_set1_ps(89.0f), (__m512)x);
  x = (Floats)_mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x);
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
  x = x > 89.0f ? Floats{} + 89.0f : x;
  x = x < -87.5f ? Floats{} - 87.5f : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer stands in the low bits
  const Floats n = shifted - 12582912.0f;
#endif
  Floats r = x - n * 0.693145752f;  // ln 2 to 16 bits, so that the product is exact, and the rest of it
  r = r - n * 1.42860677e-6f;
  Floats p = Floats{} + 0.00138131482f;
  p = p * r + 0.00836941879f;
  p = p * r + 0.041668456f;
  p = p * r + 0.166665152f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // In two factors: 2^128 is no float. 2^-127 becomes 0.
  return p * (Floats)(((Ints)shifted << 23) + (126 << 23)) * 2.0f;
#endif
}

}  // namespace ruvjax

#endif  // RUVJAX_VECTOR_H_
