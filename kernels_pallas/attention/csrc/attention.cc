// Softmax attention and its gradient on a CPU, as XLA custom calls.
//
// q is [batch, queries, heads, dim], k and v are [batch, keys, kv_heads, dim], all read where they lie. One task of the
// forward pass is a few hundred queries of one head, one task of the backward pass a key head with the query heads that
// share it. Both walk over blocks of keys and of queries so small that a block's scores stay in cache; the forward pass
// keeps a running maximum and sum (online softmax), the backward pass computes the probabilities again from the
// log-sum-exp. No result depends on the number of threads.
//
// All dots have one form, C[i, :] = sum_k A[i, k] B[k, :]: a word of A is broadcast and multiplied with vectors of B. In
// `Single` a word is a float, in `Pairs` two bfloat16 neighbours along k, which one instruction multiplies and adds.
// `Tiles` are pairs that a processor with AMX multiplies 16 rows by 16 columns at a time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Registers for kRows x kColumns accumulators, a row of B and a broadcast.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int kColumns = 2;                  // vectors
constexpr int64_t kTile = kColumns * kLanes;  // keys of one tile of scores
constexpr int64_t kQueryBlock = 64;           // queries of one block of the backward pass
constexpr int64_t kMaxDim = 256;
constexpr float kInfinity = __builtin_inff();

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

