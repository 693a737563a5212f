// Runs a launch: one block after the other, a block's threads as fibers that change at barriers and warp
// instructions. A fiber keeps its stack from block to block, so that a thread costs two jumps to start.
#include "machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <utility>

namespace cuda_emulator {

Thread threads[kMaxThreads];
Running running;
Clock clock_;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
// Neighbours' stacks begin in different cache sets.
constexpr size_t kStackColours = 32, kColourBytes = 192;
constexpr uint64_t kUntouched = 0x6b6e756c62616e6bu;

enum class Order { kForward, kReverse, kRandom, kInterleaved };

struct Machine {
  Order order = Order::kForward;
  std::minstd_rand random;
  Launch launch{};
  int block_threads = 0;
  int exited = 0, at_barrier = 0, first_at_barrier = 0;
  uint32_t arrived[kMaxThreads / kWarp] = {};
  uint64_t ready[kMaxThreads / 64] = {};
  int latest = 0;  // the thread that ran last
  char* stacks = nullptr;
  bool begun[kMaxThreads] = {};  // whether the thread's fiber waits for its next block
  std::jmp_buf scheduler;
  bool faulted = false;
  std::vector<uint64_t> only_blocks;  // of each launch; all where empty
};
Machine machine;

struct Fault {
  std::string text;
  const void* kernel = nullptr;
  const void* code = nullptr;
};
Fault first_fault;

char* stack_of(int thread) { return machine.stacks + static_cast<size_t>(thread) * kStackBytes; }

// The two saved contexts lie on different stacks; _setjmp and _longjmp keep no signal mask and cost no system
// call.
[[gnu::noinline]] void change(std::jmp_buf from, std::jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

void set_ready(int thread) {
  threads[thread].state = State::kReady;
  machine.ready[thread / 64] |= uint64_t{1} << thread % 64;
}

// The first ready thread at or after `start`, around the end; -1 if there is none.
int next_ready(int start) {
  const int words = (machine.block_threads + 63) / 64;
  for (int i = 0; i <= words; ++i) {
    const int word = (start / 64 + i) % words;
    uint64_t bits = machine.ready[word];
    if (i == 0) bits &= ~uint64_t{0} << start % 64;
    if (i == words) bits &= (uint64_t{1} << start % 64) - 1;
    if (bits != 0) return word * 64 + __builtin_ctzll(bits);
  }
  return -1;
}

int last_ready() {
  for (int word = kMaxThreads / 64 - 1; word >= 0; --word) {
    if (machine.ready[word] != 0) return word * 64 + 63 - __builtin_clzll(machine.ready[word]);
  }
  return -1;
}

int choose_thread() {
  const int n = machine.block_threads;
  switch (machine.order) {
    case Order::kForward:
      return next_ready(0);
    case Order::kReverse:
      return last_ready();
    case Order::kRandom:
      return next_ready(static_cast<int>(machine.random() % static_cast<unsigned>(n)));
    case Order::kInterleaved: {  // the next warp; within it from the last lane down
      const int first =
          next_ready((machine.latest / kWarp + 1) * kWarp % ((n + kWarp - 1) / kWarp * kWarp) % n);
      if (first < 0) return first;
      const uint32_t lanes = static_cast<uint32_t>(machine.ready[first / 64] >> first / kWarp % 2 * kWarp);
      return first / kWarp * kWarp + 31 - __builtin_clz(lanes);
    }
  }
  return -1;
}

void leave_thread() { change(threads[running.thread].context, machine.scheduler); }

[[noreturn]] void fiber_main() {
  for (;;) {
    machine.launch.body(machine.launch.call);
    end_thread_memory(machine.launch.kernel);
    end_thread_warpgroup(machine.launch.kernel);
    const auto* low = reinterpret_cast<const uint64_t*>(stack_of(running.thread));
    if (*low != kUntouched)
      fault(machine.launch.kernel, "uses more than %zu KiB of local memory", kStackBytes / 1024);
    threads[running.thread].state = State::kExited;
    ++machine.exited;
    leave_thread();
  }
}

void run_thread(int number) {
  Thread& thread = threads[number];
  machine.latest = number;
  machine.ready[number / 64] &= ~(uint64_t{1} << number % 64);
  running.stack = reinterpret_cast<uintptr_t>(stack_of(number));
  running.stack_bytes = kStackBytes;
  running.thread = number;
  running.warp = number / kWarp;
  if (machine.begun[number]) {
    change(machine.scheduler, thread.context);
  } else if (_setjmp(machine.scheduler) == 0) {
    machine.begun[number] = true;
    *reinterpret_cast<uint64_t*>(stack_of(number)) = kUntouched;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_of(number);
    context.uc_stack.ss_size = kStackBytes - static_cast<size_t>(number) % kStackColours * kColourBytes;
    context.uc_link = nullptr;
    makecontext(&context, reinterpret_cast<void (*)()>(fiber_main), 0);
    setcontext(&context);
  }
  running = Running{.block = running.block};
}

std::string described(const uint3& i) {
  char text[48];
  std::snprintf(text, sizeof(text), "(%u,%u,%u)", i.x, i.y, i.z);
  return text;
}

std::string described(Place place) {
  const std::string file(place.file);
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(place.line);
}

std::string doing(int number) {
  const Thread& thread = threads[number];
  std::string who = "thread " + described(thread.index);
  if (thread.state == State::kExited) return who + " has ended";
  who += std::string(" waits at ") + thread.instruction + " (" + described(thread.place) + ")";
  char mask[40];
  std::snprintf(mask, sizeof(mask), " with mask 0x%08x", thread.mask);
  return thread.state == State::kAtWarpInstruction ? who + mask : who;
}

// No thread can go on: says which one waits, and for whom.
void explain_divergence() {
  for (int i = 0; i < machine.block_threads; ++i) {
    if (threads[i].state != State::kAtBarrier) continue;
    for (int j = 0; j < machine.block_threads; ++j) {
      if (threads[j].state == State::kAtBarrier) continue;
      note_fault(nullptr, "block %s: barrier divergence: %s, %s", described(running.block).c_str(),
                 doing(i).c_str(), doing(j).c_str());
      return;
    }
  }
  for (int i = 0; i < machine.block_threads; ++i) {
    if (threads[i].state != State::kAtWarpInstruction) continue;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int j = i / kWarp * kWarp + lane;
      if ((threads[i].mask >> lane & 1) == 0) continue;
      if (j >= machine.block_threads) {
        note_fault(nullptr, "block %s: warp divergence: %s, but lane %d does not exist",
                   described(running.block).c_str(), doing(i).c_str(), lane);
        return;
      }
      if (threads[j].state == State::kAtWarpInstruction && threads[j].instruction == threads[i].instruction &&
          threads[j].place.line == threads[i].place.line && threads[j].mask == threads[i].mask) {
        continue;
      }
      note_fault(nullptr, "block %s: warp divergence: %s, %s", described(running.block).c_str(),
                 doing(i).c_str(), doing(j).c_str());
      return;
    }
  }
}

void run_block(uint3 block) {
  running.block = block;
  machine.exited = machine.at_barrier = 0;
  std::fill(std::begin(machine.arrived), std::end(machine.arrived), 0);
  std::fill(std::begin(machine.ready), std::end(machine.ready), 0);
  clock_.block = clock_.barrier = ++clock_.now;
  std::fill(std::begin(clock_.warps), std::end(clock_.warps), clock_.now);
  begin_block_memory();
  begin_block_warpgroups();
  const dim3 size = machine.launch.block;
  for (int i = 0; i < machine.block_threads; ++i) {
    const auto n = static_cast<unsigned>(i);
    threads[i].index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
    set_ready(i);
  }
  machine.latest = machine.block_threads - 1;
  while (!machine.faulted && machine.exited < machine.block_threads) {
    const int thread = choose_thread();
    if (thread >= 0) {
      run_thread(thread);
    } else {
      explain_divergence();
    }
  }
  if (!machine.faulted) end_block_warpgroups(machine.block_threads);
  if (counts_traffic) end_traffic_interval(machine.block_threads);
}

void begin_stacks() {
  if (machine.stacks != nullptr) return;
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  machine.stacks = static_cast<char*>(memory);
}

std::vector<uint64_t> block_order(uint64_t blocks) {
  std::vector<uint64_t> order = machine.only_blocks;
  std::erase_if(order, [&](uint64_t block) { return block >= blocks; });
  if (machine.only_blocks.empty()) {
    order.resize(blocks);
    std::iota(order.begin(), order.end(), 0);
  }
  if (machine.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (machine.order == Order::kRandom) std::shuffle(order.begin(), order.end(), machine.random);
  if (machine.order == Order::kInterleaved) {
    std::stable_partition(order.begin(), order.end(), [](uint64_t block) { return block % 2 == 1; });
  }
  return order;
}

void set_fault(const void* code, const std::string& text) {
  machine.faulted = true;
  if (first_fault.text.empty()) first_fault = {text, machine.launch.kernel, code};
}

std::string formatted(const char* format, va_list arguments) {
  char text[512];
  std::vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

}  // namespace

void note_fault(const void* code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  set_fault(code, formatted(format, arguments));
  va_end(arguments);
}

void fault(const void* code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string what = formatted(format, arguments);
  va_end(arguments);
  set_fault(code, "block " + described(running.block) + ", thread " +
                      described(threads[running.thread].index) + ": " + what);
  leave_thread();
  __builtin_unreachable();
}

namespace {
// Told of each launch instead of its being run, where there is one.
void (*recorded)(const void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads,
                 size_t shared) = nullptr;
}  // namespace

cudaError_t run(const Launch& launch) {
  if (machine.faulted) return cudaErrorLaunchFailure;
  const auto [gx, gy, gz] = launch.grid;
  const auto [bx, by, bz] = launch.block;
  if (gx == 0 || gy == 0 || gz == 0 || gx > 0x7fffffff || gy > 65535 || gz > 65535)
    return cudaErrorInvalidConfiguration;
  if (bx == 0 || by == 0 || bz == 0 || bx > 1024 || by > 1024 || bz > 64 ||
      uint64_t{bx} * by * bz > kMaxThreads) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.shared_bytes > shared_bytes_limit) return cudaErrorInvalidValue;
  if (recorded != nullptr) {
    recorded(launch.kernel, gx, gy, gz, bx * by * bz, launch.shared_bytes);
    return cudaSuccess;
  }
  begin_stacks();
  machine.launch = launch;
  machine.block_threads = static_cast<int>(bx * by * bz);
  clock_.launch = ++clock_.now;
  begin_launch_memory(launch);
  const auto finished = [](cudaError_t error) {
    machine.launch.kernel = nullptr;  // what comes now is the launcher's fault
    return error;
  };
  for (const uint64_t b : block_order(uint64_t{gx} * gy * gz)) {
    run_block({static_cast<unsigned>(b % gx), static_cast<unsigned>(b / gx % gy),
               static_cast<unsigned>(b / gx / gy)});
    if (machine.faulted) {
      // The fibers are left where they stand: each begins anew the next time.
      std::fill(std::begin(machine.begun), std::end(machine.begun), false);
      for (Thread& thread : threads) {
        thread.async = {};
        thread.wgmmas = {};
      }
      return finished(cudaErrorLaunchFailure);
    }
  }
  return finished(cudaSuccess);
}

void block_barrier(Place place) {
  Thread& thread = threads[running.thread];
  const void* code = __builtin_return_address(0);
  thread.instruction = "__syncthreads";
  thread.place = place;
  if (machine.at_barrier == 0) machine.first_at_barrier = running.thread;
  const Thread& first = threads[machine.first_at_barrier];
  if (first.place.line != place.line || std::string_view(first.place.file) != place.file) {
    fault(code, "barrier divergence: waits at __syncthreads (%s), %s", described(place).c_str(),
          doing(machine.first_at_barrier).c_str());
  }
  thread.state = State::kAtBarrier;
  if (++machine.at_barrier == machine.block_threads) {
    machine.at_barrier = 0;
    if (counts_traffic) end_traffic_interval(machine.block_threads);
    clock_.barrier = ++clock_.now;
    std::fill(std::begin(clock_.warps), std::end(clock_.warps), clock_.now);
    for (int i = 0; i < machine.block_threads; ++i) set_ready(i);
  }
  leave_thread();
}

void meet_warp(const char* instruction, uint32_t mask, Place place, void* operand, void (*execute)(Operands),
               const void* code) {
  Thread& thread = threads[running.thread];
  const int lane = running.thread % kWarp, warp = running.warp;
  if ((mask >> lane & 1) == 0)
    fault(code, "%s with mask 0x%08x, in which its own lane %d is not", instruction, mask, lane);
  thread.state = State::kAtWarpInstruction;
  thread.instruction = instruction;
  thread.place = place;
  thread.mask = mask;
  thread.operand = operand;
  machine.arrived[warp] |= 1u << lane;
  Thread* const lanes = threads + warp * kWarp;
  bool together = (machine.arrived[warp] & mask) == mask;
  for (int i = 0; i < kWarp && together; ++i) {
    if ((mask >> i & 1) == 0) continue;
    together = lanes[i].mask == mask && lanes[i].instruction == instruction &&
               lanes[i].place.line == place.line && std::string_view(lanes[i].place.file) == place.file;
  }
  if (together) {
    void* operands[kWarp] = {};
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) != 0) operands[i] = lanes[i].operand;
    }
    execute(operands);
    machine.arrived[warp] &= ~mask;
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) != 0) set_ready(warp * kWarp + i);
    }
  }
  leave_thread();
}

