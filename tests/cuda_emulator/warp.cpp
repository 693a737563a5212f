// The instructions that a warp executes together. Fragments as the PTX
// ISA has them ("Matrix Fragments for mma.m16n8k8", "... mma.m16n8k16", "ldmatrix"): group = lane / 4 and
// member = lane % 4 there are g and t here.
#include <bit>
#include <cstring>

#include "machine.h"

namespace cuda_emulator {
namespace {

template <class Operand>
Operand& lane_of(Operands lanes, int lane) {
  return *static_cast<Operand*>(lanes[lane]);
}

struct ShuffleOperand {
  Shuffle kind;
  uint64_t value;
  unsigned operand;
  unsigned width;
  uint64_t result;
  int absent_lane;  // that the value should come from; -1 if it took part
};

// PTX shfl.sync: the lane that the value comes from; its own where that is in another segment of `width`
// lanes.
unsigned source_lane(const ShuffleOperand& o, unsigned lane) {
  const unsigned segment = lane & ~(o.width - 1), last = segment | (o.width - 1);
  switch (o.kind) {
    case Shuffle::kIndex:
      return segment | (o.operand & (o.width - 1));
    case Shuffle::kUp:
      return lane >= segment + o.operand ? lane - o.operand : lane;
    case Shuffle::kDown:
      return o.operand <= last - lane ? lane + o.operand : lane;
    case Shuffle::kXor:
      return (lane ^ o.operand) <= last ? lane ^ o.operand : lane;
  }
  return lane;
}

void execute_shuffle(Operands lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane] == nullptr) continue;
    auto& o = lane_of<ShuffleOperand>(lanes, lane);
    const int source = static_cast<int>(source_lane(o, static_cast<unsigned>(lane)));
    o.absent_lane = lanes[source] == nullptr ? source : -1;
    if (o.absent_lane < 0) o.result = lane_of<ShuffleOperand>(lanes, source).value;
  }
}

struct BallotOperand {
  bool vote;
  uint32_t result;
};

void execute_ballot(Operands lanes) {
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane] != nullptr && lane_of<BallotOperand>(lanes, lane).vote) votes |= 1u << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane] != nullptr) lane_of<BallotOperand>(lanes, lane).result = votes;
  }
}

void execute_warp_barrier(Operands) { clock_.warps[running.warp] = ++clock_.now; }

struct LoadOperand {
  uint16_t row[8];  // the row that this lane names
  uint32_t* r;
};

template <int kMatrices, bool kTransposed>
void execute_load(Operands lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < kMatrices; ++j) {
      const auto element = [&](int row, int column) -> uint32_t {
        return lane_of<LoadOperand>(lanes, 8 * j + row).row[column];
      };
      const uint32_t low = kTransposed ? element(2 * t, g) : element(g, 2 * t);
      const uint32_t high = kTransposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
      lane_of<LoadOperand>(lanes, lane).r[j] = low | high << 16;
    }
  }
}

struct MultiplyOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// d += a b for a 16 x K times K x 8 product whose fragments have been gathered.
template <int K>
void multiply(Operands lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) {
        sums[row][column] += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* d = lane_of<MultiplyOperand>(lanes, lane).d;
    for (int i = 0; i < 4; ++i) {
      d[i] = static_cast<float>(d[i] + sums[i < 2 ? g : g + 8][2 * t + i % 2]);
    }
  }
}

void execute_multiply_tf32(Operands lanes) {
  float a[16][8], b[8][8];
  const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto& o = lane_of<MultiplyOperand>(lanes, lane);
    for (int i = 0; i < 4; ++i) a[i % 2 == 0 ? g : g + 8][i < 2 ? t : t + 4] = tf32(o.a[i]);
    for (int i = 0; i < 2; ++i) b[i == 0 ? t : t + 4][g] = tf32(o.b[i]);
  }
  multiply<8>(lanes, a, b);
}

void execute_multiply_bf16(Operands lanes) {
  float a[16][16], b[16][8];
  const auto bf16 = [](uint32_t pair, int half) {
    return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xffff0000u);
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto& o = lane_of<MultiplyOperand>(lanes, lane);
    for (int i = 0; i < 8; ++i) {
      const int row = i % 4 < 2 ? g : g + 8, column = 2 * t + i % 2 + (i < 4 ? 0 : 8);
      a[row][column] = bf16(o.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + (i < 2 ? 0 : 8)][g] = bf16(o.b[i / 2], i % 2);
  }
  multiply<16>(lanes, a, b);
}

}  // namespace

void warp_barrier(uint32_t mask, Place place) {
  const void* code = __builtin_return_address(0);
  if (mask != kAllLanes)
    fault(code, "__syncwarp with mask 0x%08x: the emulator knows whole warps only", mask);
  meet_warp("__syncwarp", mask, place, nullptr, execute_warp_barrier, code);
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, int width, Place place) {
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                           "__shfl_xor_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  const void* code = __builtin_return_address(0);
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fault(code, "%s with a width of %d", name, width);
  ShuffleOperand o{kind, value, operand, static_cast<unsigned>(width), 0, -1};
  meet_warp(name, mask, place, &o, execute_shuffle, code);
  if (o.absent_lane >= 0)
    fault(code, "%s reads lane %d, which is not in the mask 0x%08x", name, o.absent_lane, mask);
  return o.result;
}

uint32_t ballot(const char* name, uint32_t mask, bool vote, Place place) {
  BallotOperand o{vote, 0};
  meet_warp(name, mask, place, &o, execute_ballot, __builtin_return_address(0));
  return o.result;
}

void load_matrices(uint32_t* r, int matrices, bool transposed, const void* shared_row, Place place) {
  const void* code = __builtin_return_address(0);
  LoadOperand o{{}, r};
  threads[running.thread].wgmmas.fenced = false;
  if (running.thread % kWarp < 8 * matrices) {
    check_shared_read(shared_row, sizeof(o.row), code);
    std::memcpy(o.row, shared_row, sizeof(o.row));
  }
  switch (matrices) {
    case 4:
      return meet_warp("ldmatrix.x4", kAllLanes, place, &o,
                       transposed ? execute_load<4, true> : execute_load<4, false>, code);
    case 2:
      return meet_warp("ldmatrix.x2", kAllLanes, place, &o,
                       transposed ? execute_load<2, true> : execute_load<2, false>, code);
    default:
      return meet_warp("ldmatrix.x1", kAllLanes, place, &o,
                       transposed ? execute_load<1, true> : execute_load<1, false>, code);
  }
}

void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  MultiplyOperand o{d, a, b};
  meet_warp("mma.m16n8k8.tf32", kAllLanes, place, &o, execute_multiply_tf32, __builtin_return_address(0));
}

void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  MultiplyOperand o{d, a, b};
  meet_warp("mma.m16n8k16.bf16", kAllLanes, place, &o, execute_multiply_bf16, __builtin_return_address(0));
}

}  // namespace cuda_emulator
