// Work shared out among the threads. Each has a range of tasks, neighbours in memory, and takes them in
// order; one that is done takes the others' next ones, so that a core which is slower, or lent to somebody
// else, does not hold up the rest. What a task computes must not depend on who does it, nor when.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

namespace maskcore {

/// The numbers [0, count), each handed out once.
class Tasks {
 public:
  Tasks(int64_t count, int64_t threads)
      : count_(count), ranges_(std::clamp<int64_t>(threads, 1, kMostRanges)) {
    for (int64_t i = 0; i < ranges_; ++i) next_[static_cast<size_t>(i)].task = first(i);
  }

  /// The next task of a thread, its own or, after those, another's; count or more if none is left.
  int64_t take(int64_t thread) {
    for (int64_t i = 0; i < ranges_; ++i) {
      const int64_t range = (thread + i) % ranges_;
      std::atomic<int64_t>& next = next_[static_cast<size_t>(range)].task;
      if (next.load(std::memory_order_relaxed) >= first(range + 1)) continue;
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task < first(range + 1)) return task;
    }
    return count_;
  }

 private:
  static constexpr int64_t kMostRanges = 64;
  struct alignas(64) Next {  // a cache line of its own
    std::atomic<int64_t> task;
  };

  int64_t first(int64_t range) const { return range * count_ / ranges_; }

  const int64_t count_, ranges_;
  std::array<Next, kMostRanges> next_;
};

/// Runs work(take) on as many threads as there are, and tasks for; take() is the thread's next task, count or
/// more if there is none.
template <class Work>
void share(int64_t count, const Work& work) {
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  Tasks tasks(count, threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      work([&tasks, thread]() { return tasks.take(thread); });
    }
  });
}

}  // namespace maskcore