inline Floats fill(float x) { return Floats{} + x; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Lanes of a and b (numbered on from a's) in the order of `index`.
inline Floats shuffle(Floats a, Floats b, Ints index) {
#if defined(__clang__)
  Floats to;
  for (int i = 0; i < kLanes; ++i) to[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return to;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

struct Lanes {
  int32_t index[kLanes];
};

template <typename F>
constexpr Lanes lanes(F index) {
  Lanes to{};
  for (int i = 0; i < kLanes; ++i) to.index[i] = index(i);
  return to;
}

// Lane i takes lane i ^ kStep.
template <int kStep>
inline Floats exchange(Floats v) {
  static constexpr Lanes order = lanes([](int i) { return i ^ kStep; });
  return shuffle(v, v, load<Ints>(order.index));
}

inline Floats more(Floats a, Floats b) { return a > b ? a : b; }

template <int kStep = kLanes / 2>
inline float largest(Floats v) {
  v = more(v, exchange<kStep>(v));
  if constexpr (kStep > 1) return largest<kStep / 2>(v);
  return v[0];
}

template <int kStep = kLanes / 2>
inline float total(Floats v) {
  v = v + exchange<kStep>(v);
  if constexpr (kStep > 1) return total<kStep / 2>(v);
  return v[0];
}

// 2^x within 2 units in the last place, for x up to 127. -inf gives 0 or less than 1e-38, NaN stays NaN.
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Floats f = x - (Floats)n;
#else
  x = x < -127.0f ? fill(-127.0f) : x;
  const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer nearest to x stands in the low bits
  const Floats f = x - (shifted - 12582912.0f);
#endif
  Floats p = fill(0.0013264727080064078f);
  p = p * f + 0.009671512862184924f;
  p = p * f + 0.055507337456458423f;
  p = p * f + 0.24022242081843181f;
  p = p * f + 0.6931469775965878f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, n);
#else
  return (Floats)((Ints)p + ((Ints)shifted << 23));
#endif
}

struct Bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return load<float>(&bits);
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, Bfloat16* to) {
  const uint32_t bits = load<uint32_t>(&x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Floats widen_lanes(const float* from) { return load<Floats>(from); }
inline Floats widen_lanes(const Bfloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  return (Floats)(__builtin_convertvector(load<Halves>(from), Ints) << 16);
}

template <typename T>
inline void widen_row(const T* from, int64_t dim, float* row) {
  int64_t x = 0;
  for (; x + kLanes <= dim; x += kLanes) store(row + x, widen_lanes(from + x));
  for (; x < dim; ++x) row[x] = widen(from[x]);
}

// Dots of floats.
struct Single {
  typedef float Word;
  typedef Floats Vector;
  static constexpr int64_t kPack = 1;  // elements of a word
  static constexpr int64_t kUnit = kRows;    // queries are padded to a multiple of this,
  static constexpr int64_t kWidth = kLanes;  // and rows of heads
  static constexpr bool kTiled = false;
  struct Session {};  // held while a thread multiplies

  static inline Floats dot(Floats sum, const Word* a, Vector b) { return sum + *a * b; }
  static inline void pack(const float* row, int64_t dim, Word* to) { std::memcpy(to, row, dim * sizeof(float)); }
  // Rows of words as the rows of B whose neighbours along k share a word: here as they are.
  static const Word* interleave(const Word* rows, int64_t, int64_t, Word*) { return rows; }
  // A tile of weights as words along its row.
  static inline void put_row(float* row, int64_t x, const Floats (&v)[kColumns]) {
    for (int i = 0; i < kColumns; ++i) store(row + x + i * kLanes, v[i]);
  }
  // kPack rows as words that join the rows, and as words along each row.
  static inline void put_columns(const Floats (&v)[1], Word* to) { store(to, v[0]); }
  static inline void put_rows(const Floats (&)[1], Word*, int64_t, int64_t) {}
  // Words may reach over the last column: what stands there must not count.
  static inline void clear_tail(Word*, int64_t, int64_t, int64_t) {}
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_PAIRS 1
// Dots of bfloat16, summed in float.
struct Pairs {
  typedef uint32_t Word;
  typedef __m512i Vector;
  static constexpr int64_t kPack = 2;
  static constexpr int64_t kUnit = kRows, kWidth = kLanes;
  static constexpr bool kTiled = false;
  struct Session {};

  static inline Floats dot(Floats sum, const Word* a, Vector b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), (__m512bh)b);
  }
  static inline __m512i join(Floats low, Floats high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
  static inline void pack(const float* row, int64_t dim, Word* to) {
    for (int64_t x = 0; x < dim; x += kLanes)
      store(to + x / 2, (__m256i)_mm512_cvtneps_pbh((__m512)load<Floats>(row + x)));
  }
  static const Word* interleave(const Word* rows, int64_t count, int64_t width, Word* to) {
    for (int64_t i = 0; i < count; i += 2)
      for (int64_t x = 0; x < width; x += kLanes) {
        const Word* from = rows + i * (width / 2) + x / 2;
        const __m512i low = _mm512_cvtepu16_epi32(load<__m256i>(from));
        const __m512i high = _mm512_cvtepu16_epi32(load<__m256i>(from + width / 2));
        store(to + i / 2 * width + x, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    return to;
  }
  static inline void put_row(float* row, int64_t x, const Floats (&v)[kColumns]) { store(row + x / 2, join(v[0], v[1])); }
  static inline void put_columns(const Floats (&v)[2], Word* to) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    store(to, _mm512_permutexvar_epi16(order, join(v[0], v[1])));
  }
  static inline void put_rows(const Floats (&v)[2], Word* to, int64_t ld, int64_t x) {
    const __m512i both = join(v[0], v[1]);
    store(to + x / 2, _mm512_castsi512_si256(both));
    store(to + ld + x / 2, _mm512_extracti64x4_epi64(both, 1));
  }
  static inline void clear_tail(Word* rows, int64_t count, int64_t ld, int64_t columns) {
    if (columns % 2)
      for (int64_t i = 0; i < count; ++i) rows[i * ld + columns / 2] &= 0xffff;
  }
};
#endif

#if defined(HAVE_PAIRS) && defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_TILES 1
struct Tiles : Pairs {
  static constexpr int64_t kUnit = 32, kWidth = 32;
  static constexpr bool kTiled = true;

  // All eight tiles are 16 rows of 64 bytes. They are part of a thread's state, so they are given back soon.
  struct Session {
    Session() {
      struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shape;
      // Not _tile_loadconfig: gcc's names one word of the structure as what is read.
      __asm__ volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Session() { _tile_release(); }
  };

  static inline void clear_tail(Word* rows, int64_t count, int64_t ld, int64_t columns) {
    Pairs::clear_tail(rows, count, ld, columns);
    const int64_t first = (columns + 1) / 2, end = round_up(first, 16);
    for (int64_t i = 0; i < count; ++i) std::memset(rows + i * ld + first, 0, (end - first) * sizeof(Word));
  }

  // The kernel lends the tiles to a process that asks.
  static bool allowed() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return granted;
  }

  // rows, width are multiples of 32, steps of 16; steps are neighbours in `a`.
  static void multiply(int64_t rows, int64_t width, int64_t steps, const Word* a, int64_t stride, const Word* b, int64_t ldb,
                       float* c, int64_t ldc, bool accumulate) {
    // The compiler does not know that tiles are read from memory and written to it.
    __asm__ volatile("" ::: "memory");
    for (int64_t x = 0; x < width; x += 32) {
      for (int64_t i = 0; i < rows; i += 32) {
        float *top = c + i * ldc + x, *bottom = top + 16 * ldc;
        if (accumulate) {
          _tile_loadd(0, top, 4 * ldc);
          _tile_loadd(1, top + 16, 4 * ldc);
          _tile_loadd(2, bottom, 4 * ldc);
          _tile_loadd(3, bottom + 16, 4 * ldc);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t k = 0; k < steps; k += 16) {
          const Word *left = a + i * stride + k, *right = b + k * ldb + x;
          _tile_loadd(4, left, 4 * stride);
          _tile_loadd(5, left + 16 * stride, 4 * stride);
          _tile_loadd(6, right, 4 * ldb);
          _tile_loadd(7, right + 16, 4 * ldb);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, top, 4 * ldc);
        _tile_stored(1, top + 16, 4 * ldc);
        _tile_stored(2, bottom, 4 * ldc);
        _tile_stored(3, bottom + 16, 4 * ldc);
      }
    }
    __asm__ volatile("" ::: "memory");
  }
};
#endif

// C[rows, columns of vectors] (+)= A B. A word of row i and step k is a[i * row_stride + k * step_stride], and one of
// the two strides is 1: kAlong says whether the steps are neighbours (rows of A) or the rows are (columns).
enum Along { kSteps, kAcross };

template <typename P, Along kAlong, int kWide>
inline __attribute__((always_inline)) void tile(int64_t steps, const typename P::Word* a, int64_t stride,
                                                const typename P::Word* b, int64_t ldb, float* c, int64_t ldc,
                                                bool accumulate) {
  Floats sums[kRows][kWide];
  if (accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kWide; ++v) sums[r][v] = load<Floats>(c + r * ldc + v * kLanes);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kWide; ++v) sums[r][v] = Floats{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    typename P::Vector right[kWide];
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) right[v] = load<typename P::Vector>(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < kWide; ++v) sums[r][v] = P::dot(sums[r][v], kAlong == kSteps ? a + r * stride : a + r, right[v]);
    a += kAlong == kSteps ? 1 : stride;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < kWide; ++v) store(c + r * ldc + v * kLanes, sums[r][v]);
}

// rows is a multiple of P::kUnit, width of P::kWidth.
template <typename P, Along kAlong>
void multiply(int64_t rows, int64_t width, int64_t steps, const typename P::Word* a, int64_t stride,
              const typename P::Word* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if constexpr (P::kTiled && kAlong == kSteps)
    return P::multiply(rows, width, round_up(steps, 16), a, stride, b, ldb, c, ldc, accumulate);
  int64_t x = 0;
  for (; x + kTile <= width; x += kTile)
    for (int64_t i = 0; i < rows; i += kRows)
      tile<P, kAlong, kColumns>(steps, kAlong == kSteps ? a + i * stride : a + i, stride, b + x, ldb, c + i * ldc + x, ldc,
                                accumulate);
  for (; x < width; x += kLanes)
    for (int64_t i = 0; i < rows; i += kRows)
      tile<P, kAlong, 1>(steps, kAlong == kSteps ? a + i * stride : a + i, stride, b + x, ldb, c + i * ldc + x, ldc,
                         accumulate);
}

// A square of kLanes vectors is transposed by swapping halves, quarters and so on down to single lanes.
template <int kStep = kLanes / 2>
inline __attribute__((always_inline)) void turn(Floats (&v)[kLanes]) {
  static constexpr Lanes low = lanes([](int i) { return i & kStep ? kLanes + i - kStep : i; });
  static constexpr Lanes high = lanes([](int i) { return i & kStep ? kLanes + i : i + kStep; });
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Floats a = v[i], b = v[i + kStep];
    v[i] = shuffle(a, b, load<Ints>(low.index));
    v[i + kStep] = shuffle(a, b, load<Ints>(high.index));
  }
  if constexpr (kStep > 1) turn<kStep / 2>(v);
}

// to[x, i] = from[i, x] of `rows` (a multiple of kLanes) x `width` words.
template <typename Word>
void transpose(const Word* from, int64_t rows, int64_t width, int64_t stride, Word* to, int64_t ld) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    int64_t x = 0;
    for (; x + kLanes <= width; x += kLanes) {
      Floats square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = load<Floats>(from + (i + r) * stride + x);
      turn(square);
      for (int r = 0; r < kLanes; ++r) store(to + (x + r) * ld + i, square[r]);
    }
    for (; x < width; ++x)
      for (int64_t r = i; r < i + kLanes; ++r) to[x * ld + r] = from[r * stride + x];
  }
}

