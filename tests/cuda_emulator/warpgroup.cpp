// wgmma: products of a warpgroup, whose second operand a matrix descriptor names in shared memory and whose
// sums come when they are waited for. Descriptor, fragments and proxies as the PTX ISA has them
// ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate").
//
// A product is computed when the last lane of its warp has come to it; until a wgmma.wait_group ends it, its
// sums are NaN, its fragments may not change, and nobody may write what it reads.
#include <algorithm>
#include <bit>
#include <cstring>

#include "machine.h"

namespace cuda_emulator {
namespace {

constexpr int kWarpsOfGroup = 4, kMostColumns = 256, kBytesOfStep = 32, kMostDepth = 16;
constexpr uint32_t kPoison = 0x7fc0beefu;  // a NaN

// What the warps of each warpgroup have issued, in order: they must be the same.
struct Issued {
  uint64_t descriptor;
  Place place;
};
std::vector<Issued> issued[kMaxThreads / kWarp / kWarpsOfGroup];
size_t issued_by[kMaxThreads / kWarp];

struct Operand {
  float* d;
  const uint32_t* a;
  uint64_t descriptor;
  int columns;
  bool bf16, transposed;
  Place place;
  const void* code;
};

// "Matrix Descriptor Format": 14 bits each of address, leading and stride byte offset without their lowest
// four bits, then the base offset, and the kind of swizzle.
struct Descriptor {
  uint32_t start, leading, stride;
  unsigned base_offset, swizzle;
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        swizzle(bits >> 62 & 3) {}
};
constexpr unsigned kNoSwizzle = 0, kSwizzle64 = 2;
constexpr uint32_t kAtom = 512;  // eight rows of 64 bytes, which its pattern repeats after

// Where 16 bytes of a row lie in the shared window: K-major, 64-byte swizzle.
uint32_t chunk_address(const Descriptor& of, int row, int chunk) {
  const auto linear = of.start + static_cast<uint32_t>(row / 8) * of.stride +
                      static_cast<uint32_t>(row % 8 * 64 + chunk * 16);
  return linear ^ (linear >> 7 & 3) << 4;
}

// Where the 16 bytes of eight columns lie, of a step's `depth`-th row: MN-major, no swizzle. The document
// calls the way along the reduction the leading one here.
uint32_t columns_address(const Descriptor& of, int depth, int eight_columns) {
  return of.start + static_cast<uint32_t>(depth / 8) * of.leading + static_cast<uint32_t>(depth % 8 * 16) +
         static_cast<uint32_t>(eight_columns) * of.stride;
}

// Of an operand K-major, each row's chunks; of a transposed one, each of the reduction's rows' eights of
// columns.
template <class Visit>
void each_chunk(const Descriptor& of, int columns, bool transposed, Visit visit) {
  if (transposed) {
    for (int depth = 0; depth < kMostDepth; ++depth) {
      for (int eight = 0; eight < columns / 8; ++eight)
        visit(depth, eight, columns_address(of, depth, eight));
    }
  } else {
    for (int row = 0; row < columns; ++row) {
      for (int chunk = 0; chunk < kBytesOfStep / 16; ++chunk)
        visit(row, chunk, chunk_address(of, row, chunk));
    }
  }
}

float bf16_of(uint32_t pair, int half) {
  return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xffff0000u);
}
float tf32_of(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

// Whether registers are what they were at the last wgmma.fence.
bool are_as_fenced(const Wgmmas& wgmmas, const void* registers, size_t bytes) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(registers) - wgmmas.registers_begin;
  return offset + bytes <= wgmmas.registers.size() &&
         std::memcmp(wgmmas.registers.data() + offset, registers, bytes) == 0;
}

bool are_in_flight(const Wgmmas& wgmmas, const float* d) {
  return std::any_of(wgmmas.sums.begin(), wgmmas.sums.end(),
                     [d](const WgmmaSums& sums) { return sums.d == d; });
}

bool is_poisoned(const WgmmaSums& sums) {
  return std::all_of(sums.d, sums.d + sums.values.size(),
                     [](float d) { return std::bit_cast<uint32_t>(d) == kPoison; });
}

void add(Thread& thread, const Operand& o, const double (&products)[4 * kMostColumns / 8]) {
  Wgmmas& wgmmas = thread.wgmmas;
  const auto count = static_cast<size_t>(o.columns / 8 * 4);
  auto sums = std::find_if(wgmmas.sums.begin(), wgmmas.sums.end(),
                           [&](const WgmmaSums& other) { return other.d == o.d; });
  if (sums == wgmmas.sums.end()) {
    sums = wgmmas.sums.insert(sums, WgmmaSums{o.d, {o.d, o.d + count}, 0});
  } else if (!is_poisoned(*sums)) {
    fault(o.code, "sums of a wgmma in flight were written: no wgmma.wait_group has ended it");
  }
  for (size_t i = 0; i < count; ++i) {
    sums->values[i] = static_cast<float>(static_cast<double>(sums->values[i]) + products[i]);
  }
  std::fill(o.d, o.d + count, std::bit_cast<float>(kPoison));
  ++sums->in_flight;
  Wgmma product{o.d, o.a, {}, o.descriptor, o.columns, o.transposed};
  std::copy(o.a, o.a + 4, product.held);
  wgmmas.products.push_back(product);
}

void execute_wgmma(Operands lanes) {
  const Operand& any = *static_cast<Operand*>(lanes[0]);
  const void* code = any.code;
  for (int lane = 1; lane < kWarp; ++lane) {
    if (static_cast<Operand*>(lanes[lane])->descriptor != any.descriptor)
      fault(code, "wgmma: lanes 0 and %d have different descriptors", lane);
  }
  const Descriptor of(any.descriptor);
  if (of.swizzle != (any.transposed ? kNoSwizzle : kSwizzle64))
    fault(code, "wgmma: the emulator knows the 64-byte swizzle, and none where b is transposed, not %u",
          of.swizzle);
  if (of.base_offset != 0) fault(code, "wgmma: a base offset");
  if (!any.transposed && of.start % kAtom >= 64)
    fault(code, "wgmma: rows that do not begin at a multiple of %u bytes", kAtom);

  const auto [x, y, z] = block_size();
  const int first_warp = running.warp / kWarpsOfGroup * kWarpsOfGroup;
  const int warps = static_cast<int>(x * y * z) / kWarp - first_warp;
  if (warps < kWarpsOfGroup) fault(code, "wgmma by a warpgroup of %d warps", warps);
  auto& of_group = issued[running.warp / kWarpsOfGroup];
  const size_t turn = issued_by[running.warp]++;
  if (turn == of_group.size()) {
    of_group.push_back({any.descriptor, any.place});
  } else if (of_group[turn].descriptor != any.descriptor || of_group[turn].place.line != any.place.line) {
    fault(code, "wgmma: the warps of a warpgroup issue different ones");
  }

  static uint32_t b[kMostColumns][kBytesOfStep / 4];
  each_chunk(of, any.columns, any.transposed, [&](int row, int chunk, uint32_t address) {
    const void* const bytes = read_by_wgmma(address, code);
    if (any.transposed) {
      uint16_t eight[8];
      std::memcpy(eight, bytes, 16);
      for (int i = 0; i < 8; ++i)
        std::memcpy(reinterpret_cast<char*>(b[8 * chunk + i]) + 2 * row, &eight[i], 2);
    } else {
      std::memcpy(&b[row][4 * chunk], bytes, 16);
    }
  });
  static double products[kWarp][4 * kMostColumns / 8];
  // Row g or g + 8 of the warp's 16: the fragment's registers 0 and 2, or 1 and 3, of the four lanes of g.
  for (int row = 0; row < 16; ++row) {
    float a[16];
    const int g = row % 8, depth = any.bf16 ? 16 : 8;
    for (int k = 0; k < depth; ++k) {
      const int within = any.bf16 ? k / 2 : k, t = within % 4;
      const uint32_t bits = static_cast<Operand*>(lanes[4 * g + t])->a[row / 8 + 2 * (within / 4)];
      a[k] = any.bf16 ? bf16_of(bits, k % 2) : tf32_of(bits);
    }
    for (int column = 0; column < any.columns; ++column) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) {
        const float of_b = any.bf16 ? bf16_of(b[column][k / 2], k % 2) : tf32_of(b[column][k]);
        sum += static_cast<double>(a[k]) * static_cast<double>(of_b);
      }
      const int lane = 4 * g + column % 8 / 2;
      products[lane][column / 8 * 4 + row / 8 * 2 + column % 2] = sum;
    }
  }
  each_chunk(of, any.columns, any.transposed, [](int, int, uint32_t address) { pin_for_wgmma(address); });
  for (int lane = 0; lane < kWarp; ++lane) {
    add(threads[running.warp * kWarp + lane], *static_cast<Operand*>(lanes[lane]), products[lane]);
  }
}

