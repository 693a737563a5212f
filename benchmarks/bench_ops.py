"""Every operator beside PyTorch's, forward and backward, at the final network's own shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskcore import models, ops

Compare = Callable[..., None]


def _image(n: int, h: int, w: int, c: int) -> Tensor:
    return torch.randn(n, c, h, w).to(memory_format=torch.channels_last)


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Both engines must agree before they are timed; fp32 sums of up to 4 million terms differ by 1e-5."""
    error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error <= 1e-4, f"the engines disagree by {error:.1e}"


class Case(NamedTuple):
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    operands: list[Tensor]
    flops: int


def _torch_conv_bn_relu(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    z = F.conv2d(x, weight, bias)
    return F.relu(F.batch_norm(z, None, None, gamma, beta, training=True, eps=1e-3))


def _conv_case(at: models.Placed, n: int) -> Case:
    layer = at.layer
    assert isinstance(layer, models.Conv)
    (H, W, C), K = at.input_shape, layer.channels
    operands = [_image(n, H, W, C).relu_(), torch.randn(K, C, 3, 3) * (2 / (9 * C)) ** 0.5, torch.randn(K)]
    flops = 2 * 9 * C * K * (H - 2) * (W - 2) * n
    if layer.bn:
        operands += [torch.rand(K) + 0.5, torch.randn(K)]
        return Case(lambda *a: ops.conv_bn_relu_train(*a)[0], _torch_conv_bn_relu, operands, flops)
    if layer.pool:
        return Case(ops.conv_relu_max_pool, ops.conv_relu_max_pool_reference, operands, flops)
    return Case(ops.conv_relu, ops.conv_relu_reference, operands, flops)


def bench_conv_forward(compare: Compare, conv: models.Placed, batch_size: int) -> None:
    case = _conv_case(conv, batch_size)
    with torch.no_grad():
        _assert_close(case.ours(*case.operands), case.theirs(*case.operands))
        compare(lambda: case.ours(*case.operands), lambda: case.theirs(*case.operands), flops=case.flops)


def bench_conv_backward(compare: Compare, conv: models.Placed, batch_size: int) -> None:
    """The gradients of filter and bias, and of the input but for the first layer."""
    case = _conv_case(conv, batch_size)
    first = conv.input_shape[-1] == 3
    needed = [t.requires_grad_() for t in (case.operands[1:] if first else case.operands)]
    graphs = [case.ours(*case.operands), case.theirs(*case.operands)]
    dy = torch.randn(graphs[0].shape).to(memory_format=torch.channels_last)
    for y in graphs:  # where the ReLU's sign may hang on the engine's rounding there is no gradient
        dy[(y > 0) & (y < 1e-3)] = 0

    def gradient(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, needed, dy, retain_graph=True)

    _assert_close(gradient(graphs[0])[-1], gradient(graphs[1])[-1])
    flops = case.flops * (1 if first else 2)
    compare(lambda: gradient(graphs[0]), lambda: gradient(graphs[1]), flops=flops)


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def bench_conv_bn_relu(compare: Compare, block: int, batch_size: int, image_size: int) -> None:
    """The inference form of a block's first convolution; the normalisation is folded into the filter in each call."""
    at = next(at for at in models.place("final", image_size=image_size) if at.name == f"block{block}_conv1")
    case = _conv_case(at, batch_size)
    K = at.output_shape[-1]
    operands: list[Any] = [*case.operands, torch.randn(K), torch.rand(K) + 0.5]
    with torch.no_grad():
        _assert_close(ops.conv_bn_relu(*operands), ops.conv_bn_relu_reference(*operands))
        compare(
            lambda: ops.conv_bn_relu(*operands),
            lambda: ops.conv_bn_relu_reference(*operands),
            flops=case.flops,
        )


def bench_first_layer(compare: Compare, batch_size: int, image_size: int) -> None:
    """With the normalisation folded in beforehand, as inference has it, and beside writing its output alone."""
    x = _image(batch_size, image_size, image_size, 3)
    weight, bias = torch.randn(32, 3, 3, 3) / 27**0.5, torch.randn(32)
    with torch.no_grad():
        y = ops.conv_relu(x, weight, bias)
        _assert_close(y, ops.conv_relu_reference(x, weight, bias))
        compare(
            lambda: ops.conv_relu(x, weight, bias),
            {"PyTorch": lambda: ops.conv_relu_reference(x, weight, bias), "filling y": lambda: y.fill_(1)},
            bytes=x.nbytes + y.nbytes,
        )


@pytest.mark.parametrize("channels", [32, 256])
def bench_max_pool_forward(compare: Compare, channels: int, batch_size: int) -> None:
    x = _image(batch_size, 128, 128, channels)
    _assert_close(ops.max_pool(x), ops.max_pool_reference(x))
    compare(lambda: ops.max_pool(x), lambda: ops.max_pool_reference(x), bytes=x.nbytes + x.nbytes // 4)


@pytest.mark.parametrize("channels", [32, 256])
def bench_max_pool_backward(compare: Compare, channels: int, batch_size: int) -> None:
    x = _image(batch_size, 128, 128, channels).requires_grad_()
    ours, theirs = ops.max_pool(x), ops.max_pool_reference(x)
    dy = torch.randn_like(ours)

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    _assert_close(gradient(ours), gradient(theirs))
    compare(lambda: gradient(ours), lambda: gradient(theirs), bytes=x.nbytes + x.nbytes // 4)


def _large_dense(batch_size: int, image_size: int) -> list[Tensor]:
    """Input, weight and bias of the large dense layer."""
    at = next(at for at in models.place("final", image_size=image_size) if at.name == "dense1")
    (inputs,), (outputs,) = at.input_shape, at.output_shape
    return [torch.randn(batch_size, inputs), torch.randn(outputs, inputs) / 100, torch.randn(outputs)]


def bench_dense_forward(compare: Compare, batch_size: int, image_size: int) -> None:
    """At these batches bound by reading the weights once."""
    x, weight, bias = _large_dense(batch_size, image_size)
    theirs = lambda: F.relu(F.linear(x, weight, bias))  # noqa: E731
    _assert_close(ops.dense(x, weight, bias, relu=True), theirs())
    compare(lambda: ops.dense(x, weight, bias, relu=True), theirs, bytes=weight.nbytes)


def bench_dense_backward(compare: Compare, batch_size: int, image_size: int) -> None:
    """The weights are read and their gradient is written."""
    x, weight, bias = operands = [t.requires_grad_() for t in _large_dense(batch_size, image_size)]
    ours, theirs = ops.dense(x, weight, bias, relu=True), F.relu(F.linear(x, weight, bias))
    dy = torch.randn_like(ours).masked_fill_((ours > 0) & (ours < 1e-3), 0)  # its sign may hang on rounding

    def gradient(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, operands, dy, retain_graph=True)

    for one, other in zip(gradient(ours), gradient(theirs), strict=True):
        _assert_close(one, other)
    compare(lambda: gradient(ours), lambda: gradient(theirs), bytes=2 * weight.nbytes)


def bench_dropout(compare: Compare, batch_size: int, image_size: int) -> None:
    """On the flattened pictures, forward; masks differ, so that the shares that stay are what is compared."""
    x = _large_dense(batch_size, image_size)[0].abs_() + 1
    seed = torch.zeros(1, dtype=torch.int64)
    for y in (ops.dropout(x, seed, 0.5), F.dropout(x, 0.5)):
        assert abs(float((y != 0).float().mean()) - 0.5) < 0.02
    compare(lambda: ops.dropout(x, seed, 0.5), lambda: F.dropout(x, 0.5), bytes=2 * x.nbytes)


def bench_softmax_cross_entropy(compare: Compare, batch_size: int) -> None:
    logits, target = torch.randn(batch_size, 3, requires_grad=True), torch.randint(0, 3, (batch_size,))

    def both_passes(loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
        return torch.autograd.grad(loss(logits, target), logits)[0]

    _assert_close(both_passes(ops.softmax_cross_entropy), both_passes(F.cross_entropy))
    compare(
        lambda: both_passes(ops.softmax_cross_entropy),
        lambda: both_passes(F.cross_entropy),
        bytes=2 * logits.nbytes,
    )
