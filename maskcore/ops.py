"""Operators: one function each, its plain-torch reference right under it, then shape inference and gradient.

Tensors here are what ``torch.nn`` uses: images ``[N, C, H, W]`` (kept in ``channels_last`` memory),
filters ``[K, C, 3, 3]``, all float32. The kernels see the same memory as contiguous ``[N, H, W, C]``;
going from one to the other is a view. Every ``*_reference`` has the signature of the function above it,
works in any floating dtype and on any device, and is what the tests hold the kernel against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskcore import _library, _native, philox

#: What the products of a convolution may round their float32 operands to (sums are float32 in any case), by the
#: names of ``torch.backends``' ``fp32_precision``: nothing, TensorFloat-32 or bfloat16. A processor that is not
#: faster for it computes more precisely.
Precision = Literal["ieee", "tf32", "bf16"]

_library.load()

_ops = torch.ops.maskcore
_fake = torch.library.register_fake
_autograd = torch.library.register_autograd


def _nhwc(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` -> contiguous ``[N, H, W, C]``; a view where x is channels_last already."""
    return x.permute(0, 2, 3, 1).contiguous()


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _check_image(x: Tensor, name: str = "x") -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be a batch of images [N, C, H, W], has {x.dim()} dimensions")
    on_cpu = x.device.type == "cpu"
    if x.dtype != torch.float32 and (on_cpu or x.dtype != torch.bfloat16):
        raise TypeError(f"{name} must be float32{'' if on_cpu else ' or bfloat16'}, is {x.dtype}")


def _check_devices(image: str, device: torch.device, **others: Tensor) -> None:
    """The dispatcher would run a mixture as if all of it were on one of the devices."""
    for name, tensor in others.items():
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of {image}, {device}, is on {tensor.device}")


def _output_size(H: int, W: int, padding: int) -> tuple[int, int]:
    return H + 2 * padding - 2, W + 2 * padding - 2


# ---- conv_relu -----------------------------------------------------------------------------------


def transform_filter(weight: Tensor, precision: Precision = "ieee") -> Tensor:
    """The filters in the Winograd domain, to be given to :func:`conv_relu` again and again.

    weight ``[K, C, 3, 3]`` float32 -> an opaque tensor of 4 times the size, or 11 times for up to 64 input channels,
    for this processor's kernels and this precision only: not to be stored.
    """
    return _ops.transform_filter(weight.contiguous(), precision)