void execute_nothing(Operands) {}

}  // namespace

void begin_block_warpgroups() {
  for (auto& of_group : issued) of_group.clear();
  std::fill(std::begin(issued_by), std::end(issued_by), 0);
}

void end_block_warpgroups(int block_threads) {
  for (int warp = 0; warp < block_threads / kWarp; ++warp) {
    const size_t all = issued[warp / kWarpsOfGroup].size();
    if (issued_by[warp] != all)
      note_fault(nullptr, "block (%u,%u,%u): warp %d issued %zu of its warpgroup's %zu wgmmas",
                 running.block.x, running.block.y, running.block.z, warp, issued_by[warp], all);
  }
}

void end_thread_warpgroup(const void* code) {
  const Wgmmas& wgmmas = threads[running.thread].wgmmas;
  if (!wgmmas.products.empty()) fault(code, "ends with %zu wgmmas in flight", wgmmas.products.size());
}

void multiply_warpgroup(const char* instruction, float* d, int columns, const uint32_t (&a)[4],
                        uint64_t descriptor, Place place) {
  const void* code = __builtin_return_address(0);
  const Wgmmas& wgmmas = threads[running.thread].wgmmas;
  const auto sums_bytes = sizeof(float) * static_cast<size_t>(columns / 2);
  // Sums may go from one product to the next without a fence.
  if (!wgmmas.fenced || !are_as_fenced(wgmmas, a, sizeof(a)) ||
      (!are_in_flight(wgmmas, d) && !are_as_fenced(wgmmas, d, sums_bytes)))
    fault(code, "%s without a wgmma.fence behind the last write of its registers", instruction);
  const auto has = [instruction](const char* word) { return std::strstr(instruction, word) != nullptr; };
  Operand o{d, a, descriptor, columns, has("bf16"), has("trans"), place, code};
  meet_warp(instruction, kAllLanes, place, &o, execute_wgmma, code);
}

