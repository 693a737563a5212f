// Checks every access of a kernel. Beside each granule of memory (a byte of shared memory, an element of a
// tensor) stand two words: the last write and the reads since that still matter, each with the time and the
// thread. An access is looked up, compared with them under the clock's order, and leaves its own mark.
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <memory>
#include <string>

#include "machine.h"

namespace cuda_emulator {

// A block's most: 227 KiB on sm_90, 163 on sm_80, 99 on sm_86, 89 and 120.
static constexpr size_t kMostSharedBytes = 227 * 1024;
size_t shared_bytes_limit = kMostSharedBytes;

namespace {

// A mark: time in the upper 48 bits, the thread's number in the next 12, flags in the lowest 4. 0 is never.
using Mark = uint64_t;
constexpr Mark kInFlight = 1;    // of a write: a cp.async whose bytes have not arrived
constexpr Mark kAtomic = 2;      // of a write: atomics may meet one another
constexpr Mark kManyLanes = 1;   // of a read: several lanes of the thread's warp
constexpr Mark kManyWarps = 2;   // of a read: threads of several warps of the block
constexpr Mark kManyBlocks = 4;  // of a read: earlier blocks of this launch read as well
Mark mark(uint64_t time, int thread, Mark flags) {
  return time << 16 | static_cast<Mark>(thread) << 4 | flags;
}
uint64_t time_of(Mark m) { return m >> 16; }
int thread_of(Mark m) { return static_cast<int>(m >> 4 & 0xfff); }

struct Cell {
  Mark write, read;
};

enum class Space { kShared, kGlobal };

// Cells of zeros, of which only those that are accessed take memory.
struct Unmap {
  size_t cells = 0;
  void operator()(Cell* begin) const { munmap(begin, cells * sizeof(Cell)); }
};
using Cells = std::unique_ptr<Cell[], Unmap>;

Cells zeroed_cells(size_t count) {
  if (count == 0) return {};
  void* memory = mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return Cells(static_cast<Cell*>(memory), Unmap{count});
}

struct Region {
  Space space;
  uintptr_t begin = 0;
  size_t bytes = 0;
  int granule_log2 = 0;
  std::string name;
  bool initialised = false;  // before the launch
  bool read_only = false;
  Cells cells;

