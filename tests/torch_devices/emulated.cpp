// The torch device "emulated": its memory is the host's, and for maskcore's operators csrc/ops_cuda.cpp and
// the kernels' sources run on the emulator. Everything else that torch can do is done by the CPU's operators,
// on copies. Its tensors mix with the CPU's as little as a GPU's do. emulated:0 is of compute capability 8.0,
// emulated:1 of 9.0.
//
// An operator's tensors are known to the emulator as they are at its beginning: what exists may be read and
// written; what the operator allocates must be written before it is read, and before it is returned.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

extern "C" {
void cuda_emulator_add_tensor(void*, size_t bytes, int granule_log2, int initialised, int read_only,
                              const char* name);
void cuda_emulator_forget_tensors();
long long cuda_emulator_first_unwritten(size_t i);
void cuda_emulator_set_order(int order, unsigned seed);
void cuda_emulator_set_shared_limit(size_t bytes);
}

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;

// ---- memory --------------------------------------------------------------------------------------

struct Block {
  size_t bytes;
  int element_log2;
  size_t number;  // among the emulator's tensors
  bool fresh;     // allocated by the operator that runs
};

/// What the device has allocated, and which operator runs.
struct Memory {
  std::mutex mutex;  // backward passes run on a thread of their own
  std::map<void*, Block> blocks;
  std::vector<void*> freed;  // by the operator that runs: kept so that no address is given twice
  size_t known = 0;          // tensors told to the emulator
  bool in_call = false;
  unsigned calls = 0;

  void tell(void* begin, Block& block) {
    const std::string name = "a tensor of " + std::to_string(block.bytes) + " bytes";
    cuda_emulator_add_tensor(begin, block.bytes, block.element_log2, !block.fresh, 0, name.c_str());
    block.number = known++;
  }
};
Memory& memory() {
  static Memory* const it = new Memory;  // tensors may outlive static objects
  return *it;
}

thread_local int element_log2 = 0;  // of the tensor that is being allocated

void release(void* begin) {
  if (begin == nullptr) return;
  Memory& m = memory();
  const std::lock_guard lock(m.mutex);
  m.blocks.erase(begin);
  if (m.in_call) {
    m.freed.push_back(begin);
  } else {
    std::free(begin);
  }
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device = c10::impl::getDeviceGuardImpl(kDevice)->getDevice();
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    constexpr size_t kAlignment = 512;  // as torch's CUDA allocator
    void* const begin = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (begin == nullptr) throw std::bad_alloc();
    std::memset(begin, 0xff, bytes);  // NaN
    Memory& m = memory();
    const std::lock_guard lock(m.mutex);
    Block& block =
        m.blocks[begin] = {.bytes = bytes, .element_log2 = element_log2, .number = 0, .fresh = m.in_call};
    if (m.in_call) m.tell(begin, block);
    return {begin, begin, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

// ---- torch's idea of the device ------------------------------------------------------------------

thread_local c10::DeviceIndex current_index = 0;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kDevice> {
  c10::Device getDevice() const override { return {kDevice, current_index}; }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_index = device.index();
  }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
const bool hooks_are_registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

/// Remembers what the allocator is not told: the device and the size of an element.
class Allocating {
 public:
  Allocating(std::optional<c10::Device> device, std::optional<c10::ScalarType> dtype)
      : type_(c10::dtype_or_default(dtype)), before_(current_index) {
    if (device.has_value() && device->has_index()) current_index = device->index();
    element_log2 = std::bit_width(c10::elementSize(type_)) - 1;
  }
  ~Allocating() {
    current_index = before_;
    element_log2 = 0;
  }
  c10::ScalarType type() const { return type_; }

 private:
  const c10::ScalarType type_;
  const c10::DeviceIndex before_;
};

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(at::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>,
                 std::optional<c10::MemoryFormat> format) {
  const Allocating allocating(device, dtype);
  return at::detail::empty_generic(size, &allocator, kKeys, allocating.type(), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const Allocating allocating(device, dtype);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, allocating.type());
}

/// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU));
}
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}
at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  return at::native::_local_scalar_dense_cpu(on_host(tensor));
}

/// torch's other operators; one of maskcore's that a GPU has not is not here either.
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(!name.starts_with("maskcore::"), name,
                              " has no kernel for the emulated device");
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("unfold", &at::native::unfold);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

}  // namespace

// ---- what emulated.h calls -----------------------------------------------------------------------

/// An operator begins. Each runs its kernels' threads in another order than the one before.
void emulated_device_begin_call(int index) {
  Memory& m = memory();
  const std::lock_guard lock(m.mutex);
  cuda_emulator_forget_tensors();
  m.known = 0;
  m.in_call = true;
  for (auto& [begin, block] : m.blocks) {
    block.fresh = false;
    m.tell(begin, block);
  }
  cuda_emulator_set_order(static_cast<int>(m.calls % 4), m.calls);
  ++m.calls;
  cuda_emulator_set_shared_limit((index == 0 ? 163 : 227) * 1024);
}

/// An operator ends. Its results, which are what it has allocated and not freed, must have been written, if
/// it has not failed.
void emulated_device_end_call(bool failed) {
  Memory& m = memory();
  const std::lock_guard lock(m.mutex);
  m.in_call = false;
  for (void* begin : std::exchange(m.freed, {})) std::free(begin);
  for (const auto& [begin, block] : m.blocks) {
    const long long element = block.fresh && !failed ? cuda_emulator_first_unwritten(block.number) : -1;
    TORCH_CHECK(element < 0, "nothing wrote element ", element, " of a result of ", block.bytes, " bytes");
  }
  cuda_emulator_forget_tensors();
}
