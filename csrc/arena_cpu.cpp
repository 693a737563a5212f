// Where the results of the operators lie: a range of addresses, reserved once and filled from its low end.
// Backward frees the activations in the reverse order of their making, so first fit leaves few gaps, and a
// block that was freed is taken again with its pages in place: a steady training step maps and clears no
// memory. malloc would either map large blocks anew each time or keep a heap in which small blocks pin the
// gaps.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include "arena.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace maskcore {

namespace {

/// Blocks of memory, first fit, of a range as large as the machine's memory. Safe for several threads.
class Arena {
 public:
  Arena() {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // whose watch ends at blocks that malloc cut
    // A limit on the address space is somebody's wish to have less than all of it reserved.
    rlimit limit{};
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return;
    const size_t bytes =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* range = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return;
    const size_t misaligned = reinterpret_cast<uintptr_t>(range) % kHugePage;
    begin_ = static_cast<std::byte*>(range) + (kHugePage - misaligned) % kHugePage;
    madvise(begin_, bytes, MADV_HUGEPAGE);  // a wish: failure costs nothing
    free_.emplace(0, bytes);
#endif
  }

  /// Memory of its own for the caller, at 64 bytes; nullptr where there is no range, or none so long is free.
  void* allocate(size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    const std::lock_guard lock(mutex_);
    for (auto gap = free_.begin(); gap != free_.end(); ++gap) {
      const auto [at, length] = *gap;
      if (length < bytes) continue;
      free_.erase(gap);
      if (length > bytes) free_.emplace(at + bytes, length - bytes);
      taken_.emplace(at, bytes);
      return begin_ + at;
    }
    return nullptr;
  }

  void release(void* block) {
    const std::lock_guard lock(mutex_);
    const auto entry = taken_.find(static_cast<size_t>(static_cast<std::byte*>(block) - begin_));
    auto [at, length] = *entry;
    taken_.erase(entry);
    auto next = free_.lower_bound(at);
    if (next != free_.end() && at + length == next->first) {
      length += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == at) {
        previous->second += length;
        return;
      }
    }
    free_.emplace_hint(next, at, length);
  }

  /// Gives the system back the pages that no block lies on.
  void trim() {
#if defined(__linux__)
    const std::lock_guard lock(mutex_);
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (const auto& [at, length] : free_) {
      const size_t begin = (at + page - 1) / page * page, end = (at + length) / page * page;
      if (begin < end) madvise(begin_ + begin, end - begin, MADV_DONTNEED);
    }
#endif
  }

 private:
  static constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;

  std::mutex mutex_;
  std::byte* begin_ = nullptr;
  std::map<size_t, size_t> free_;   // offset in the range -> bytes; no two of them touch
  std::map<size_t, size_t> taken_;  // likewise
};

/// Two, since one gradient that stays behind would split the room that a step's activations left. Never
/// destroyed: tensors may outlive whatever is destroyed at the end of a process.
Arena& activations() {
  static auto* const arena = new Arena;
  return *arena;
}

Arena& gradients() {
  static auto* const arena = new Arena;
  return *arena;
}

template <Arena& arena()>
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  constexpr size_t kSmall = size_t{64} << 10;
  size_t bytes =
      dtype == ScalarType::Byte ? 1 : (dtype == ScalarType::Float ? sizeof(float) : sizeof(double));
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  void* block = bytes > kSmall ? arena().allocate(bytes) : nullptr;
  if (!block) return torch::stable::empty(sizes, dtype);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::data(sizes)[i]) strides[i] = stride;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(block, sizes, strides, cpu, dtype,
                                  [](void* data) { arena().release(data); });
}

void empty_cache_cpu() {
  activations().trim();
  gradients().trim();
}

}  // namespace

Tensor empty_activation(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty<activations>(sizes, dtype);
}

Tensor empty_gradient(std::initializer_list<int64_t> sizes) {
  return empty<gradients>(sizes, ScalarType::Float);
}

}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&maskcore::empty_cache_cpu));
}