// Memory of one thread, kept between calls: fresh pages would cost more than the work in them.
template <typename W>
class Buffer {
 public:
  W* need(int64_t count) {
    if (count > size_) {
      memory_.reset(static_cast<W*>(::operator new(count * sizeof(W), std::align_val_t(64))));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(W* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<W, Free> memory_;
  int64_t size_ = 0;
};

template <typename T>
struct Problem {
  const T *q, *k, *v;
  const uint8_t* allowed;  // [mask_batch, queries, keys], or null
  const float *cos, *sin;  // [rotation_batch, length, dim / 2] that rotate q and k, or null
  float scale;
  int64_t batch, queries, keys, heads, kv_heads, dim, mask_batch, rotation_batch;
  int64_t query_block, key_block;  // of a forward task; of both passes

  int64_t group() const { return heads / kv_heads; }
  const float* turn(const float* table, int64_t b) const {
    return table == nullptr ? nullptr : table + (rotation_batch == 1 ? 0 : b) * queries * (dim / 2);
  }
  const uint8_t* mask(int64_t b) const {
    return allowed == nullptr ? nullptr : allowed + (mask_batch == 1 ? 0 : b) * queries * keys;
  }
};

// Rows of one head: position i starts at first + i * stride.
template <typename T>
struct Head {
  const T* first;
  int64_t stride;
  const float *cos, *sin;  // of position 0, or null
};

template <typename T>
inline void rotate(float* __restrict row, int64_t dim, const float* __restrict cos, const float* __restrict sin, float sign) {
  const int64_t half = dim / 2;
  for (int64_t x = 0; x < half; ++x) {
    const float a = row[x], b = row[x + half], s = sign * sin[x];
    row[x] = a * cos[x] - b * s;
    row[x + half] = b * cos[x] + a * s;
  }
}

// Rows [first, first + count) as words, zeros up to `padded` rows and `width` elements. With `bad`, a row that holds a
// value that is not finite becomes zeros and is noted there: zero times NaN would carry it through a mask. Returns
// whether there was any.
template <typename T, typename P>
bool stage(const Head<T>& head, int64_t first, int64_t count, int64_t padded, int64_t dim, int64_t width,
           typename P::Word* to, uint8_t* bad) {
  const int64_t words = width / P::kPack;
  bool any = false;
  float row[kMaxDim] __attribute__((aligned(64)));
  std::memset(row, 0, sizeof(row));
  for (int64_t i = 0; i < count; ++i) {
    const T* from = head.first + (first + i) * head.stride;
    widen_row(from, dim, row);
    if (head.cos != nullptr) {
      rotate<T>(row, dim, head.cos + (first + i) * (dim / 2), head.sin + (first + i) * (dim / 2), 1.0f);
    }
    if (bad != nullptr) {
      Floats sum{};
      for (int64_t x = 0; x < width; x += kLanes) sum += load<Floats>(row + x) * 0.0f;
      bad[i] = !(total(sum) == 0.0f);
      if (bad[i]) {
        std::memset(row, 0, sizeof(row));
        any = true;
      }
    }
    P::pack(row, width, to + i * words);
  }
  std::memset(to + count * words, 0, (padded - count) * words * sizeof(typename P::Word));
  if (bad != nullptr) std::memset(bad + count, 0, padded - count);
  return any;
}

// to = factor * row, turned back where the head was rotated.
template <typename T>
inline void finish(float* row, int64_t dim, float factor, const float* cos, const float* sin, T* to) {
  if (cos != nullptr) rotate<T>(row, dim, cos, sin, -1.0f);
  for (int64_t x = 0; x < dim; ++x) narrow(factor * row[x], to + x);
}

inline Ints chosen(const uint8_t* keep) { return __builtin_convertvector(load<Bytes>(keep), Ints) != 0; }

// Rows [first, first + count) of a mask's columns [from, from + columns), zeros up to `padded` rows and `ld` columns.
inline void stage_mask(const uint8_t* mask, int64_t keys, int64_t first, int64_t count, int64_t padded, int64_t from,
                       int64_t columns, uint8_t* to, int64_t ld) {
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t there = i < count ? columns : 0;
    if (there) std::memcpy(to + i * ld, mask + (first + i) * keys + from, there);
    std::memset(to + i * ld + there, 0, ld - there);
  }
}

// One row of scores becomes weights 2^(c s - peak), packed in place. Updates the row's running peak and sum, and returns
// what earlier weights have to be multiplied with.
template <typename P, bool kMasked>
float soften(float* row, int64_t columns, int64_t padded, float c, const uint8_t* keep, const uint8_t* bad, float& peak,
             float& sum) {
  for (int64_t x = columns; x < padded; ++x) row[x] = -1e30f;  // finite: exp2 makes it 0
  Floats most[kColumns];
  for (auto& m : most) m = fill(-kInfinity);
  for (int64_t x = 0; x < padded; x += kTile) {
    for (int v = 0; v < kColumns; ++v) {
      Floats s = load<Floats>(row + x + v * kLanes);
      if (kMasked) {
        s = chosen(keep + x + v * kLanes) ? s : fill(-kInfinity);
        store(row + x + v * kLanes, s);
      }
      most[v] = more(s, most[v]);
    }
  }
  for (int v = 1; v < kColumns; ++v) most[0] = more(most[v], most[0]);
  const float before = peak;
  peak = std::max(before, c * largest(most[0]));
  const float shift = peak == -kInfinity ? 0.0f : peak;
  Floats sums[kColumns] = {};
  for (int64_t x = 0; x < padded; x += kTile) {
    Floats weights[kColumns];
    for (int v = 0; v < kColumns; ++v) {
      const Floats s = load<Floats>(row + x + v * kLanes);
      weights[v] = exp2(s * c - shift);
      if (kMasked) weights[v] = s == -kInfinity ? Floats{} : weights[v];
      sums[v] += weights[v];
    }
    P::put_row(row, x, weights);
  }
  for (int v = 1; v < kColumns; ++v) sums[0] += sums[v];
  const float scale = before == -kInfinity ? 0.0f : std::exp2(before - peak);
  sum = sum * scale + total(sums[0]);
  if (bad != nullptr)
    for (int64_t x = 0; x < columns; ++x)
      if (keep[x] && bad[x]) sum = __builtin_nanf("");
  return scale;
}

template <typename T, typename P>
void forward_task(const Problem<T>& p, T* out, float* lse, int64_t task) {
  typedef typename P::Word Word;
  constexpr int64_t kBlock = 32;  // queries whose scores are computed at a time
  static thread_local Buffer<Word> queries_, keys_, turned_, values_, mixed_;
  static thread_local Buffer<float> scores_, sums_, state_;
  static thread_local Buffer<uint8_t> keep_, bad_queries_, bad_keys_, bad_values_;

  const int64_t pieces = (p.queries + p.query_block - 1) / p.query_block;
  const int64_t b = task / (p.heads * pieces), h = task / pieces % p.heads, first = task % pieces * p.query_block;
  const int64_t kv = h / p.group(), width = round_up(p.dim, P::kWidth), words = width / P::kPack;
  const int64_t count = std::min(p.query_block, p.queries - first), rows = round_up(count, P::kUnit);
  const int64_t most = round_up(std::min(p.key_block, p.keys), kTile), ld = most + kLanes;
  const float c = p.scale * 1.4426950408889634f;  // log2(e): all exponentials are powers of two
  const uint8_t* mask = p.mask(b);
  const bool masked = mask != nullptr;

  Word *queries = queries_.need(rows * words), *keys = keys_.need(most * words), *turned = turned_.need(words * ld);
  Word *rows_of_v = values_.need(most * words), *mixed = mixed_.need(most * width);
  float *scores = scores_.need(kBlock * ld), *sums = sums_.need(rows * width), *state = state_.need(2 * rows);
  float *peak = state, *sum = state + rows;
  uint8_t* keep = keep_.need(kBlock * ld);
  uint8_t *bad_queries = bad_queries_.need(rows), *bad_keys = bad_keys_.need(most), *bad_values = bad_values_.need(most);

  const Head<T> q{p.q + (b * p.queries * p.heads + h) * p.dim, p.heads * p.dim, p.turn(p.cos, b), p.turn(p.sin, b)};
  const Head<T> k{p.k + (b * p.keys * p.kv_heads + kv) * p.dim, p.kv_heads * p.dim, q.cos, q.sin};
  const Head<T> v{p.v + (b * p.keys * p.kv_heads + kv) * p.dim, p.kv_heads * p.dim, nullptr, nullptr};
  stage<T, P>(q, first, count, rows, p.dim, width, queries, masked ? bad_queries : nullptr);
  std::fill(peak, peak + rows, -kInfinity);
  std::fill(sum, sum + rows, 0.0f);

  for (int64_t from = 0; from < p.keys; from += p.key_block) {
    const int64_t columns = std::min(p.key_block, p.keys - from), padded = round_up(columns, kTile);
    bool bad = stage<T, P>(k, from, columns, padded, p.dim, width, keys, masked ? bad_keys : nullptr);
    transpose(keys, padded, words, words, turned, ld);
    bad |= stage<T, P>(v, from, columns, padded, p.dim, width, rows_of_v, masked ? bad_values : nullptr);
    const Word* values = P::interleave(rows_of_v, padded, width, mixed);
    if (bad)
      for (int64_t x = 0; x < padded; ++x) bad_keys[x] |= bad_values[x];
    for (int64_t i = 0; i < rows; i += kBlock) {
      const int64_t block = std::min(kBlock, rows - i);
      multiply<P, kSteps>(block, padded, p.dim / P::kPack, queries + i * words, words, turned, ld, scores, ld, false);
      if (masked) stage_mask(mask, p.keys, first + i, std::min(block, count - i), block, from, columns, keep, ld);
      for (int64_t r = 0; r < std::min(block, count - i); ++r) {
        const float scale = masked ? soften<P, true>(scores + r * ld, columns, padded, c, keep + r * ld,
                                                     bad ? bad_keys : nullptr, peak[i + r], sum[i + r])
                                   : soften<P, false>(scores + r * ld, columns, padded, c, nullptr, nullptr, peak[i + r],
                                                      sum[i + r]);
        if (from > 0)
          for (int64_t x = 0; x < width; ++x) sums[(i + r) * width + x] *= scale;
      }
      multiply<P, kSteps>(block, width, (columns + P::kPack - 1) / P::kPack, reinterpret_cast<const Word*>(scores), ld,
                          values, width, sums + i * width, width, from > 0);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (masked && bad_queries[i] && sum[i] != 0.0f) sum[i] = __builtin_nanf("");
    const bool nothing = sum[i] == 0.0f;
    finish(sums + i * width, p.dim, nothing ? 0.0f : 1.0f / sum[i], nullptr, nullptr,
           out + ((b * p.queries + first + i) * p.heads + h) * p.dim);
    lse[(b * p.queries + first + i) * p.heads + h] = nothing ? 0.0f : peak[i] + std::log2(sum[i]);
  }
}

// kPack rows of scores and of dP become P by columns, dS = P (dP - inner) by columns and dS by rows. In `Single` both
// orders are one, and P and dS take the places of the scores and of dP.
template <typename P, bool kMasked>
void soften_gradient(const float* s, const float* dp, int64_t ld, int64_t padded, float c, const float* lse,
                     const float* inner, const uint8_t* keep, typename P::Word* weights, typename P::Word* gradient,
                     typename P::Word* gradient_rows, int64_t rows_ld) {
  for (int64_t x = 0; x < padded; x += kLanes) {
    Floats weight[P::kPack], ds[P::kPack];
    for (int r = 0; r < P::kPack; ++r) {
      weight[r] = exp2(load<Floats>(s + r * ld + x) * c - lse[r]);
      if (kMasked) weight[r] = chosen(keep + r * ld + x) ? weight[r] : Floats{};
      ds[r] = weight[r] * (load<Floats>(dp + r * ld + x) - inner[r]);
      if (kMasked) ds[r] = chosen(keep + r * ld + x) ? ds[r] : Floats{};
    }
    P::put_columns(weight, weights + x);
    P::put_columns(ds, gradient + x);
    P::put_rows(ds, gradient_rows, rows_ld, x);
  }
}

template <typename T>
struct Gradients {
  const T *out, *dout;
  const float* lse;
  T *dq, *dk, *dv;
  float* partial;  // [splits, batch, queries, heads, dim]: dq by ranges of keys, where one block does not hold them all
  int64_t splits;
};

template <typename T, typename P>
void backward_task(const Problem<T>& p, const Gradients<T>& g, int64_t task) {
  typedef typename P::Word Word;
  static thread_local Buffer<Word> keys_, turned_k_, mixed_k_, values_, turned_v_, queries_, mixed_q_, douts_, mixed_do_;
  static thread_local Buffer<Word> weights_, gradient_, gradient_rows_, turned_rows_;
  static thread_local Buffer<float> scores_, dp_, dq_, dk_, dv_, sums_k_, sums_v_;
  static thread_local Buffer<uint8_t> keep_, bad_;

  const int64_t split = task % g.splits, kv = task / g.splits % p.kv_heads, b = task / g.splits / p.kv_heads;
  const int64_t width = round_up(p.dim, P::kWidth), words = width / P::kPack, steps = p.dim / P::kPack;
  const int64_t most = round_up(std::min(p.key_block, p.keys), kTile), ld = most + kLanes;
  const int64_t blocks = (p.keys + p.key_block - 1) / p.key_block;
  const float c = p.scale * 1.4426950408889634f;
  const uint8_t* mask = p.mask(b);
  const bool masked = mask != nullptr;

  Word *keys = keys_.need(most * words), *turned_k = turned_k_.need(words * ld), *mixed_k = mixed_k_.need(most * width);
  Word *values = values_.need(most * words), *turned_v = turned_v_.need(words * ld);
  Word *queries = queries_.need(kQueryBlock * words), *mixed_q = mixed_q_.need(kQueryBlock * width);
  Word *douts = douts_.need(kQueryBlock * words), *mixed_do = mixed_do_.need(kQueryBlock * width);
  float *scores = scores_.need(kQueryBlock * ld), *dp = dp_.need(kQueryBlock * ld), *dq = dq_.need(kQueryBlock * width);
  float *dk = dk_.need(most * width), *dv = dv_.need(most * width);
  // In tiles dk and dv are summed with the keys along the rows, because the weights lie so.
  float* sums_k = P::kTiled ? sums_k_.need(width * ld) : dk;
  float* sums_v = P::kTiled ? sums_v_.need(width * ld) : dv;
  Word* turned_rows = P::kTiled ? turned_rows_.need(kQueryBlock / 2 * width) : nullptr;
  uint8_t *keep = keep_.need(kQueryBlock * ld), *bad = bad_.need(std::max(most, kQueryBlock));
  float o[kMaxDim] = {}, d[kMaxDim] = {};
  const bool apart = P::kPack > 1;
  Word* weights = apart ? weights_.need(kQueryBlock / P::kPack * ld) : reinterpret_cast<Word*>(scores);
  Word* gradient = apart ? gradient_.need(kQueryBlock / P::kPack * ld) : reinterpret_cast<Word*>(dp);
  Word* gradient_rows = apart ? gradient_rows_.need(kQueryBlock * ld / P::kPack) : gradient;
  const int64_t rows_ld = ld / P::kPack;

  const float *cos = p.turn(p.cos, b), *sin = p.turn(p.sin, b);
  const Head<T> k{p.k + (b * p.keys * p.kv_heads + kv) * p.dim, p.kv_heads * p.dim, cos, sin};
  const Head<T> v{p.v + (b * p.keys * p.kv_heads + kv) * p.dim, p.kv_heads * p.dim, nullptr, nullptr};
  const int64_t begin = split * blocks / g.splits, end = (split + 1) * blocks / g.splits;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t from = chunk * p.key_block, columns = std::min(p.key_block, p.keys - from);
    const int64_t padded = round_up(columns, kTile);
    stage<T, P>(k, from, columns, padded, p.dim, width, keys, masked ? bad : nullptr);
    transpose(keys, padded, words, words, turned_k, ld);
    const Word* rows_of_k = P::interleave(keys, padded, width, mixed_k);
    stage<T, P>(v, from, columns, padded, p.dim, width, values, masked ? bad : nullptr);
    transpose(values, padded, words, words, turned_v, ld);
    for (int64_t member = 0; member < p.group(); ++member) {
      const int64_t h = kv * p.group() + member, offset = (b * p.queries * p.heads + h) * p.dim;
      const Head<T> q{p.q + offset, p.heads * p.dim, cos, sin};
      const Head<T> upstream{g.dout + offset, p.heads * p.dim, nullptr, nullptr};
      for (int64_t first = 0; first < p.queries; first += kQueryBlock) {
        const int64_t count = std::min(kQueryBlock, p.queries - first), rows = round_up(count, P::kUnit);
        float lse[kQueryBlock] = {}, inner[kQueryBlock] = {};
        stage<T, P>(q, first, count, rows, p.dim, width, queries, masked ? bad : nullptr);
        stage<T, P>(upstream, first, count, rows, p.dim, width, douts, masked ? bad : nullptr);
        for (int64_t i = 0; i < count; ++i) {
          // sum_m P dP = dO . O for each query.
          const int64_t at = offset + (first + i) * p.heads * p.dim;
          widen_row(g.out + at, p.dim, o);
          widen_row(g.dout + at, p.dim, d);
          Floats sum{};
          for (int64_t x = 0; x < width; x += kLanes) sum += load<Floats>(o + x) * load<Floats>(d + x);
          inner[i] = total(sum);
          lse[i] = masked && bad[i] ? __builtin_nanf("") : g.lse[(b * p.queries + first + i) * p.heads + h];
        }
        const Word* rows_of_q = P::interleave(queries, rows, width, mixed_q);
        const Word* rows_of_do = P::interleave(douts, rows, width, mixed_do);
        multiply<P, kSteps>(rows, padded, steps, queries, words, turned_k, ld, scores, ld, false);
        multiply<P, kSteps>(rows, padded, steps, douts, words, turned_v, ld, dp, ld, false);
        if (masked) stage_mask(mask, p.keys, first, count, rows, from, columns, keep, ld);
        for (int64_t i = 0; i < rows; i += P::kPack) {
          const int64_t pair = i / P::kPack * ld;
          (masked ? soften_gradient<P, true> : soften_gradient<P, false>)(
              scores + i * ld, dp + i * ld, ld, padded, c, lse + i, inner + i, keep + i * ld, weights + pair,
              gradient + pair, gradient_rows + i * rows_ld, rows_ld);
        }
        const bool later = member > 0 || first > 0;
        const auto add = [&](const Word* by_query, const Word* right, float* to) {
          const int64_t steps = rows / P::kPack;
          if constexpr (P::kTiled) {
            transpose(right, steps, width, width, turned_rows, steps);
            multiply<P, kSteps>(width, padded, steps, turned_rows, steps, by_query, ld, to, ld, later);
          } else {
            multiply<P, kAcross>(padded, width, steps, by_query, ld, right, width, to, width, later);
          }
        };
        add(weights, rows_of_do, sums_v);
        add(gradient, rows_of_q, sums_k);
        P::clear_tail(gradient_rows, rows, rows_ld, columns);
        multiply<P, kSteps>(rows, width, (columns + P::kPack - 1) / P::kPack, gradient_rows, rows_ld, rows_of_k, width, dq,
                            width, false);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = offset + (first + i) * p.heads * p.dim;
          if (blocks == 1) {
            const int64_t turn = (first + i) * (p.dim / 2);
            finish(dq + i * width, p.dim, p.scale, cos ? cos + turn : cos, sin ? sin + turn : sin, g.dq + at);
          } else {
            float* sum = g.partial + split * p.batch * p.queries * p.heads * p.dim + at;
            for (int64_t x = 0; x < p.dim; ++x) sum[x] = (chunk > begin ? sum[x] : 0.0f) + dq[i * width + x];
          }
        }
      }
    }
    if constexpr (P::kTiled) {
      transpose(sums_k, width, padded, ld, dk, width);
      transpose(sums_v, width, padded, ld, dv, width);
    }
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t at = ((b * p.keys + from + i) * p.kv_heads + kv) * p.dim, turn = (from + i) * (p.dim / 2);
      finish(dk + i * width, p.dim, p.scale, cos ? cos + turn : cos, sin ? sin + turn : sin, g.dk + at);
      finish(dv + i * width, p.dim, 1.0f, nullptr, nullptr, g.dv + at);
    }
  }
}

