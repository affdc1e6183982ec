// The k keys of largest inner product with each query, as an XLA custom call for the CPU.
//
// Reading the keys is what a search costs, so a first pass reads them as bytes and gives each key an upper bound of its
// product, by Cauchy and Schwarz from the norms of what rounding left out of key and query. A second pass multiplies in
// float32 the keys whose bound reaches the k-th best product found so far. The answer is that of the float32 products
// of all keys: a loose bound (keys that are nearly the same) costs time and nothing else.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 16;         // keys of a group, whose bytes lie side by side: [group, dim / 4, 16, 4]
constexpr int64_t kGroups = 32;    // groups of a task
constexpr int kTile = 12;          // queries that share the reading of a group
constexpr float kLow = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// The first `count` lanes; the others are 0.
template <typename V, typename T>
inline V load(const T* from, int64_t count) {
  V v{};
  if (count == kLanes)
    std::memcpy(&v, from, sizeof(V));
  else
    std::memcpy(&v, from, count * sizeof(T));
  return v;
}

// Sixteen sums of products of four key bytes (unsigned, 128 is zero) and four query bytes (signed).
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
constexpr int kLevels = 127;  // the largest query byte
struct Sums {
  __m512i v = _mm512_setzero_si512();
  void add(const uint8_t* keys, int32_t query) {
    v = _mm512_dpbusd_epi32(v, _mm512_loadu_si512(keys), _mm512_set1_epi32(query));
  }
  Ints get() const { return (Ints)v; }
};
#elif defined(__AVX2__)
constexpr int kLevels = 63;  // two products of a byte and a query byte then fit 16 bits
struct Sums {
  __m256i v[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  void add(const uint8_t* keys, int32_t query) {
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs =
          _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)(keys + 32 * i)), _mm256_set1_epi32(query));
      v[i] = _mm256_add_epi32(v[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  Ints get() const { return load<Ints>(v, kLanes); }
};
#else
constexpr int kLevels = 127;
struct Sums {
  int32_t v[kLanes] = {};
  void add(const uint8_t* keys, int32_t query) {
    int8_t q[4];
    std::memcpy(q, &query, 4);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i) v[lane] += keys[4 * lane + i] * q[i];
  }
  Ints get() const { return load<Ints>(v, kLanes); }
};
#endif

// The order of accumulation is fixed, so that equal keys have equal products.
float product(const float* a, const float* b, int64_t dim) {
  Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes)
    for (int j = 0; j < 2; ++j) {
      Floats x, y;
      std::memcpy(&x, a + i + j * kLanes, sizeof(x));
      std::memcpy(&y, b + i + j * kLanes, sizeof(y));
      sums[j] = sums[j] + x * y;
    }
  float total = 0;
  const Floats both = sums[0] + sums[1];
  for (int j = 0; j < kLanes; ++j) total += both[j];
  for (; i < dim; ++i) total += a[i] * b[i];
  return total;
}

struct Query {
  std::vector<int32_t> bytes;  // four to a number
  float scale;                 // of a byte
  int32_t zero;                // what the offset of the key bytes adds to a sum
  float norm, error;           // of the query, and of what its bytes leave out
};

struct Problem {
  const uint8_t* codes;  // [groups, dim4, 16, 4]
  const float *scale, *norm, *error;  // [keys]: of a byte; of the key, and of what its bytes leave out
  const uint8_t* live;
  const float *values, *queries;
  int32_t* slots;
  float *scores, *bounds, *best;  // bounds [queries of a batch, groups, 16], best [queries of a batch, tasks, 16]
  int64_t keys, dim, dim4, groups, tasks, k;
};

Query prepared(const float* from, int64_t dim, int64_t dim4) {
  Query q{std::vector<int32_t>(dim4, 0), 0, 0, 0, 0};
  float largest = 0;
  double norm = 0, error = 0;
  for (int64_t i = 0; i < dim; ++i) largest = std::max(largest, std::fabs(from[i])), norm += double(from[i]) * from[i];
  q.scale = largest / kLevels;
  int8_t* bytes = reinterpret_cast<int8_t*>(q.bytes.data());
  for (int64_t i = 0; i < dim && q.scale > 0; ++i) {
    const float code = std::min<float>(kLevels, std::max<float>(-kLevels, std::nearbyint(from[i] / q.scale)));
    bytes[i] = static_cast<int8_t>(code);
    q.zero += 128 * bytes[i];
    const double left = double(from[i]) - double(q.scale) * code;
    error += left * left;
  }
  // Rounded up by more than the square root and the conversion can round down.
  q.norm = std::sqrt(norm) * 1.00001f;
  q.error = (q.scale > 0 ? std::sqrt(error) : std::sqrt(norm)) * 1.00001f;
  return q;
}

