// Splitting a kernel's work over the threads that XLA computes with.

#ifndef RUVJAX_PARALLEL_H_
#define RUVJAX_PARALLEL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ruvjax {

// Runs body(i) for i in [0, tasks), on the calling thread too. The caller waits only for tasks that have begun, so
// a busy pool can delay nothing and block nothing; a helper that comes late finds no task and drops its share of `state`.
template <typename Body>
void parallel(xla::ffi::ThreadPool& pool, int64_t tasks, const Body& body) {
  struct State {
    const Body* body;
    int64_t tasks;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;

    void run() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        (*body)(i);
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) {
          std::lock_guard<std::mutex> lock(mutex);
          finished.notify_all();
        }
      }
    }
  };
  const int64_t threads = pool.num_threads();
  const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  auto state = std::make_shared<State>();
  state->body = &body;
  state->tasks = tasks;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->run(); });
  state->run();
  // The last tasks end close to each other: looking is cheaper than sleeping.
  for (int i = 0; i < 4096; ++i)
    if (state->done.load(std::memory_order_acquire) == tasks) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load(std::memory_order_acquire) == tasks; });
}

}  // namespace ruvjax

#endif  // RUVJAX_PARALLEL_H_
