// The forward pass of the selective scan on a CPU, as an XLA custom call.
//
// x, delta and y are [batch, length, width], b and c [batch, length, state], a is [state, width], the states are
// [batch, state, width]: neighbouring channels fill a vector, so that no sum crosses lanes. One task takes a few vectors
// of channels of one row from the first position to the last; their states stay in the first-level cache, and nothing is
// written but y, the final state and the states before the chunks. No result depends on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace ruvjax;

constexpr int kColumns = 2;  // vectors of a task
constexpr int64_t kTile = kColumns * kLanes;
constexpr int64_t kMaxState = 128;

struct Problem {
  const float *x, *delta, *a, *b, *c, *d, *initial;
  const uint8_t* reset;  // or null
  float *y, *final, *starts;
  int64_t batch, length, width, state, steps;
};

// kVectors vectors of channels of one row; `count` lanes of each are there.
template <int kVectors>
struct Task {
  const Problem& p;
  const int64_t row, channel, count;
  Floats state[kMaxState][kVectors], a[kMaxState][kVectors], d[kVectors];

  void keep(float* to) const {
    for (int64_t n = 0; n < p.state; ++n)
      for (int v = 0; v < kVectors; ++v) store(to + n * p.width + v * kLanes, state[n][v], count);
  }

  // One position. kReset: nothing of the state before it is left, whatever it holds.
  template <bool kReset>
  void step(int64_t position) {
    const int64_t at = position * p.width + channel;
    const float *b = p.b + position * p.state, *c = p.c + position * p.state;
    Floats delta[kVectors], u[kVectors], y[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const Floats x = load(p.x + at + v * kLanes, count);
      delta[v] = load(p.delta + at + v * kLanes, count);
      u[v] = delta[v] * x;
      y[v] = d[v] * x;
    }
    for (int64_t n = 0; n < p.state; ++n)
      for (int v = 0; v < kVectors; ++v) {
        Floats now = u[v] * b[n];
        if (!kReset) now = exp(delta[v] * a[n][v]) * state[n][v] + now;
        state[n][v] = now;
        y[v] = y[v] + now * c[n];
      }
    for (int v = 0; v < kVectors; ++v) store(p.y + at + v * kLanes, y[v], count);
  }

  void run() {
    const int64_t before = row * p.state * p.width + channel;
    for (int v = 0; v < kVectors; ++v) d[v] = load(p.d + channel + v * kLanes, count);
    for (int64_t n = 0; n < p.state; ++n)
      for (int v = 0; v < kVectors; ++v) {
        a[n][v] = load(p.a + n * p.width + channel + v * kLanes, count);
        state[n][v] = load(p.initial + before + n * p.width + v * kLanes, count);
      }
    for (int64_t first = 0, chunk = 0; first < p.length; first += p.steps, ++chunk) {
      keep(p.starts + chunk * p.batch * p.state * p.width + before);
      for (int64_t t = first; t < std::min(p.length, first + p.steps); ++t) {
        const int64_t position = row * p.length + t;
        if (p.reset && p.reset[position])
          step<true>(position);
        else
          step<false>(position);
      }
    }
    keep(p.final + before);
  }
};

void run(const Problem& p, int64_t row, int64_t channel) {
  if (channel + kTile <= p.width) {
    Task<kColumns>{p, row, channel, kLanes}.run();
    return;
  }
  for (; channel < p.width; channel += kLanes)
    Task<1>{p, row, channel, std::min<int64_t>(kLanes, p.width - channel)}.run();
}

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer delta, ffi::AnyBuffer a, ffi::AnyBuffer b,
                   ffi::AnyBuffer c, ffi::AnyBuffer d, ffi::AnyBuffer initial, ffi::AnyBuffer reset,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> final,
                   ffi::Result<ffi::AnyBuffer> starts, int64_t steps) {
  const auto shape = x.dimensions();
  const auto in = [](ffi::AnyBuffer& buffer) { return static_cast<const float*>(buffer.untyped_data()); };
  const auto out = [](ffi::Result<ffi::AnyBuffer>& buffer) { return static_cast<float*>(buffer->untyped_data()); };
  Problem p{};
  p.x = in(x), p.delta = in(delta), p.a = in(a), p.b = in(b), p.c = in(c), p.d = in(d), p.initial = in(initial);
  p.reset = reset.dimensions()[0] ? static_cast<const uint8_t*>(reset.untyped_data()) : nullptr;
  p.y = out(y), p.final = out(final), p.starts = out(starts);
  p.batch = shape[0], p.length = shape[1], p.width = shape[2], p.state = a.dimensions()[0], p.steps = steps;
  if (p.state > kMaxState || steps < 1) return ffi::Error::InvalidArgument("selective scan: too many states");
  const int64_t tiles = (p.width + kTile - 1) / kTile;
  ruvjax::parallel(pool, p.batch * tiles, [&](int64_t task) { run(p, task / tiles, task % tiles * kTile); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ruvjax_selective_scan, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // delta
                                  .Arg<ffi::AnyBuffer>()  // a
                                  .Arg<ffi::AnyBuffer>()  // b
                                  .Arg<ffi::AnyBuffer>()  // c
                                  .Arg<ffi::AnyBuffer>()  // d
                                  .Arg<ffi::AnyBuffer>()  // initial state
                                  .Arg<ffi::AnyBuffer>()  // reset
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<ffi::AnyBuffer>()  // final state
                                  .Ret<ffi::AnyBuffer>()  // states before the chunks
                                  .Attr<int64_t>("steps"));