@_fake("maskcore::transform_filter")
def _(weight: Tensor, precision: str = "ieee") -> Tensor:
    K, C = weight.shape[:2]
    components = 36 + 64 if C <= 64 else 36
    return weight.new_empty(components * 32 * (C * ((K + 31) // 32) + 1))


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int = 0,
    transformed: Tensor | None = None,
    precision: Precision = "ieee",
) -> Tensor:
    """3x3 stride-1 convolution, bias and ReLU in one pass.

    Large enough shapes are computed by Winograd's F(4x4, 3x3), with about five times the rounding error of a
    direct convolution (1e-6 of the result); forward, without bfloat16 products and of up to 64 input channels,
    by F(6x6, 3x3) (3e-6). There a NaN or an infinity in x may make NaN of any output of the 4x4 or 6x6 tiles
    whose inputs it lies in.

    Args:
        x: ``[N, C, H, W]`` float32, channels_last for speed.
        weight: ``[K, C, 3, 3]``, as ``torch.nn.Conv2d`` keeps it.
        bias: ``[K]``.
        padding: 0 (Keras' ``valid``) or 1 (``same``), filled with zeros.
        transformed: :func:`transform_filter` of this weight and precision, where it is at hand (not
            differentiable).
        precision: what the products may round their operands to; with ``"bf16"`` the error is about 1e-2 of
            the result.

    Returns:
        ``[N, K, H + 2 padding - 2, W + 2 padding - 2]``, channels_last. NaN stays NaN.

    Raises:
        ValueError, TypeError, RuntimeError: an argument, which the message names, has a wrong shape or dtype.
    """
    _check_image(x)
    _check_devices("x", x.device, weight=weight, bias=bias)
    return _nchw(_ops.conv_relu(_nhwc(x), weight.contiguous(), bias, padding, transformed, precision))


def conv_relu_reference(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding=padding))


@_fake("maskcore::conv_relu")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int,
    transformed: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    P, Q = _output_size(x.shape[1], x.shape[2], padding)
    return x.new_empty(x.shape[0], P, Q, weight.shape[0])


@_fake("maskcore::_conv_relu_backward")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, padding: int, precision: str, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_conv_gradients(x, weight, need_dx)


def _fake_conv_gradients(x: Tensor, weight: Tensor, need_dx: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape[0] if need_dx else 0, *x.shape[1:])
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _conv_relu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.padding, _, ctx.precision = inputs
    ctx.save_for_backward(x, weight, output)


@once_differentiable
def _conv_relu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, dweight, dbias = _ops._conv_relu_backward(
        dy.contiguous(), x, weight, y, ctx.padding, ctx.precision, need_dx
    )
    return dx if need_dx else None, dweight, dbias, None, None, None


_autograd("maskcore::conv_relu", _conv_relu_backward, setup_context=_conv_relu_setup)


# ---- conv_relu_max_pool --------------------------------------------------------------------------


def conv_relu_max_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int = 0,
    transformed: Tensor | None = None,
    precision: Precision = "ieee",
) -> Tensor:
    """:func:`conv_relu` followed by :func:`max_pool`; the full-size image is never stored.

    Arguments and errors as for :func:`conv_relu`. Returns ``[N, K, P // 2, Q // 2]`` for a convolution
    that gives ``[N, K, P, Q]``.
    """
    _check_image(x)
    _check_devices("x", x.device, weight=weight, bias=bias)
    y, _ = _ops.conv_relu_max_pool(_nhwc(x), weight.contiguous(), bias, padding, transformed, precision)
    return _nchw(y)


def conv_relu_max_pool_reference(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0) -> Tensor:
    return F.max_pool2d(conv_relu_reference(x, weight, bias, padding), 2)