// Upper bounds of the products of `kQueries` queries with the keys of `kTogether` groups.
template <int kQueries, int kTogether>
void bound(const Problem& p, const Query* queries, int64_t first, int64_t group, float* best, int64_t next) {
  Sums sums[kQueries][kTogether];
  const uint8_t* from = p.codes + group * p.dim4 * 4 * kLanes;
  for (int64_t j = 0; j < p.dim4; ++j)
    for (int g = 0; g < kTogether; ++g)
      for (int q = 0; q < kQueries; ++q)
        sums[q][g].add(from + (g * p.dim4 + j) * 4 * kLanes, queries[q].bytes[j]);
  // What float32 sums of `dim` products can be off by, relative to the norms, twice over.
  const float slack = (p.dim / 8 + 32) * 1.2e-7f;
  for (int g = 0; g < kTogether; ++g) {
    const int64_t start = (group + g) * kLanes, count = std::min<int64_t>(kLanes, p.keys - start);
    const Floats scale = load<Floats>(p.scale + start, count), norm = load<Floats>(p.norm + start, count);
    const Floats error = load<Floats>(p.error + start, count);
    const Ints live = __builtin_convertvector(load<Bytes>(p.live + start, count), Ints);
    const Floats dead = live != 0 ? Floats{} : Floats{} + kLow;
    for (int q = 0; q < kQueries; ++q) {
      const Query& query = queries[q];
      const Floats value = __builtin_convertvector(sums[q][g].get() - query.zero, Floats) * (scale * query.scale);
      const Floats upper = value + error * query.norm + norm * (query.error + slack * query.norm) + dead;
      std::memcpy(p.bounds + (first + q) * p.groups * kLanes + start, &upper, sizeof(upper));
      float* top = best + q * next;
      const Floats so_far = load<Floats>(top, kLanes), larger = so_far < upper ? upper : so_far;
      std::memcpy(top, &larger, sizeof(larger));
    }
  }
}

template <int kQueries>
void bounds(const Problem& p, const Query* queries, int64_t first, int64_t task) {
  constexpr int kTogether = kQueries >= 4 ? 1 : 4;  // sums enough to hide how long one takes
  const int64_t start = task * kGroups, stop = std::min(start + kGroups, p.groups), next = p.tasks * kLanes;
  float* best = p.best + first * next + task * kLanes;
  for (int q = 0; q < kQueries; ++q) std::fill_n(best + q * next, kLanes, kLow);
  int64_t group = start;
  for (; group + kTogether <= stop; group += kTogether)
    bound<kQueries, kTogether>(p, queries, first, group, best, next);
  for (; group < stop; ++group) bound<kQueries, 1>(p, queries, first, group, best, next);
}

template <int kQueries = kTile>
void bounds_of(const Problem& p, const Query* queries, int64_t count, int64_t first, int64_t task) {
  if constexpr (kQueries > 0) {
    if (count >= kQueries) {
      bounds<kQueries>(p, queries, first, task);
      bounds_of<kQueries>(p, queries + kQueries, count - kQueries, first + kQueries, task);
    } else {
      bounds_of<kQueries - 1>(p, queries, count, first, task);
    }
  }
}

struct Hit {
  float score;
  int32_t slot;
  // Of equal scores the lower slot is the better.
  bool operator<(const Hit& other) const {
    return score > other.score || (score == other.score && slot < other.slot);
  }
};

// The k best hits so far; the worst of them stands first.
struct Best {
  std::vector<Hit> heap;
  size_t k;
  void add(Hit hit) {
    if (heap.size() < k) {
      heap.push_back(hit);
      std::push_heap(heap.begin(), heap.end());
    } else if (hit < heap.front()) {
      std::pop_heap(heap.begin(), heap.end());
      heap.back() = hit;
      std::push_heap(heap.begin(), heap.end());
    }
  }
  float floor() const { return heap.size() < k ? kLow : heap.front().score; }
};

