// The gradients of a convolution, by Winograd or directly. `gradient` is a source (sources.h) of the gradient
// at the convolution's output.
#pragma once

#include "conv_direct.h"
#include "conv_winograd.h"

namespace maskcore {

/// dweight [K,C,3,3]; dbias [K] where it is not null; the gradient of the input, if the sink wants it.
template <class Input, class Gradient, class Sink>
void convolve_backward(const ConvShape& s, Precision precision, const Input& input, const Gradient& gradient,
                       const float* weight, const Sink& sink, float* dweight, float* dbias) {
  if (use_winograd(s)) {
    with_operands(precision, [&]<class Operands>() {
      const GradientSink<Input> any(sink);
      WinogradBackward<Operands, Input, Gradient>(s, input, gradient, weight, any).run(dweight, dbias);
    });
  } else {
    convolve_backward_weight(s, input, gradient, dweight, dbias);
    if (sink.wanted()) convolve_backward_data(s, gradient, weight, sink.dx);
  }
}

template <class Gradient>
void convolve_backward(const ConvShape& s, Precision precision, const Gradient& gradient, const float* x,
                       const float* weight, float* dx, float* dweight, float* dbias) {
  convolve_backward(s, precision, Activation{x, s.H, s.W, s.C}, gradient, weight, StoreRows::of(dx, s),
                    dweight, dbias);
}

}  // namespace maskcore
