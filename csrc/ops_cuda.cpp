// The CUDA operators as torch sees them: checks, memory, the device and its current stream; then the
// launchers of cuda_launchers.h, which know nothing of torch. The only such file: host code, against
// LibTorch's stable ABI.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_launchers.h"

namespace maskcore {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks --------------------------------------------------------------------------------------

constexpr int64_t kAny = -1;  // a size that only has to be consistent with itself

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Long:
      return "int64";
    default:
      return "another type";
  }
}

/// Whether sm_90's own products may be used: where these kernels were compiled for it, and MASKCORE_WGMMA is
/// not 0, to compare them with those that every GPU has.
bool wgmma_is_wanted() {
#ifdef MASKCORE_BUILT_FOR_SM90A
  const char* const value = std::getenv("MASKCORE_WGMMA");
  const std::string wanted = value == nullptr ? "" : value;
  STD_TORCH_CHECK(wanted.empty() || wanted == "0" || wanted == "1", "MASKCORE_WGMMA must be 0 or 1, is ",
                  wanted);
  return wanted != "0";
#else
  return false;
#endif
}

std::string device_of(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "not a CUDA device";
}

/// An operator's call on the device of its first tensor, which `first` names: where it runs, and the checks
/// of its arguments.
class Call {
 public:
  Call(const Tensor& tensor, const char* first)
      : first_(first), index_(tensor.get_device_index()), guard_(checked(tensor, first)) {
    int major = 0, minor = 0;
    for (const auto& [value, attribute] :
         {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
          std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
          std::pair{&multiprocessors_, cudaDevAttrMultiProcessorCount},
          std::pair{&shared_bytes_, cudaDevAttrMaxSharedMemoryPerMultiprocessor}}) {
      started(cudaDeviceGetAttribute(value, attribute, index_), "the device's attributes");
    }
    STD_TORCH_CHECK(major >= 8, first, " is on cuda:", index_, ", whose compute capability ", major, ".",
                    minor, " is below 8.0: maskcore's CUDA kernels need an A100, an RTX 30 or a later GPU");
    void* stream = nullptr;
    wgmma_ = major == 9 && minor == 0 && wgmma_is_wanted();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }
  int shared_bytes() const { return shared_bytes_; }  // of a multiprocessor
  bool wgmma() const { return wgmma_; }

  /// Device, dimensions, dtype and layout.
  void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
             ScalarType type = ScalarType::Float) const {
    check_device(tensor, name);
    check_sizes(tensor, name, sizes);
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", name_of(type), ", is ",
                    name_of(tensor.scalar_type()));
    STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  }

  /// The same for a tensor that may be float32 or bfloat16.
  DataType check_activation(const Tensor& tensor, const char* name,
                            std::initializer_list<int64_t> sizes) const {
    const bool bf16 = tensor.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(bf16 || tensor.scalar_type() == ScalarType::Float, name,
                    " must be float32 or bfloat16, is ", name_of(tensor.scalar_type()));
    check(tensor, name, sizes, tensor.scalar_type());
    return bf16 ? DataType::kBfloat16 : DataType::kFloat32;
  }

  void check_device(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == index_, name,
                    " must be on the device of ", first_, ", cuda:", index_, ", is on ", device_of(tensor));
  }

  static void started(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, " could not be launched: ", cudaGetErrorString(error));
  }

 private:
  static int32_t checked(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device, as another argument is");
    return tensor.get_device_index();
  }

  static void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(),
                    " dimensions, has ", tensor.dim());
    int64_t i = 0;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(size == kAny || tensor.size(i) == size, name, " must have size ", size,
                      " in dimension ", i, ", has ", tensor.size(i));
      ++i;
    }
  }

  const char* first_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  int multiprocessors_ = 0, shared_bytes_ = 0;
  bool wgmma_ = false;
  cudaStream_t stream_ = nullptr;
};

