// Where the convolutions' time goes, for the benchmarks' --phases: nanoseconds of all threads together. A
// phase is a block's work, thousands of times longer than the clock takes to read.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace maskcore {

enum class Phase : std::uint8_t {
  kFilterTransform,
  kInputTransform,
  kProducts,
  kOutputTransform,
  kDirect,
  kCount
};

inline std::array<std::atomic<int64_t>, static_cast<size_t>(Phase::kCount)> phase_nanoseconds;

/// Adds the time since it was made, or since the last end(), to a phase.
class PhaseClock {
 public:
  void end(Phase phase) {
    const auto now = std::chrono::steady_clock::now();
    phase_nanoseconds[static_cast<size_t>(phase)].fetch_add(
        std::chrono::duration_cast<std::chrono::nanoseconds>(now - begin_).count(),
        std::memory_order_relaxed);
    begin_ = now;
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace maskcore
