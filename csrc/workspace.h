// Scratch memory that a thread keeps from call to call, so that a steady training step allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
  kPackedFilter,
  kHeldInput,
  kHeldRows,
  kTransformedRows,
  kGradientRows,
  kPatches,
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
  // Large buffers are asked to be of huge pages: a tile's 36 or 64 components lie in as many places.
  constexpr size_t kLine = 64, kHugePage = 2 * 1024 * 1024;
  const size_t wanted = static_cast<size_t>(floats) * sizeof(float);
  if (wanted > buffer.bytes) {
    const size_t unit = wanted >= kHugePage / 32 ? kHugePage : kLine,
                 bytes = (wanted + unit - 1) / unit * unit;
    buffer.data.reset();  // frees the old block before the larger one is asked for
    buffer.bytes = 0;
    buffer.data.reset(static_cast<float*>(std::aligned_alloc(unit, bytes)));
    if (!buffer.data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == kHugePage) madvise(buffer.data.get(), bytes, MADV_HUGEPAGE);  // a wish: failure costs nothing
#endif
    buffer.bytes = bytes;
  }
  return buffer.data.get();
}

}  // namespace maskcore