/// Elements are counted in 64 bits, those of a row of pixels in 32.
void check_row(int64_t W, int64_t C, const char* name) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  STD_TORCH_CHECK(C <= kMost && W < kMost && (W + 1) <= kMost / std::max<int64_t>(C, 1), name,
                  " must have fewer than 2^31 elements in a row, has ", W, " x ", C);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// ---- convolutions --------------------------------------------------------------------------------

Precision parse_precision(const std::string& name) {
  if (name == "ieee") return Precision::kIeee;
  if (name == "tf32") return Precision::kTf32;
  STD_TORCH_CHECK(name == "bf16", "precision must be ieee, tf32 or bf16, is ", name);
  return Precision::kBf16;
}

/// `number`, which is empty or 1, stands behind the arguments' names in errors.
ConvCall conv_call(const Call& call, const Tensor& x, const Tensor& weight, int64_t padding,
                   const std::string& precision, const std::string& number = "") {
  const std::string of_weight = "weight" + number;
  STD_TORCH_CHECK(padding == 0 || padding == 1, "padding", number, " must be 0 or 1, is ", padding);
  const DataType dtype = call.check_activation(x, "x", {kAny, kAny, kAny, kAny});
  call.check(weight, of_weight.c_str(), {kAny, x.size(3), 3, 3});
  const ConvSize size{.N = x.size(0),
                      .H = x.size(1),
                      .W = x.size(2),
                      .C = x.size(3),
                      .K = weight.size(0),
                      .padding = padding};
  STD_TORCH_CHECK(size.P >= 1 && size.Q >= 1, "x must be at least ", 3 - 2 * padding,
                  " pixels high and wide, is ", size.H, " x ", size.W);
  STD_TORCH_CHECK(size.C >= 1 && size.K >= 1, of_weight,
                  " must have at least one input and one output channel");
  check_row(size.W, size.C, "x");
  check_row(size.W + 2 * padding, size.K, "the convolution's output");
  STD_TORCH_CHECK(size.N <= std::numeric_limits<int32_t>::max() / (size.H * size.W),
                  "x must have fewer than 2^31 pixels, has ", size.N, " x ", size.H, " x ", size.W);
  return {size, dtype, parse_precision(precision), call.multiprocessors(), call.shared_bytes(), call.wgmma()};
}

ScalarType scalar_type(DataType dtype) {
  return dtype == DataType::kBfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

void refuse_transformed(const std::optional<Tensor>& transformed) {
  STD_TORCH_CHECK(!transformed.has_value(),
                  "transformed must be None on a CUDA device: it is for the CPU's Winograd kernels");
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

Tensor conv_relu_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t padding,
                      const std::optional<Tensor>& transformed, const std::string& precision) {
  const Call call(x, "x");
  refuse_transformed(transformed);
  const ConvCall conv = conv_call(call, x, weight, padding, precision);
  const ConvSize& s = conv.size;
  call.check(bias, "bias", {s.K});
  Tensor y = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.K});
  const Tensor room = workspace(x, conv_relu_workspace_bytes(conv));
  call.started(launch_conv_relu(conv, x.const_data_ptr(), const_data<float>(weight), const_data<float>(bias),
                                y.mutable_data_ptr(), room.mutable_data_ptr(), call.stream()),
               "conv_relu");
  return y;
}