  size_t granules() const { return (bytes + (size_t{1} << granule_log2) - 1) >> granule_log2; }
  bool is_written(Mark write) const {
    return space == Space::kGlobal ? initialised || write != 0 : time_of(write) >= clock_.block;
  }
};

enum class Access { kRead, kWrite, kAtomic, kAsyncWrite, kArrival };

// Dynamic shared memory lies amidst addresses that nothing else uses, 1024 bytes past a multiple of 2048: as
// aligned as csrc/launch.cuh has it, and no more. In the shared window, too, it begins there.
constexpr size_t kArenaBytes = 2 << 20, kWindowOffset = 1024, kArenaOffset = (1 << 20) + kWindowOffset;
constexpr unsigned char kUnknownByte = 0xff;  // a NaN in every floating-point type
char* arena = nullptr;
Region dynamic_shared{.space = Space::kShared, .name = "dynamic"};
Region static_shared{.space = Space::kShared, .name = "static"};

std::vector<Region> tensors;
Region* latest_tensor = nullptr;

// What a kernel may read besides: its parameters, and constants of its library.
struct Range {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t address, size_t bytes) const { return address >= begin && address + bytes <= end; }
};
Range parameters;
std::vector<Range> constants;
const void* constants_of = nullptr;

uint64_t accesses = 0;

// Of each word of dynamic shared memory: how many wgmmas in flight read it, who wrote it last, and how many
// fences of operands had been before that. Of each thread: which its last one was, when, and which was the
// last one in front of the barrier before that: other warps know of those in front of a barrier alone.
struct Word {
  uint16_t pins, writer;
  uint32_t fences;
};
Word words[kMostSharedBytes / 4];
struct Fences {
  uint32_t latest, before_barrier;
  uint64_t time;
};
uint32_t operand_fences = 0;
Fences fences_of[kMaxThreads];

uint32_t known_fence(int thread) {
  const Fences& fences = fences_of[thread];
  const bool is_ordered = thread / kWarp == running.warp || fences.time < clock_.barrier;
  return is_ordered ? fences.latest : fences.before_barrier;
}

std::string described(const Region& region, uintptr_t address) {
  char text[160];
  if (region.space == Space::kShared) {
    std::snprintf(text, sizeof(text), "%s shared memory at byte %zu of %zu", region.name.c_str(),
                  static_cast<size_t>(address - region.begin), region.bytes);
  } else {
    std::snprintf(text, sizeof(text), "%s at byte %zu of %zu (element %zu)", region.name.c_str(),
                  static_cast<size_t>(address - region.begin), region.bytes,
                  static_cast<size_t>(address - region.begin) >> region.granule_log2);
  }
  return text;
}

const char* verb(Access access) {
  switch (access) {
    case Access::kRead:
      return "reads";
    case Access::kWrite:
      return "writes";
    case Access::kAtomic:
      return "atomically changes";
    case Access::kAsyncWrite:
    case Access::kArrival:
      return "copies with cp.async to";
  }
  return "";
}

std::string described_thread(int number) {
  const uint3 i = threads[number].index;
  char text[64];
  std::snprintf(text, sizeof(text), "thread (%u,%u,%u)", i.x, i.y, i.z);
  return text;
}

bool of_another_block(Mark m) { return time_of(m) >= clock_.launch && time_of(m) < clock_.block; }

// Whether what left the mark is ordered before the running thread's present. kManyLanes are of one warp, the
// latest of them left the time.
bool is_ordered(Mark m, bool many_lanes, bool many_warps) {
  const uint64_t time = time_of(m);
  if (time < clock_.barrier) return !of_another_block(m);
  if (many_warps) return false;
  if (thread_of(m) == running.thread && !many_lanes) return true;
  return thread_of(m) / kWarp == running.warp && time < clock_.warps[running.warp];
}
bool write_is_ordered(Mark m) { return is_ordered(m, false, false); }
bool read_is_ordered(Mark m) { return is_ordered(m, m & kManyLanes, m & kManyWarps); }

[[noreturn]] void race(const Region& region, uintptr_t address, Access access, Mark other, bool other_wrote,
                       const void* code) {
  const char* did = other_wrote ? "wrote" : "read";
  if (region.space == Space::kGlobal && of_another_block(other)) {
    fault(code, "race of blocks: %s %s, which another block of this launch %s", verb(access),
          described(region, address).c_str(), did);
  }
  fault(code, "race: %s %s, which %s %s with no barrier between", verb(access),
        described(region, address).c_str(), described_thread(thread_of(other)).c_str(), did);
}

// The reads after one more by the running thread.
Mark with_read(Mark before) {
  const Mark mine = mark(clock_.warps[running.warp], running.thread, 0);
  if (before == 0 || time_of(before) < clock_.launch) return mine;
  if (time_of(before) < clock_.block) return mine | kManyBlocks;
  const Mark blocks = before & kManyBlocks;
  if (read_is_ordered(before)) return mine | blocks;
  if ((before & kManyWarps) != 0 || thread_of(before) / kWarp != running.warp)
    return mine | kManyWarps | blocks;
  if (thread_of(before) == running.thread) return mine | (before & kManyLanes) | blocks;
  return mine | kManyLanes | blocks;
}

Cell changed(const Region& region, uintptr_t address, Cell cell, Access access, const void* code) {
  const Mark mine = mark(clock_.warps[running.warp], running.thread, 0);
  if (access == Access::kArrival) return {mine, cell.read};
  const bool written = region.is_written(cell.write);
  if (written && (cell.write & kInFlight) != 0) {
    const int owner = thread_of(cell.write);
    fault(code, "%s %s, which a cp.async of %s still owns: no wait_group has ended it", verb(access),
          described(region, address).c_str(),
          owner == running.thread ? "its own" : described_thread(owner).c_str());
  }
  const bool reads = access == Access::kRead || access == Access::kAtomic;
  if (reads && !written) {
    fault(code, "%s %s, which nothing has written", verb(access), described(region, address).c_str());
  }
  const bool both_atomic = access == Access::kAtomic && (cell.write & kAtomic) != 0;
  if (written && !both_atomic && !write_is_ordered(cell.write)) {
    race(region, address, access, cell.write, true, code);
  }
  if (access == Access::kRead) return {cell.write, with_read(cell.read)};
  const bool read_since_block = time_of(cell.read) >= clock_.block;
  if (region.space == Space::kGlobal && time_of(cell.read) >= clock_.launch &&
      (!read_since_block || (cell.read & kManyBlocks) != 0)) {
    fault(code, "race of blocks: %s %s, which another block of this launch read", verb(access),
          described(region, address).c_str());
  }
  if (read_since_block && !read_is_ordered(cell.read)) race(region, address, access, cell.read, false, code);
  const Mark flags = access == Access::kAtomic ? kAtomic : access == Access::kAsyncWrite ? kInFlight : 0;
  return {mine | flags, cell.read};
}

void access_region(Region& region, uintptr_t address, size_t bytes, Access access, const void* code) {
  const size_t offset = address - region.begin;
  Cell* cell = &region.cells[offset >> region.granule_log2];
  Cell* const last = &region.cells[(offset + bytes - 1) >> region.granule_log2];
  // Neighbours mostly share their past.
  const Cell known = *cell;
  const Cell then = changed(region, address, known, access, code);
  for (;; ++cell) {
    if (cell->write == known.write && cell->read == known.read) {
      *cell = then;
    } else {
      const size_t granule = static_cast<size_t>(cell - region.cells.get()) << region.granule_log2;
      *cell = changed(region, std::max(address, region.begin + granule), *cell, access, code);
    }
    if (cell == last) return;
  }
}

[[noreturn]] void outside(uintptr_t address, size_t bytes, Access access, const void* code) {
  if (address - reinterpret_cast<uintptr_t>(arena) < kArenaBytes) {
    const auto past = static_cast<long long>(address - dynamic_shared.begin);
    fault(code, "out of bounds: %s %zu bytes at byte %lld of the block's %zu bytes of dynamic shared memory",
          verb(access), bytes, past, dynamic_shared.bytes);
  }
  const Region* nearest = nullptr;
  uintptr_t distance = 1 << 20;
  bool before = false;
  for (const Region& tensor : tensors) {
    const uintptr_t past_end = address + bytes - (tensor.begin + tensor.bytes),
                    to_begin = tensor.begin - address;
    if (past_end < distance) {
      nearest = &tensor;
      distance = past_end;
      before = false;
    }
    if (to_begin < distance) {
      nearest = &tensor;
      distance = to_begin;
      before = true;
    }
  }
  if (nearest != nullptr) {
    fault(code, "out of bounds: %s %zu bytes, %zu of them %s of %s, which has %zu bytes", verb(access), bytes,
          std::min(bytes, distance), before ? "before the beginning" : "past the end", nearest->name.c_str(),
          nearest->bytes);
  }
  fault(code, "out of bounds: %s %zu bytes at 0x%" PRIxPTR ", which is in no tensor and no shared memory",
        verb(access), bytes, address);
}

Region* find_tensor(uintptr_t address) {
  if (latest_tensor != nullptr && address - latest_tensor->begin < latest_tensor->bytes) return latest_tensor;
  for (Region& tensor : tensors) {
    if (address - tensor.begin < tensor.bytes) return latest_tensor = &tensor;
  }
  return nullptr;
}

Region* find_region(uintptr_t address) {
  if (address - dynamic_shared.begin < dynamic_shared.bytes) return &dynamic_shared;
  if (address - static_shared.begin < static_shared.bytes) return &static_shared;
  return find_tensor(address);
}

// Shared memory, or so near to it that it must have been meant.
bool is_shared(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return address - reinterpret_cast<uintptr_t>(arena) < kArenaBytes ||
         address - static_shared.begin < static_shared.bytes;
}

[[gnu::noinline]] void access_memory(uintptr_t address, size_t bytes, size_t alignment, Access access,
                                     const void* code) {
  ++accesses;
  Region* const region = find_region(address);
  if (region == nullptr || address - region->begin + bytes > region->bytes) {
    if (access == Access::kRead && region == nullptr) {
      if (parameters.contains(address, bytes)) return;
      for (const Range& range : constants) {
        if (range.contains(address, bytes)) return;
      }
    }
    outside(address, bytes, access, code);
  }
  if (address % alignment != 0) {
    fault(code, "misaligned: %s %zu bytes of %s, whose address is not a multiple of %zu", verb(access), bytes,
          described(*region, address).c_str(), alignment);
  }
  if (access != Access::kRead && region->read_only) {
    fault(code, "%s %s, which is const", verb(access), described(*region, address).c_str());
  }
  access_region(*region, address, bytes, access, code);
  if (access != Access::kRead && region == &dynamic_shared) {
    const size_t first = (address - region->begin) / 4, last = (address - region->begin + bytes - 1) / 4;
    for (size_t i = first; i <= last; ++i) {
      if (words[i].pins != 0) {
        fault(code, "%s %s, which a wgmma in flight still reads: no wgmma.wait_group has ended it",
              verb(access), described(*region, address).c_str());
      }
      words[i].writer = static_cast<uint16_t>(running.thread);
      words[i].fences = operand_fences;
    }
  }
  if (counts_traffic && access != Access::kArrival) {
    record_traffic(code, address, bytes, region->space == Space::kShared, access != Access::kRead);
  }
}

inline void access_anywhere(const void* pointer, size_t bytes, size_t alignment, Access access,
                            const void* code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - running.stack < running.stack_bytes) return;
  access_memory(address, bytes, alignment, access, code);
}