// Query `q` of a batch whose first query is `first`.
void pick(const Problem& p, int64_t first, int64_t q) {
  const float* query = p.queries + (first + q) * p.dim;
  const float* bounds = p.bounds + q * p.groups * kLanes;
  const float* best = p.best + q * p.tasks * kLanes;
  const int64_t columns = p.tasks * kLanes;  // a column: one lane of the groups of a task
  Best tops{{}, static_cast<size_t>(p.k)}, found{{}, static_cast<size_t>(p.k)};
  for (int64_t c = 0; c < columns; ++c)
    if (best[c] > tops.floor()) tops.add({best[c], static_cast<int32_t>(c)});
  // The products of k keys that look best set the bar.
  Best bar{{}, static_cast<size_t>(p.k)};
  for (const Hit& top : tops.heap) {
    const int64_t start = top.slot / kLanes * kGroups, stop = std::min(start + kGroups, p.groups);
    for (int64_t g = start; g < stop; ++g) {
      const int64_t key = g * kLanes + top.slot % kLanes;
      if (bounds[key] == top.score) {
        bar.add({product(query, p.values + key * p.dim, p.dim), static_cast<int32_t>(key)});
        break;
      }
    }
  }
  const float floor = bar.floor();
  for (int64_t c = 0; c < columns; ++c) {
    if (best[c] == kLow || best[c] < std::max(floor, found.floor())) continue;
    const int64_t start = c / kLanes * kGroups, stop = std::min(start + kGroups, p.groups);
    for (int64_t g = start; g < stop; ++g) {
      const int64_t key = g * kLanes + c % kLanes;
      if (bounds[key] == kLow || bounds[key] < std::max(floor, found.floor())) continue;
      found.add({product(query, p.values + key * p.dim, p.dim), static_cast<int32_t>(key)});
    }
  }
  std::sort_heap(found.heap.begin(), found.heap.end());
  for (int64_t i = 0; i < p.k; ++i) {
    const bool there = i < static_cast<int64_t>(found.heap.size());
    p.slots[(first + q) * p.k + i] = there ? found.heap[i].slot : -1;
    p.scores[(first + q) * p.k + i] = there ? found.heap[i].score : kLow;
  }
}

ffi::Error search(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer scale, ffi::AnyBuffer norm,
                  ffi::AnyBuffer error, ffi::AnyBuffer live, ffi::AnyBuffer values, ffi::AnyBuffer queries,
                  ffi::Result<ffi::AnyBuffer> slots, ffi::Result<ffi::AnyBuffer> scores,
                  ffi::Result<ffi::AnyBuffer> bounds, ffi::Result<ffi::AnyBuffer> best) {
  Problem p{codes.typed_data<uint8_t>(),
            scale.typed_data<float>(),
            norm.typed_data<float>(),
            error.typed_data<float>(),
            reinterpret_cast<const uint8_t*>(live.untyped_data()),
            values.typed_data<float>(),
            queries.typed_data<float>(),
            slots->typed_data<int32_t>(),
            scores->typed_data<float>(),
            bounds->typed_data<float>(),
            best->typed_data<float>(),
            values.dimensions()[0],
            values.dimensions()[1],
            codes.dimensions()[1],
            codes.dimensions()[0],
            best->dimensions()[1],
            slots->dimensions()[1]};
  const int64_t count = queries.dimensions()[0], batch = bounds->dimensions()[0];
  for (int64_t first = 0; first < count; first += batch) {
    const int64_t now = std::min(batch, count - first);
    std::vector<Query> ready;
    for (int64_t q = 0; q < now; ++q) ready.push_back(prepared(p.queries + (first + q) * p.dim, p.dim, p.dim4));
    ruvjax::parallel(pool, p.tasks, [&](int64_t task) { bounds_of(p, ready.data(), now, 0, task); });
    ruvjax::parallel(pool, now, [&](int64_t q) { pick(p, first, q); });
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_retrieve, search,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // codes
                                  .Arg<ffi::AnyBuffer>()  // scale
                                  .Arg<ffi::AnyBuffer>()  // norm
                                  .Arg<ffi::AnyBuffer>()  // error
                                  .Arg<ffi::AnyBuffer>()  // live
                                  .Arg<ffi::AnyBuffer>()  // values
                                  .Arg<ffi::AnyBuffer>()  // queries
                                  .Ret<ffi::AnyBuffer>()  // slots
                                  .Ret<ffi::AnyBuffer>()  // scores
                                  .Ret<ffi::AnyBuffer>()  // bounds, of a batch of queries
                                  .Ret<ffi::AnyBuffer>()  // best, of a batch of queries
);