std::tuple<Tensor, Tensor> conv_relu_max_pool_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   int64_t padding, const std::optional<Tensor>& transformed,
                                                   const std::string& precision) {
  const Call call(x, "x");
  refuse_transformed(transformed);
  const ConvCall conv = conv_call(call, x, weight, padding, precision);
  const ConvSize& s = conv.size;
  call.check(bias, "bias", {s.K});
  STD_TORCH_CHECK(s.P >= 2 && s.Q >= 2, "x is too small to be pooled: the convolution gives ", s.P, " x ",
                  s.Q);
  Tensor y = torch::stable::new_empty(x, {s.N, s.P / 2, s.Q / 2, s.K});
  Tensor argmax = torch::stable::new_empty(x, {s.N, s.P / 2, s.Q / 2, s.K}, ScalarType::Byte);
  const Tensor room = workspace(x, conv_relu_workspace_bytes(conv));
  call.started(launch_conv_relu_max_pool(conv, x.const_data_ptr(), const_data<float>(weight),
                                         const_data<float>(bias), y.mutable_data_ptr(), data<uint8_t>(argmax),
                                         room.mutable_data_ptr(), call.stream()),
               "conv_relu_max_pool");
  return {y, argmax};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // dx, dweight, dbias

Gradients empty_gradients(const ConvSize& s, const Tensor& x, const Tensor& weight, bool need_dx) {
  return {torch::stable::new_empty(x, {need_dx ? s.N : 0, s.H, s.W, s.C}),
          torch::stable::new_empty(weight, {s.K, s.C, 3, 3}), torch::stable::new_empty(weight, {s.K})};
}

Gradients conv_relu_backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& y,
                                  int64_t padding, const std::string& precision, bool need_dx) {
  const Call call(x, "x");
  const ConvCall conv = conv_call(call, x, weight, padding, precision);
  const ConvSize& s = conv.size;
  call.check(dy, "dy", {s.N, s.P, s.Q, s.K}, scalar_type(conv.dtype));
  call.check(y, "y", {s.N, s.P, s.Q, s.K}, scalar_type(conv.dtype));
  const auto [dx, dweight, dbias] = empty_gradients(s, x, weight, need_dx);
  const Tensor room = workspace(x, conv_relu_backward_workspace_bytes(conv));
  call.started(launch_conv_relu_backward(conv, dy.const_data_ptr(), x.const_data_ptr(),
                                         const_data<float>(weight), y.const_data_ptr(),
                                         need_dx ? dx.mutable_data_ptr() : nullptr, data<float>(dweight),
                                         data<float>(dbias), room.mutable_data_ptr(), call.stream()),
               "_conv_relu_backward");
  return {dx, dweight, dbias};
}