// The read-only segments of the library that the kernel is in.
void find_constants(const void* kernel) {
  if (kernel == constants_of) return;
  constants_of = kernel;
  constants.clear();
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* kernel) {
        const auto segments = [&](auto&& visit) {
          for (int i = 0; i < library->dlpi_phnum; ++i) {
            const auto& segment = library->dlpi_phdr[i];
            const uintptr_t begin = library->dlpi_addr + segment.p_vaddr;
            if (segment.p_type == PT_LOAD) visit(Range{begin, begin + segment.p_memsz}, segment.p_flags);
          }
        };
        bool found = false;
        segments([&](Range range, auto) { found |= range.contains(reinterpret_cast<uintptr_t>(kernel), 1); });
        if (found) {
          segments([&](Range range, auto flags) {
            if ((flags & PF_W) == 0) constants.push_back(range);
          });
        }
        return static_cast<int>(found);
      },
      const_cast<void*>(kernel));
}

}  // namespace

void begin_launch_memory(const Launch& launch) {
  if (arena == nullptr) {
    void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    arena = static_cast<char*>(memory);
    dynamic_shared.begin = reinterpret_cast<uintptr_t>(arena + kArenaOffset);
    dynamic_shared.cells = zeroed_cells(kMostSharedBytes);
  }
  dynamic_shared.bytes = launch.shared_bytes;
  const auto begin = reinterpret_cast<uintptr_t>(launch.static_shared);
  const auto bytes = static_cast<size_t>(launch.static_shared_end - launch.static_shared);
  if (static_shared.begin != begin || static_shared.bytes != bytes) {
    static_shared.begin = begin;
    static_shared.bytes = bytes;
    static_shared.cells = zeroed_cells(bytes);
  }
  const auto call = reinterpret_cast<uintptr_t>(launch.call);
  parameters = {call, call + launch.call_bytes};
  find_constants(launch.kernel);
}

