// Products of a few float rows with block-quantized weights, as XLA custom calls for the CPU.
//
// y[b, o] = sum_i x[b, i] w[o, i]. The weights are decoded in registers and x stays float32: with two AVX-512 cores the
// product is close to the speed of memory already, so that integer products with a quantized x would only cost accuracy.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

enum Kind : int64_t { kQ8_0 = 0, kQ4_0 = 1, kQ4_K = 2 };

struct Problem {
  const float* x;          // [batch, inner]
  const uint8_t* codes;    // [outer, inner] int8 (Q8_0) or [outer, inner / 2]
  const uint16_t* scales;  // [outer, inner / 32] float16 (Q8_0, Q4_0)
  const uint8_t* levels;   // [outer, inner / 32] (Q4_K: s)
  const uint8_t* mins;     // [outer, inner / 32] (Q4_K: m)
  const uint16_t* steps;   // [outer, inner / 256, 2] float16 (Q4_K: d, dmin)
  float* y;                // [batch, outer]
  int64_t batch, inner, outer;
};

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// kLanes codes as integers. Compilers widen bytes by way of half vectors, at three times the instructions.
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline Ints widen_signed(const void* p) { return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
inline Ints widen_bytes(const void* p) { return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
inline Ints widen_words(const void* p) { return (Ints)_mm512_cvtepu16_epi32(load<__m256i>(p)); }
#elif defined(__AVX2__)
inline Ints widen_signed(const void* p) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline Ints widen_bytes(const void* p) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline Ints widen_words(const void* p) { return (Ints)_mm256_cvtepu16_epi32(load<__m128i>(p)); }
#else
template <typename T>
inline Ints widen(const void* p) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
  return __builtin_convertvector(load<Narrow>(p), Ints);
}
inline Ints widen_bytes(const void* p) { return widen<uint8_t>(p); }
inline Ints widen_signed(const void* p) { return (widen_bytes(p) << 24) >> 24; }  // SSE2 has no signed widening
inline Ints widen_words(const void* p) { return widen<uint16_t>(p); }
#endif

inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

// scale q - offset for the low and the high four bits q of kLanes bytes, each with a scale and an offset of its own.
inline void nibbles(const void* p, const float* scales, const float* offsets, int high_at, Floats& low, Floats& high) {
  const Ints both = widen_bytes(p);
#if defined(__AVX512F__) && defined(__AVX512BW__)
  // A look-up reads the low four bits of its index only, and one table serves all weights of a scale.
  const Floats levels = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats low_table = levels * scales[0] - offsets[0], high_table = levels * scales[high_at] - offsets[high_at];
  low = (Floats)_mm512_permutexvar_ps((__m512i)both, (__m512)low_table);
  high = (Floats)_mm512_permutexvar_ps((__m512i)(both >> 4), (__m512)high_table);
#else
  low = to_float(both & 15) * scales[0] - offsets[0];
  high = to_float(both >> 4) * scales[high_at] - offsets[high_at];
#endif
}

// float16 to float32 by bits. XLA runs with subnormals flushed to zero, so those of float16 (scales below 6e-5, which
// small weights have) are rebuilt from their integer mantissa and never pass through a float32 subnormal.
inline Floats from_half(const uint16_t* p) {
  const Ints bits = widen_words(p);
  const Ints sign = (bits & 0x8000) << 16, exponent = bits & 0x7c00, rest = (bits & 0x7fff) << 13;
  const Floats tiny = to_float(bits & 0x3ff) * 0x1p-24f;
  const Ints wide = rest + (exponent == 0x7c00 ? Ints{} + ((255 - 31) << 23) : Ints{} + ((127 - 15) << 23));
  return (Floats)((exponent == 0 ? (Ints)tiny : wide) | sign);
}

inline float total(Floats v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Blocks that are decoded together: Q4_K keeps two in one run of bytes.
template <int KIND>
constexpr int kTogether = KIND == kQ4_K ? 2 : 1;

// `kTogether` blocks of a row from block `b` on, in order. The two of Q4_K are the low and the high bits of their bytes.
template <int KIND>
inline void decode(const uint8_t* row, int64_t b, const float* scales, const float* offsets, Floats* w) {
  constexpr int parts = 32 / kLanes;
  if constexpr (KIND == kQ8_0) {
    for (int i = 0; i < parts; ++i) w[i] = to_float(widen_signed(row + 32 * b + kLanes * i)) * scales[0];
  } else {
    constexpr int half = parts * kTogether<KIND> / 2;
    for (int i = 0; i < half; ++i)
      nibbles(row + 16 * b + kLanes * i, scales, offsets, kTogether<KIND> - 1, w[i], w[half + i]);
  }
}

// Scale and offset of 16 blocks of a row from block `b` on: a weight is scale q - offset, with offset 8 d in Q4_0 and the
// minimum in Q4_K. Those past `count` are zero.
template <int KIND>
inline void constants(const Problem& p, int64_t row, int64_t b, int64_t count, float* scales, float* offsets) {
  const int64_t at = row * (p.inner / 32) + b;
  uint8_t filled[3][32] = {};
  const auto first = [&](int which, const void* from, int64_t size) -> const void* {
    if (count == 16) return from;
    std::memcpy(filled[which], from, size);
    return filled[which];
  };
  if constexpr (KIND == kQ4_K) {
    const void* levels = first(0, p.levels + at, count);
    const void* mins = first(1, p.mins + at, count);
    // d and dmin of two sets of eight blocks; a row has whole sets, so the second may be missing but not begun.
    alignas(64) uint16_t halves[16] = {};
    std::memcpy(halves, p.steps + at / 4, count / 2);
    const Floats v = from_half(halves);
    alignas(64) float steps[kLanes], d[16], dmin[16];
    std::memcpy(steps, &v, sizeof(v));
    for (int i = 0; i < 16; ++i) d[i] = steps[i / 8 * 2], dmin[i] = steps[i / 8 * 2 + 1];
    for (int i = 0; i < 16; i += kLanes) {
      const Floats s = load<Floats>(d + i) * to_float(widen_bytes((const uint8_t*)levels + i));
      const Floats m = load<Floats>(dmin + i) * to_float(widen_bytes((const uint8_t*)mins + i));
      std::memcpy(scales + i, &s, sizeof(s));
      std::memcpy(offsets + i, &m, sizeof(m));
    }
  } else {
    const void* halves = first(0, p.scales + at, 2 * count);
    for (int i = 0; i < 16; i += kLanes) {
      const Floats s = from_half((const uint16_t*)halves + i), m = s * 8.0f;
      std::memcpy(scales + i, &s, sizeof(s));
      if constexpr (KIND == kQ4_0) std::memcpy(offsets + i, &m, sizeof(m));
    }
  }
}

// ROWS rows of the weight by BATCH rows of x. Every output is summed in the same order whatever ROWS and BATCH are, so
// that a row of x gets the same bits at any place in any batch.
template <int KIND, int ROWS, int BATCH>
void tile(const Problem& p, int64_t row, int64_t batch) {
  constexpr int together = kTogether<KIND>, parts = 32 / kLanes, block_bytes = KIND == kQ8_0 ? 32 : 16;
  const int64_t blocks = p.inner / 32, row_bytes = blocks * block_bytes;
  const float* x = p.x + batch * p.inner;
  Floats sum[ROWS][BATCH] = {};
  for (int64_t b0 = 0; b0 < blocks; b0 += 16) {
    const int64_t count = blocks - b0 < 16 ? blocks - b0 : 16;
    alignas(64) float scales[ROWS][16], offsets[ROWS][16];
    for (int r = 0; r < ROWS; ++r) constants<KIND>(p, row + r, b0, count, scales[r], offsets[r]);
    for (int64_t b = 0; b < count; b += together) {
      Floats w[ROWS][together * parts];
      for (int r = 0; r < ROWS; ++r) {
        decode<KIND>(p.codes + (row + r) * row_bytes, b0 + b, scales[r] + b, offsets[r] + b, w[r]);
        // The rows of the next tile, which lie right behind: hardware stops at each page, which a row may be.
        __builtin_prefetch(p.codes + (row + ROWS + r) * row_bytes + (b0 + b) * block_bytes);
      }
      for (int m = 0; m < BATCH; ++m) {
        for (int i = 0; i < together * parts; ++i) {
          const Floats v = load<Floats>(x + m * p.inner + 32 * (b0 + b) + kLanes * i);
          for (int r = 0; r < ROWS; ++r) sum[r][m] += w[r][i] * v;
        }
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < BATCH; ++m) p.y[(batch + m) * p.outer + row + r] = total(sum[r][m]);
}

template <int KIND, int ROWS, int BATCH>
void strip(const Problem& p, int64_t batch, int64_t first, int64_t last) {
  if (last - first < ROWS) {
    for (int64_t row = first; row < last; ++row)
      for (int m = 0; m < BATCH; ++m) tile<KIND, 1, 1>(p, row, batch + m);
    return;
  }
  for (int64_t row = first; row < last; row += ROWS)  // the last tile may do rows again
    tile<KIND, ROWS, BATCH>(p, row + ROWS <= last ? row : last - ROWS, batch);
}

template <int KIND>
void rows(const Problem& p, int64_t first, int64_t last) {
  int64_t batch = 0;
  for (; batch + 8 <= p.batch; batch += 8) strip<KIND, 2, 8>(p, batch, first, last);
  if (p.batch - batch >= 4) strip<KIND, 4, 4>(p, batch, first, last), batch += 4;
  if (p.batch - batch >= 2) strip<KIND, 4, 2>(p, batch, first, last), batch += 2;
  if (p.batch - batch >= 1) strip<KIND, 4, 1>(p, batch, first, last);
}

template <int KIND>
ffi::Error multiply(ffi::ThreadPool& pool, const Problem& problem) {
  // Pieces of about a hundred thousand products: enough of them to even out threads that are held up, and none so short
  // that waking a thread for it takes longer than it does.
  const int64_t products = problem.batch * problem.inner;
  const int64_t least = products > 0 ? (100000 + products - 1) / products : 1;
  const int64_t share = (problem.outer + 63) / 64;
  const int64_t size = ((share > least ? share : least) + 7) / 8 * 8;
  ruvjax::parallel(pool, (problem.outer + size - 1) / size, [&](int64_t i) {
    const int64_t first = i * size;
    rows<KIND>(problem, first, first + size < problem.outer ? first + size : problem.outer);
  });
  return ffi::Error::Success();
}

Problem begin(const ffi::Buffer<ffi::F32>& x, const ffi::AnyBuffer& codes, ffi::ResultBuffer<ffi::F32>& y) {
  Problem p{};
  p.x = x.typed_data();
  p.codes = static_cast<const uint8_t*>(codes.untyped_data());
  p.y = y->typed_data();
  p.batch = x.dimensions()[0];
  p.inner = x.dimensions()[1];
  p.outer = y->dimensions()[1];
  return p;
}

ffi::Error plain(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                 ffi::ResultBuffer<ffi::F32> y, int64_t bits) {
  Problem p = begin(x, codes, y);
  p.scales = static_cast<const uint16_t*>(scales.untyped_data());
  return bits == 8 ? multiply<kQ8_0>(pool, p) : multiply<kQ4_0>(pool, p);
}

ffi::Error nested(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer levels,
                  ffi::AnyBuffer mins, ffi::AnyBuffer steps, ffi::ResultBuffer<ffi::F32> y) {
  Problem p = begin(x, codes, y);
  p.levels = static_cast<const uint8_t*>(levels.untyped_data());
  p.mins = static_cast<const uint8_t*>(mins.untyped_data());
  p.steps = static_cast<const uint16_t*>(steps.untyped_data());
  return multiply<kQ4_K>(pool, p);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_quant_matmul, plain,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_quant_matmul_nested, nested,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