Gradients conv_relu_max_pool_backward_cuda(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                           const Tensor& y, const Tensor& argmax, int64_t padding,
                                           const std::string& precision, bool need_dx) {
  const Call call(x, "x");
  const ConvCall conv = conv_call(call, x, weight, padding, precision);
  const ConvSize& s = conv.size;
  call.check(dy, "dy", {s.N, s.P / 2, s.Q / 2, s.K}, scalar_type(conv.dtype));
  call.check(y, "y", {s.N, s.P / 2, s.Q / 2, s.K}, scalar_type(conv.dtype));
  call.check(argmax, "argmax", {s.N, s.P / 2, s.Q / 2, s.K}, ScalarType::Byte);
  const auto [dx, dweight, dbias] = empty_gradients(s, x, weight, need_dx);
  const Tensor room = workspace(x, conv_relu_backward_workspace_bytes(conv));
  call.started(launch_conv_relu_max_pool_backward(
                   conv, dy.const_data_ptr(), x.const_data_ptr(), const_data<float>(weight),
                   y.const_data_ptr(), const_data<uint8_t>(argmax), need_dx ? dx.mutable_data_ptr() : nullptr,
                   data<float>(dweight), data<float>(dbias), room.mutable_data_ptr(), call.stream()),
               "_conv_relu_max_pool_backward");
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_relu_train_cuda(const Tensor& x, const Tensor& weight,
                                                                   const Tensor& bias, const Tensor& gamma,
                                                                   const Tensor& beta, double eps,
                                                                   int64_t padding,
                                                                   const std::string& precision) {
  const Call call(x, "x");
  const ConvCall conv = conv_call(call, x, weight, padding, precision);
  const ConvSize& s = conv.size;
  STD_TORCH_CHECK(s.N >= 1, "x must hold at least one image: without one there are no batch statistics");
  call.check(bias, "bias", {s.K});
  call.check(gamma, "gamma", {s.K});
  call.check(beta, "beta", {s.K});
  Tensor y = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.K});
  Tensor z = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.K});
  Tensor mean = torch::stable::new_empty(weight, {s.K}), var = torch::stable::new_empty(weight, {s.K});
  const Tensor room = workspace(x, conv_bn_relu_train_workspace_bytes(conv));
  call.started(
      launch_conv_bn_relu_train(conv, x.const_data_ptr(), const_data<float>(weight), const_data<float>(bias),
                                const_data<float>(gamma), const_data<float>(beta), eps, y.mutable_data_ptr(),
                                z.mutable_data_ptr(), data<float>(mean), data<float>(var),
                                room.mutable_data_ptr(), call.stream()),
      "conv_bn_relu_train");
  return {y, z, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_relu_train_backward_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& z, const Tensor& gamma,
    const Tensor& beta, const Tensor& mean, const Tensor& var, double eps, int64_t padding,
    const std::string& precision, bool need_dx) {
  const Call call(x, "x");
  const ConvCall conv = conv_call(call, x, weight, padding, precision);
  const ConvSize& s = conv.size;
  STD_TORCH_CHECK(s.N >= 1, "x must hold at least one image: without one there are no batch statistics");
  call.check(dy, "dy", {s.N, s.P, s.Q, s.K}, scalar_type(conv.dtype));
  call.check(z, "z", {s.N, s.P, s.Q, s.K}, scalar_type(conv.dtype));
  call.check(gamma, "gamma", {s.K});
  call.check(beta, "beta", {s.K});
  call.check(mean, "mean", {s.K});
  call.check(var, "var", {s.K});
  const auto [dx, dweight, dgamma] = empty_gradients(s, x, weight, need_dx);
  Tensor dbeta = torch::stable::new_empty(weight, {s.K});
  const Tensor room = workspace(x, conv_bn_relu_train_backward_workspace_bytes(conv));
  call.started(
      launch_conv_bn_relu_train_backward(
          conv, dy.const_data_ptr(), x.const_data_ptr(), const_data<float>(weight), z.const_data_ptr(),
          const_data<float>(gamma), const_data<float>(beta), const_data<float>(mean), const_data<float>(var),
          eps, need_dx ? dx.mutable_data_ptr() : nullptr, data<float>(dweight), data<float>(dgamma),
          data<float>(dbeta), room.mutable_data_ptr(), call.stream()),
      "_conv_bn_relu_train_backward");
  return {dx, dweight, dgamma, dbeta};
}

// ---- conv_bn_relu_conv_relu ----------------------------------------------------------------------
// z is always stored. gram serves the CPU, which computes z again where channels are few: empty here.

/// Sizes of the second convolution, of the first one's output z.
ConvSize second_size(const ConvSize& first, const Tensor& weight2, int64_t padding2) {
  return {.N = first.N, .H = first.P, .W = first.Q, .C = first.K, .K = weight2.size(0), .padding = padding2};
}