@_fake("maskcore::conv_relu_max_pool")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int,
    transformed: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    P, Q = _output_size(x.shape[1], x.shape[2], padding)
    y = x.new_empty(x.shape[0], P // 2, Q // 2, weight.shape[0])
    return y, torch.empty_like(y, dtype=torch.uint8)


@_fake("maskcore::_conv_relu_max_pool_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    argmax: Tensor,
    padding: int,
    precision: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_conv_gradients(x, weight, need_dx)


def _conv_relu_max_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.padding, _, ctx.precision = inputs
    y, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.set_materialize_grads(False)  # else zeros are written for argmax
    ctx.save_for_backward(x, weight, y, argmax)


@once_differentiable
def _conv_relu_max_pool_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y, argmax = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, dweight, dbias = _ops._conv_relu_max_pool_backward(
        dy.contiguous(), x, weight, y, argmax, ctx.padding, ctx.precision, need_dx
    )
    return dx if need_dx else None, dweight, dbias, None, None, None


_autograd(
    "maskcore::conv_relu_max_pool",
    _conv_relu_max_pool_backward,
    setup_context=_conv_relu_max_pool_setup,
)


# ---- conv_bn_relu --------------------------------------------------------------------------------


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-3,
    padding: int = 0,
    precision: Precision = "ieee",
) -> Tensor:
    """Convolution, batch normalisation with given statistics, ReLU: the inference form.

    The normalisation is folded into the filter and the bias, so this costs what :func:`conv_relu` does:
    ``scale = gamma / sqrt(var + eps)``, ``weight' = scale weight``, ``bias' = beta + scale (bias - mean)``.

    Args:
        x, weight, bias, padding, precision: as for :func:`conv_relu`.
        gamma, beta, mean, var: ``[K]``.
        eps: added to the variance; 1e-3 is Keras' default.
    """
    _check_image(x)
    vectors = {"bias": bias, "gamma": gamma, "beta": beta, "mean": mean, "var": var}
    _check_devices("x", x.device, weight=weight, **vectors)
    for name, vector in vectors.items():  # a size 1 would be broadcast
        if vector.shape != weight.shape[:1]:
            raise ValueError(f"{name} must have shape {tuple(weight.shape[:1])}, has {tuple(vector.shape)}")
        if vector.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, is {vector.dtype}")
    if weight.dim() != 4:
        raise ValueError(f"weight must have 4 dimensions, has {weight.dim()}")
    folded = fold_batch_norm(weight, bias, gamma, beta, mean, var, eps)
    return conv_relu(x, *folded, padding, precision=precision)


def fold_batch_norm(
    weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """The filter and the bias that convolve and normalise at once: see :func:`conv_bn_relu`."""
    scale = gamma * torch.rsqrt(var + eps)
    return weight * scale[:, None, None, None], beta + scale * (bias - mean)


def conv_bn_relu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-3,
    padding: int = 0,
) -> Tensor:
    z = F.conv2d(x, weight, bias, padding=padding)
    return F.relu(F.batch_norm(z, mean, var, gamma, beta, training=False, eps=eps))


# ---- conv_bn_relu_train --------------------------------------------------------------------------


def conv_bn_relu_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-3,
    padding: int = 0,
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, batch normalisation with the batch's own statistics, ReLU: the training form.

    Arguments as for :func:`conv_bn_relu`. Returns ``(y, mean, var)``: the activation ``[N, K, P, Q]`` and
    the statistics ``[K]`` of the convolution's output, ``var`` biased (divided by N P Q). The statistics
    carry no gradient; a layer keeps its running averages with them. The bias does not reach the output
    (the mean takes it away), so its gradient is exactly zero.
    """
    _check_image(x)
    _check_devices("x", x.device, weight=weight, bias=bias, gamma=gamma, beta=beta)
    y, _, mean, var = _ops.conv_bn_relu_train(
        _nhwc(x), weight.contiguous(), bias, gamma, beta, eps, padding, precision
    )
    return _nchw(y), mean, var


def conv_bn_relu_train_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-3,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    z = F.conv2d(x, weight, bias, padding=padding)
    y = F.relu(F.batch_norm(z, None, None, gamma, beta, training=True, eps=eps))
    var, mean = torch.var_mean(z.detach(), dim=(0, 2, 3), correction=0)
    return y, mean, var


@_fake("maskcore::conv_bn_relu_train")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    padding: int,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    P, Q = _output_size(x.shape[1], x.shape[2], padding)
    y = x.new_empty(x.shape[0], P, Q, weight.shape[0])
    return y, torch.empty_like(y), weight.new_empty(weight.shape[0]), weight.new_empty(weight.shape[0])


@_fake("maskcore::_conv_bn_relu_train_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    padding: int,
    precision: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dchannel = _fake_conv_gradients(x, weight, need_dx)
    return dx, dweight, dchannel, torch.empty_like(dchannel)


def _conv_bn_relu_train_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    x, weight, bias, gamma, beta, ctx.eps, ctx.padding, ctx.precision = inputs
    _, z, mean, var = output
    ctx.mark_non_differentiable(z, mean, var)
    ctx.set_materialize_grads(False)  # else zeros are written for z, the largest tensor of all
    ctx.save_for_backward(x, weight, bias, z, gamma, beta, mean, var)


@once_differentiable
def _conv_bn_relu_train_backward(ctx: Any, dy: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, z, gamma, beta, mean, var = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, dweight, dgamma, dbeta = _ops._conv_bn_relu_train_backward(
        dy.contiguous(), x, weight, z, gamma, beta, mean, var, ctx.eps, ctx.padding, ctx.precision, need_dx
    )
    dbias = torch.zeros_like(bias)
    return dx if need_dx else None, dweight, dbias, dgamma, dbeta, None, None, None


_autograd(
    "maskcore::conv_bn_relu_train",
    _conv_bn_relu_train_backward,
    setup_context=_conv_bn_relu_train_setup,
)


# ---- conv_bn_relu_conv_relu ----------------------------------------------------------------------

#: Input channels up to which the CPU's kernels compute the first convolution again instead of storing its output.
_MOST_RECOMPUTED = 3


def conv_bn_relu_conv_relu_train(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-3,
    padding1: int = 0,
    padding2: int = 0,
    pool: bool = False,
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`conv_bn_relu_train` and, behind it, :func:`conv_relu` or with ``pool`` :func:`conv_relu_max_pool`.

    The activation between the two is never stored. On the CPU, where x has up to 3 channels, neither is the first
    convolution's output, nor its gradient if x needs none.

    Args:
        x, weight1, bias1, gamma, beta, eps, padding1: of the first, as for :func:`conv_bn_relu_train`.
        weight2, bias2, padding2: of the second; weight2 is ``[K2, K1, 3, 3]``.
        precision: of both.

    Returns:
        ``(y, mean, var)``: the second's output, and the statistics ``[K1]`` of the first convolution's.
    """
    _check_image(x)
    vectors = {"bias1": bias1, "gamma": gamma, "beta": beta, "bias2": bias2}
    _check_devices("x", x.device, weight1=weight1, weight2=weight2, **vectors)
    y, *_, mean, var = _ops.conv_bn_relu_conv_relu_train(
        _nhwc(x),
        weight1.contiguous(),
        bias1,
        gamma,
        beta,
        weight2.contiguous(),
        bias2,
        eps,
        padding1,
        padding2,
        pool,
        precision,
    )
    return _nchw(y), mean, var


def conv_bn_relu_conv_relu_train_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-3,
    padding1: int = 0,
    padding2: int = 0,
    pool: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    between, mean, var = conv_bn_relu_train_reference(x, weight1, bias1, gamma, beta, eps, padding1)
    second = conv_relu_max_pool_reference if pool else conv_relu_reference
    return second(between, weight2, bias2, padding2), mean, var


@_fake("maskcore::conv_bn_relu_conv_relu_train")
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    padding1: int,
    padding2: int,
    pool: bool,
    precision: str = "ieee",
) -> tuple[Tensor, ...]:
    N, H, W, C = x.shape
    K1, K2 = weight1.shape[0], weight2.shape[0]
    recomputed = x.device.type == "cpu" and C <= _MOST_RECOMPUTED
    H1, W1 = _output_size(H, W, padding1)
    P, Q = _output_size(H1, W1, padding2)
    if pool:
        P, Q = P // 2, Q // 2
    taps = 9 * C + 1 if recomputed else 0
    return (
        x.new_empty(N, P, Q, K2),
        x.new_empty(N if pool else 0, P, Q, K2, dtype=torch.uint8),
        x.new_empty(0 if recomputed else N, H1, W1, K1),
        x.new_empty(taps, taps, dtype=torch.float64),
        weight1.new_empty(K1),
        weight1.new_empty(K1),
    )