// dq of one position from its parts.
template <typename T>
void join(const Problem<T>& p, const Gradients<T>& g, int64_t position) {
  const int64_t b = position / p.queries, turn = position % p.queries * (p.dim / 2);
  const float *cos = p.turn(p.cos, b), *sin = p.turn(p.sin, b);
  for (int64_t h = 0; h < p.heads; ++h) {
    float row[kMaxDim] = {};
    const int64_t at = (position * p.heads + h) * p.dim;
    for (int64_t s = 0; s < g.splits; ++s) {
      const float* part = g.partial + s * p.batch * p.queries * p.heads * p.dim + at;
      for (int64_t x = 0; x < p.dim; ++x) row[x] += part[x];
    }
    finish(row, p.dim, p.scale, cos ? cos + turn : cos, sin ? sin + turn : sin, g.dq + at);
  }
}

// Calls `run` with a value of the arithmetic for `queries` rows of bfloat16.
template <typename F>
auto with_arithmetic([[maybe_unused]] int64_t queries, F run) {
#ifdef HAVE_TILES
  if (queries >= kLanes && Tiles::allowed()) return run(Tiles{});
#endif
#ifdef HAVE_PAIRS
  return run(Pairs{});
#else
  return run(Single{});
#endif
}

template <typename T>
Problem<T> problem(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer allowed, ffi::AnyBuffer cos,
                   ffi::AnyBuffer sin, double scale, int64_t query_block, int64_t key_block) {
  const auto shape = q.dimensions(), shape_k = k.dimensions();
  Problem<T> p{};
  p.q = static_cast<const T*>(q.untyped_data());
  p.k = static_cast<const T*>(k.untyped_data());
  p.v = static_cast<const T*>(v.untyped_data());
  p.allowed = allowed.dimensions()[0] ? static_cast<const uint8_t*>(allowed.untyped_data()) : nullptr;
  p.cos = cos.dimensions()[0] ? static_cast<const float*>(cos.untyped_data()) : nullptr;
  p.sin = cos.dimensions()[0] ? static_cast<const float*>(sin.untyped_data()) : nullptr;
  p.scale = static_cast<float>(scale);
  p.batch = shape[0], p.queries = shape[1], p.heads = shape[2], p.dim = shape[3];
  p.keys = shape_k[1], p.kv_heads = shape_k[2];
  p.mask_batch = allowed.dimensions()[0], p.rotation_batch = cos.dimensions()[0];
  p.query_block = query_block, p.key_block = key_block;
  return p;
}