/// The checks of both convolutions.
std::pair<ConvCall, ConvSize> head_call(const Call& call, const Tensor& x, const Tensor& weight1,
                                        const Tensor& weight2, int64_t padding1, int64_t padding2, bool pool,
                                        const std::string& precision) {
  const ConvCall first = conv_call(call, x, weight1, padding1, precision, "1");
  STD_TORCH_CHECK(padding2 == 0 || padding2 == 1, "padding2 must be 0 or 1, is ", padding2);
  STD_TORCH_CHECK(first.size.N >= 1,
                  "x must hold at least one image: without one there are no batch statistics");
  call.check(weight2, "weight2", {kAny, first.size.K, 3, 3});
  const ConvSize second = second_size(first.size, weight2, padding2);
  const int64_t least = pool ? 2 : 1;
  STD_TORCH_CHECK(second.P >= least && second.Q >= least, "x is too small: the second convolution gives ",
                  second.P, " x ", second.Q);
  STD_TORCH_CHECK(second.K >= 1, "weight2 must have at least one output channel");
  check_row(second.W + 2 * padding2, second.K, "the second convolution's output");
  return {first, second};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_conv_relu_train_cuda(
    const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& gamma, const Tensor& beta,
    const Tensor& weight2, const Tensor& bias2, double eps, int64_t padding1, int64_t padding2, bool pool,
    const std::string& precision) {
  const Call call(x, "x");
  const auto [first, s] = head_call(call, x, weight1, weight2, padding1, padding2, pool, precision);
  call.check(bias1, "bias1", {s.C});
  call.check(gamma, "gamma", {s.C});
  call.check(beta, "beta", {s.C});
  call.check(bias2, "bias2", {s.K});
  const int64_t window = pool ? 2 : 1;
  Tensor y = torch::stable::new_empty(x, {s.N, s.P / window, s.Q / window, s.K});
  Tensor argmax =
      torch::stable::new_empty(x, {pool ? s.N : 0, s.P / window, s.Q / window, s.K}, ScalarType::Byte);
  Tensor z = torch::stable::new_empty(x, {s.N, s.H, s.W, s.C});
  Tensor gram = torch::stable::new_empty(x, {0, 0}, ScalarType::Double);
  Tensor mean = torch::stable::new_empty(weight1, {s.C}), var = torch::stable::new_empty(weight1, {s.C});
  const Tensor room = workspace(x, conv_bn_relu_conv_relu_workspace_bytes(first, s.K, padding2));
  call.started(
      launch_conv_bn_relu_conv_relu(
          first, s.K, padding2, x.const_data_ptr(), const_data<float>(weight1), const_data<float>(bias1),
          const_data<float>(gamma), const_data<float>(beta), const_data<float>(weight2),
          const_data<float>(bias2), eps, y.mutable_data_ptr(), pool ? data<uint8_t>(argmax) : nullptr,
          z.mutable_data_ptr(), data<float>(mean), data<float>(var), room.mutable_data_ptr(), call.stream()),
      "conv_bn_relu_conv_relu_train");
  return {y, argmax, z, gram, mean, var};
}

/// dx, dweight1, dgamma, dbeta, dweight2, dbias2; bias1's gradient is zero.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_conv_relu_train_backward_cuda(
    const Tensor& dy, const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& gamma,
    const Tensor& beta, const Tensor& weight2, const Tensor& y, const Tensor& argmax, const Tensor& z,
    const Tensor& gram, const Tensor& mean, const Tensor& var, double eps, int64_t padding1, int64_t padding2,
    bool pool, const std::string& precision, bool need_dx) {
  const Call call(x, "x");
  const auto [first, s] = head_call(call, x, weight1, weight2, padding1, padding2, pool, precision);
  const int64_t window = pool ? 2 : 1;
  for (const auto& [tensor, name] : {std::pair{&dy, "dy"}, std::pair{&y, "y"}}) {
    call.check(*tensor, name, {s.N, s.P / window, s.Q / window, s.K}, scalar_type(first.dtype));
  }
  call.check(argmax, "argmax", {pool ? s.N : 0, s.P / window, s.Q / window, s.K}, ScalarType::Byte);
  call.check(gram, "gram", {0, 0}, ScalarType::Double);
  call.check(z, "z", {s.N, s.H, s.W, s.C}, scalar_type(first.dtype));
  for (const auto& [tensor, name] :
       {std::pair{&bias1, "bias1"}, std::pair{&gamma, "gamma"}, std::pair{&beta, "beta"},
        std::pair{&mean, "mean"}, std::pair{&var, "var"}}) {
    call.check(*tensor, name, {s.C});
  }
  const auto [dx, dweight1, dgamma] = empty_gradients(first.size, x, weight1, need_dx);
  Tensor dbeta = torch::stable::new_empty(weight1, {s.C});
  Tensor dweight2 = torch::stable::new_empty(weight2, {s.K, s.C, 3, 3});
  Tensor dbias2 = torch::stable::new_empty(weight2, {s.K});
  const Tensor room = workspace(x, conv_bn_relu_conv_relu_backward_workspace_bytes(first, s.K, padding2));
  call.started(
      launch_conv_bn_relu_conv_relu_backward(
          first, s.K, padding2, dy.const_data_ptr(), x.const_data_ptr(), const_data<float>(weight1),
          const_data<float>(gamma), const_data<float>(beta), const_data<float>(weight2), y.const_data_ptr(),
          pool ? const_data<uint8_t>(argmax) : nullptr, z.const_data_ptr(), const_data<float>(mean),
          const_data<float>(var), eps, need_dx ? dx.mutable_data_ptr() : nullptr, data<float>(dweight1),
          data<float>(dgamma), data<float>(dbeta), data<float>(dweight2), data<float>(dbias2),
          room.mutable_data_ptr(), call.stream()),
      "_conv_bn_relu_conv_relu_train_backward");
  return {dx, dweight1, dgamma, dbeta, dweight2, dbias2};
}

