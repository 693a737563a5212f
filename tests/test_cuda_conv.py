"""The CUDA convolutions' own sources, run on the host: every launcher, precision, epilogue and prologue.

Two kinds of tests. With small whole numbers every sum is exact in every precision, so that results are compared
for equality: indices, borders, tails, ties. With random numbers the reference is float64 on operands that are
rounded as the precision rounds them (to 10 mantissa bits for tf32, 7 for bf16), so that what remains is the
rounding of float32 sums, whatever the precision.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cuda_emulator
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import Output, Workspace
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
MULTIPROCESSORS = 1  # of four blocks, so that a resident filter serves several tiles
AMPLE, SMALL = 228 * 1024, 100 * 1024  # bytes of its shared memory on the largest and on the smallest GPUs

pytestmark = pytest.mark.skipif(not cuda_emulator.has_compiler(), reason="there is no C++ compiler")


class Kind(NamedTuple):
    """A tensors' type and how it is multiplied."""

    dtype: torch.dtype
    precision: str
    mantissa: int  # bits of the operands
    wgmma: bool = False  # on a device that has it

    def round(self, x: Tensor) -> Tensor:
        """To the operands' mantissa: to nearest, ties to even in bf16, away from zero in tf32."""
        if self.precision == "bf16":
            return x.bfloat16().to(x.dtype)
        if self.precision == "tf32":
            bits = x.float().view(torch.int32)
            return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)
        return x


KINDS = {
    "ieee": Kind(torch.float32, "ieee", 23),
    "tf32": Kind(torch.float32, "tf32", 10),
    "fp32-bf16": Kind(torch.float32, "bf16", 7),
    "bf16": Kind(torch.bfloat16, "bf16", 7),
    "tf32-wgmma": Kind(torch.float32, "tf32", 10, wgmma=True),
    "fp32-bf16-wgmma": Kind(torch.float32, "bf16", 7, wgmma=True),
    "bf16-wgmma": Kind(torch.bfloat16, "bf16", 7, wgmma=True),
}
PLAIN_KINDS = [name for name, kind in KINDS.items() if not kind.wgmma]
PRECISIONS = ["ieee", "tf32", "bf16"]


class Size(NamedTuple):
    N: int
    H: int
    W: int
    C: int
    K: int
    padding: int

    def __str__(self) -> str:
        return f"N{self.N}_{self.H}x{self.W}_C{self.C}_K{self.K}_p{self.padding}"

    @property
    def P(self) -> int:
        return self.H + 2 * self.padding - 2

    @property
    def Q(self) -> int:
        return self.W + 2 * self.padding - 2


# Tiles are 128 pixels by 32, 64 or 128 output channels; slabs 16 float32 or 32 bfloat16 channels; the weight
# gradient's tiles are 80 or 40 pixels by 32 or 64 output and 32 input channels, or 112 or 56 by 64 and 64.
SIZES = [
    Size(1, 3, 3, 1, 1, 0),  # one output
    Size(2, 1, 1, 5, 3, 1),  # one pixel, all border
    Size(3, 7, 5, 3, 32, 0),  # first layer; a tile with three images
    Size(1, 19, 21, 8, 33, 1),  # several tiles; one channel in a second block of the middle tile
    Size(2, 12, 12, 32, 32, 0),  # resident filter, full slabs
    Size(2, 9, 18, 40, 65, 1),  # a wide tile with one channel over half, slabs with tails
    Size(1, 6, 5, 100, 194, 0),  # two wide tiles, many slabs, unaligned in bf16
    Size(1, 7, 6, 20, 130, 0),  # three middle tiles: two wide ones would be emptier
    Size(1, 10, 40, 16, 24, 1),  # wide image
    Size(1, 40, 4, 17, 7, 0),  # tall image, odd channels
    Size(1, 30, 26, 20, 32, 1),  # more tiles than blocks of a resident filter
    Size(1, 31, 33, 3, 33, 1),  # first layer, tiles that a block goes through, two blocks of channels
    Size(2, 12, 40, 2, 8, 0),  # pictures of two channels
]
# Of 6 halo tiles, where the first layer's kernel would have 5.
MORE_HALO_TILES = Size(3, 62, 2, 5, 34, 1)
# wgmma's kernels, by bytes of filter in bf16 and in TF32, forward and, channels turned, in backward-data: up to 72 KB
# resident in a block with one tile, up to 144 KB in a block with two, above that streamed; a wide tile always. Three
# tiles, so that a block with two has one without pixels, or more than a block goes through at once.
WGMMA_SIZES = [
    Size(1, 13, 21, 66, 34, 1),  # 108 and 180 KB
    Size(1, 13, 21, 34, 66, 1),  # backward so; forward a wide tile
    Size(2, 9, 15, 34, 34, 1),  # 72 and 108 KB
    Size(1, 7, 9, 130, 34, 0),  # 180 and 324 KB
    Size(1, 7, 9, 34, 130, 0),  # backward so; forward two wide tiles
    Size(1, 20, 30, 12, 34, 1),  # 36 KB, more than two tiles for each of two blocks
    Size(1, 20, 30, 34, 12, 1),  # backward so
    Size(4, 19, 11, 34, 66, 0),  # the gradient's tiles: three images in one, rows and columns past the images
]


