"""Layers: parameters and running statistics; the arithmetic is in :mod:`maskcore.ops`.

All are ordinary ``torch.nn.Module`` objects with Keras' semantics: glorot-uniform weights and zero biases,
batch-normalisation epsilon 1e-3 and decay 0.99. Images are ``[N, C, H, W]`` in channels_last memory.
``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` does not know :class:`ConvBNReLU`: in a distributed run each
process normalises with the statistics of its own batch.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from maskcore import ops


def glorot_uniform_(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Fills a filter ``[K, C, R, S]`` or a matrix ``[K, C]`` in place from U(-a, a), a = sqrt(6 / (fan_in + fan_out)).

    Glorot & Bengio 2010; Keras' default. The fans of a convolution count its R S taps.
    """
    taps = math.prod(weight.shape[2:])
    limit = math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * taps))
    with torch.no_grad():
        weight.uniform_(-limit, limit, generator=generator)


class _Weighted(torch.nn.Module):
    """A layer with a weight and a bias."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter

    def _create(self, outputs: int, inputs: int, *taps: int) -> None:
        if outputs < 1 or inputs < 1:
            raise ValueError(f"a layer needs at least one input and one output, not {inputs} and {outputs}")
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, *taps))
        self.bias = torch.nn.Parameter(torch.empty(outputs))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new glorot-uniform weights and zeroes the bias."""
        glorot_uniform_(self.weight, generator)
        torch.nn.init.zeros_(self.bias)


class _Conv(_Weighted):
    """A 3x3 stride-1 convolution's parameters, and the precision of its products."""

    precision: ops.Precision

    def __init__(self, in_channels: int, out_channels: int, padding: int, precision: ops.Precision) -> None:
        super().__init__()
        if padding not in (0, 1):
            raise ValueError(f"padding must be 0 (valid) or 1 (same), is {padding!r}")
        if precision not in get_args(ops.Precision):
            raise ValueError(f"precision must be ieee, tf32 or bf16, is {precision!r}")
        self._create(out_channels, in_channels, 3, 3)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.padding = padding
        self.precision = precision

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, padding={self.padding}"
        return sizes if self.precision == "ieee" else f"{sizes}, precision={self.precision}"


class ConvReLU(_Conv):
    """3x3 convolution and ReLU; with ``pool`` a 2x2 max-pool is fused behind them.

    x ``[N, in_channels, H, W]`` -> ``[N, out_channels, P, Q]`` with P = H + 2 padding - 2 (half of it, rounded
    down, with ``pool``). ``precision`` is that of :func:`maskcore.ops.conv_relu`, in both directions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        padding: int = 0,
        pool: bool = False,
        precision: ops.Precision = "ieee",
    ) -> None:
        super().__init__(in_channels, out_channels, padding, precision)
        self.pool = pool
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        convolve = ops.conv_relu_max_pool if self.pool else ops.conv_relu
        return convolve(x, self.weight, self.bias, self.padding, precision=self.precision)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool}"


class ConvBNReLU(_Conv):
    """3x3 convolution, batch normalisation and ReLU.

    In training mode the batch's statistics normalise, and the running ones follow:
    ``running = momentum * running + (1 - momentum) * batch`` (Keras' meaning of momentum; PyTorch's is the
    complement). In evaluation mode the running statistics are folded into the filter.

    Args:
        in_channels, out_channels, padding: of the convolution.
        eps: added to the variance.
        momentum: decay of the running statistics.
        moving_variance: what the running variance averages: ``"unbiased"`` (M / (M - 1) times the batch's,
            as the fused kernel of tf.keras 2 and PyTorch have it) or ``"biased"`` (Keras 3).
        precision: of the convolution's products: see :func:`maskcore.ops.conv_relu`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        padding: int = 0,
        eps: float = 1e-3,
        momentum: float = 0.99,
        moving_variance: Literal["unbiased", "biased"] = "unbiased",
        precision: ops.Precision = "ieee",
    ) -> None:
        super().__init__(in_channels, out_channels, padding, precision)
        if moving_variance not in ("unbiased", "biased"):
            raise ValueError(f"moving_variance must be 'unbiased' or 'biased', is {moving_variance!r}")
        self.eps = eps
        self.momentum = momentum
        self.moving_variance = moving_variance
        self.gamma = torch.nn.Parameter(torch.empty(out_channels))
        self.beta = torch.nn.Parameter(torch.empty(out_channels))
        self.register_buffer("running_mean", torch.empty(out_channels))
        self.register_buffer("running_var", torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        for tensor, value in (
            (self.gamma, 1.0),
            (self.beta, 0.0),
            (self.running_mean, 0.0),
            (self.running_var, 1.0),
        ):
            torch.nn.init.constant_(tensor, value)

    def forward(self, x: Tensor) -> Tensor:
        affine = (self.weight, self.bias, self.gamma, self.beta)
        if not self.training:
            statistics = self.running_mean, self.running_var
            return ops.conv_bn_relu(x, *affine, *statistics, self.eps, self.padding, self.precision)
        y, mean, var = ops.conv_bn_relu_train(x, *affine, self.eps, self.padding, self.precision)
        self._follow(mean, var, y.shape[0] * y.shape[2] * y.shape[3])
        return y

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, pixels: int) -> None:
        if self.moving_variance == "unbiased":
            var = var * (pixels / max(pixels - 1, 1))
        self.running_mean.lerp_(mean, 1 - self.momentum)
        self.running_var.lerp_(var, 1 - self.momentum)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, momentum={self.momentum}"


