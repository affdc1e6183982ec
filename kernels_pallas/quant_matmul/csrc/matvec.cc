// Products of a few float rows with block-quantized weights, as XLA custom calls for the CPU.
//
// y[b, o] = sum_i x[b, i] w[o, i]. The weights are decoded in registers, x stays float32: on the machines measured the
// matvec is then limited by memory already, and nothing is lost to a quantized x.
//
// The arithmetic is written once (matvec_body.h) in compiler vectors and compiled for each instruction set below; the
// widest that the processor has is chosen when the library is first used.

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

enum Kind : int64_t { kQ8_0 = 0, kQ4_0 = 1, kQ4_K = 2 };

struct Problem {
  const float* x;         // [batch, inner]
  const float* sums;      // [batch, sums_stride], of each block of x, then zeros
  int64_t sums_stride;    // blocks rounded up to 16
  const uint8_t* codes;   // [outer, inner] int8 or [outer, inner / 2]
  const uint16_t* scales; // [outer, inner / 32] float16 (Q8_0, Q4_0)
  const uint8_t* levels;  // [outer, inner / 32] (Q4_K: s)
  const uint8_t* mins;    // [outer, inner / 32] (Q4_K: m)
  const uint16_t* steps;  // [outer, inner / 256, 2] float16 (Q4_K: d, dmin)
  float* y;               // [batch, outer]
  int64_t batch, inner, outer;
};

using Rows = void (*)(const Problem&, int64_t first, int64_t last);
struct Kernels { Rows of[3]; };

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)

#define BODY portable
#define LANES 4
#include "matvec_body.h"
#undef BODY
#undef LANES

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_X86 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define BODY avx2
#define LANES 8
#include "matvec_body.h"
#undef BODY
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#define BODY avx512
#define LANES 16
#include "matvec_body.h"
#undef BODY
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// 0: the widest there is; 1, 2, 3: exactly this one, null where the processor lacks it.
const Kernels* choose(int64_t level) {
#ifdef HAVE_X86
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if ((level == 0 || level == 3) && wide) return &avx512::kernels;
  if ((level == 0 || level == 2) && narrow) return &avx2::kernels;
#endif
  return level <= 1 ? &portable::kernels : nullptr;
}

// Chunks of rows handed out by a counter, to the calling thread too: it never waits for a task that has not begun, so
// a busy pool can delay nothing and block nothing. Tasks that come late find no chunk and only drop their share of this.
struct Work {
  Problem problem;
  Rows rows;
  int64_t chunk, chunks;
  std::vector<float> sums;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void run() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const int64_t first = i * chunk;
      rows(problem, first, first + chunk < problem.outer ? first + chunk : problem.outer);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  void wait() {
    // The last chunks end within microseconds of each other: looking is cheaper than sleeping.
    for (int i = 0; i < 4096; ++i)
      if (done.load(std::memory_order_acquire) == chunks) return;
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done.load(std::memory_order_acquire) == chunks; });
  }
};

ffi::Error multiply(ffi::ThreadPool& pool, Kind kind, int64_t level, Problem problem) {
  const Kernels* kernels = choose(level);
  if (kernels == nullptr) return ffi::Error(ffi::ErrorCode::kUnimplemented, "this processor lacks the instructions");
  if (problem.batch == 0 || problem.outer == 0) return ffi::Error::Success();
  auto work = std::make_shared<Work>();
  const int64_t blocks = problem.inner / 32;
  if (kind != kQ8_0) {
    problem.sums_stride = (blocks + 15) / 16 * 16;
    work->sums.resize(problem.batch * problem.sums_stride);
    for (int64_t m = 0; m < problem.batch; ++m) {
      for (int64_t b = 0; b < blocks; ++b) {
        float total = 0;
        for (int j = 0; j < 32; ++j) total += problem.x[m * problem.inner + 32 * b + j];
        work->sums[m * problem.sums_stride + b] = total;
      }
    }
    problem.sums = work->sums.data();
  }
  work->problem = problem;
  work->rows = kernels->of[kind];
  const int64_t threads = pool.num_threads();
  // Below about 100 thousand products, waking a thread takes longer than it saves.
  const int64_t useful = 1 + problem.batch * problem.outer * problem.inner / 100000;
  const int64_t helpers = (threads < useful ? threads : useful) - 1;
  const int64_t pieces = helpers > 0 ? 8 * (helpers + 1) : 1;
  const int64_t chunk = (problem.outer + pieces - 1) / pieces;
  work->chunk = (chunk + 15) / 16 * 16;
  work->chunks = (problem.outer + work->chunk - 1) / work->chunk;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->run(); });
  work->run();
  work->wait();
  return ffi::Error::Success();
}

ffi::Error plain(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                 ffi::ResultBuffer<ffi::F32> y, int64_t kind, int64_t level) {
  Problem p{};
  p.x = x.typed_data();
  p.codes = static_cast<const uint8_t*>(codes.untyped_data());
  p.scales = static_cast<const uint16_t*>(scales.untyped_data());
  p.y = y->typed_data();
  p.batch = x.dimensions()[0];
  p.inner = x.dimensions()[1];
  p.outer = y->dimensions()[1];
  return multiply(pool, static_cast<Kind>(kind), level, p);
}

ffi::Error nested(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer levels,
                  ffi::AnyBuffer mins, ffi::AnyBuffer steps, ffi::ResultBuffer<ffi::F32> y, int64_t level) {
  Problem p{};
  p.x = x.typed_data();
  p.codes = static_cast<const uint8_t*>(codes.untyped_data());
  p.levels = static_cast<const uint8_t*>(levels.untyped_data());
  p.mins = static_cast<const uint8_t*>(mins.untyped_data());
  p.steps = static_cast<const uint16_t*>(steps.untyped_data());
  p.y = y->typed_data();
  p.batch = x.dimensions()[0];
  p.inner = x.dimensions()[1];
  p.outer = y->dimensions()[1];
  return multiply(pool, kQ4_K, level, p);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_quant_matvec, plain,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_quant_matvec_nested, nested,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("level"));