def used_forward(s: Size, kind: Kind) -> bool:
    """Whether wgmma is: pictures, and few output channels, have kernels without it (csrc/conv_dispatch.cuh)."""
    return s.C > 3 and s.K > 32


def used_backward(s: Size, kind: Kind) -> bool:
    """Nor are gradients multiplied by it that have to be rounded on their way into shared memory."""
    return s.C > 32 and (kind.dtype == torch.bfloat16 or kind.precision != "bf16")


def used(s: Size, kind: Kind) -> bool:
    return used_forward(s, kind) or used_backward(s, kind)


def sizes_and_kinds(
    sizes: Sequence[Size], wgmma_sizes: Sequence[Size], is_used: Callable[[Size, Kind], bool]
) -> pytest.MarkDecorator:
    """Every size with every kind, but those with wgmma where it is used: elsewhere they are the same kernels."""
    pairs = [(s, kind) for s in sizes for kind in PLAIN_KINDS]
    pairs += [
        (s, name)
        for s in (*sizes, *wgmma_sizes)
        for name, kind in KINDS.items()
        if kind.wgmma and is_used(s, kind)
    ]
    return pytest.mark.parametrize(("s", "kind"), pairs, ids=[f"{s}-{kind}" for s, kind in pairs])


@pytest.fixture(scope="module")
def batch_norm() -> cuda_emulator.Kernels:
    return cuda_emulator.build("conv_bn_relu_cuda.cu")


@pytest.fixture(scope="module")
def fused() -> cuda_emulator.Kernels:
    return cuda_emulator.build("conv_bn_relu_conv_relu_cuda.cu")


CALL = np.dtype(
    [(name, np.int64) for name in ("N", "H", "W", "C", "K", "padding", "P", "Q")]
    + [(name, np.int32) for name in ("dtype", "precision", "multiprocessors", "shared_bytes")]
    + [("wgmma", np.bool_)],
    align=True,
)


def conv_call(
    s: Size, kind: Kind, shared_bytes: int = AMPLE, multiprocessors: int = MULTIPROCESSORS
) -> np.ndarray:
    """A ConvCall of csrc/conv_size.h."""
    dtype = [torch.float32, torch.bfloat16].index(kind.dtype)
    precision = PRECISIONS.index(kind.precision)
    device = (multiprocessors, shared_bytes, kind.wgmma)
    return np.array([(*s, s.P, s.Q, dtype, precision, *device)], CALL)


def workspace(kernels: cuda_emulator.Kernels, name: str, call: np.ndarray, *sizes: int) -> Workspace:
    function = kernels.library[kernels.launchers[name][0].symbol]
    function.restype = ctypes.c_int64
    size = function(ctypes.c_void_p(call.ctypes.data), *map(ctypes.c_int64, sizes))
    # The emulator wants 16 bytes aligned memory, the launchers 256. Races are found by element: a workspace may
    # hold bfloat16.
    element = torch.int16 if call["dtype"][0] == 1 else torch.float32
    memory = torch.empty(size // element.itemsize + 128, dtype=element)
    skipped = -memory.data_ptr() % 256 // element.itemsize
    return Workspace(memory[skipped : skipped + size // element.itemsize])


def whole(*shape: int, largest: int = 3) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).double()


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def close(ours: Tensor, exact: Tensor, terms: int, name: str, magnitude: float = 0.0) -> None:
    """float32 sums of ``terms`` numbers: sqrt(terms) eps of the largest, as conftest.py derives, and, of a
    bfloat16 tensor, the rounding to 8 bits."""
    assert ours.shape == exact.shape, f"{name}: {ours.shape}, reference {exact.shape}"
    if exact.numel() == 0:
        return
    limit = 2 * math.sqrt(terms) * EPS32 * max(float(exact.abs().max()), magnitude)
    stored = 2.0**-8 * exact.abs() if ours.dtype == torch.bfloat16 else 0.0
    excess = float(((ours.double() - exact).abs() - stored).max())
    assert excess <= limit, f"{name}: error {excess:.3g} > {limit:.3g}"


def close_but_for_rounding(
    ours: Tensor, exact: Tensor, squares: Tensor, kind: Kind, terms: int, name: str, roundings: int = 1
) -> None:
    """The same where an operand is rounded after it was computed in float32, so that it may fall to the other side
    of a tie: so the operand's rounding is in the bound here. Of random terms' sum it is 2^-(mantissa + 1) of their
    root sum of ``squares`` at most, of the largest of these; six standard deviations of 1 / sqrt(3) of that.
    """
    rounding = roundings * 2.0 ** -(kind.mantissa + 1) * 6 / math.sqrt(3) * float(squares.max().sqrt())
    magnitude = rounding / (2 * math.sqrt(terms) * EPS32) + float(exact.abs().max())
    close(ours, exact, terms, name, magnitude=magnitude)


def equal(ours: Tensor, exact: Tensor, name: str) -> None:
    expected = exact.to(ours.dtype)
    assert ours.shape == expected.shape, f"{name}: {ours.shape}, reference {expected.shape}"
    wrong = (ours != expected).nonzero()
    assert len(wrong) == 0, f"{name}: {len(wrong)} of {ours.numel()} differ, first at {wrong[0].tolist()}"


@sizes_and_kinds(SIZES, WGMMA_SIZES, used_forward)
def test_conv_relu_whole_numbers(forward: cuda_emulator.Kernels, s: Size, kind: str) -> None:
    k = KINDS[kind]
    x, weight, bias = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3), whole(s.K)
    y = torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype)
    call = conv_call(s, k)
    room = workspace(forward, "conv_relu_workspace_bytes", call)
    forward.run("launch_conv_relu", call, x.to(k.dtype), weight.float(), bias.float(), Output(y), room)
    equal(y, nhwc(F.relu(F.conv2d(nchw(x), weight, bias, padding=s.padding))), "y")