// ---- max_pool ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> max_pool_cuda(const Tensor& x) {
  const Call call(x, "x");
  const DataType dtype = call.check_activation(x, "x", {kAny, kAny, kAny, kAny});
  const int64_t N = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3);
  STD_TORCH_CHECK(H >= 2 && W >= 2, "x must be at least 2 pixels high and wide, is ", H, " x ", W);
  check_row(W, C, "x");
  Tensor y = torch::stable::new_empty(x, {N, H / 2, W / 2, C});
  Tensor argmax = torch::stable::new_empty(x, {N, H / 2, W / 2, C}, ScalarType::Byte);
  call.started(launch_max_pool(x.const_data_ptr(), dtype, N, H, W, C, y.mutable_data_ptr(),
                               data<uint8_t>(argmax), call.stream()),
               "max_pool");
  return {y, argmax};
}

Tensor max_pool_backward_cuda(const Tensor& dy, const Tensor& argmax, int64_t H, int64_t W) {
  const Call call(dy, "dy");
  const DataType dtype = call.check_activation(dy, "dy", {kAny, H / 2, W / 2, kAny});
  const int64_t N = dy.size(0), C = dy.size(3);
  call.check(argmax, "argmax", {N, H / 2, W / 2, C}, ScalarType::Byte);
  check_row(W, C, "dy");
  Tensor dx = torch::stable::new_empty(dy, {N, H, W, C});
  call.started(launch_max_pool_backward(dy.const_data_ptr(), const_data<uint8_t>(argmax), dtype, N, H, W, C,
                                        dx.mutable_data_ptr(), call.stream()),
               "_max_pool_backward");
  return dx;
}

// ---- softmax_cross_entropy -----------------------------------------------------------------------

std::tuple<Tensor, Tensor> softmax_cross_entropy_cuda(const Tensor& logits, const Tensor& target) {
  const Call call(logits, "logits");
  call.check(logits, "logits", {kAny, kAny});
  const int64_t N = logits.size(0), K = logits.size(1);
  call.check(target, "target", {N}, ScalarType::Long);
  STD_TORCH_CHECK(N >= 1 && K >= 1, "logits must hold at least one sample and one class");
  Tensor loss = torch::stable::new_empty(logits, {});
  Tensor probabilities = torch::stable::new_empty(logits, {N, K});
  call.started(launch_softmax_cross_entropy(const_data<float>(logits), const_data<int64_t>(target), N, K,
                                            data<float>(loss), data<float>(probabilities), call.stream()),
               "softmax_cross_entropy");
  return {loss, probabilities};
}

