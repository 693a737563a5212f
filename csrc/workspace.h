// Scratch memory that a thread keeps from call to call, so that a steady training step allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace maskcore {

/// One growing buffer a (thread, purpose). A buffer's content lasts until its next request.
enum class Purpose : std::uint8_t {
  kFilter,
  kRows,
  kConvolved,
  kInputPanel,
  kGradientPanel,
  kPartial,
  kStatistics,
  kCount
};

inline float* workspace(Purpose purpose, int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<float, Free> data;
    size_t bytes = 0;
  };
  thread_local Buffer buffers[static_cast<size_t>(Purpose::kCount)];
  Buffer& buffer = buffers[static_cast<size_t>(purpose)];
  constexpr size_t kLine = 64;
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + kLine - 1) / kLine * kLine;
  if (bytes > buffer.bytes) {
    buffer.data.reset();  // frees the old block before the larger one is asked for
    buffer.bytes = 0;
    buffer.data.reset(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return buffer.data.get();
}

}  // namespace maskcore