uint3 thread_index() { return threads[running.thread].index; }
uint3 block_index() { return running.block; }
dim3 block_size() { return machine.launch.block; }
dim3 grid_size() { return machine.launch.grid; }
void* dynamic_shared_memory() { return dynamic_shared_begin(); }

}  // namespace cuda_emulator

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unknown error";
}
cudaError_t cudaGetLastError() {
  return cuda_emulator::machine.faulted ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// A small GPU of compute capability 8.0, whose few processors make grids that depend on them small as well.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 164 * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(cuda_emulator::shared_bytes_limit);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// What tests/cuda_emulator/__init__.py calls. -----------------------------------------------------

extern "C" {

void cuda_emulator_record_launches(void (*told)(const void*, unsigned, unsigned, unsigned, unsigned,
                                                size_t)) {
  cuda_emulator::recorded = told;
}

void cuda_emulator_set_order(int order, unsigned seed) {
  cuda_emulator::machine.order = static_cast<cuda_emulator::Order>(order);
  cuda_emulator::machine.random.seed(seed + 1);
}

// Of each launch to come only these blocks run, as far as it has them; all where there are none.
void cuda_emulator_set_only_blocks(const uint64_t* blocks, size_t count) {
  cuda_emulator::machine.only_blocks.assign(blocks, blocks + count);
}

// The sentence of the first fault since the last call, or null; the addresses of the kernel and of the place
// in it.
const char* cuda_emulator_take_fault(const void** kernel, const void** code) {
  static cuda_emulator::Fault taken;
  taken = std::exchange(cuda_emulator::first_fault, {});
  cuda_emulator::machine.faulted = false;
  *kernel = taken.kernel;
  *code = taken.code;
  return taken.text.empty() ? nullptr : taken.text.c_str();
}

}  // extern "C"