def _is_watched(layer: torch.nn.Module) -> bool:
    """Whether somebody wants to be told of the layer's calls: torch calls hooks where a module is called."""
    everywhere = torch.nn.modules.module
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def can_fuse(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether :func:`conv_bn_relu_conv_relu` may stand for ``second(first(x))``.

    It is for training, and calls no hooks: a layer that has some is called by itself.
    """
    return (
        type(first) is ConvBNReLU
        and type(second) is ConvReLU
        and first.training
        and first.precision == second.precision
        and not _is_watched(first)
        and not _is_watched(second)
    )


def conv_bn_relu_conv_relu(first: ConvBNReLU, second: ConvReLU, x: Tensor) -> Tensor:
    """``second(first(x))`` in training mode, without storing what is between the two."""
    y, mean, var = ops.conv_bn_relu_conv_relu_train(
        x,
        first.weight,
        first.bias,
        first.gamma,
        first.beta,
        second.weight,
        second.bias,
        first.eps,
        first.padding,
        second.padding,
        second.pool,
        first.precision,
    )
    first._follow(
        mean, var, x.shape[0] * (x.shape[2] + 2 * first.padding - 2) * (x.shape[3] + 2 * first.padding - 2)
    )
    return y


class InferenceConv(torch.nn.Module):
    """A :class:`ConvReLU` or :class:`ConvBNReLU` as it is now, for inference only.

    The batch normalisation is folded into the filter and the filter is transformed, once instead of in every
    call. Later changes of the layer that it was made from do not reach it, and it has no parameters.
    ``precision`` is that of the products, by default the layer's own.
    """

    weight: Tensor
    bias: Tensor
    transformed: Tensor | None

    @torch.no_grad()
    def __init__(self, layer: ConvReLU | ConvBNReLU, precision: ops.Precision | None = None) -> None:
        super().__init__()
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        if isinstance(layer, ConvBNReLU):
            statistics = layer.running_mean, layer.running_var
            weight, bias = ops.fold_batch_norm(weight, bias, layer.gamma, layer.beta, *statistics, layer.eps)
        self.padding = layer.padding
        self.precision = precision or layer.precision
        self.pool = isinstance(layer, ConvReLU) and layer.pool
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        on_cpu = weight.device.type == "cpu"
        transformed = ops.transform_filter(weight, self.precision) if on_cpu else None
        self.register_buffer("transformed", transformed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        convolve = ops.conv_relu_max_pool if self.pool else ops.conv_relu
        return convolve(x, self.weight, self.bias, self.padding, self.transformed, self.precision)

    def extra_repr(self) -> str:
        K, C = self.weight.shape[:2]
        return f"{C}, {K}, padding={self.padding}, pool={self.pool}"


class MaxPool2d(torch.nn.Module):
    """2x2 max-pooling with stride 2, an odd last row or column dropped: ``[N, C, H // 2, W // 2]``."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool(x)


class Dense(_Weighted):
    """Fully connected layer ``[N, in_features] -> [N, out_features]``, with ReLU if asked for."""

    def __init__(self, in_features: int, out_features: int, relu: bool = False) -> None:
        super().__init__()
        self._create(out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.relu = relu
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return ops.dense(x, self.weight, self.bias, self.relu)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, relu={self.relu}"


class Dropout(torch.nn.Dropout):
    """Zeroes each value with probability p in training and scales the rest by 1 / (1 - p), as Keras does.

    Each call draws a seed from torch's CPU generator, whatever the device, and :func:`maskcore.ops.dropout`
    does the rest: the same state of that generator drops the same values everywhere.

    Attributes:
        seed: ``[1]`` int64 on the input's device. Where it is not None it is used instead of a new one: a step in
            a CUDA graph reads it, and :meth:`draw` is called before each replay.
    """

    seed: Tensor | None = None

    @staticmethod
    def draw() -> int:
        """A new seed from torch's CPU generator."""
        return int(torch.randint(-(2**63), 2**63 - 1, ()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        seed = self.seed
        if seed is None:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,)).to(x.device)
        return ops.dropout(x, seed, self.p)


class Flatten(torch.nn.Module):
    """``[N, C, H, W] -> [N, H W C]``, in Keras' order: channels vary fastest. A view in channels_last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)
