// The entropy of the distribution that each row of logits stands for, as an XLA custom call for the CPU: the row is read
// twice and nothing is written out between. XLA writes the exponentials of a row, and reads them for each of its sums.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace ruvjax;

constexpr int64_t kRows = 4;      // rows of a task
constexpr float kLeast = -200.f;  // exp of less is 0, and 0 times a forbidden token's logit stays 0

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

float entropy(const float* row, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  float top = row[0];
  Floats tops = Floats{} + top;
  for (int64_t i = 0; i < whole; i += kLanes) tops = larger(load(row + i, kLanes), tops);
  for (int i = 0; i < kLanes; ++i) top = std::max(top, tops[i]);
  for (int64_t i = whole; i < count; ++i) top = std::max(top, row[i]);
  Floats total{}, spread{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats below = load(row + i, kLanes) - top;
    const Floats kept = below < kLeast ? Floats{} + kLeast : below;  // a NaN stays one
    const Floats weight = exp(kept);
    total = total + weight;
    spread = spread + weight * kept;
  }
  float all = sum(total), mean = sum(spread);
  for (int64_t i = whole; i < count; ++i) {
    const float below = row[i] - top, kept = below < kLeast ? kLeast : below, weight = std::exp(kept);
    all += weight;
    mean += weight * kept;
  }
  return std::log(all) - mean / all;
}

ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t rows = logits.dimensions()[0], count = logits.dimensions()[1];
  const float* from = logits.typed_data<float>();
  float* to = out->typed_data<float>();
  parallel(pool, (rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row)
      to[row] = entropy(from + row * count, count);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_entropy, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // logits [rows, vocabulary]
                                  .Ret<ffi::AnyBuffer>()  // nats [rows]
);