void begin_block_memory() {
  std::fill_n(words, (dynamic_shared.bytes + 3) / 4, Word{});
  for (const Region* shared : {&dynamic_shared, &static_shared}) {
    std::memset(reinterpret_cast<void*>(shared->begin), kUnknownByte, shared->bytes);
  }
}

void* dynamic_shared_begin() { return reinterpret_cast<void*>(dynamic_shared.begin); }

void check_shared_read(const void* address, size_t bytes, const void* code) {
  if (!is_shared(address)) fault(code, "ldmatrix of an address that is not in shared memory");
  access_memory(reinterpret_cast<uintptr_t>(address), bytes, bytes, Access::kRead, code);
}

uint32_t shared_window(const void* shared) {
  if (!is_shared(shared)) fault(__builtin_return_address(0), "the shared address of global memory");
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared) - dynamic_shared.begin + kWindowOffset);
}

void fence_operands() {
  Fences& mine = fences_of[running.thread];
  if (mine.time < clock_.barrier) mine.before_barrier = mine.latest;
  mine.latest = ++operand_fences;
  mine.time = clock_.warps[running.warp];
}

const void* read_by_wgmma(uint32_t address, const void* code) {
  const uintptr_t at = dynamic_shared.begin + address - kWindowOffset;
  if (address < kWindowOffset || at + 16 > dynamic_shared.begin + dynamic_shared.bytes)
    outside(at, 16, Access::kRead, code);
  ++accesses;
  access_region(dynamic_shared, at, 16, Access::kRead, code);
  for (size_t i = (at - dynamic_shared.begin) / 4, end = i + 4; i < end; ++i) {
    if (known_fence(words[i].writer) <= words[i].fences) {
      fault(code, "wgmma reads %s, which %s wrote without a fence.proxy.async behind it",
            described(dynamic_shared, at).c_str(), described_thread(words[i].writer).c_str());
    }
  }
  return reinterpret_cast<const void*>(at);
}

