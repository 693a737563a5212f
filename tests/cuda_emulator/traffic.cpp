// Counts what a warp's accesses cost in shared memory and in global memory, where a launch is asked for it.
//
// Lanes execute one after the other here, so a warp's request is put together again: between two barriers,
// the i-th access of each lane at one place of the code belongs to one request. That is what a GPU does where
// the lanes do not diverge; where they do, the counts are an approximation. What nvcc merges or moves is not
// seen. What a wgmma reads of its operand is not counted.
//
// Shared memory has 32 banks of 4 bytes. A request of 4 bytes a lane is served for 32 lanes at a time, of 8
// bytes for 16, of 16 bytes (ldmatrix's rows too) for 8; each time takes as many wavefronts as the busiest
// bank has different words. Global memory is moved in sectors of 32 bytes.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "machine.h"

namespace cuda_emulator {

bool counts_traffic = false;

namespace {

struct Event {
  const void* code;
  uintptr_t address;
  uint16_t bytes;
  bool shared, writes;
};
std::vector<Event> events[kMaxThreads];

struct Cost {
  uint64_t requests = 0, units = 0, least = 0;
};
using CodePlace = std::tuple<const void*, bool, bool>;  // code, shared, writes
std::map<CodePlace, Cost> costs;

struct Request {
  Event first;
  std::vector<std::pair<int, uintptr_t>> lanes;
};

void add_shared(const Request& request, Cost& cost) {
  const int lanes_at_a_time = request.first.bytes <= 4 ? 32 : 128 / request.first.bytes;
  for (int begin = 0; begin < kWarp; begin += lanes_at_a_time) {
    std::set<uintptr_t> words;
    for (const auto& [lane, address] : request.lanes) {
      if (lane < begin || lane >= begin + lanes_at_a_time) continue;
      for (uintptr_t word = address / 4; word <= (address + request.first.bytes - 1) / 4; ++word)
        words.insert(word);
    }
    if (words.empty()) continue;
    uint64_t in_bank[32] = {};
    for (const uintptr_t word : words) ++in_bank[word % 32];
    cost.units += *std::max_element(std::begin(in_bank), std::end(in_bank));
    cost.least += (words.size() + 31) / 32;
  }
}

void add_global(const Request& request, Cost& cost) {
  std::set<uintptr_t> sectors, bytes;
  for (const auto& [lane, address] : request.lanes) {
    for (uintptr_t byte = address; byte < address + request.first.bytes; ++byte) bytes.insert(byte);
    sectors.insert(address / 32);
    sectors.insert((address + request.first.bytes - 1) / 32);
  }
  cost.units += sectors.size();
  cost.least += (bytes.size() + 31) / 32;
}

}  // namespace

void record_traffic(const void* code, uintptr_t address, size_t bytes, bool shared, bool writes) {
  events[running.thread].push_back({code, address, static_cast<uint16_t>(bytes), shared, writes});
}

void end_traffic_interval(int block_threads) {
  for (int warp = 0; warp * kWarp < block_threads; ++warp) {
    std::map<std::pair<const void*, int>, Request> requests;
    for (int lane = 0; lane < kWarp; ++lane) {
      std::unordered_map<const void*, int> times;
      for (const Event& event : events[warp * kWarp + lane]) {
        Request& request = requests[{event.code, times[event.code]++}];
        request.first = event;
        request.lanes.emplace_back(lane, event.address);
      }
      events[warp * kWarp + lane].clear();
    }
    for (const auto& [key, request] : requests) {
      Cost& cost = costs[{request.first.code, request.first.shared, request.first.writes}];
      ++cost.requests;
      if (request.first.shared) {
        add_shared(request, cost);
      } else {
        add_global(request, cost);
      }
    }
  }
}

}  // namespace cuda_emulator

extern "C" {

// Whether the launches to come are counted; forgets the counts of those before.
void cuda_emulator_count_traffic(int wanted) {
  cuda_emulator::counts_traffic = wanted != 0;
  cuda_emulator::costs.clear();
  for (auto& of_thread : cuda_emulator::events) of_thread.clear();
}

// The i-th place's counts: requests, wavefronts or sectors, and the least there could be. False past the end.
int cuda_emulator_traffic(size_t i, const void** code, int* shared, int* writes, uint64_t counts[3]) {
  if (i >= cuda_emulator::costs.size()) return 0;
  const auto& [place, cost] = *std::next(cuda_emulator::costs.begin(), static_cast<ptrdiff_t>(i));
  *code = std::get<0>(place);
  *shared = std::get<1>(place);
  *writes = std::get<2>(place);
  counts[0] = cost.requests;
  counts[1] = cost.units;
  counts[2] = cost.least;
  return 1;
}

}  // extern "C"