void fence_warpgroup(Place place) {
  meet_warp("wgmma.fence", kAllLanes, place, nullptr, execute_nothing, __builtin_return_address(0));
  Wgmmas& wgmmas = threads[running.thread].wgmmas;
  wgmmas.fenced = true;
  const auto begin = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  const auto* const memory = reinterpret_cast<const char*>(begin);
  wgmmas.registers.assign(memory, memory + (running.stack + running.stack_bytes - begin));
  wgmmas.registers_begin = begin;
}

void commit_warpgroup(Place place) {
  meet_warp("wgmma.commit_group", kAllLanes, place, nullptr, execute_nothing, __builtin_return_address(0));
  Wgmmas& wgmmas = threads[running.thread].wgmmas;
  wgmmas.group_ends.push_back(wgmmas.products.size());
  wgmmas.fenced = false;
}

void wait_warpgroup(int pending, Place place) {
  const void* code = __builtin_return_address(0);
  meet_warp("wgmma.wait_group", kAllLanes, place, nullptr, execute_nothing, code);
  Wgmmas& wgmmas = threads[running.thread].wgmmas;
  if (wgmmas.group_ends.size() <= static_cast<size_t>(pending)) return;
  const size_t groups = wgmmas.group_ends.size() - static_cast<size_t>(pending);
  const size_t ended = wgmmas.group_ends[groups - 1];
  for (size_t i = 0; i < ended; ++i) {
    const Wgmma& product = wgmmas.products[i];
    if (!std::equal(product.held, product.held + 4, product.a))
      fault(code, "fragments of a wgmma in flight were written: no wgmma.wait_group has ended it");
    if (running.thread % kWarp == 0) {
      each_chunk(Descriptor(product.descriptor), product.columns, product.transposed,
                 [code](int, int, uint32_t address) { unpin_for_wgmma(address, code); });
    }
    const auto sums = std::find_if(wgmmas.sums.begin(), wgmmas.sums.end(),
                                   [&](const WgmmaSums& other) { return other.d == product.d; });
    if (--sums->in_flight > 0) continue;
    if (!is_poisoned(*sums))
      fault(code, "sums of a wgmma in flight were written: no wgmma.wait_group has ended it");
    std::copy(sums->values.begin(), sums->values.end(), sums->d);
    wgmmas.sums.erase(sums);
  }
  wgmmas.products.erase(wgmmas.products.begin(), wgmmas.products.begin() + static_cast<ptrdiff_t>(ended));
  wgmmas.group_ends.erase(wgmmas.group_ends.begin(),
                          wgmmas.group_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : wgmmas.group_ends) end -= ended;
}

}  // namespace cuda_emulator