@_fake("maskcore::_conv_bn_relu_conv_relu_train_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight2: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    need_dx = rest[-1]
    dx, dweight1, dchannel = _fake_conv_gradients(x, weight1, need_dx)
    dweight2, dbias2 = weight2.new_empty(weight2.shape), weight2.new_empty(weight2.shape[0])
    return dx, dweight1, dchannel, torch.empty_like(dchannel), dweight2, dbias2


def _conv_bn_relu_conv_relu_train_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    x, weight1, bias1, gamma, beta, weight2, _, *ctx.settings = inputs
    y, argmax, z, gram, mean, var = output
    ctx.mark_non_differentiable(argmax, z, gram, mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight1, bias1, gamma, beta, weight2, y, argmax, z, gram, mean, var)


@once_differentiable
def _conv_bn_relu_conv_relu_train_backward(
    ctx: Any, dy: Tensor, *_others: Tensor
) -> tuple[Tensor | None, ...]:
    need_dx = ctx.needs_input_grad[0]
    dx, dweight1, dgamma, dbeta, dweight2, dbias2 = _ops._conv_bn_relu_conv_relu_train_backward(
        dy.contiguous(), *ctx.saved_tensors, *ctx.settings, need_dx
    )
    dbias1 = torch.zeros_like(ctx.saved_tensors[2])
    gradients = (dx if need_dx else None, dweight1, dbias1, dgamma, dbeta, dweight2, dbias2)
    return *gradients, None, None, None, None, None


_autograd(
    "maskcore::conv_bn_relu_conv_relu_train",
    _conv_bn_relu_conv_relu_train_backward,
    setup_context=_conv_bn_relu_conv_relu_train_setup,
)


# ---- max_pool ------------------------------------------------------------------------------------


def max_pool(x: Tensor) -> Tensor:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped (Keras' ``valid``).

    x ``[N, C, H, W]`` float32 -> ``[N, C, H // 2, W // 2]``, channels_last. The gradient goes to the first
    maximum of a window, as in Keras and PyTorch; NaN wins over any number.
    """
    _check_image(x)
    y, _ = _ops.max_pool(_nhwc(x))
    return _nchw(y)


def max_pool_reference(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


@_fake("maskcore::max_pool")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3])
    return y, torch.empty_like(y, dtype=torch.uint8)


@_fake("maskcore::_max_pool_backward")
def _(dy: Tensor, argmax: Tensor, H: int, W: int) -> Tensor:
    return dy.new_empty(dy.shape[0], H, W, dy.shape[3])


def _max_pool_setup(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.H, ctx.W, _ = inputs[0].shape
    _, argmax = output
    ctx.mark_non_differentiable(argmax)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(argmax)


@once_differentiable
def _max_pool_backward(ctx: Any, dy: Tensor, _: Tensor) -> Tensor:
    (argmax,) = ctx.saved_tensors
    return _ops._max_pool_backward(dy.contiguous(), argmax, ctx.H, ctx.W)


_autograd("maskcore::max_pool", _max_pool_backward, setup_context=_max_pool_setup)


# ---- dense ---------------------------------------------------------------------------------------


def dense(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    """Fully connected layer: ``x weight^T + bias``, then ReLU if asked for.

    x ``[N, C]``, weight ``[K, C]``, bias ``[K]``, float32. On the CPU up to 8 samples are computed at the speed of
    the memory that the weights come from; larger batches, and other devices, take PyTorch's matrix product. On a CUDA
    device x may be bfloat16, and the result is then too; weight and bias are rounded for it.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [N, C], has {x.dim()} dimensions")
    K = weight.shape[0]
    for name, tensor, shape in (("weight", weight, (K, x.shape[1])), ("bias", bias, (K,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, has {tuple(tensor.shape)}")
    on_cpu = x.device.type == "cpu"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor.dtype != torch.float32 and (on_cpu or name != "x" or x.dtype != torch.bfloat16):
            raise TypeError(f"{name} must be float32, is {tensor.dtype}")
    _check_devices("x", x.device, weight=weight, bias=bias)
    if not on_cpu:
        return dense_reference(x, weight.to(x.dtype), bias.to(x.dtype), relu)
    return _ops.dense(x.contiguous(), weight.contiguous(), bias.contiguous(), relu)


def dense_reference(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    y = F.linear(x, weight, bias)
    return F.relu(y) if relu else y


@_fake("maskcore::dense")
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_fake("maskcore::_dense_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.relu = inputs
    ctx.save_for_backward(x, weight, output)


@once_differentiable
def _dense_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    dx, dweight, dbias = _ops._dense_backward(dy.contiguous(), x, weight, y, ctx.relu)
    return dx, dweight, dbias, None


_autograd("maskcore::dense", _dense_backward, setup_context=_dense_setup)


# ---- softmax_cross_entropy -----------------------------------------------------------------------


def softmax_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the categorical cross-entropy of ``softmax(logits)``.

    Args:
        logits: ``[N, classes]`` float32.
        target: ``[N]`` int64, class codes.

    Returns:
        A scalar, in nats. Stable for any finite logits (the largest is subtracted first).

    Raises:
        RuntimeError: on the CPU, where a target is no class; on a GPU, which is not waited for, the loss is NaN then.
    """
    _check_devices("logits", logits.device, target=target)
    loss, _ = _ops.softmax_cross_entropy(logits.contiguous(), target.contiguous())
    return loss


def softmax_cross_entropy_reference(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


@_fake("maskcore::softmax_cross_entropy")
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), logits.new_empty(logits.shape)


@_fake("maskcore::_softmax_cross_entropy_backward")
def _(dloss: Tensor, probabilities: Tensor, target: Tensor) -> Tensor:
    return probabilities.new_empty(probabilities.shape)


def _softmax_cross_entropy_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
) -> None:
    _, target = inputs
    _, probabilities = output
    ctx.mark_non_differentiable(probabilities)
    ctx.save_for_backward(probabilities, target)


@once_differentiable
def _softmax_cross_entropy_backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, None]:
    probabilities, target = ctx.saved_tensors
    return _ops._softmax_cross_entropy_backward(dloss, probabilities, target), None


_autograd(
    "maskcore::softmax_cross_entropy",
    _softmax_cross_entropy_backward,
    setup_context=_softmax_cross_entropy_setup,
)


# ---- adam_ ---------------------------------------------------------------------------------------


def adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l2: float,
    step: int,
    keras_epsilon: bool,
) -> None:
    """One step of Adam (Kingma & Ba 2015) on all tensors, in place and in one pass over memory.

    The gradient gets ``2 l2 p`` first: the penalty ``l2 sum(p^2)`` as a Keras regulariser adds it to the
    loss. ``keras_epsilon`` adds eps outside the bias correction ("epsilon hat", as
    ``keras.optimizers.Adam`` does), else inside it (as ``torch.optim.Adam`` does). ``step`` counts from 1.
    Tensors are float32 and contiguous; ``gradients``, ``exp_avgs`` and ``exp_avg_sqs`` match ``parameters``.
    """
    arguments = (list(parameters), list(gradients), list(exp_avgs), list(exp_avg_sqs))
    _ops.adam_(*arguments, lr, beta1, beta2, eps, l2, step, keras_epsilon)


def adam_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l2: float,
    step: int,
    keras_epsilon: bool,
) -> None:
    correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    for p, g, m, v in zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True):
        g = g + 2 * l2 * p
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if keras_epsilon:
            p.sub_(lr * correction2 / correction1 * m / (v.sqrt() + eps))
        else:
            p.sub_(lr / correction1 * m / (v.sqrt() / correction2 + eps))


@_fake("maskcore::adam_")
def _(*_arguments: Any) -> None:
    return None


def adam_counted_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    l2: float,
    keras_epsilon: bool,
) -> None:
    """:func:`adam_` with its count in memory, as a step that is captured in a CUDA graph needs it.

    ``step`` is a scalar int64 tensor on the parameters' device: the number of steps done so far. It goes up by
    one, and that step is taken, each time that this, or a graph of it, runs.
    """
    arguments = (list(parameters), list(gradients), list(exp_avgs), list(exp_avg_sqs))
    _ops.adam_counted_(*arguments, step, lr, beta1, beta2, eps, l2, keras_epsilon)


def adam_counted_reference(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    **settings: Any,
) -> None:
    step.add_(1)
    adam_reference(parameters, gradients, exp_avgs, exp_avg_sqs, step=int(step), **settings)


@_fake("maskcore::adam_counted_")
def _(*_arguments: Any) -> None:
    return None


# ---- dropout -------------------------------------------------------------------------------------


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Zeroes each value with probability p and scales the others by 1 / (1 - p).

    Which ones is a function of the seed and of the value's place in x alone: the same on every device, and in
    backward, which stores no mask. A dropped NaN is zero.

    Args:
        x: any shape, float32, or on a CUDA device bfloat16.
        seed: ``[1]`` int64, on the device of x; it is read when the kernel runs, so that a captured CUDA graph
            drops other values once another seed is written there.
        p: from 0 to 1, in steps of 2^-32.
    """
    _check_devices("x", x.device, seed=seed)
    return _ops.dropout(x.contiguous(), seed, p)


def dropout_reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    words = philox.raw(philox.DROPOUT, int(seed), 0, 0, -(-x.numel() // 2))
    halves = torch.from_numpy(words.view("<u4").astype("int64"))[: x.numel()]
    keep = (halves >= round(p * 2**32)).reshape(x.shape).to(x.device)
    return torch.where(keep, x / (1 - p) if p < 1 else x, torch.zeros_like(x))


@_fake("maskcore::dropout")
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _dropout_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


@once_differentiable
def _dropout_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return _ops.dropout(dy.contiguous(), seed, ctx.p), None, None


_autograd("maskcore::dropout", _dropout_backward, setup_context=_dropout_setup)


# ---- warp ----------------------------------------------------------------------------------------


def warp(
    pictures: Tensor,
    matrices: Tensor,
    fill: float = 0.0,
    scale: float = 1 / 255,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Pictures as they are stored -> the network's input, each moved by its own affine map.

    Result (x, y) is the picture's point (m0 x + m1 y + m2, m3 x + m4 y + m5), interpolated bilinearly, times
    ``scale``; a point outside of the picture is ``fill`` times ``scale``. The identity, ``(1, 0, 0, 0, 1, 0)``,
    gives the picture's own values. The same bits on every device.

    Args:
        pictures: ``[N, H, W, 3]`` uint8.
        matrices: ``[N, 6]`` float64, on the same device.
        dtype: float32, or on a CUDA device bfloat16.

    Returns:
        ``[N, 3, H, W]``, channels_last.
    """
    _check_devices("pictures", pictures.device, matrices=matrices)
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype must be float32 or bfloat16, is {dtype}")
    bfloat16 = dtype == torch.bfloat16
    return _nchw(_ops.warp(pictures.contiguous(), matrices.contiguous(), fill, scale, bfloat16))


@torch.library.impl("maskcore::warp", "CPU")
def _warp_cpu(
    pictures: Tensor, matrices: Tensor, fill: float, scale: float, bfloat16: bool = False
) -> Tensor:
    if bfloat16:
        raise TypeError("dtype must be float32 on the CPU")
    out = torch.empty(pictures.shape)
    for picture, matrix, row in zip(pictures.numpy(), matrices.tolist(), out.numpy(), strict=True):
        _native.warp(picture, matrix, fill, row, scale)
    return out


@_fake("maskcore::warp")
def _(pictures: Tensor, matrices: Tensor, fill: float, scale: float, bfloat16: bool = False) -> Tensor:
    return pictures.new_empty(pictures.shape, dtype=torch.bfloat16 if bfloat16 else torch.float32)


def empty_cache() -> None:
    """Gives the system back the memory that freed results of operators on the CPU left, as ``torch.cuda.empty_cache``.

    Otherwise the process keeps it for the next results, so it stays as large as its largest step was.
    """
    _ops.empty_cache()