static void pin(uint32_t address, int by) {
  const size_t first = (address - kWindowOffset) / 4;
  for (size_t i = first; i < first + 4; ++i) words[i].pins = static_cast<uint16_t>(words[i].pins + by);
}

void pin_for_wgmma(uint32_t address) { pin(address, 1); }

// The read lasts until now: a barrier since its beginning orders nothing.
void unpin_for_wgmma(uint32_t address, const void* code) {
  pin(address, -1);
  access_region(dynamic_shared, dynamic_shared.begin + address - kWindowOffset, 16, Access::kRead, code);
}

void atomic_access(const void* address, size_t bytes) {
  access_anywhere(address, bytes, bytes, Access::kAtomic, __builtin_return_address(0));
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  const void* code = __builtin_return_address(0);
  const auto to = reinterpret_cast<uintptr_t>(shared);
  if (!is_shared(shared)) fault(code, "cp.async to an address that is not in shared memory");
  AsyncCopy copy{.shared = to, .bytes = {}, .size = bytes};
  if (valid) {
    if (find_tensor(reinterpret_cast<uintptr_t>(global)) == nullptr) {
      outside(reinterpret_cast<uintptr_t>(global), bytes, Access::kRead, code);
    }
    access_memory(reinterpret_cast<uintptr_t>(global), bytes, bytes, Access::kRead, code);
    std::memcpy(copy.bytes, global, bytes);
  }
  access_memory(to, bytes, bytes, Access::kAsyncWrite, code);
  threads[running.thread].async.copies.push_back(copy);
}

// Reads nothing, so that it may come before what is written there; but it must know where that is.
void prefetch(const void* global) {
  const auto address = reinterpret_cast<uintptr_t>(global);
  if (find_tensor(address) == nullptr) outside(address, 1, Access::kRead, __builtin_return_address(0));
}

void commit_async() {
  AsyncCopies& async = threads[running.thread].async;
  async.group_ends.push_back(async.copies.size());
}

void wait_async(int pending) {
  AsyncCopies& async = threads[running.thread].async;
  if (async.group_ends.size() <= static_cast<size_t>(pending)) return;
  const size_t groups = async.group_ends.size() - static_cast<size_t>(pending);
  const size_t arrived = async.group_ends[groups - 1];
  for (size_t i = 0; i < arrived; ++i) {
    const AsyncCopy& copy = async.copies[i];
    access_memory(copy.shared, copy.size, copy.size, Access::kArrival, nullptr);
    std::memcpy(reinterpret_cast<void*>(copy.shared), copy.bytes, copy.size);
  }
  async.copies.erase(async.copies.begin(), async.copies.begin() + static_cast<ptrdiff_t>(arrived));
  async.group_ends.erase(async.group_ends.begin(), async.group_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : async.group_ends) end -= arrived;
}

void end_thread_memory(const void* code) {
  AsyncCopies& async = threads[running.thread].async;
  if (!async.copies.empty()) fault(code, "ends with %zu cp.async in flight", async.copies.size());
  async.group_ends.clear();
}

}  // namespace cuda_emulator

