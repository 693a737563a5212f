// The memory of the operators' results.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>

namespace maskcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Contiguous tensors on the CPU, not written yet: of an arena (arena_cpu.cpp), or of torch's allocator where
// they are small or the arena is full.

/// For what a step makes and frees: activations and the gradients at them.
Tensor empty_activation(std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float);

/// For gradients of parameters, float32, which live on to the next step.
Tensor empty_gradient(std::initializer_list<int64_t> sizes);

}  // namespace maskcore
