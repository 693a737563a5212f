// What the parts of the emulator know of each other: the thread that runs, the clock that orders accesses,
// and faults. machine.cpp runs threads, memory.cpp checks accesses, traffic.cpp counts them, warp.cpp has the
// warp instructions, warpgroup.cpp those of four warps.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda_emulator.h"

namespace cuda_emulator {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// One thread's cp.async: copies in the order of issue, and where each committed group of them ends.
struct AsyncCopy {
  uintptr_t shared;
  unsigned char bytes[16];
  size_t size;
};
struct AsyncCopies {
  std::vector<AsyncCopy> copies;
  std::vector<size_t> group_ends;
};

// One thread's wgmmas that no wait_group has ended: its registers of each, and where each committed group of
// them ends; and the sums that it will see then.
struct Wgmma {
  float* d;
  const uint32_t* a;
  uint32_t held[4];  // the fragment as it was
  uint64_t descriptor;
  int columns;
  bool transposed;
};
struct WgmmaSums {
  float* d;
  std::vector<float> values;
  int in_flight;
};
struct Wgmmas {
  bool fenced = false;          // since the last commit and the last fragment loaded
  std::vector<char> registers;  // the thread's local memory as it was at the last fence, and where it begins
  uintptr_t registers_begin = 0;
  std::vector<Wgmma> products;
  std::vector<size_t> group_ends;
  std::vector<WgmmaSums> sums;
};

enum class State { kReady, kAtBarrier, kAtWarpInstruction, kExited };

struct Thread {
  State state;
  uint3 index;
  std::jmp_buf context;
  AsyncCopies async;
  Wgmmas wgmmas;
  // Where and for whom it waits:
  const char* instruction;
  Place place;
  uint32_t mask;
  void* operand;
};
extern Thread threads[kMaxThreads];

// The thread that runs, as every memory access must know it. While none does, all memory is its stack, so
// that the instrumented host code of launchers passes without a check.
struct Running {
  uintptr_t stack = 0;
  size_t stack_bytes = SIZE_MAX;
  int thread = -1;
  int warp = -1;
  uint3 block{};
};
extern Running running;

// Time advances at barriers and at __syncwarp, never goes back, and is kept beside every byte accessed. What
// happened before `barrier` (the block's latest), or in the warp before `warps[warp]`, is ordered before now.
struct Clock {
  uint64_t now = 1;  // 0 is never; 1 is before the first launch
  uint64_t launch = 0, block = 0, barrier = 0;
  uint64_t warps[kMaxThreads / kWarp] = {};
};
extern Clock clock_;

// Ends the launch with this sentence about the running thread. `code` is where in the kernel it happened.
[[noreturn, gnu::format(printf, 2, 3)]] void fault(const void* code, const char* format, ...);
// The same about the launch as a whole; comes back.
[[gnu::format(printf, 2, 3)]] void note_fault(const void* code, const char* format, ...);

// A launch's memory, made known to memory.cpp.
void begin_launch_memory(const Launch& launch);
void begin_block_memory();
void* dynamic_shared_begin();
// Faults if the running thread ends with copies in flight.
void end_thread_memory(const void* code);
// Checks that the running thread may read these bytes of shared memory, aligned to their number.
void check_shared_read(const void* address, size_t bytes, const void* code);
extern size_t shared_bytes_limit;
// 16 bytes of shared memory, by their address in the shared window, read for a wgmma of the running thread's
// warp: what was written there must be fenced for it. While pinned, nobody may write them.
const void* read_by_wgmma(uint32_t address, const void* code);
void pin_for_wgmma(uint32_t address);
void unpin_for_wgmma(uint32_t address, const void* code);

// warpgroup.cpp: before a block's first thread, at the end of one of them, behind the last.
void begin_block_warpgroups();
void end_thread_warpgroup(const void* code);
void end_block_warpgroups(int block_threads);

// traffic.cpp: while `counts_traffic`, accesses are recorded, and put together between two barriers.
extern bool counts_traffic;
void record_traffic(const void* code, uintptr_t address, size_t bytes, bool shared, bool writes);
void end_traffic_interval(int block_threads);

// Returns when all lanes of the mask have come to the same instruction at the same place; the last to come
// executes it for all. Lanes outside of the mask are null.
using Operands = void* const (&)[kWarp];
void meet_warp(const char* instruction, uint32_t mask, Place place, void* operand, void (*execute)(Operands),
               const void* code);

}  // namespace cuda_emulator
