"""The CUDA kernels beside the convolutions, executed on the emulator with all of its detectors: max_pool, Adam,
softmax_cross_entropy, dropout and warp. References and tolerances are those of the CPU's operators.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import cuda_emulator
import numpy as np
import pytest
import torch
from cuda_emulator import ORDERS, Fault, Input, Kernels, LaunchError, Order, Output, Replacement, Workspace
from torch import Tensor

from maskcore import _native, ops

pytestmark = pytest.mark.skipif(
    not cuda_emulator.has_compiler(), reason="the emulator needs g++, addr2line and nm"
)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # DataType of csrc/conv_size.h
Check = Callable[..., None]


@functools.cache
def kernels(op: str) -> Kernels:
    return cuda_emulator.build(f"{op}_cuda.cu")


@functools.cache
def with_fault(op: str, old: str, new: str) -> Kernels:
    file = f"{op}_cuda.cu"
    return cuda_emulator.build(file, replacements=[Replacement(file, old, new)])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, or both NaN."""
    return a.dtype == b.dtype and bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def askew(x: Tensor) -> Tensor:
    """The same values at an address that is a multiple of nothing but the element's size."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


# ---- max_pool ------------------------------------------------------------------------------------

# N, H, W, C: whole vectors and their tails, odd sizes, one window, more windows in a row than threads.
POOLS = [(2, 6, 4, 8), (1, 2, 2, 1), (2, 5, 7, 16), (1, 3, 2, 6), (1, 2, 5, 13), (1, 4, 70, 64), (1, 1, 3, 8)]


def pooled(x: Tensor, order: Order = "forward") -> tuple[Tensor, Tensor]:
    N, H, W, C = x.shape
    y = torch.empty(N, H // 2, W // 2, C, dtype=x.dtype)
    argmax = torch.empty(y.shape, dtype=torch.uint8)
    kernels("max_pool").run(
        "launch_max_pool", x, DTYPES[x.dtype], N, H, W, C, Output(y), Output(argmax), order=order, seed=1
    )
    return y, argmax


def unpooled(dy: Tensor, argmax: Tensor, H: int, W: int, order: Order = "forward") -> Tensor:
    N, _, _, C = dy.shape
    dx = torch.empty(N, H, W, C, dtype=dy.dtype)
    kernels("max_pool").run(
        "launch_max_pool_backward", dy, argmax, DTYPES[dy.dtype], N, H, W, C, Output(dx), order=order, seed=1
    )
    return dx


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", POOLS, ids=str)
def test_max_pool(shape: tuple[int, ...], dtype: torch.dtype, order: Order) -> None:
    H, W = shape[1:3]
    x = torch.randint(-2, 3, shape).to(dtype)  # with ties
    x[torch.rand(shape) < 0.05] = math.nan
    x[torch.rand(shape) < 0.05] = -math.inf
    y, argmax = pooled(x, order)
    dy = torch.randn(y.shape).to(dtype)
    dx = unpooled(dy, argmax, H, W, order)
    if H < 2:
        assert y.numel() == 0
        assert not dx.any()
        return
    image = x.permute(0, 3, 1, 2).float()
    assert same(y, nhwc(ops.max_pool_reference(image)).to(dtype))
    # The CPU's kernel has the same rule for several NaN in a window, which torch has not.
    assert torch.equal(argmax, torch.ops.maskcore.max_pool(x.float())[1])
    expected = torch.ops.maskcore._max_pool_backward(dy.float(), argmax, H, W)
    assert torch.equal(dx, expected.to(dtype))


def test_max_pool_takes_any_address() -> None:
    x = torch.randn(1, 4, 4, 8)
    y, argmax = pooled(x)
    assert all(map(torch.equal, pooled(askew(x)), (y, argmax)))
    dy = torch.randn(y.shape)
    assert torch.equal(unpooled(askew(dy), argmax, 4, 4), unpooled(dy, argmax, 4, 4))
    assert torch.equal(unpooled(dy, askew(argmax), 4, 4), unpooled(dy, argmax, 4, 4))


def test_max_pool_counts_in_64_bits() -> None:
    N, H, W, C = 1 + 2**31 // (4 * 64 * 128), 4, 64, 128
    x = cuda_emulator.sparse((N, H, W, C), "float32")
    y = cuda_emulator.sparse((N, H // 2, W // 2, C), "float32")
    argmax = cuda_emulator.sparse((N, H // 2, W // 2, C), "uint8")
    assert x.size > 2**31
    x[-1, 3] = 7.0
    last = N * (H // 2) - 1
    kernels("max_pool").run(
        "launch_max_pool", x, 0, N, H, W, C, Output(y), Output(argmax), only_blocks=[0, last]
    )
    assert (y[-1, 1] == 7.0).all()
    assert (argmax[-1, 1] == 2).all()
    dx = cuda_emulator.sparse((N, H, W, C), "float32")
    kernels("max_pool").run(
        "launch_max_pool_backward", y, argmax, 0, N, H, W, C, Output(dx), only_blocks=[0, last]
    )
    assert (dx[-1, 3, ::2] == 7.0).all()
    assert not dx[-1, 2].any()
    assert not dx[-1, 3, 1::2].any()


def test_max_pool_refuses_rows_it_cannot_count() -> None:
    x, y, argmax = torch.empty(1), torch.empty(1), torch.empty(1, dtype=torch.uint8)
    with pytest.raises(LaunchError):
        kernels("max_pool").run("launch_max_pool", x, 0, 1, 2, 2**24, 128, y, argmax)


# ---- softmax_cross_entropy -----------------------------------------------------------------------


def cross_entropy(logits: Tensor, target: Tensor, order: Order = "forward") -> tuple[Tensor, Tensor]:
    N, K = logits.shape
    loss, probabilities = torch.empty(()), torch.empty(N, K)
    kernels("softmax_cross_entropy").run(
        "launch_softmax_cross_entropy",
        *(logits, target, N, K, Output(loss), Output(probabilities)),
        order=order,
        seed=1,
    )
    return loss, probabilities


def cross_entropy_backward(
    dloss: Tensor, probabilities: Tensor, target: Tensor, order: Order = "forward"
) -> Tensor:
    N, K = probabilities.shape
    dlogits = torch.empty(N, K)
    kernels("softmax_cross_entropy").run(
        "launch_softmax_cross_entropy_backward",
        *(dloss, probabilities, target, N, K, Output(dlogits)),
        order=order,
        seed=1,
    )
    return dlogits


@pytest.mark.parametrize("N", [1, 2, 8, 9, 32, 257])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 32, 33, 100])
def test_softmax_cross_entropy(N: int, K: int, as_exact_as_torch: Check) -> None:
    logits, target, dloss = 5 * torch.randn(N, K), torch.randint(0, K, (N,)), torch.randn(())
    results = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype, copy=True).requires_grad_()
        loss = ops.softmax_cross_entropy_reference(x, target)
        loss.backward(dloss.to(dtype))
        assert x.grad is not None
        results.append((loss.detach(), x.grad))
    loss, probabilities = cross_entropy(logits, target)
    dlogits = cross_entropy_backward(dloss, probabilities, target)
    for name, ours, torch32, exact in zip(("loss", "dlogits"), (loss, dlogits), *results, strict=True):
        as_exact_as_torch(ours, torch32, exact, terms=K, name=name, magnitude=float(logits.abs().max()))
    for order in ORDERS:
        again = cross_entropy(logits, target, order)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], probabilities)
        assert torch.equal(cross_entropy_backward(dloss, probabilities, target, order), dlogits)


def test_softmax_cross_entropy_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [-3e38, 3e38, 0.0]])
    loss, probabilities = cross_entropy(logits, torch.tensor([0, 1]))
    assert float(loss) == 0.0
    assert torch.equal(probabilities, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_target_that_is_no_class_gives_nan(wrong: int) -> None:
    target = torch.tensor([0, wrong])
    loss, probabilities = cross_entropy(torch.randn(2, 3), target)
    assert math.isnan(float(loss))
    dlogits = cross_entropy_backward(torch.ones(()), probabilities, target)
    assert dlogits.isnan().any(dim=1).tolist() == [False, True]


def test_nan_and_infinity_in_logits_give_nan() -> None:
    for value in (math.nan, math.inf):
        loss, _ = cross_entropy(torch.tensor([[0.0, value]]), torch.tensor([0]))
        assert math.isnan(float(loss))


# ---- adam_ ---------------------------------------------------------------------------------------


class AdamTensor(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in "pgmv"), ("size", ctypes.c_int64)]


class AdamSettings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "l2")),
        ("keras_epsilon", ctypes.c_bool),
    ]


Four = tuple[Tensor, Tensor, Tensor, Tensor]  # parameter, gradient, moments
SETTINGS: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7, "l2": 1e-3}
# A chunk's size, one less and one more, several chunks, less than a vector, nothing.
SIZES = [4096, 4095, 1, 4097, 10_000, 3, 0, 64]


def adam_state(sizes: list[int], place: Callable[[Tensor], Tensor] = lambda x: x) -> list[Four]:
    return [
        tuple(place(x) for x in (torch.randn(n), torch.randn(n), 0.1 * torch.randn(n), torch.rand(n)))  # type: ignore[misc]
        for n in sizes
    ]


def as_dtype(state: list[Four], dtype: torch.dtype) -> list[Four]:
    return [tuple(x.to(dtype, copy=True) for x in four) for four in state]  # type: ignore[misc]


def adam(
    state: list[Four],
    step: int | Tensor,
    keras_epsilon: bool = True,
    order: Order = "forward",
    library: Kernels | None = None,
) -> None:
    table = (AdamTensor * len(state))(
        *(AdamTensor(*map(cuda_emulator.address_of, four), four[0].numel()) for four in state)
    )
    beside: dict[str, Any] = {}
    for i, (p, g, m, v) in enumerate(state):
        beside |= {f"p[{i}]": p, f"g[{i}]": Input(g), f"m[{i}]": m, f"v[{i}]": v}
    settings = AdamSettings(**SETTINGS, keras_epsilon=keras_epsilon)
    run = (library or kernels("adam")).run
    if isinstance(step, int):
        run("launch_adam", table, len(state), settings, step, beside=beside, order=order, seed=1)
    else:
        room = Workspace(torch.empty(2))
        run(
            "launch_adam_counted", table, len(state), settings, step, room, beside=beside, order=order, seed=1
        )


@pytest.mark.parametrize("keras_epsilon", [True, False])
@pytest.mark.parametrize("place", [lambda x: x, askew], ids=["aligned", "askew"])
def test_adam(place: Callable[[Tensor], Tensor], keras_epsilon: bool, as_exact_as_torch: Check) -> None:
    state = adam_state(SIZES, place)
    references = {dtype: as_dtype(state, dtype) for dtype in (torch.float32, torch.float64)}
    for step in (1, 2, 1000):
        adam(state, step, keras_epsilon)
        for reference in references.values():
            ops.adam_reference(
                *zip(*reference, strict=True), **SETTINGS, step=step, keras_epsilon=keras_epsilon
            )
    for ours, torch32, exact in zip(state, *references.values(), strict=True):
        for i, name in ((0, "p"), (2, "m"), (3, "v")):
            as_exact_as_torch(ours[i], torch32[i], exact[i], terms=12, name=name)


def test_adam_is_the_cpu_kernel_but_for_the_last_bits() -> None:
    state = adam_state(SIZES)
    cpu = as_dtype(state, torch.float32)
    adam(state, 3)
    ops.adam_(*zip(*cpu, strict=True), **SETTINGS, step=3, keras_epsilon=True)
    for ours, theirs in zip(state, cpu, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=4e-7, atol=1e-8)


@pytest.mark.parametrize("order", ORDERS)
def test_adam_that_counts_takes_the_same_steps(order: Order) -> None:
    state = adam_state([100, 5])
    counted, step = copy.deepcopy(state), torch.tensor(6)
    for number in (7, 8):
        adam(state, number, order=order)
        adam(counted, step, order=order)
        assert int(step) == number
    for ours, theirs in zip(state, counted, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("counted", [False, True])
def test_adam_takes_more_tensors_than_a_launch(counted: bool) -> None:
    state = adam_state([3] * 84 + [0] * 3 + [4] * 85)
    expected = as_dtype(state, torch.float32)
    step = torch.tensor(4)
    adam(state, step if counted else 5)
    assert int(step) == 4 + counted
    ops.adam_(*zip(*expected, strict=True), **SETTINGS, step=5, keras_epsilon=True)
    for ours, theirs in zip(state, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=4e-7, atol=1e-8)


def test_adam_counts_elements_in_64_bits() -> None:
    size = 2**31 + 4096 + 5
    arrays = [cuda_emulator.sparse((size,), "float32") for _ in range(4)]
    arrays[1][-5:] = 1.0
    table = (AdamTensor * 1)(AdamTensor(*map(cuda_emulator.address_of, arrays), size))
    beside: dict[str, Any] = dict(zip("pgmv", arrays, strict=True))
    beside["g"] = Input(arrays[1])
    settings = AdamSettings(**SETTINGS, keras_epsilon=True)
    blocks = -(-size // 4096)
    kernels("adam").run("launch_adam", table, 1, settings, 1, beside=beside, only_blocks=[blocks - 1])
    assert (arrays[2][-5:] > 0.09).all()
    assert not arrays[2][:4096].any()


# ---- dropout -------------------------------------------------------------------------------------


def dropped(x: Tensor, seed: int, p: float, order: Order = "forward") -> Tensor:
    y = torch.empty_like(x)
    kernels("dropout").run(
        "launch_dropout",
        x,
        torch.tensor([seed]),
        DTYPES[x.dtype],
        x.numel(),
        p,
        Output(y),
        order=order,
        seed=1,
    )
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 2048, 2049, 5000])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_dropout_drops_what_the_cpu_drops(size: int, p: float, dtype: torch.dtype, order: Order) -> None:
    x = (torch.rand(size) + 0.5).to(dtype)
    for seed in (0, -(2**63), 2**63 - 1):
        y = dropped(x, seed, p, order)
        expected = ops.dropout(x.float(), torch.tensor([seed]), p)
        assert torch.equal(y, expected.to(dtype))
        torch.testing.assert_close(expected, ops.dropout_reference(x.float(), torch.tensor([seed]), p))


def test_dropout_takes_any_address() -> None:
    x = torch.rand(100)
    assert torch.equal(dropped(askew(x), 5, 0.5), dropped(x, 5, 0.5))


def test_dropout_counts_in_64_bits() -> None:
    size = 2**31 + 2048
    x, y = (cuda_emulator.sparse((size,), "float32") for _ in range(2))
    x[-2048:] = 1.0
    blocks = size // 2048
    kernels("dropout").run(
        "launch_dropout", x, torch.tensor([3]), 0, size, 0.5, Output(y), only_blocks=[blocks - 1]
    )
    words = np.random.Philox(key=[3, 4], counter=[2**31 // 8, 0, 0, 0]).random_raw(1024)
    assert np.array_equal(y[-2048:] != 0, words.view("<u4") >= 2**31)


# ---- warp ----------------------------------------------------------------------------------------

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def warped(
    pictures: Tensor, matrices: Tensor, fill: float, dtype: torch.dtype, order: Order = "forward"
) -> Tensor:
    N, H, W, _ = pictures.shape
    out = torch.empty(N, H, W, 3, dtype=dtype)
    kernels("warp").run(
        "launch_warp",
        *(pictures, matrices, N, H, W, fill, 1 / 255, DTYPES[dtype], Output(out)),
        order=order,
        seed=1,
    )
    return out


def matrices_for(N: int, H: int, W: int) -> Tensor:
    """The identity, whole shifts that end at the border exactly, and anything."""
    chosen = [IDENTITY, (1.0, 0.0, -2.0, 0.0, 1.0, 1.0), (-1.0, 0.0, W - 1.0, 0.0, -1.0, H - 1.0)]
    random = torch.tensor(IDENTITY) + 0.3 * torch.randn(N, 6)
    return torch.cat([torch.tensor(chosen), random]).double()[torch.arange(N) % (3 + N)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 3), (8, 8), (7, 9), (16, 12)], ids=str)
def test_warp_is_the_cpu_to_the_bit(size: tuple[int, int], order: Order) -> None:
    N, fill = 6, 7.0
    pictures = torch.randint(0, 256, (N, *size, 3), dtype=torch.uint8)
    matrices = matrices_for(N, *size)
    expected = torch.empty(pictures.shape)
    for picture, matrix, row in zip(pictures.numpy(), matrices.tolist(), expected.numpy(), strict=True):
        _native.warp(picture, matrix, fill, row, 1 / 255)
    assert torch.equal(warped(pictures, matrices, fill, torch.float32, order), expected)
    assert torch.equal(warped(pictures, matrices, fill, torch.bfloat16, order), expected.bfloat16())


def test_the_identity_gives_the_pictures() -> None:
    pictures = torch.randint(0, 256, (2, 9, 8, 3), dtype=torch.uint8)
    matrices = torch.tensor([IDENTITY, IDENTITY], dtype=torch.float64)
    expected = pictures.float() * torch.tensor(1 / 255)
    assert torch.equal(warped(pictures, matrices, 0.0, torch.float32), expected)
    assert torch.equal(nhwc(ops.warp(pictures, matrices)), expected)


# ---- the detectors see into these kernels --------------------------------------------------------


def test_a_missing_barrier_is_found() -> None:
    faulty = with_fault("softmax_cross_entropy", "  __syncthreads();\n", "")
    loss, probabilities = Output(torch.empty(())), Output(torch.empty(64, 3))
    target = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(Fault, match="softmax_cross_entropy_kernel"):
        faulty.run("launch_softmax_cross_entropy", torch.randn(64, 3), target, 64, 3, loss, probabilities)


def test_a_border_that_is_off_by_one_is_found() -> None:
    faulty = with_fault("max_pool", "2 * q + place % 2 < s.W", "2 * q + place % 2 <= s.W")
    dy, argmax = torch.randn(1, 2, 2, 4), torch.zeros(1, 2, 2, 4, dtype=torch.uint8)
    dx = Output(torch.empty(1, 5, 5, 4))
    with pytest.raises(Fault, match="max_pool_backward_kernel"):
        faulty.run("launch_max_pool_backward", dy, argmax, 0, 1, 5, 5, 4, dx)


def test_a_tail_that_is_too_long_is_found() -> None:
    faulty = with_fault("adam", "threadIdx.x); i < size;", "threadIdx.x); i <= size;")
    with pytest.raises(Fault, match="adam_kernel"):
        adam(adam_state([6]), 1, library=faulty)


# ---- memory traffic ------------------------------------------------------------------------------


def test_every_access_moves_whole_sectors() -> None:
    """Where rows are whole vectors, no 32-byte sector of global memory is moved for less than 32 bytes.

    But the bytes of argmax (4 a thread of float32) and warp's gathers, which caches serve.
    """
    x = torch.randn(1, 4, 64, 32)
    y, argmax = torch.empty(1, 2, 32, 32), torch.empty(1, 2, 32, 32, dtype=torch.uint8)
    traffic = kernels("max_pool").run(
        "launch_max_pool", x, 0, *x.shape, Output(y), Output(argmax), count_traffic=True
    )
    traffic += kernels("max_pool").run(
        "launch_max_pool_backward", y, argmax, 0, *x.shape, Output(torch.empty_like(x)), count_traffic=True
    )
    traffic += kernels("dropout").run(
        "launch_dropout",
        x,
        torch.tensor([1]),
        0,
        x.numel(),
        0.5,
        Output(torch.empty_like(x)),
        count_traffic=True,
    )
    moved = [t for t in traffic if t.space == "global" and t.requests > 1]
    assert moved
    for cost in moved:
        assert cost.units <= 2 * cost.least, cost
