"""The CUDA convolutions on the host, at their edges: NaN and infinity, tensors at any address, tensors of more than
2^31 elements.
"""

from __future__ import annotations

import math

import cuda_emulator
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import Kernels, Output, Workspace
from test_cuda_conv import (
    KINDS,
    PLAIN_KINDS,
    Kind,
    Size,
    conv_call,
    gradients,
    nchw,
    nhwc,
    sizes_and_kinds,
    unpool,
    used,
    used_backward,
    used_forward,
    whole,
    windows,
    workspace,
)
from torch import Tensor

pytestmark = pytest.mark.skipif(not cuda_emulator.has_compiler(), reason="there is no C++ compiler")

# The halo tile with borders, and the kernels of pictures; tails in every dimension.
SIZES = [Size(2, 9, 11, 20, 33, 1), Size(2, 12, 10, 3, 34, 0), Size(1, 8, 13, 2, 8, 1)]
WGMMA_SIZES = [Size(2, 9, 11, 34, 20, 1)]  # backward


@pytest.fixture(scope="module")
def batch_norm() -> Kernels:
    return cuda_emulator.build("conv_bn_relu_cuda.cu")


def askew(x: Tensor) -> Tensor:
    """The same values at an address that is a multiple of nothing but the element's size."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def convolved(kernels: Kernels, s: Size, k: Kind, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    call = conv_call(s, k)
    y = torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype)
    room = workspace(kernels, "conv_relu_workspace_bytes", call)
    kernels.run("launch_conv_relu", call, x, weight, bias, Output(y), room)
    return y


def pooled(
    kernels: Kernels, s: Size, k: Kind, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    call = conv_call(s, k)
    y = torch.empty(s.N, s.P // 2, s.Q // 2, s.K, dtype=k.dtype)
    argmax = torch.empty(y.shape, dtype=torch.uint8)
    room = workspace(kernels, "conv_relu_workspace_bytes", call)
    kernels.run("launch_conv_relu_max_pool", call, x, weight, bias, Output(y), Output(argmax), room)
    return y, argmax


def differentiated(
    kernels: Kernels,
    s: Size,
    k: Kind,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    argmax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    call = conv_call(s, k)
    dx, dweight, dbias = torch.empty(x.shape, dtype=k.dtype), torch.empty(weight.shape), torch.empty(s.K)
    room = workspace(kernels, "conv_relu_backward_workspace_bytes", call)
    name = f"launch_conv_relu{'' if argmax is None else '_max_pool'}_backward"
    places = () if argmax is None else (argmax,)
    results = (Output(dx), Output(dweight), Output(dbias))
    kernels.run(name, call, dy, x, weight, y, *places, *results, room)
    return dx, dweight, dbias


def equal(ours: Tensor, exact: Tensor) -> bool:
    """The same numbers, infinities and NaN."""
    return torch.equal(
        torch.nan_to_num(ours.double(), nan=1e30), torch.nan_to_num(exact.double(), nan=1e30)
    ) and bool((ours.isnan() == exact.isnan()).all())


# ---- NaN and infinity ----------------------------------------------------------------------------


@sizes_and_kinds(SIZES, [], used_forward)
def test_nan_and_infinity_come_out_where_they_must(forward: Kernels, s: Size, kind: str) -> None:
    """And nowhere else: as torch has it, ReLU keeps NaN, and of infinities of both signs comes NaN."""
    k = KINDS[kind]
    x, weight, bias = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3), whole(s.K)
    weight[weight == 0] = 1.0  # zero times infinity is another matter: of the filter's padding
    x[0, 1, 1, 0] = math.inf
    x[0, 1, 2, 1 % s.C] = -math.inf
    x[-1, -1, -1, -1] = math.nan
    exact = nhwc(F.relu(F.conv2d(nchw(x), weight, bias, padding=s.padding)))
    assert exact.isnan().any()
    assert exact.isinf().any()
    assert exact.isfinite().any()
    y = convolved(forward, s, k, x.to(k.dtype), weight.float(), bias.float())
    assert equal(y, exact.to(k.dtype))


@sizes_and_kinds(SIZES, [], used_forward)
def test_a_pool_takes_nan_before_all_and_infinity_before_numbers(
    forward: Kernels, s: Size, kind: str
) -> None:
    k = KINDS[kind]
    x, weight, bias = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3), whole(s.K)
    weight[weight == 0] = 1.0
    x[0, 1, 1, 0] = math.inf
    x[-1, 5, 5, -1] = math.nan
    full = nhwc(F.relu(F.conv2d(nchw(x), weight, bias, padding=s.padding)))
    y, argmax = pooled(forward, s, k, x.to(k.dtype), weight.float(), bias.float())
    exact = nhwc(F.max_pool2d(nchw(full), 2))
    assert exact.isnan().any()
    assert exact.isinf().any()
    assert equal(y, exact.to(k.dtype))
    # The place holds what was taken, and no earlier one does.
    corners = [full[:, i : s.P // 2 * 2 : 2, j : s.Q // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]
    for place in range(4):
        same = (corners[place] == exact) | (corners[place].isnan() & exact.isnan())
        assert same[argmax == place].all()
        assert not same[argmax > place].any()


@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
@sizes_and_kinds(SIZES, WGMMA_SIZES, used_backward)
def test_nan_and_infinity_in_gradients(backward: Kernels, s: Size, pool: bool, kind: str) -> None:
    k = KINDS[kind]
    x, weight = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3)
    weight[weight == 0] = 1.0
    x[x == 0] = 1.0
    if pool:
        y, argmax = windows(s.P, s.Q, s, k)
    else:
        y, argmax = F.relu(whole(s.N, s.P, s.Q, s.K)).to(k.dtype), None
    dy = whole(*y.shape)
    dy[0, 1, 1, 0], y[0, 1, 1, 0] = math.nan, 1.0
    dy[-1, 0, 2, 1], y[-1, 0, 2, 1] = math.inf, 1.0
    dy[0, 2, 1, 2], y[0, 2, 1, 2] = math.nan, 0.0  # which the ReLU keeps back
    dy[0, 2, 2, 3], y[0, 2, 2, 3] = 2.0, math.nan  # a NaN lets pass
    g = torch.where(y <= 0, 0.0, dy)
    if argmax is not None:
        g = unpool(g, argmax, s.P, s.Q)
    dx_exact, dweight_exact = gradients(g, x, weight, s.padding)
    memory = (dy.to(k.dtype), x.to(k.dtype), weight.float(), y, argmax)
    dx, dweight, dbias = differentiated(backward, s, k, *memory)
    assert dx_exact.isnan().any()
    assert dx_exact.isinf().any()
    assert dx_exact.isfinite().any()
    assert equal(dx, dx_exact.to(k.dtype))
    # A filter's gradient adds up borders too, zeros that make NaN of an infinite gradient: as they do in torch.
    assert equal(dweight, dweight_exact.float())
    assert equal(dbias, g.sum((0, 1, 2)).float())


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_infinity_in_a_picture_stays_infinity_in_the_gradient(backward: Kernels, kind: str) -> None:
    """Of a tile's first pixel, whose window stands in for those of pixels past the picture: they must not count, not
    even as zero times infinity."""
    k, s = KINDS[kind], SIZES[1]
    x, weight, y = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3), torch.ones(s.N, s.P, s.Q, s.K)
    dy = whole(s.N, s.P, s.Q, s.K)
    x[0, 0, 0, 1], dy[0, 0, 0] = math.inf, 1.0
    dweight_exact = gradients(dy, x, weight, s.padding)[1]
    memory = (dy.to(k.dtype), x.to(k.dtype), weight.float(), y.to(k.dtype), None)
    dweight = differentiated(backward, s, k, *memory)[1]
    assert (dweight_exact[:, 1, 0, 0] == math.inf).all()
    assert equal(dweight, dweight_exact.float())


# ---- any address ---------------------------------------------------------------------------------


@sizes_and_kinds([Size(1, 9, 11, 32, 64, 1), SIZES[1]], [Size(1, 9, 11, 40, 8, 1)], used)
def test_tensors_may_lie_anywhere(forward: Kernels, backward: Kernels, s: Size, kind: str) -> None:
    """Channels are whole packets, so that it is the address alone that forbids 16-byte accesses; each tensor in its
    turn, and all of them."""
    k = KINDS[kind]
    x, weight, bias = (
        torch.randn(s.N, s.H, s.W, s.C).to(k.dtype),
        torch.randn(s.K, s.C, 3, 3),
        torch.randn(s.K),
    )
    inputs = (x, weight, bias)
    y = convolved(forward, s, k, *inputs)
    y_pooled, argmax = pooled(forward, s, k, *inputs)
    for which in (0, 1, 2, None):
        moved = [askew(tensor) if which in (i, None) else tensor for i, tensor in enumerate(inputs)]
        assert torch.equal(convolved(forward, s, k, *moved), y)
        assert all(map(torch.equal, pooled(forward, s, k, *moved), (y_pooled, argmax)))

    for result, places in ((y, None), (y_pooled, argmax)):
        dy = torch.randn(result.shape).to(k.dtype)
        aligned = (dy, x, weight, result, *(() if places is None else (places,)))
        exact = differentiated(backward, s, k, *aligned[:4], places)
        for which in (*range(len(aligned)), None):
            moved = [askew(tensor) if which in (i, None) else tensor for i, tensor in enumerate(aligned)]
            ours = differentiated(backward, s, k, *moved[:4], None if places is None else moved[4])
            assert all(map(torch.equal, ours, exact))


@sizes_and_kinds([Size(1, 9, 11, 16, 32, 1)], [Size(1, 9, 11, 40, 40, 1)], used)
def test_results_may_lie_anywhere(forward: Kernels, batch_norm: Kernels, s: Size, kind: str) -> None:
    k = KINDS[kind]
    x, weight, vector = (
        torch.randn(s.N, s.H, s.W, s.C).to(k.dtype),
        torch.randn(s.K, s.C, 3, 3),
        torch.rand(s.K),
    )
    call = conv_call(s, k)
    found = []
    for place in (torch.clone, askew):
        y, z = (place(torch.zeros(s.N, s.P, s.Q, s.K, dtype=k.dtype)) for _ in range(2))
        mean, var, dgamma, dbeta = (place(torch.zeros(s.K)) for _ in range(4))
        outputs = (Output(y), Output(z), Output(mean), Output(var))
        room = workspace(batch_norm, "conv_bn_relu_train_workspace_bytes", call)
        batch_norm.run("launch_conv_bn_relu_train", call, x, weight, *[vector] * 3, 1e-3, *outputs, room)
        dx, dweight = place(torch.zeros(x.shape, dtype=k.dtype)), place(torch.zeros(weight.shape))
        outputs = (Output(dx), Output(dweight), Output(dgamma), Output(dbeta))
        room = workspace(batch_norm, "conv_bn_relu_train_backward_workspace_bytes", call)
        inputs = (y, x, weight, z, vector, vector, mean, var)
        batch_norm.run("launch_conv_bn_relu_train_backward", call, *inputs, 1e-3, *outputs, room)
        pooled_y = place(torch.zeros(s.N, s.P // 2, s.Q // 2, s.K, dtype=k.dtype))
        argmax = place(torch.zeros(pooled_y.shape, dtype=torch.uint8))
        room = workspace(forward, "conv_relu_workspace_bytes", call)
        outputs = (Output(pooled_y), Output(argmax))
        forward.run("launch_conv_relu_max_pool", call, x, weight, vector, *outputs, room)
        found.append((y, z, mean, var, dx, dweight, dgamma, dbeta, pooled_y, argmax))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


# ---- more than 2^31 elements ---------------------------------------------------------------------


@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
@pytest.mark.parametrize("C", [8, 3])
def test_convolutions_count_elements_in_64_bits(forward: Kernels, C: int, pool: bool) -> None:
    """The first and the last block of the launch on sparse memory; x and, unless pooled, y have more than 2^31
    elements. Backward-data takes its addresses from the same functions (Tiling, Pixel::element)."""
    K = 8
    s = Size(2**31 // (4 * 64 * C) + 1, 4, 64, C, K, 1)
    x = cuda_emulator.sparse((s.N, s.H, s.W, C), "float32")
    assert x.size > 2**31
    y = cuda_emulator.sparse((s.N, s.P // (1 + pool), s.Q // (1 + pool), K), "float32")
    argmax = cuda_emulator.sparse(y.shape, "uint8")
    x[-1, 2:, -2:] = 1.0
    weight, bias = torch.zeros(K, C, 3, 3), torch.full((K,), 0.5)
    weight[:, :, 1, 1] = torch.arange(1, K + 1)[:, None]
    call = conv_call(s, KINDS["ieee"])
    call["multiprocessors"] = 2**22  # so many that the kernel of pictures has a block a tile
    name = f"launch_conv_relu{'_max_pool' * pool}"
    outputs = (Output(y), *([Output(argmax)] if pool else []))
    recorded = forward.record(name, call.ctypes.data, *[1 << 20] * (5 + pool))
    packing = [launch.grid[0] for launch in recorded[:-1]]
    blocks = recorded[-1].grid[0]
    room = workspace(forward, "conv_relu_workspace_bytes", call)
    only = [*range(max(packing, default=1)), blocks - 1]
    forward.run(name, call, x, weight, bias, *outputs, room, only_blocks=only)
    expected = np.arange(1, K + 1) * C + 0.5
    assert (y[-1, -1, -1] == expected).all()
    assert (y[-1, 0, -1] == 0.5).all()
    assert (y[0, 0, 0] == 0.5).all()
    assert not y[s.N // 2].any()
    if pool:
        assert not argmax[-1, -1, -1].any()


def test_filter_gradients_count_elements_in_64_bits(backward: Kernels) -> None:
    """The last block alone, that of the last channels and images, whose sums are read from the workspace."""
    s = Size(4200, 8, 8, 8192, 8, 0)
    call = conv_call(s, KINDS["tf32"], multiprocessors=2**14)
    x = cuda_emulator.sparse((s.N, s.H, s.W, s.C), "float32")
    assert x.size > 2**31
    dy, y = (cuda_emulator.sparse((s.N, s.P, s.Q, s.K), "float32") for _ in range(2))
    weight = cuda_emulator.sparse((s.K, s.C, 3, 3), "float32")
    x[-1, ..., -32:], dy[-1], y[-1] = 2.0, np.arange(s.K), 1.0
    *_, launch, _ = backward.record(
        "launch_conv_relu_backward", call.ctypes.data, *[1 << 20] * 4, None, *[1 << 20] * 3
    )
    c_tiles = s.C // 32
    splits = launch.grid[0] // c_tiles
    sums = cuda_emulator.sparse((2**28,), "float32")
    outputs = (cuda_emulator.sparse(weight.shape, "float32"), cuda_emulator.sparse((s.K,), "float32"))
    arguments = (call, dy, x, weight, y, None, *outputs, sums)
    backward.run("launch_conv_relu_backward", *arguments, only_blocks=[launch.grid[0] - 1])
    size, begin = 9 * s.K * s.C, 9 * s.C * 16  # behind the packed filter, of 16 channels
    last = sums[begin + (splits - 1) * size : begin + splits * size].reshape(9, s.K, s.C)
    assert (last[..., -32:] == 2 * s.P * s.Q * np.arange(s.K)[:, None]).all()
    assert not last[..., :-32].any()


@pytest.mark.parametrize("C", [3, 16])
def test_convolutions_refuse_rows_they_cannot_count(forward: Kernels, C: int) -> None:
    """2^31 rows of pixels."""
    s = Size(2**29, 2, 3, C, 8, 1)
    room = Workspace(torch.empty(1 << 16))
    memory = (torch.empty(1), torch.empty(8, C, 3, 3), torch.empty(8), torch.empty(1))
    with pytest.raises(cuda_emulator.LaunchError):
        forward.run("launch_conv_relu", conv_call(s, KINDS["tf32"]), *memory, room)