def wgmma_tiles(kernels: cuda_emulator.Kernels, launcher: str, call: np.ndarray) -> set[str]:
    """The tiles of wgmma's kernels that a launcher starts: type, columns, tiles a block, whether it is resident; or
    that of the filter's gradient."""
    parameters = len(kernels.launchers[launcher][0].parameters)
    launches = kernels.record(launcher, call.ctypes.data, *[1 << 20] * (parameters - 1))
    found = [
        re.search(r"conv_halo_wgmma_kernel<.*?WgmmaTile<.*?(\w+), (.*?)>", launch.kernel)
        for launch in launches
    ]
    gradient = {GRADIENT for launch in launches if "conv_weight_gradient_wgmma_kernel" in launch.kernel}
    return {f"{match[1]} {match[2]}" for match in found if match} | gradient


GRADIENT = "gradient"
TILES = ["128, 1, false", "64, 1, true", "64, 2, true", "64, 1, false"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_sizes_reach_every_tile_of_wgmma(
    forward: cuda_emulator.Kernels, backward: cuda_emulator.Kernels, direction: str
) -> None:
    """And what is not run with it would reach none."""
    kernels, launcher, is_used = {
        "forward": (forward, "launch_conv_relu", used_forward),
        "backward": (backward, "launch_conv_relu_backward", used_backward),
    }[direction]
    reached = set()
    for s in (*SIZES, *WGMMA_SIZES):
        for name in KINDS.keys() - PLAIN_KINDS:
            kind = KINDS[name]
            tiles = wgmma_tiles(kernels, launcher, conv_call(s, kind))
            assert bool(tiles - {GRADIENT}) == is_used(s, kind), f"{s} {name}"
            by_gradient = direction == "backward" and kind.dtype == torch.bfloat16 and min(s.C, s.K) > 32
            assert (GRADIENT in tiles) == by_gradient, f"{s} {name}"
            reached |= tiles - {GRADIENT}
    assert reached == {f"{math} {tile}" for math in ("Tf32", "Bf16") for tile in TILES}


def windows(P: int, Q: int, s: Size, k: Kind) -> tuple[Tensor, Tensor]:
    """A pooled gradient's y and argmax."""
    y = F.relu(whole(s.N, P // 2, Q // 2, s.K)).to(k.dtype)
    return y, torch.randint(0, 4, y.shape, dtype=torch.uint8)


def unpool(g: Tensor, argmax: Tensor, P: int, Q: int) -> Tensor:
    """g [N,P/2,Q/2,K] at the places of argmax in [N,P,Q,K]."""
    out = torch.zeros(g.shape[0], P, Q, g.shape[3], dtype=g.dtype)
    for place in range(4):
        rows = out[:, place // 2 : P // 2 * 2 : 2, place % 2 : Q // 2 * 2 : 2]
        rows[:] = torch.where(argmax == place, g, 0.0)
    return out


def gradients(g: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """dx [N,H,W,C] and dweight [K,C,3,3] of the gradient g [N,P,Q,K] at the convolution's output."""
    x_nchw, w = nchw(x).requires_grad_(), weight.clone().requires_grad_()
    dx, dweight = torch.autograd.grad(F.conv2d(x_nchw, w, padding=padding), (x_nchw, w), nchw(g))
    return nhwc(dx), dweight


@sizes_and_kinds(SIZES, WGMMA_SIZES, used_forward)
def test_conv_relu_max_pool_whole_numbers(forward: cuda_emulator.Kernels, s: Size, kind: str) -> None:
    """Many ties: the first maximum is the one that counts."""
    k = KINDS[kind]
    x, weight, bias = whole(s.N, s.H, s.W, s.C, largest=1), whole(s.K, s.C, 3, 3, largest=1), whole(s.K)
    y = torch.empty(s.N, s.P // 2, s.Q // 2, s.K, dtype=k.dtype)
    argmax = torch.empty(y.shape, dtype=torch.uint8)
    call = conv_call(s, k)
    room = workspace(forward, "conv_relu_workspace_bytes", call)
    memory = (call, x.to(k.dtype), weight.float(), bias.float())
    forward.run("launch_conv_relu_max_pool", *memory, Output(y), Output(argmax), room)
    if y.numel() == 0:
        return
    full = F.relu(F.conv2d(nchw(x), weight, bias, padding=s.padding))
    exact, places = F.max_pool2d(full, 2, return_indices=True)
    equal(y, nhwc(exact), "y")
    equal(argmax, nhwc(places // s.Q % 2 * 2 + places % s.Q % 2), "argmax")


@sizes_and_kinds(SIZES, WGMMA_SIZES, used_backward)
def test_conv_relu_backward_whole_numbers(backward: cuda_emulator.Kernels, s: Size, kind: str) -> None:
    check_backward_whole_numbers(backward, s, kind, MULTIPROCESSORS)


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_filter_gradient_in_several_splits_of_several_tiles(
    backward: cuda_emulator.Kernels, kind: str
) -> None:
    """16 blocks: 4 splits for each of 2 x 2 tiles of 64 x 64 channels; and of 2 x 1 of 32 or 64 x 32."""
    check_backward_whole_numbers(backward, Size(2, 16, 40, 72, 65, 1), kind, 16)
    check_backward_whole_numbers(backward, Size(2, 9, 18, 20, 65, 1), kind, 8)


def check_backward_whole_numbers(
    backward: cuda_emulator.Kernels, s: Size, kind: str, multiprocessors: int
) -> None:
    k = KINDS[kind]
    x, weight = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3)
    dy, y = whole(s.N, s.P, s.Q, s.K), F.relu(whole(s.N, s.P, s.Q, s.K))
    dx, dweight, dbias = torch.empty(x.shape, dtype=k.dtype), torch.empty(weight.shape), torch.empty(s.K)
    call = conv_call(s, k, multiprocessors=multiprocessors)
    room = workspace(backward, "conv_relu_backward_workspace_bytes", call)
    memory = (call, dy.to(k.dtype), x.to(k.dtype), weight.float(), y.to(k.dtype))
    backward.run("launch_conv_relu_backward", *memory, Output(dx), Output(dweight), Output(dbias), room)
    g = torch.where(y > 0, dy, 0.0)
    dx_exact, dweight_exact = gradients(g, x, weight, s.padding)
    equal(dx, dx_exact, "dx")
    equal(dweight, dweight_exact, "dweight")
    equal(dbias, g.sum((0, 1, 2)), "dbias")


@sizes_and_kinds(SIZES, WGMMA_SIZES, used_backward)
def test_conv_relu_max_pool_backward_whole_numbers(
    backward: cuda_emulator.Kernels, s: Size, kind: str
) -> None:
    k = KINDS[kind]
    x, weight = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3)
    y, argmax = windows(s.P, s.Q, s, k)
    dy = whole(*y.shape)
    dweight, dbias = torch.empty(weight.shape), torch.empty(s.K)
    dx = torch.empty(x.shape, dtype=k.dtype)
    call = conv_call(s, k)
    room = workspace(backward, "conv_relu_backward_workspace_bytes", call)
    memory = (call, dy.to(k.dtype), x.to(k.dtype), weight.float(), y, argmax)
    results = (Output(dx), Output(dweight), Output(dbias))
    backward.run("launch_conv_relu_max_pool_backward", *memory, *results, room)
    g = unpool(torch.where(y > 0, dy, 0.0), argmax, s.P, s.Q)
    dx_exact, dweight_exact = gradients(g, x, weight, s.padding)
    equal(dx, dx_exact, "dx")
    equal(dweight, dweight_exact, "dweight")
    equal(dbias, g.sum((0, 1, 2)), "dbias")


@pytest.mark.parametrize("kind", ["tf32", "bf16"])
@pytest.mark.parametrize("K", [40, 64])
def test_a_filter_is_kept_where_the_multiprocessor_has_room(
    forward: cuda_emulator.Kernels, K: int, kind: str
) -> None:
    """And streamed, in as many stages as there is room for, where it has not: the same sums in the same order."""
    k = KINDS[kind]
    s = Size(1, 18, 30, 64 if kind == "bf16" else 32, K, 1)  # two slabs, three tiles for each of two blocks
    x, weight, bias = (
        torch.randn(s.N, s.H, s.W, s.C).to(k.dtype),
        torch.randn(s.K, s.C, 3, 3),
        torch.randn(s.K),
    )
    found = []
    for shared_bytes in (SMALL, 164 * 1024, AMPLE):
        call = conv_call(s, k, shared_bytes)
        *_, launch = forward.record("launch_conv_relu", call.ctypes.data, *[1 << 20] * 5)
        y = torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype)
        room = workspace(forward, "conv_relu_workspace_bytes", call)
        forward.run("launch_conv_relu", call, x, weight, bias, Output(y), room)
        assert torch.equal(y, found[0][1] if found else y)
        found.append((launch.shared_bytes, y))
    assert [shared for shared, _ in found] == [33_024, 37_120, 98_560]
    exact = F.conv2d(nchw(k.round(x.double())), k.round(weight.double()), bias.double(), padding=s.padding)
    close(found[0][1], nhwc(F.relu(exact)), 9 * s.C, "y")


@sizes_and_kinds([SIZES[3], SIZES[5], SIZES[7]], WGMMA_SIZES[2:3], used)
def test_random_numbers(
    forward: cuda_emulator.Kernels, backward: cuda_emulator.Kernels, s: Size, kind: str
) -> None:
    """What is left besides the operands' rounding is that of float32 sums."""
    k = KINDS[kind]
    x = torch.randn(s.N, s.H, s.W, s.C).to(k.dtype)
    weight, bias = torch.randn(s.K, s.C, 3, 3) / math.sqrt(9 * s.C), torch.randn(s.K)
    y = torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype)
    call = conv_call(s, k)
    room = workspace(forward, "conv_relu_workspace_bytes", call)
    forward.run("launch_conv_relu", call, x, weight, bias, Output(y), room)
    rounded_x, rounded_weight = k.round(x.double()), k.round(weight.double())
    full = F.relu(F.conv2d(nchw(rounded_x), rounded_weight, bias.double(), padding=s.padding))
    close(y, nhwc(full), 9 * s.C, "y")

    dy = torch.randn(y.shape).to(k.dtype)
    dx, dweight, dbias = torch.empty(x.shape, dtype=k.dtype), torch.empty(weight.shape), torch.empty(s.K)
    room = workspace(backward, "conv_relu_backward_workspace_bytes", call)
    memory = (call, dy, x, weight, y)
    backward.run("launch_conv_relu_backward", *memory, Output(dx), Output(dweight), Output(dbias), room)
    g = torch.where(y > 0, dy.double(), 0.0)
    dx_exact, dweight_exact = gradients(k.round(g), rounded_x, rounded_weight, s.padding)
    close(dx, dx_exact, 9 * s.K, "dx")
    close(dweight, dweight_exact, s.N * s.P * s.Q, "dweight")
    close(dbias, g.sum((0, 1, 2)), s.N * s.P * s.Q, "dbias")


@sizes_and_kinds([SIZES[1], *SIZES[3:6], *SIZES[8:], MORE_HALO_TILES], WGMMA_SIZES, used)
def test_conv_bn_relu_train(batch_norm: cuda_emulator.Kernels, s: Size, kind: str) -> None:
    """The mean is large against the deviation; one channel is constant."""
    k, eps = KINDS[kind], 1e-3
    x = (torch.randn(s.N, s.H, s.W, s.C) + 1.0).to(k.dtype)
    weight, bias = torch.randn(s.K, s.C, 3, 3) / math.sqrt(9 * s.C), 10 * torch.randn(s.K)
    weight[0] = 0.0
    gamma, beta = torch.randn(s.K), torch.randn(s.K)
    y = torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype)
    z, mean, var = torch.empty_like(y), torch.empty(s.K), torch.empty(s.K)
    call = conv_call(s, k)
    room = workspace(batch_norm, "conv_bn_relu_train_workspace_bytes", call)
    results = (Output(y), Output(z), Output(mean), Output(var))
    batch_norm.run("launch_conv_bn_relu_train", call, x, weight, bias, gamma, beta, eps, *results, room)
    rounded_x, rounded_weight = k.round(x.double()), k.round(weight.double())
    z_exact = nhwc(F.conv2d(nchw(rounded_x), rounded_weight, bias.double(), padding=s.padding))
    var_exact, mean_exact = torch.var_mean(z_exact, (0, 1, 2), correction=0)
    close(z, z_exact, 9 * s.C, "z")
    largest = float(z_exact.abs().max())
    close(mean, mean_exact, 9 * s.C, "mean")
    # An error e of each z, the same for all at worst, changes a deviation by e and the variance by twice that.
    deviation = float((z_exact - mean_exact).abs().max())
    close(var, var_exact, 9 * s.C, "var", magnitude=deviation * (deviation + largest))
    scale = gamma.double() / (var.double() + eps).sqrt()
    y_exact = F.relu(scale * (z.double() - mean.double()) + beta.double())
    close(y, y_exact, 4, "y")

    dy = torch.randn(y.shape).to(k.dtype)
    dx, dweight = torch.empty(x.shape, dtype=k.dtype), torch.empty(weight.shape)
    dgamma, dbeta = torch.empty(s.K), torch.empty(s.K)
    room = workspace(batch_norm, "conv_bn_relu_train_backward_workspace_bytes", call)
    memory = (call, dy, x, weight, z, gamma, beta, mean, var, eps)
    results = (Output(dx), Output(dweight), Output(dgamma), Output(dbeta))
    batch_norm.run("launch_conv_bn_relu_train_backward", *memory, *results, room)
    pixels = s.N * s.P * s.Q
    inv_std = 1.0 / (var.double() + eps).sqrt()
    zhat = (z.double() - mean.double()) * inv_std
    # The forward pass' own formula in float32 decides where the ReLU cuts.
    centred = (z.float() - mean).double()
    kept = (scale.float().double() * centred + beta.double()).float() > 0
    g = torch.where(kept, dy.double(), 0.0)
    sum_g, sum_g_zhat = g.sum((0, 1, 2)), (g * zhat).sum((0, 1, 2))
    close(dbeta, sum_g, pixels, "dbeta")
    close(dgamma, sum_g_zhat, pixels, "dgamma", magnitude=float((g * zhat).abs().max()))
    dz = scale * (g - sum_g / pixels - zhat * sum_g_zhat / pixels)
    dx_exact, dweight_exact = gradients(dz, rounded_x, rounded_weight, s.padding)
    squares = gradients(dz.square(), rounded_x.square(), rounded_weight.square(), s.padding)
    close_but_for_rounding(dx, dx_exact, squares[0], k, 9 * s.K, "dx")
    close_but_for_rounding(dweight, dweight_exact, squares[1], k, pixels, "dweight")


class Head(NamedTuple):
    """A block's head: the convolution in front of the batch norm, the channels and padding of the one behind it."""

    first: Size
    K: int
    padding: int

    def __str__(self) -> str:
        return f"{self.first}_K{self.K}_p{self.padding}"

    @property
    def second(self) -> Size:
        s = self.first
        return Size(s.N, s.P, s.Q, s.K, self.K, self.padding)


HEADS = [
    Head(Size(2, 15, 17, 3, 32, 0), 32, 0),  # the network's first block
    Head(Size(1, 12, 19, 16, 33, 1), 40, 1),  # tails, a border of zeros behind the batch norm
    Head(Size(1, 9, 10, 5, 40, 0), 66, 1),  # a wide tile
    Head(Size(2, 5, 4, 8, 7, 1), 5, 0),
    Head(MORE_HALO_TILES, 5, 1),
]
WGMMA_HEADS = [
    Head(Size(1, 9, 10, 5, 40, 0), 130, 1),  # wide tiles; backward a filter of 180 KB
    Head(Size(1, 10, 12, 5, 66, 1), 34, 0),  # of 108 KB; backward a wide tile
]
HEADS_AND_KINDS = [(head, kind) for head in HEADS for kind in PLAIN_KINDS]
HEADS_AND_KINDS += [
    (head, name)
    for head in (*HEADS, *WGMMA_HEADS)
    for name, kind in KINDS.items()
    if kind.wgmma and (used(head.first, kind) or used(head.second, kind))
]


def second_of_head(
    forward: cuda_emulator.Kernels, call: np.ndarray, y1: Tensor, weight: Tensor, bias: Tensor, y: Tensor
) -> Tensor | None:
    """Of the second convolution by itself: y, and argmax where it is pooled."""
    room = workspace(forward, "conv_relu_workspace_bytes", call)
    if y.shape[1:3] == (call["P"][0], call["Q"][0]):
        forward.run("launch_conv_relu", call, y1, weight, bias, Output(y), room)
        return None
    argmax = torch.empty(y.shape, dtype=torch.uint8)
    forward.run("launch_conv_relu_max_pool", call, y1, weight, bias, Output(y), Output(argmax), room)
    return argmax


@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
@pytest.mark.parametrize(
    ("head", "kind"), HEADS_AND_KINDS, ids=[f"{head}-{kind}" for head, kind in HEADS_AND_KINDS]
)
def test_conv_bn_relu_conv_relu(
    forward: cuda_emulator.Kernels,
    backward: cuda_emulator.Kernels,
    batch_norm: cuda_emulator.Kernels,
    fused: cuda_emulator.Kernels,
    head: Head,
    pool: bool,
    kind: str,
) -> None:
    """Forward, and the second filter's gradient: the bits of the operators that it replaces. The other gradients,
    whose batch norm's sums are those of the second convolution's tiles, against float64."""
    k, s, t, eps = KINDS[kind], head.first, head.second, 1e-3
    x = torch.randn(s.N, s.H, s.W, s.C).to(k.dtype)
    weight1, bias1 = torch.randn(s.K, s.C, 3, 3) / math.sqrt(9 * s.C), torch.randn(s.K)
    gamma, beta = torch.randn(s.K), torch.randn(s.K)
    weight2, bias2 = torch.randn(t.K, t.C, 3, 3) / math.sqrt(9 * t.C), torch.randn(t.K)
    first, second = conv_call(s, k), conv_call(t, k)
    sizes = (t.K, t.padding)

    y1_apart = torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype)
    apart = [torch.empty_like(y1_apart), torch.empty(s.K), torch.empty(s.K)]
    y_apart = torch.empty(t.N, t.P // (1 + pool), t.Q // (1 + pool), t.K, dtype=k.dtype)
    room = workspace(batch_norm, "conv_bn_relu_train_workspace_bytes", first)
    outputs = (Output(y1_apart), *map(Output, apart))
    batch_norm.run("launch_conv_bn_relu_train", first, x, weight1, bias1, gamma, beta, eps, *outputs, room)
    argmax_apart = second_of_head(forward, second, y1_apart, weight2, bias2, y_apart)

    y, argmax = torch.empty_like(y_apart), torch.empty(y_apart.shape, dtype=torch.uint8)
    z, mean, var = (torch.empty_like(tensor) for tensor in apart)
    room = workspace(fused, "conv_bn_relu_conv_relu_workspace_bytes", first, *sizes)
    results = (Output(y), Output(argmax) if pool else None, Output(z), Output(mean), Output(var))
    parameters = (weight1, bias1, gamma, beta, weight2, bias2)
    fused.run("launch_conv_bn_relu_conv_relu", first, *sizes, x, *parameters, eps, *results, room)
    for ours, theirs in zip((y, z, mean, var), (y_apart, *apart), strict=True):
        assert torch.equal(ours, theirs)
    assert argmax_apart is None or torch.equal(argmax, argmax_apart)

    dy = torch.randn(y.shape).to(k.dtype)
    dweight2_apart, dbias2_apart = torch.empty(weight2.shape), torch.empty(t.K)
    room = workspace(backward, "conv_relu_backward_workspace_bytes", second)
    memory = (second, dy, y1_apart, weight2, y, *([argmax] if pool else []))
    outputs = (Output(torch.empty_like(y1_apart)), Output(dweight2_apart), Output(dbias2_apart))
    backward.run(f"launch_conv_relu{'_max_pool' * pool}_backward", *memory, *outputs, room)

    dx, dweight1, dweight2 = (
        torch.empty(x.shape, dtype=k.dtype),
        torch.empty(weight1.shape),
        torch.empty(weight2.shape),
    )
    dgamma, dbeta, dbias2 = torch.empty(s.K), torch.empty(s.K), torch.empty(t.K)
    room = workspace(fused, "conv_bn_relu_conv_relu_backward_workspace_bytes", first, *sizes)
    memory = (
        first,
        *sizes,
        dy,
        x,
        weight1,
        gamma,
        beta,
        weight2,
        y,
        argmax if pool else None,
        z,
        mean,
        var,
        eps,
    )
    results = tuple(map(Output, (dx, dweight1, dgamma, dbeta, dweight2, dbias2)))
    fused.run("launch_conv_bn_relu_conv_relu_backward", *memory, *results, room)
    assert torch.equal(dweight2, dweight2_apart)
    assert torch.equal(dbias2, dbias2_apart)

    g2 = torch.where(y > 0, dy.double(), 0.0)
    if pool:
        g2 = unpool(g2, argmax, t.P, t.Q)
    dy1, _ = gradients(k.round(g2), k.round(y1_apart.double()), k.round(weight2.double()), t.padding)
    g = torch.where(y1_apart > 0, dy1, 0.0)
    pixels = s.N * s.P * s.Q
    scale = gamma.double() / (var.double() + eps).sqrt()
    zhat = (z.double() - mean.double()) / (var.double() + eps).sqrt()
    sum_g, sum_g_zhat = g.sum((0, 1, 2)), (g * zhat).sum((0, 1, 2))
    # Each g is a float32 sum of 9 K numbers itself.
    of_g = math.sqrt(9 * t.K)
    close(dbeta, sum_g, pixels, "dbeta", magnitude=of_g * float(g.abs().max()))
    close(dgamma, sum_g_zhat, pixels, "dgamma", magnitude=of_g * float((g * zhat).abs().max()))
    dz = scale * (g.to(k.dtype).double() - sum_g / pixels - zhat * sum_g_zhat / pixels)
    rounded_x, rounded_weight = k.round(x.double()), k.round(weight1.double())
    dx_exact, dweight_exact = gradients(dz, rounded_x, rounded_weight, s.padding)
    squares = gradients(dz.square(), rounded_x.square(), rounded_weight.square(), s.padding)
    # Of terms that are themselves float32 sums of 9 K; in bfloat16 g was rounded as well as dz.
    roundings = 2 if k.dtype == torch.bfloat16 else 1
    close_but_for_rounding(dx, dx_exact, squares[0], k, 9 * s.K * 9 * t.K, "dx", roundings)
    close_but_for_rounding(dweight1, dweight_exact, squares[1], k, pixels * 9 * t.K, "dweight1", roundings)


@pytest.mark.parametrize("order", cuda_emulator.ORDERS)
@sizes_and_kinds([Size(2, 12, 21, 33, 34, 1), Size(2, 17, 21, 3, 34, 1)], [Size(1, 9, 13, 40, 66, 1)], used)
def test_same_bits_in_any_order(
    backward: cuda_emulator.Kernels,
    batch_norm: cuda_emulator.Kernels,
    s: Size,
    kind: str,
    order: cuda_emulator.Order,
) -> None:
    """Threads and blocks run in another order: nothing that they share is unprotected, every sum is the same."""
    k = KINDS[kind]
    x, weight = torch.randn(s.N, s.H, s.W, s.C).to(k.dtype), torch.randn(s.K, s.C, 3, 3)
    dy, y = torch.randn(2, s.N, s.P, s.Q, s.K).to(k.dtype)
    call = conv_call(s, k)
    room = workspace(backward, "conv_relu_backward_workspace_bytes", call)
    found = []
    for used in ("forward", order):
        dx, dweight, dbias = torch.empty(x.shape, dtype=k.dtype), torch.empty(weight.shape), torch.empty(s.K)
        results = (Output(dx), Output(dweight), Output(dbias))
        backward.run("launch_conv_relu_backward", call, dy, x, weight, y, *results, room, order=used, seed=3)
        z, mean, var = torch.empty_like(y), torch.empty(s.K), torch.empty(s.K)
        results = (Output(torch.empty_like(y)), Output(z), Output(mean), Output(var))
        vectors = (torch.zeros(s.K), torch.ones(s.K), torch.zeros(s.K), 1e-3)
        space = workspace(batch_norm, "conv_bn_relu_train_workspace_bytes", call)
        batch_norm.run(
            "launch_conv_bn_relu_train", call, x, weight, *vectors, *results, space, order=used, seed=3
        )
        found.append((dx, dweight, dbias, z, mean, var))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("order", cuda_emulator.ORDERS[1:])
@pytest.mark.parametrize("kind", ["tf32", "bf16", "tf32-wgmma", "bf16-wgmma"])
def test_a_head_gives_the_same_bits_in_any_order(
    fused: cuda_emulator.Kernels, kind: str, order: cuda_emulator.Order
) -> None:
    k, head = KINDS[kind], HEADS[1]
    s, t = head.first, head.second
    call, sizes = conv_call(s, k), (t.K, t.padding)
    x, z = torch.randn(s.N, s.H, s.W, s.C).to(k.dtype), torch.randn(s.N, s.P, s.Q, s.K).to(k.dtype)
    dy, y = torch.randn(2, t.N, t.P, t.Q, t.K).to(k.dtype)
    weight1, weight2 = torch.randn(s.K, s.C, 3, 3), torch.randn(t.K, t.C, 3, 3)
    gamma, beta, mean, var = torch.rand(4, s.K).unbind()
    room = workspace(fused, "conv_bn_relu_conv_relu_backward_workspace_bytes", call, *sizes)
    found = []
    for used in ("forward", order):
        gradients_of_parameters = (weight1, gamma, beta, weight2, torch.empty(t.K))
        results = [torch.empty_like(like) for like in (x, *gradients_of_parameters)]
        inputs = (
            dy,
            x,
            weight1,
            gamma.clone(),
            beta.clone(),
            weight2,
            y,
            None,
            z,
            mean.clone(),
            var.clone(),
            1e-3,
        )
        memory = (call, *sizes, *inputs, *map(Output, results), room)
        fused.run("launch_conv_bn_relu_conv_relu_backward", *memory, order=used, seed=3)
        found.append(results)
    assert all(map(torch.equal, *found))