Tensor softmax_cross_entropy_backward_cuda(const Tensor& dloss, const Tensor& probabilities,
                                           const Tensor& target) {
  const Call call(probabilities, "probabilities");
  call.check(dloss, "dloss", {});
  call.check(probabilities, "probabilities", {kAny, kAny});
  const int64_t N = probabilities.size(0), K = probabilities.size(1);
  call.check(target, "target", {N}, ScalarType::Long);
  Tensor dlogits = torch::stable::new_empty(probabilities, {N, K});
  call.started(launch_softmax_cross_entropy_backward(
                   const_data<float>(dloss), const_data<float>(probabilities), const_data<int64_t>(target), N,
                   K, data<float>(dlogits), call.stream()),
               "_softmax_cross_entropy_backward");
  return dlogits;
}

// ---- adam_ ---------------------------------------------------------------------------------------

/// True if both have p's sizes and strides and leave no hole: they can be walked as flat arrays.
bool same_dense_layout(const Tensor& tensor, const Tensor& p) {
  if (tensor.dim() != p.dim()) return false;
  int64_t span = p.numel() == 0 ? 0 : 1;
  for (int64_t d = 0; d < p.dim(); ++d) {
    if (tensor.size(d) != p.size(d)) return false;
    if (p.size(d) > 1 && tensor.stride(d) != p.stride(d)) return false;
    if (p.size(d) > 1) span += (p.size(d) - 1) * p.stride(d);
  }
  return span == p.numel() || p.numel() == 0;
}

using Tensors = std::vector<Tensor>;

std::vector<AdamTensor> adam_tensors(const Call& call, const Tensors& parameters, const Tensors& gradients,
                                     const Tensors& exp_avgs, const Tensors& exp_avg_sqs) {
  STD_TORCH_CHECK(gradients.size() == parameters.size() && exp_avgs.size() == parameters.size() &&
                      exp_avg_sqs.size() == parameters.size(),
                  "gradients, exp_avgs and exp_avg_sqs must be as many as parameters");
  std::vector<AdamTensor> tensors;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor* four[] = {&parameters[i], &gradients[i], &exp_avgs[i], &exp_avg_sqs[i]};
    const char* names[] = {"parameters", "gradients", "exp_avgs", "exp_avg_sqs"};
    for (int t = 0; t < 4; ++t) {
      call.check_device(*four[t], names[t]);
      STD_TORCH_CHECK(four[t]->scalar_type() == ScalarType::Float, names[t], " must be float32, is ",
                      name_of(four[t]->scalar_type()));
      STD_TORCH_CHECK(same_dense_layout(*four[t], parameters[i]), names[t],
                      " must be dense and laid out in memory as the parameter is");
    }
    tensors.push_back({.p = data<float>(parameters[i]),
                       .g = const_data<float>(gradients[i]),
                       .m = data<float>(exp_avgs[i]),
                       .v = data<float>(exp_avg_sqs[i]),
                       .size = parameters[i].numel()});
  }
  return tensors;
}

void adam_cuda(const Tensors& parameters, const Tensors& gradients, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, double lr, double beta1, double beta2, double eps, double l2,
               int64_t step, bool keras_epsilon) {
  STD_TORCH_CHECK(step >= 1, "step must count from 1, is ", step);
  if (parameters.empty()) return;
  const Call call(parameters[0], "parameters");
  const auto tensors = adam_tensors(call, parameters, gradients, exp_avgs, exp_avg_sqs);
  const AdamSettings settings{lr, beta1, beta2, eps, l2, keras_epsilon};
  call.started(
      launch_adam(tensors.data(), static_cast<int64_t>(tensors.size()), settings, step, call.stream()),
      "adam_");
}

void adam_counted_cuda(const Tensors& parameters, const Tensors& gradients, const Tensors& exp_avgs,
                       const Tensors& exp_avg_sqs, const Tensor& step, double lr, double beta1, double beta2,
                       double eps, double l2, bool keras_epsilon) {
  const Call call(step, "step");
  call.check(step, "step", {}, ScalarType::Long);
  const auto tensors = adam_tensors(call, parameters, gradients, exp_avgs, exp_avg_sqs);
  const AdamSettings settings{lr, beta1, beta2, eps, l2, keras_epsilon};
  const Tensor factors = torch::stable::new_empty(step, {2}, ScalarType::Float);
  call.started(launch_adam_counted(tensors.data(), static_cast<int64_t>(tensors.size()), settings,
                                   data<int64_t>(step), data<float>(factors), call.stream()),
               "adam_counted_");
}

