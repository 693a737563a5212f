// The gradients of a convolution, by Winograd or directly. `gradient` is a source (sources.h) of the gradient
// at the convolution's output.
#pragma once

#include "conv_direct.h"
#include "conv_winograd.h"

namespace maskcore {

/// dweight [K,C,3,3]; dbias [K] and dx [N,H,W,C] where they are not null.
template <class Gradient>
void convolve_backward(const ConvShape& s, Precision precision, const Gradient& gradient, const float* x,
                       const float* weight, float* dx, float* dweight, float* dbias) {
  const Activation input{x, s.H, s.W, s.C};
  if (use_winograd(s)) {
    with_operands(precision, [&]<class Operands>() {
      WinogradBackward<Operands, Activation, Gradient>(s, input, gradient, weight, dx).run(dweight, dbias);
    });
  } else {
    convolve_backward_weight(s, input, gradient, dweight, dbias);
    if (dx != nullptr) convolve_backward_data(s, gradient, weight, dx);
  }
}

}  // namespace maskcore