cudaError_t cudaMemsetAsync(void* global, int value, size_t bytes, cudaStream_t) {
  using namespace cuda_emulator;
  const auto begin = reinterpret_cast<uintptr_t>(global);
  const Region* tensor = find_tensor(begin);
  if (tensor == nullptr || begin - tensor->begin + bytes > tensor->bytes || tensor->read_only) {
    return cudaErrorInvalidValue;
  }
  std::memset(global, value, bytes);
  const size_t first = (begin - tensor->begin) >> tensor->granule_log2;
  const size_t last =
      (begin - tensor->begin + bytes + (size_t{1} << tensor->granule_log2) - 1) >> tensor->granule_log2;
  std::fill(&tensor->cells[first], &tensor->cells[last], Cell{mark(1, 0, 0), 0});
  return cudaSuccess;
}

// The calls that g++ -fsanitize=thread,... compiles into the kernels. -----------------------------

using namespace cuda_emulator;

#define HERE __builtin_return_address(0)

#define ACCESSES_OF(bytes)                                                                          \
  void __tsan_read##bytes(const void* p) { access_anywhere(p, bytes, bytes, Access::kRead, HERE); } \
  void __tsan_write##bytes(const void* p) { access_anywhere(p, bytes, bytes, Access::kWrite, HERE); }

// A violation found by the instrumented code itself. Launchers are instrumented too.
#define VIOLATION(handler, what)                \
  void __ubsan_handle_##handler() {             \
    if (running.thread >= 0) fault(HERE, what); \
    note_fault(HERE, "in the launcher: " what); \
  }

extern "C" {

ACCESSES_OF(1)
ACCESSES_OF(2)
ACCESSES_OF(4)
ACCESSES_OF(8)
ACCESSES_OF(16)
void __tsan_read_range(const void* p, size_t bytes) { access_anywhere(p, bytes, 1, Access::kRead, HERE); }
void __tsan_write_range(const void* p, size_t bytes) { access_anywhere(p, bytes, 1, Access::kWrite, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

VIOLATION(type_mismatch_v1, "misaligned: an access through a pointer that is not aligned to its type")
VIOLATION(out_of_bounds, "out of bounds: an index beyond an array")
VIOLATION(add_overflow, "overflow of a signed sum")
VIOLATION(sub_overflow, "overflow of a signed difference")
VIOLATION(mul_overflow, "overflow of a signed product")
VIOLATION(negate_overflow, "overflow of a negation")
VIOLATION(divrem_overflow, "division by zero or its overflow")
VIOLATION(shift_out_of_bounds, "shift by less than nothing or more than there are bits")
VIOLATION(load_invalid_value, "a bool that is neither true nor false")

// What tests/cuda_emulator/__init__.py calls. -----------------------------------------------------

void cuda_emulator_set_shared_limit(size_t bytes) { shared_bytes_limit = std::min(bytes, kMostSharedBytes); }

// Makes a tensor's memory known. Where not initialised, its bytes must be written before they are read.
void cuda_emulator_add_tensor(void* memory, size_t bytes, int granule_log2, int initialised, int read_only,
                              const char* name) {
  Region tensor{.space = Space::kGlobal,
                .begin = reinterpret_cast<uintptr_t>(memory),
                .bytes = bytes,
                .granule_log2 = granule_log2,
                .name = name,
                .initialised = initialised != 0,
                .read_only = read_only != 0};
  tensor.cells = zeroed_cells(tensor.granules());
  tensors.push_back(std::move(tensor));
  latest_tensor = nullptr;
}

// The first element of the i-th tensor that nothing has written, or -1.
long long cuda_emulator_first_unwritten(size_t i) {
  const Region& tensor = tensors[i];
  const Cell* const begin = tensor.cells.get();
  const Cell* const end = begin + tensor.granules();
  const Cell* const found = std::find_if(begin, end, [](const Cell& cell) { return cell.write == 0; });
  return found == end ? -1 : found - begin;
}

void cuda_emulator_forget_tensors() {
  tensors.clear();
  latest_tensor = nullptr;
}

unsigned long long cuda_emulator_accesses() { return accesses; }

}  // extern "C"