template <typename P, typename T>
ffi::Error run_forward(ffi::ThreadPool& pool, const Problem<T>& p, T* out, float* lse) {
  if (p.batch * p.queries * p.heads == 0) return ffi::Error::Success();
  const int64_t pieces = (p.queries + p.query_block - 1) / p.query_block;
  ruvjax::parallel(pool, p.batch * p.heads * pieces, [&](int64_t task) {
    [[maybe_unused]] const typename P::Session session;
    forward_task<T, P>(p, out, lse, task);
  });
  return ffi::Error::Success();
}

template <typename P, typename T>
ffi::Error run_backward(ffi::ThreadPool& pool, const Problem<T>& p, const Gradients<T>& g) {
  if (p.batch * p.queries * p.heads == 0) return ffi::Error::Success();
  ruvjax::parallel(pool, p.batch * p.kv_heads * g.splits, [&](int64_t task) {
    [[maybe_unused]] const typename P::Session session;
    backward_task<T, P>(p, g, task);
  });
  if (p.keys > p.key_block) {
    constexpr int64_t kSome = 16;
    const int64_t positions = p.batch * p.queries;
    ruvjax::parallel(pool, (positions + kSome - 1) / kSome, [&](int64_t task) {
      for (int64_t i = task * kSome; i < std::min(positions, (task + 1) * kSome); ++i) join(p, g, i);
    });
  }
  return ffi::Error::Success();
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer allowed,
                   ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> lse, double scale, int64_t query_block, int64_t key_block) {
  float* const sums = static_cast<float*>(lse->untyped_data());
  void* const to = out->untyped_data();
  if (q.element_type() == ffi::BF16) {
    const auto p = problem<Bfloat16>(q, k, v, allowed, cos, sin, scale, query_block, key_block);
    return with_arithmetic(p.queries, [&](auto arithmetic) {
      return run_forward<decltype(arithmetic)>(pool, p, static_cast<Bfloat16*>(to), sums);
    });
  }
  return run_forward<Single>(pool, problem<float>(q, k, v, allowed, cos, sin, scale, query_block, key_block),
                     static_cast<float*>(to), sums);
}