// ---- dropout -------------------------------------------------------------------------------------

Tensor dropout_cuda(const Tensor& x, const Tensor& seed, double p) {
  const Call call(x, "x");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p must lie in [0, 1], is ", p);
  const bool bf16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bf16 || x.scalar_type() == ScalarType::Float, "x must be float32 or bfloat16, is ",
                  name_of(x.scalar_type()));
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  call.check(seed, "seed", {1}, ScalarType::Long);
  Tensor y = torch::stable::empty_like(x);
  call.started(launch_dropout(x.const_data_ptr(), const_data<int64_t>(seed),
                              bf16 ? DataType::kBfloat16 : DataType::kFloat32, x.numel(), p,
                              y.mutable_data_ptr(), call.stream()),
               "dropout");
  return y;
}

// ---- warp ----------------------------------------------------------------------------------------

Tensor warp_cuda(const Tensor& pictures, const Tensor& matrices, double fill, double scale, bool bfloat16) {
  const Call call(pictures, "pictures");
  call.check(pictures, "pictures", {kAny, kAny, kAny, 3}, ScalarType::Byte);
  const int64_t N = pictures.size(0), H = pictures.size(1), W = pictures.size(2);
  call.check(matrices, "matrices", {N, 6}, ScalarType::Double);
  check_row(W, 3, "pictures");
  const ScalarType type = bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor out = torch::stable::new_empty(pictures, {N, H, W, 3}, type);
  call.started(
      launch_warp(const_data<uint8_t>(pictures), const_data<double>(matrices), N, H, W,
                  static_cast<float>(fill), static_cast<float>(scale),
                  bfloat16 ? DataType::kBfloat16 : DataType::kFloat32, out.mutable_data_ptr(), call.stream()),
      "warp");
  return out;
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CUDA, m) {
  m.impl("conv_relu", TORCH_BOX(&maskcore::conv_relu_cuda));
  m.impl("_conv_relu_backward", TORCH_BOX(&maskcore::conv_relu_backward_cuda));
  m.impl("conv_relu_max_pool", TORCH_BOX(&maskcore::conv_relu_max_pool_cuda));
  m.impl("_conv_relu_max_pool_backward", TORCH_BOX(&maskcore::conv_relu_max_pool_backward_cuda));
  m.impl("conv_bn_relu_train", TORCH_BOX(&maskcore::conv_bn_relu_train_cuda));
  m.impl("_conv_bn_relu_train_backward", TORCH_BOX(&maskcore::conv_bn_relu_train_backward_cuda));
  m.impl("conv_bn_relu_conv_relu_train", TORCH_BOX(&maskcore::conv_bn_relu_conv_relu_train_cuda));
  m.impl("_conv_bn_relu_conv_relu_train_backward",
         TORCH_BOX(&maskcore::conv_bn_relu_conv_relu_train_backward_cuda));
  m.impl("max_pool", TORCH_BOX(&maskcore::max_pool_cuda));
  m.impl("_max_pool_backward", TORCH_BOX(&maskcore::max_pool_backward_cuda));
  m.impl("softmax_cross_entropy", TORCH_BOX(&maskcore::softmax_cross_entropy_cuda));
  m.impl("_softmax_cross_entropy_backward", TORCH_BOX(&maskcore::softmax_cross_entropy_backward_cuda));
  m.impl("adam_", TORCH_BOX(&maskcore::adam_cuda));
  m.impl("adam_counted_", TORCH_BOX(&maskcore::adam_counted_cuda));
  m.impl("dropout", TORCH_BOX(&maskcore::dropout_cuda));
  m.impl("warp", TORCH_BOX(&maskcore::warp_cuda));
}
