// For the benchmarks alone. _fma_loop: the machine's ceiling, multiply-adds on registers; _phase_times:
// phases.h.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "phases.h"
#include "shapes.h"
#include "vector.h"

namespace maskcore {
namespace {

/// Every thread does `steps` times 12 multiply-adds on registers; returns how many lanes a step had in all.
int64_t fma_loop_cpu(int64_t steps) {
  constexpr int kChains = 12;  // 2 a cycle with a latency of 4 or 5 cycles need 10
  std::atomic<int64_t> lanes = 0;
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Vec sum[kChains];  // all different, lest they be computed as one
      for (int j = 0; j < kChains; ++j) sum[j] = broadcast(static_cast<float>(j));
      Vec x = broadcast(0.5f), y = broadcast(1e-3f);
      for (int64_t step = 0; step < steps; ++step) {
        asm volatile("" : "+m"(y));
        const Vec w = x;
#pragma GCC unroll 12
        for (int j = 0; j < kChains; ++j) sum[j] = sum[j] * w + y;
      }
      Vec total{};
      for (int j = 0; j < kChains; ++j) total += sum[j];
      asm volatile("" : : "m"(total));
      lanes += kChains * kLanes;
    }
  });
  return lanes;
}

/// Seconds since the last call, [phases] float64.
Tensor phase_times_cpu() {
  const auto phases = static_cast<int64_t>(Phase::kCount);
  Tensor seconds = torch::stable::empty({phases}, ScalarType::Double);
  double* out = seconds.mutable_data_ptr<double>();
  for (std::atomic<int64_t>& phase : phase_nanoseconds) {
    *out++ = static_cast<double>(phase.exchange(0, std::memory_order_relaxed)) * 1e-9;
  }
  return seconds;
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CompositeExplicitAutograd, m) {
  m.impl("_fma_loop", TORCH_BOX(&maskcore::fma_loop_cpu));
  m.impl("_phase_times", TORCH_BOX(&maskcore::phase_times_cpu));
}
