// One instruction set's kernels, in the namespace BODY with LANES floats to a vector. Included several times by
// matvec.cc, so without an include guard.

namespace BODY {

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <typename V>
static inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// LANES codes as integers. Compilers widen bytes by way of half vectors, at three times the instructions.
#if LANES == 16
static inline Ints widen_signed(const void* p) { return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
static inline Ints widen_bytes(const void* p) { return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
static inline Ints widen_words(const void* p) { return (Ints)_mm512_cvtepu16_epi32(load<__m256i>(p)); }
#elif LANES == 8
static inline Ints widen_signed(const void* p) { return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline Ints widen_bytes(const void* p) { return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline Ints widen_words(const void* p) { return (Ints)_mm256_cvtepu16_epi32(load<__m128i>(p)); }
#else
template <typename T>
static inline Ints widen(const void* p) {
  typedef T Narrow __attribute__((vector_size(LANES * sizeof(T))));
  return __builtin_convertvector(load<Narrow>(p), Ints);
}
static inline Ints widen_bytes(const void* p) { return widen<uint8_t>(p); }
static inline Ints widen_signed(const void* p) { return (widen_bytes(p) << 24) >> 24; }  // SSE2 has no signed widening
static inline Ints widen_words(const void* p) { return widen<uint16_t>(p); }
#endif

static inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

// The low and the high four bits of LANES bytes.
static inline void nibbles(const void* p, Floats& low, Floats& high) {
  const Ints both = widen_bytes(p);
#if LANES == 16
  // A table look-up reads the low four bits of its index only: one instruction in the place of a mask and a conversion.
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  low = (Floats)_mm512_permutexvar_ps((__m512i)both, table);
  high = (Floats)_mm512_permutexvar_ps((__m512i)(both >> 4), table);
#else
  low = to_float(both & 15);
  high = to_float(both >> 4);
#endif
}

// float16 to float32 by bits. XLA runs with subnormals flushed to zero, so those of float16 (scales below 6e-5, which
// small weights have) are rebuilt from their integer mantissa and never pass through a float32 subnormal.
static inline Floats from_half(const uint16_t* p) {
  const Ints bits = widen_words(p);
  const Ints sign = (bits & 0x8000) << 16, exponent = bits & 0x7c00, rest = (bits & 0x7fff) << 13;
  const Floats tiny = to_float(bits & 0x3ff) * 0x1p-24f;
  const Ints wide = rest + (exponent == 0x7c00 ? Ints{} + ((255 - 31) << 23) : Ints{} + ((127 - 15) << 23));
  return (Floats)((exponent == 0 ? (Ints)tiny : wide) | sign);
}

static inline float total(Floats v) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += v[i];
  return sum;
}

// Blocks that are decoded together: Q4_K keeps two in one run of bytes.
template <int KIND>
constexpr int kTogether = KIND == kQ4_K ? 2 : 1;

// The codes of `kTogether` blocks of a row from block `b` on, in order.
template <int KIND>
static inline void decode(const uint8_t* row, int64_t b, Floats* codes) {
  if constexpr (KIND == kQ8_0) {
    for (int i = 0; i < 32 / LANES; ++i) codes[i] = to_float(widen_signed(row + 32 * b + LANES * i));
  } else {
    constexpr int half = 16 * kTogether<KIND> / LANES;
    for (int i = 0; i < half; ++i) nibbles(row + 16 * b + LANES * i, codes[i], codes[half + i]);
  }
}

// Scales of 16 blocks of a row from block `b` on, and what one unit of the sum of x in each costs: 8 d for Q4_0, the
// minimum for Q4_K. Those past `count` are zero.
template <int KIND>
static inline void constants(const Problem& p, int64_t row, int64_t b, int64_t count, float* scales, float* offsets) {
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
    alignas(64) float steps[LANES], d[16], dmin[16];
    std::memcpy(steps, &v, sizeof(v));
    for (int i = 0; i < 16; ++i) d[i] = steps[i / 8 * 2], dmin[i] = steps[i / 8 * 2 + 1];
    for (int i = 0; i < 16; i += LANES) {
      const Floats s = load<Floats>(d + i) * to_float(widen_bytes((const uint8_t*)levels + i));
      const Floats m = load<Floats>(dmin + i) * to_float(widen_bytes((const uint8_t*)mins + i));
      std::memcpy(scales + i, &s, sizeof(s));
      std::memcpy(offsets + i, &m, sizeof(m));
    }
  } else {
    const void* halves = first(0, p.scales + at, 2 * count);
    for (int i = 0; i < 16; i += LANES) {
      const Floats s = from_half((const uint16_t*)halves + i), m = s * 8.0f;
      std::memcpy(scales + i, &s, sizeof(s));
      if constexpr (KIND == kQ4_0) std::memcpy(offsets + i, &m, sizeof(m));
    }
  }
}

template <int KIND, int ROWS, int BATCH>
static void tile(const Problem& p, int64_t row, int64_t batch) {
  constexpr int together = kTogether<KIND>, parts = 32 / LANES;
  const int64_t blocks = p.inner / 32, row_bytes = KIND == kQ8_0 ? p.inner : p.inner / 2;
  const float* x = p.x + batch * p.inner;
  Floats sum[ROWS][BATCH] = {};
  for (int64_t b0 = 0; b0 < blocks; b0 += 16) {
    const int64_t count = blocks - b0 < 16 ? blocks - b0 : 16;
    alignas(64) float scales[ROWS][16], offsets[16];
    for (int r = 0; r < ROWS; ++r) {
      constants<KIND>(p, row + r, b0, count, scales[r], offsets);
      if constexpr (KIND != kQ8_0) {
        for (int m = 0; m < BATCH; ++m)  // the sums are padded with zeros to whole runs of 16 blocks
          for (int i = 0; i < 16; i += LANES)
            sum[r][m] -= load<Floats>(offsets + i) * load<Floats>(p.sums + (batch + m) * p.sums_stride + b0 + i);
      }
    }
    for (int64_t b = 0; b < count; b += together) {
      Floats codes[ROWS][together * parts];
      for (int r = 0; r < ROWS; ++r) {
        decode<KIND>(p.codes + (row + r) * row_bytes, b0 + b, codes[r]);
        if constexpr (BATCH > 1)
          for (int i = 0; i < together * parts; ++i) codes[r][i] *= scales[r][b + i / parts];
      }
      for (int m = 0; m < BATCH; ++m) {
        const float* at = x + m * p.inner + 32 * (b0 + b);
        for (int k = 0; k < together; ++k) {
          Floats block[ROWS] = {};
          for (int i = k * parts; i < (k + 1) * parts; ++i) {
            const Floats v = load<Floats>(at + LANES * i);
            for (int r = 0; r < ROWS; ++r) {
              if constexpr (BATCH > 1)
                sum[r][m] += codes[r][i] * v;
              else
                block[r] = i == k * parts ? codes[r][i] * v : block[r] + codes[r][i] * v;
            }
          }
          if constexpr (BATCH == 1)
            for (int r = 0; r < ROWS; ++r) sum[r][m] += block[r] * scales[r][b + k];
        }
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int m = 0; m < BATCH; ++m) p.y[(batch + m) * p.outer + row + r] = total(sum[r][m]);
}

template <int KIND, int ROWS, int BATCH>
static void strip(const Problem& p, int64_t batch, int64_t first, int64_t last) {
  if (last - first < ROWS) {
    for (int64_t row = first; row < last; ++row)
      for (int m = 0; m < BATCH; ++m) tile<KIND, 1, 1>(p, row, batch + m);
    return;
  }
  for (int64_t row = first; row < last; row += ROWS)  // the last tile may do rows again
    tile<KIND, ROWS, BATCH>(p, row + ROWS <= last ? row : last - ROWS, batch);
}

template <int KIND>
static void rows(const Problem& p, int64_t first, int64_t last) {
  int64_t batch = 0;
  for (; batch + 8 <= p.batch; batch += 8) strip<KIND, 2, 8>(p, batch, first, last);
  if (p.batch - batch >= 4) strip<KIND, 4, 4>(p, batch, first, last), batch += 4;
  if (p.batch - batch >= 2) strip<KIND, 4, 2>(p, batch, first, last), batch += 2;
  if (p.batch - batch >= 1) strip<KIND, 4, 1>(p, batch, first, last);
}

static const Kernels kernels = {{rows<kQ8_0>, rows<kQ4_0>, rows<kQ4_K>}};

}  // namespace BODY