template <typename T>
Gradients<T> gradients(ffi::AnyBuffer out, ffi::AnyBuffer lse, ffi::AnyBuffer dout, ffi::Result<ffi::AnyBuffer>& dq,
                       ffi::Result<ffi::AnyBuffer>& dk, ffi::Result<ffi::AnyBuffer>& dv,
                       ffi::Result<ffi::AnyBuffer>& partial) {
  Gradients<T> g{};
  g.out = static_cast<const T*>(out.untyped_data());
  g.dout = static_cast<const T*>(dout.untyped_data());
  g.lse = static_cast<const float*>(lse.untyped_data());
  g.dq = static_cast<T*>(dq->untyped_data());
  g.dk = static_cast<T*>(dk->untyped_data());
  g.dv = static_cast<T*>(dv->untyped_data());
  g.partial = static_cast<float*>(partial->untyped_data());
  g.splits = std::max<int64_t>(partial->dimensions()[0], 1);
  return g;
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer allowed,
                    ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::AnyBuffer out, ffi::AnyBuffer lse, ffi::AnyBuffer dout,
                    ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                    ffi::Result<ffi::AnyBuffer> partial, double scale, int64_t key_block) {
  if (q.element_type() == ffi::BF16) {
    const auto p = problem<Bfloat16>(q, k, v, allowed, cos, sin, scale, 0, key_block);
    const auto g = gradients<Bfloat16>(out, lse, dout, dq, dk, dv, partial);
    return with_arithmetic(p.queries, [&](auto arithmetic) { return run_backward<decltype(arithmetic)>(pool, p, g); });
  }
  return run_backward<Single>(pool, problem<float>(q, k, v, allowed, cos, sin, scale, 0, key_block),
                      gradients<float>(out, lse, dout, dq, dk, dv, partial));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_attention_forward, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()   // q
                                  .Arg<ffi::AnyBuffer>()   // k
                                  .Arg<ffi::AnyBuffer>()   // v
                                  .Arg<ffi::AnyBuffer>()   // allowed
                                  .Arg<ffi::AnyBuffer>()   // cos
                                  .Arg<ffi::AnyBuffer>()   // sin
                                  .Ret<ffi::AnyBuffer>()   // out
                                  .Ret<ffi::AnyBuffer>()   // log2 of the sum of exponentials
                                  .Attr<double>("scale")
                                  .Attr<int64_t>("query_block")
                                  .Attr<int64_t>("key_block"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_attention_backward, backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()   // q
                                  .Arg<ffi::AnyBuffer>()   // k
                                  .Arg<ffi::AnyBuffer>()   // v
                                  .Arg<ffi::AnyBuffer>()   // allowed
                                  .Arg<ffi::AnyBuffer>()   // cos
                                  .Arg<ffi::AnyBuffer>()   // sin
                                  .Arg<ffi::AnyBuffer>()   // out
                                  .Arg<ffi::AnyBuffer>()   // lse
                                  .Arg<ffi::AnyBuffer>()   // dout
                                  .Ret<ffi::AnyBuffer>()   // dq
                                  .Ret<ffi::AnyBuffer>()   // dk
                                  .Ret<ffi::AnyBuffer>()   // dv
                                  .Ret<ffi::AnyBuffer>()   // parts of dq
                                  .Attr<double>("scale")
                                  .Attr<int64_t>("key_block"));
