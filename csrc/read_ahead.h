// Prefetching what the next block of tiles will read while the products of this one run: they have cycles of
// the load units to spare, and a block's input, which comes from memory or from the shared cache, waits in L2
// when its transform begins. Measured on Zen 4: the transform takes 90 ns instead of 200 a tile and vector,
// the products 3 % longer.
#pragma once

#include <cstdint>
#include <vector>

#include "vector.h"

namespace maskcore {

class ReadAhead {
 public:
  static constexpr int64_t kLine = 16;  // floats
  /// A share of the reads, to be asked for in kTileColumns steps, a line each.
  static constexpr int64_t kChunk = kLine * kTileColumns;

  /// Begins anew: the next block has nothing to read so far.
  void clear() {
    runs_.clear();
    chunks_ = 0;
    due_ = 0;
  }
  /// The next block will read `floats` floats from `begin` on.
  void add(const float* begin, int64_t floats) {
    runs_.push_back({begin, begin + floats});
    chunks_ += (floats + kChunk - 1) / kChunk;
  }
  /// The chunks are spread over so many calls of chunk().
  void spread(int64_t calls) {
    calls_ = calls;
    run_ = runs_.data();
    at_ = runs_.empty() ? &kNothing : run_->begin;
  }
  /// The chunk to ask for now; some come twice, and nothing is behind the last but the last again.
  const float* chunk() {
    const float* chunk = at_;
    due_ += chunks_;
    if (due_ >= calls_ && chunks_ > 0) {
      due_ -= calls_;
      at_ += kChunk;
      if (at_ >= run_->end && run_ != &runs_.back()) at_ = (++run_)->begin;
    }
    return chunk;
  }

 private:
  struct Run {
    const float *begin, *end;
  };
  std::vector<Run> runs_;
  const Run* run_ = nullptr;
  static constexpr float kNothing = 0;
  const float* at_ = &kNothing;
  int64_t chunks_ = 0, calls_ = 1, due_ = 0;
};

}  // namespace maskcore
