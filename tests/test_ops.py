"""Every operator, forward and backward, on every device, against its reference in float64 on the CPU.

Upstream gradients are random. Where a ReLU's sign or a pool's maximum hangs on the last bit, float32 may
decide otherwise than float64 and both are right: there alone the upstream gradient is zero (``decided``).
Sums of small whole numbers are exact in float32, so on those every decision and every bit must agree.
Tests without a device are of what only the CPU's kernels have: instruction sets, algorithms, caches.
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

import maskcore
from maskcore import models, nn, ops

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work: threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)


class Case(NamedTuple):
    """A convolution: images [N, C, H, W], filters [K, C, 3, 3]."""

    N: int
    C: int
    K: int
    H: int
    W: int
    padding: int

    def __str__(self) -> str:
        return f"N{self.N}_C{self.C}_K{self.K}_{self.H}x{self.W}_p{self.padding}"

    @property
    def output(self) -> tuple[int, int, int, int]:
        return self.N, self.K, self.H + 2 * self.padding - 2, self.W + 2 * self.padding - 2


def case_of(placed: models.Placed, N: int) -> Case:
    (H, W, C), layer = placed.input_shape, placed.layer
    return Case(N, C, layer.channels, H, W, layer.padding)


def op_of(placed: models.Placed) -> str:
    layer = placed.layer
    return "conv_bn_relu_train" if layer.bn else "conv_relu_max_pool" if layer.pool else "conv_relu"


def convolutions(name: str, image_size: int) -> list[models.Placed]:
    placed = models.place(name, image_size=image_size)
    return [at for at in placed if isinstance(at.layer, models.Conv)]


# One below, at and one above each size that the kernels block by (csrc/vector.h, csrc/conv_direct.h):
# 6 or 12 pixels and 8, 16 or 32 channels a tile, 2..16 rows a block, 256 pixels and 32 pieces of the weight
# gradient, 64 channels a piece.
SMALL = [Case(1, C, K, 3, 3, 0) for C, K in ((1, 1), (3, 5), (17, 16), (5, 33), (16, 17))]
SMALL += [Case(2, C, K, 3, 4, 1) for C, K in ((1, 16), (3, 17), (17, 1), (5, 5))]
SMALL += [Case(1, 3, 5, 1, 1, 1), Case(1, 3, 5, 2, 1, 1), Case(2, 4, 3, 1, 7, 1)]
COLUMNS = [Case(1, 3, 4, 4, Q + 2, 0) for Q in (4, 5, 6, 7, 11, 12, 13, 18, 19, 25)]
CHANNELS = [Case(1, 3, K, 5, 6, 1) for K in (7, 8, 9, 15, 16, 17, 31, 32, 33, 48)]
CHANNELS += [Case(1, C, 4, 6, 5, 0) for C in (6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 31, 32, 33)]
ROWS = [Case(1, 2, 3, P, 5, 1) for P in (15, 16, 17, 18, 33)]
ROWS += [Case(1, 160, 144, P + 2, 40, 0) for P in (3, 4, 5, 8, 9)]
PIECES = [Case(1, 2, K, 7, 9, 1) for K in (63, 64, 65, 129)]
PIECES += [Case(N, 2, 3, P, 4, 1) for N, P in ((1, 31), (1, 32), (1, 33), (3, 11), (5, 13))]
PIECES += [Case(1, 1, 2049, 4, 4, 0)]
PIXELS = [Case(1, 2, 3, 3 + 2, Q + 2, 0) for Q in (63, 64, 65, 85, 86, 127, 128, 129, 255, 256, 257)]
# Winograd (csrc/conv_winograd.h): tiles of 4x4 or 6x6 outputs, whole and cut; 16 pieces of tile rows, with one image
# and with pieces that start within one; the shared weight gradient (36 C K floats above 1 MiB), in one batch and
# several.
TILES = [Case(1, 3, 5, P + 2, Q + 2, 0) for P, Q in ((4, 4), (5, 8), (8, 7), (6, 3), (12, 13))]
TILES += [Case(1, 9, 8, 70, 5, 0), Case(3, 5, 9, 30, 11, 1), Case(5, 2, 3, 31, 9, 0)]
TILES += [Case(2, 96, 80, 12, 14, 1), Case(1, 70, 130, 9, 7, 0), Case(4, 97, 83, 40, 42, 0)]
#: Of a first layer: Winograd's tiles of 4 outputs along a row, four at once.
ROW_TILES = [
    Case(2, C, 37, 3, Q + 2 * (1 - padding), padding)
    for C, padding in ((1, 1), (2, 0), (3, 1), (3, 0))
    for Q in (1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 18, 31, 33)
]
EMPTY = [Case(0, 3, 4, 6, 7, padding) for padding in (0, 1)]
CASES = [*SMALL, *COLUMNS, *CHANNELS, *ROWS, *PIECES, *PIXELS, *TILES]
NETWORKS = {("final", 128): 1, ("baseline", 64): 2}
LAYERS = {
    f"{name}-{at.name}": (op_of(at), case_of(at, N))
    for (name, size), N in NETWORKS.items()
    for at in convolutions(name, size)
}
FULL_SIZE = {
    f"{name}-{at.name}": (op_of(at), case_of(at, 1))
    for name, places in (("final", (0, 1, 3)), ("baseline", (0, 1)))
    for at in (convolutions(name, 256)[i] for i in places)
}
#: A few of all kinds, for what does not depend on every size.
FEW = [SMALL[6], COLUMNS[4], CHANNELS[5], ROWS[2], ROWS[6], PIECES[2], PIXELS[4], TILES[6], TILES[8]]


# ---- the convolutions as cases -------------------------------------------------------------------


def conv_inputs(case: Case) -> dict[str, Tensor]:
    x = torch.randn(case.N, case.C, case.H, case.W).contiguous(memory_format=torch.channels_last)
    # Outputs of order one, whatever C is.
    weight = torch.randn(case.K, case.C, 3, 3) / (9 * case.C) ** 0.5
    return {"x": x, "weight": weight, "bias": torch.randn(case.K) / 2}


def bn_inputs(case: Case) -> dict[str, Tensor]:
    gamma, beta = torch.rand(case.K) + 0.5, torch.randn(case.K) / 2
    return {**conv_inputs(case), "gamma": gamma, "beta": beta}


def inference_inputs(case: Case) -> dict[str, Tensor]:
    return {**bn_inputs(case), "mean": torch.randn(case.K) / 2, "var": torch.rand(case.K) + 0.5}


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in inputs.items()}


def pooled(case: Case) -> bool:
    return min(case.output[2:]) >= 2


def pre_relu(name: str, inputs: dict[str, Tensor], padding: int) -> Tensor:
    """What the ReLU of an op gets."""
    z = F.conv2d(inputs["x"], inputs["weight"], inputs["bias"], padding=padding)
    if name == "conv_bn_relu_train":
        return F.batch_norm(z, None, None, inputs["gamma"], inputs["beta"], training=True, eps=1e-3)
    if name == "conv_bn_relu":
        statistics = inputs["mean"], inputs["var"], inputs["gamma"], inputs["beta"]
        return F.batch_norm(z, *statistics, training=False, eps=1e-3)
    return z


def decided(name: str, inputs: dict[str, Tensor], padding: int) -> Tensor:
    """1 where the decisions behind an output are the same for any rounding, else 0."""
    z = pre_relu(name, {key: value.double() for key, value in inputs.items()}, padding)
    margin = 1e-4 * z.abs().max() if z.numel() else z.sum()  # float32's error here is 100 times smaller
    if name != "conv_relu_max_pool":
        return (z.abs() > margin).float()
    P, Q = z.shape[2] // 2 * 2, z.shape[3] // 2 * 2
    windows = z[:, :, :P, :Q].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
    first, second = windows.topk(2, dim=4).values.unbind(4)
    return ((first < -margin) | ((first > margin) & (first - second > margin))).float()


INPUTS: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "conv_relu": conv_inputs,
    "conv_relu_max_pool": conv_inputs,
    "conv_bn_relu": inference_inputs,
    "conv_bn_relu_train": bn_inputs,
}
CONVOLUTIONS = list(INPUTS)


def outputs_of(function: Callable[..., Any], inputs: dict[str, Tensor], padding: int) -> dict[str, Tensor]:
    result = function(**inputs, padding=padding)
    return (
        dict(zip(("y", "mean", "var"), result, strict=True)) if isinstance(result, tuple) else {"y": result}
    )


def forward_backward(
    function: Callable[..., Any], inputs: dict[str, Tensor], padding: int, dy: Tensor, device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and gradients by name, brought back to the CPU.

    ``inputs`` that are on the device keep their memory layout and offset.
    """
    inputs = on(device, inputs)
    given = {key: value for key, value in inputs.items() if key in ("mean", "var")}  # not differentiated
    leaves = {key: value.detach().requires_grad_() for key, value in inputs.items() if key not in given}
    found = outputs_of(function, {**leaves, **given}, padding)
    gradients = torch.autograd.grad(found["y"], list(leaves.values()), dy.to(device, found["y"].dtype))
    found |= {f"d{key}": g for key, g in zip(leaves, gradients, strict=True)}
    return {key: value.detach().cpu() for key, value in found.items()}


def upstream(name: str, inputs: dict[str, Tensor], padding: int) -> Tensor:
    """A random gradient for an op's output."""
    return torch.randn_like(outputs_of(getattr(ops, name), inputs, padding)["y"])


def terms(op: str, case: Case, result: str) -> int:
    """Length of the sums behind a result of an op."""
    forward, backward = 9 * case.C, 9 * case.K
    pixels = max(1, case.N * case.output[2] * case.output[3])
    if result == "y":
        return forward
    if op == "conv_bn_relu_train":  # everything else goes through the statistics of the convolution
        return forward + pixels + (backward if result == "dx" else 0)
    if op == "conv_bn_relu" and result == "dgamma":  # summed over the pixels, then over the folded filter
        return forward * pixels
    return backward if result == "dx" else pixels


def magnitude(case: Case, result: str, dy: Tensor) -> float:
    """Size of the sums behind a result: of so many numbers of random sign, as the inputs are drawn."""
    if result in ("y", "mean", "var"):
        return 1.0
    return (case.K / case.C) ** 0.5 if result == "dx" else float(dy.square().sum((0, 2, 3)).max().sqrt())


def check_convolution(name: str, case: Case, device: str, check: Callable[..., None]) -> None:
    inputs = INPUTS[name](case)
    fast, reference = getattr(ops, name), getattr(ops, f"{name}_reference")
    mask = decided(name, inputs, case.padding)
    dy = (torch.randn(mask.shape) * mask).contiguous(memory_format=torch.channels_last)
    ours = forward_backward(fast, inputs, case.padding, dy, device)
    torch32 = forward_backward(reference, inputs, case.padding, dy)
    doubles = {key: value.double() for key, value in inputs.items()}
    exact = forward_backward(reference, doubles, case.padding, dy)
    assert ours.keys() == exact.keys()
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    if name == "conv_bn_relu_train":
        # The mean takes the bias away: what the references find is rounding alone.
        assert torch.equal(ours.pop("dbias"), torch.zeros(case.K))
    for key, value in ours.items():
        told = {"name": f"{name} {key}", "magnitude": magnitude(case, key, dy)}
        check(value, torch32[key], exact[key], terms(name, case, key), **told)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, case: Case, device: str, as_exact_as_torch: Callable[..., None]) -> None:
    if name == "conv_relu_max_pool" and not pooled(case):
        with pytest.raises(RuntimeError, match="x is too small to be pooled"):
            ops.conv_relu_max_pool(**on(device, conv_inputs(case)), padding=case.padding)
        return
    if name == "conv_bn_relu_train" and case.N * case.output[2] * case.output[3] == 1:
        return  # one value a channel: the next test
    check_convolution(name, case, device, as_exact_as_torch)


@pytest.mark.usefixtures("algorithm")
def test_statistics_of_one_value_are_its_own(device: str, as_exact_as_torch: Callable[..., None]) -> None:
    """PyTorch refuses one value a channel; here its variance is 0 and the output is max(beta, 0)."""
    inputs = bn_inputs(Case(1, 3, 5, 3, 3, 0))
    z = pre_relu("conv_relu", inputs, 0)
    dy = torch.randn(1, 5, 1, 1)
    found = forward_backward(ops.conv_bn_relu_train, inputs, 0, dy, device)
    expected = inputs["beta"].relu()
    scaled = float((inputs["gamma"] * z.flatten()).abs().max()) / 1e-3**0.5  # 1e-3 is epsilon
    as_exact_as_torch(found["y"].flatten(), expected, expected.double(), magnitude=scaled)
    assert torch.equal(found["var"], torch.zeros(5))
    torch.testing.assert_close(found["mean"], z.flatten())
    assert torch.equal(found["dbeta"], dy.flatten() * (inputs["beta"] > 0))
    for key in ("dx", "dweight", "dgamma", "dbias"):
        assert torch.equal(found[key], torch.zeros_like(found[key])), key


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_the_networks(layer: str, device: str, as_exact_as_torch: Callable[..., None]) -> None:
    name, at = LAYERS[layer]
    check_convolution(name, at, device, as_exact_as_torch)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("layer", FULL_SIZE)
def test_full_size_layers(layer: str, device: str, as_exact_as_torch: Callable[..., None]) -> None:
    name, at = FULL_SIZE[layer]
    check_convolution(name, at, device, as_exact_as_torch)


@pytest.mark.parametrize("way", ["direct", ""])
def test_outputs_that_are_written_past_the_caches(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MiB and more, which are 2^21 numbers: 2 * 182 * 182 * 32."""
    monkeypatch.setenv("MASKCORE_CONV", way)
    for C in (3, 32):
        inputs = {
            "x": torch.randn(2, C, 184, 184),
            "weight": torch.randn(32, C, 3, 3),
            "bias": torch.randn(32),
        }
        dy = torch.randn(2, 32, 182, 182) * decided("conv_relu", inputs, 0)
        expected = forward_backward(ops.conv_relu_reference, inputs, 0, dy)
        for key, found in forward_backward(ops.conv_relu, inputs, 0, dy).items():
            limit = 1e-4 * relative(expected[key])
            torch.testing.assert_close(found, expected[key], rtol=1e-4, atol=limit)


@pytest.mark.parametrize("case", [case for case in (*CASES, *ROW_TILES) if case.C <= 3], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_first_layer(name: str, case: Case, as_exact_as_torch: Callable[..., None]) -> None:
    """With AVX-512 up to three input channels go through Winograd along the rows, forward, by default.

    Its rounding errors are 1.9 (three channels) to 2.6 (one) times a direct convolution's in the root mean square.
    """
    test_convolution(name, case, "cpu", functools.partial(as_exact_as_torch, rounding=5))


@pytest.mark.parametrize("padding", [0, 1])
def test_first_layer_spreads_nan_along_its_rows_only(padding: int) -> None:
    inputs = conv_inputs(Case(1, 3, 5, 12, 18, padding))
    inputs["x"][0, 1, 5, 9 - padding] = NAN  # in the inputs of the tiles whose outputs start at 4 and 8
    nan = ops.conv_relu(**inputs, padding=padding).isnan()
    assert nan[:, :, 3 + padding : 6 + padding, 7:10].all()
    nan[:, :, 3 + padding : 6 + padding, 4:12] = False
    assert not nan.any()


@pytest.mark.usefixtures("algorithm")
@pytest.mark.slow
def test_full_size_layers_all(device: str, as_exact_as_torch: Callable[..., None]) -> None:
    for at in (*convolutions("final", 256), *convolutions("baseline", 256)):
        check_convolution(op_of(at), case_of(at, 2), device, as_exact_as_torch)


# ---- Winograd -----------------------------------------------------------------------------------


def relative(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


@pytest.mark.parametrize("tiles", ["winograd4", "winograd6"])
@pytest.mark.parametrize("layer", [key for key in LAYERS if not key.endswith("block1_conv1")])
def test_winograd_error(layer: str, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 3e-6 of the result in the root mean square, forward and backward, for inputs as a ReLU gives them."""
    monkeypatch.setenv("MASKCORE_CONV", tiles)
    _, case = LAYERS[layer]
    inputs = conv_inputs(case)
    inputs["x"].relu_()
    dy = torch.randn(case.output) * decided("conv_relu", inputs, case.padding)
    ours = forward_backward(ops.conv_relu, inputs, case.padding, dy)
    doubles = {key: value.double() for key, value in inputs.items()}
    for key, exact in forward_backward(ops.conv_relu_reference, doubles, case.padding, dy).items():
        assert relative(ours[key] - exact) <= 3e-6 * relative(exact), key


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_max_pool"])
def test_transformed_filter_changes_no_bit(name: str, precision: ops.Precision) -> None:
    for case in TILES:
        if name == "conv_relu_max_pool" and not pooled(case):
            continue
        inputs = conv_inputs(case)
        transformed = ops.transform_filter(inputs["weight"], precision)
        function = functools.partial(getattr(ops, name), **inputs, padding=case.padding, precision=precision)
        assert torch.equal(function(transformed=transformed), function())


def test_transformed_filter_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKCORE_CONV", "winograd")
    inputs = conv_inputs(TILES[0])
    with pytest.raises(RuntimeError, match="transformed must have size"):
        ops.conv_relu(**inputs, transformed=ops.transform_filter(torch.randn(64, 3, 3, 3)))


# ---- precision ----------------------------------------------------------------------------------

BFLOAT16 = maskcore.config()["instruction set"] == "avx512bf16"
BFLOAT16_ONLY = pytest.mark.skipif(not BFLOAT16, reason="these kernels have no products of bfloat16")


@BFLOAT16_ONLY
@pytest.mark.parametrize("case", [*TILES, *SMALL, *CHANNELS, *FEW], ids=str)
def test_bfloat16_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 6 times that of PyTorch's own convolution of bfloat16, forward and backward.

    Winograd's transforms spread an operand's rounding over a tile: 5.5 times a direct convolution's in the root
    mean square, which is not all of PyTorch's error: it rounds its results as well. A sample of few numbers may
    lie above the mean.
    """
    monkeypatch.setenv("MASKCORE_CONV", "winograd")
    case = case._replace(N=max(case.N, 25))
    inputs = conv_inputs(case)
    del inputs["bias"]
    bias = torch.full((case.K,), 100.0)  # no output is at the ReLU's corner
    dy = torch.randn(case.output)

    def gradients(convolve: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {key: value.detach().to(dtype).requires_grad_() for key, value in inputs.items()}
        y = convolve(**leaves)
        found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(("dx", "dweight"), found, strict=True))}

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=case.padding)

    ours = gradients(
        lambda **leaves: ops.conv_relu(**leaves, bias=bias, padding=case.padding, precision="bf16"),
        torch.float32,
    )
    ours["y"] -= 100
    theirs, exact = gradients(plain, torch.bfloat16), gradients(plain, torch.float64)
    for key, value in exact.items():
        error = relative(ours[key] - value)
        assert 1e-4 * relative(value) < error, f"{key}: nothing was rounded"
        floor = 2e-5 * relative(value) if key == "y" else 0  # of a sum with 100 in float32
        assert error <= 6 * relative(theirs[key].double() - value) + floor, key


@BFLOAT16_ONLY
def test_bfloat16_reads_nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of tiles and of channels: a pair's other half is zero, whatever lay there before."""
    monkeypatch.setenv("MASKCORE_CONV", "winograd")
    cases = Case(1, 5, 7, 14, 14, 0), Case(1, 37, 65, 14, 14, 0)
    for case in cases:
        inputs = conv_inputs(case)
        dy = torch.randn(case.output)

        def run(inputs: dict[str, Tensor] = inputs, dy: Tensor = dy) -> dict[str, Tensor]:
            return forward_backward(functools.partial(ops.conv_relu, precision="bf16"), inputs, 0, dy)

        before = run()
        poison = conv_inputs(Case(2, 96, 96, 30, 30, 0))
        poison["x"].fill_(NAN)
        forward_backward(ops.conv_relu, poison, 0, torch.full((2, 96, 28, 28), NAN))
        for key, value in run().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("precision", ["tf32"] if BFLOAT16 else ["tf32", "bf16"])
def test_precision_that_the_processor_lacks_is_exceeded(precision: Any) -> None:
    inputs = conv_inputs(TILES[0])
    assert torch.equal(ops.conv_relu(**inputs, precision=precision), ops.conv_relu(**inputs))


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_unknown_precision_is_refused(name: str, device: str) -> None:
    with pytest.raises(RuntimeError, match="precision must be ieee, tf32 or bf16, is fp8"):
        getattr(ops, name)(**on(device, INPUTS[name](TILES[1])), precision="fp8")


def test_unknown_algorithm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKCORE_CONV", "fft")
    with pytest.raises(
        RuntimeError, match="MASKCORE_CONV must be direct, winograd, winograd4 or winograd6, is fft"
    ):
        ops.conv_relu(**conv_inputs(SMALL[0]))


@pytest.mark.parametrize(("tiles", "first"), [("winograd4", 4), ("winograd6", 6)])
def test_winograd_spreads_nan_over_tiles_only(
    tiles: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKCORE_CONV", tiles)
    inputs = conv_inputs(Case(1, 3, 5, 18, 18, 0))
    inputs["x"][0, 1, 9, 9] = NAN  # in the inputs of the tiles whose outputs start at 4 and 8, or at 6
    nan = ops.conv_relu(**inputs).isnan()
    assert nan[:, :, 7:10, 7:10].all()
    nan[:, :, first:12, first:12] = False
    assert not nan.any()


def test_phases_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the algorithm that runs, and of it alone; reading them starts anew."""
    inputs = conv_inputs(Case(1, 16, 16, 34, 34, 0))
    for algorithm, timed in (("winograd", [True, True, True, True, False]), ("direct", [False] * 4 + [True])):
        monkeypatch.setenv("MASKCORE_CONV", algorithm)
        torch.ops.maskcore._phase_times()
        ops.conv_relu(**inputs)
        assert [seconds > 0 for seconds in torch.ops.maskcore._phase_times().tolist()] == timed
    assert torch.ops.maskcore._phase_times().tolist() == [0.0] * 5


def test_multiply_add_loop_counts_its_lanes() -> None:
    """12 chains of vectors of 4, 8 or 16 numbers a thread."""
    torch.set_num_threads(2)
    assert torch.ops.maskcore._fma_loop(10) in (2 * 12 * 4, 2 * 12 * 8, 2 * 12 * 16)


# ---- exact cases ---------------------------------------------------------------------------------


def whole_numbers(*shape: int, largest: int = 2) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).float()


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("case", [*CASES, *(at for _, at in LAYERS.values())], ids=str)
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_max_pool"])
def test_whole_numbers_give_the_same_bits(name: str, case: Case, device: str) -> None:
    """With |x|, |w|, |dy| <= 2 no sum reaches 2^24: exact in float32, ties and zeros included."""
    if name == "conv_relu_max_pool" and not pooled(case):
        return
    inputs = {
        "x": whole_numbers(case.N, case.C, case.H, case.W),
        "weight": whole_numbers(case.K, case.C, 3, 3),
        "bias": whole_numbers(case.K),
    }
    fast, reference = getattr(ops, name), getattr(ops, f"{name}_reference")
    dy = whole_numbers(*reference(**inputs, padding=case.padding).shape)
    ours = forward_backward(fast, inputs, case.padding, dy, device)
    doubles = {key: value.double() for key, value in inputs.items()}
    for key, value in forward_backward(reference, doubles, case.padding, dy).items():
        assert float(value.abs().max()) < 2**24
        assert torch.equal(ours[key].double(), value), key


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_max_pool", "conv_bn_relu"])
def test_no_images(name: str, case: Case, device: str) -> None:
    inputs = INPUTS[name](case)
    shape = getattr(ops, f"{name}_reference")(**inputs, padding=case.padding).shape
    found = forward_backward(getattr(ops, name), inputs, case.padding, torch.empty(shape), device)
    assert found["y"].shape == shape
    assert found["dx"].shape == inputs["x"].shape
    for key in inputs.keys() - {"x", "mean", "var"}:
        assert torch.equal(found[f"d{key}"], torch.zeros_like(inputs[key])), key


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradient_of_x_is_computed_only_if_asked_for(name: str, device: str) -> None:
    case = FEW[0]
    inputs = INPUTS[name](case)
    dy = upstream(name, inputs, case.padding)
    full = forward_backward(getattr(ops, name), inputs, case.padding, dy, device)
    given = on(device, inputs)
    for key in ("weight", "bias"):
        given[key].requires_grad_()
    y = outputs_of(getattr(ops, name), given, case.padding)["y"]
    y.backward(dy.to(device))
    assert given["x"].grad is None
    for key in ("weight", "bias"):
        assert torch.equal(given[key].grad.cpu(), full[f"d{key}"]), key


# ---- memory layouts ------------------------------------------------------------------------------


def at_odd_offset(t: Tensor) -> Tensor:
    """The same values and strides, one float behind the start of their memory: not aligned to a vector."""
    if t.dim() == 4:
        t = t.contiguous(memory_format=torch.channels_last)
    buffer = torch.full((t.numel() + 3,), NAN, device=t.device)
    return torch.as_strided(buffer, t.shape, t.stride(), 1).copy_(t)


def spread_out(t: Tensor) -> Tensor:
    """Every other column of a wider tensor, NaN between."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), NAN, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "odd_offset": at_odd_offset,
    "spread_out": spread_out,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_layout_does_not_matter(name: str, layout: str, device: str) -> None:
    case = Case(2, 5, 9, 8, 10, 1)
    inputs = INPUTS[name](case)
    function, arrange = getattr(ops, name), LAYOUTS[layout]
    dy = upstream(name, inputs, 1)
    expected = forward_backward(function, inputs, 1, dy, device)
    arranged = {
        key: arrange(value) if value.dim() == 4 else at_odd_offset(value)
        for key, value in on(device, inputs).items()
    }
    found = forward_backward(function, arranged, 1, arrange(dy.to(device)), device)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_expanded_upstream_gradient(name: str, device: str) -> None:
    """``y.sum().backward()`` gives a gradient of stride 0."""
    inputs = INPUTS[name](FEW[1])
    shape = upstream(name, inputs, 0).shape
    expected = forward_backward(getattr(ops, name), inputs, 0, torch.ones(shape), device)
    found = forward_backward(
        getattr(ops, name), inputs, 0, torch.ones((), device=device).expand(shape), device
    )
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


# ---- the same bits, always -----------------------------------------------------------------------


def convolve_all(name: str, case: Case, device: str, precision: ops.Precision = "ieee") -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs = INPUTS[name](case)
    function = functools.partial(getattr(ops, name), precision=precision)
    dy = upstream(name, inputs, case.padding)
    return forward_backward(function, inputs, case.padding, dy, device)


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("case", [*FEW, LAYERS["final-block2_conv2"][1]], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_threads_and_repetition_change_no_bit(
    name: str, case: Case, precision: ops.Precision, device: str
) -> None:
    torch.set_num_threads(1)
    expected = convolve_all(name, case, device, precision)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for key, value in convolve_all(name, case, device, precision).items():
            assert torch.equal(value, expected[key]), f"{key} with {threads} threads"


def poison(sizes: Sequence[int], device: str) -> None:
    """Leaves NaN in memory that is free again, for the next tensors of these sizes."""
    blocks = [torch.empty(size, device=device).fill_(NAN) for size in sizes for _ in range(4)]
    del blocks


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_uninitialised_memory_is_never_read(name: str, case: Case, device: str) -> None:
    """Neither that of the outputs nor the scratch memory that the kernels keep."""
    expected = convolve_all(name, case, device)
    wider = case._replace(H=case.H + 3, W=case.W + 5, C=case.C + 3, K=case.K + 17)
    for of in (case, wider):  # leaves NaN in the scratch memory
        poisoned = {key: torch.full_like(value, NAN) for key, value in INPUTS[name](of).items()}
        dy = torch.full_like(upstream(name, poisoned, of.padding), NAN)
        forward_backward(getattr(ops, name), poisoned, of.padding, dy, device)
    poison([value.numel() for value in expected.values()], device)
    for key, value in convolve_all(name, case, device).items():
        assert torch.equal(value, expected[key]), key


# ---- NaN and infinity ----------------------------------------------------------------------------


def same_with_nan(ours: Tensor, theirs: Tensor) -> bool:
    """Equal, NaN in the same places."""
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_max_pool"])
def test_relu_keeps_nan_and_infinity_as_torch_does(name: str, value: float, device: str) -> None:
    """NaN stays NaN, -inf becomes 0, inf stays; 0 * inf is NaN. Whole numbers: the rest is exact."""
    x, weight, bias = whole_numbers(2, 3, 9, 9), whole_numbers(17, 3, 3, 3), whole_numbers(17)
    x[0, 1, 4, 5] = value
    x[1, 2, 8, 8] = value
    reference = getattr(ops, f"{name}_reference")
    expected = reference(x, weight, bias, 1)
    assert not expected.isfinite().all()
    found = getattr(ops, name)(x.to(device), weight.to(device), bias.to(device), 1)
    assert same_with_nan(found.cpu(), expected)


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_max_pool"])
def test_gradient_passes_where_the_activation_is_nan(name: str, device: str) -> None:
    """As in torch: only an activation <= 0 stops the gradient, so a NaN loss is seen in the weights."""
    x, weight, bias = whole_numbers(1, 2, 6, 6), whole_numbers(5, 2, 3, 3), whole_numbers(5)
    x[0, 0, 0, 0] = NAN  # reaches the first pixel of every channel and no other
    inputs = {"x": x, "weight": weight, "bias": bias}
    reference = getattr(ops, f"{name}_reference")
    dy = torch.zeros_like(reference(**inputs))
    dy[:, :, 0, 0] = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    found = forward_backward(getattr(ops, name), inputs, 0, dy, device)
    assert torch.equal(found["dbias"], dy[0, :, 0, 0])
    for key, value in forward_backward(reference, inputs, 0, dy).items():
        assert same_with_nan(found[key], value), key


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", ["conv_bn_relu", "conv_bn_relu_train"])
def test_nan_in_a_channel_stays_in_it(name: str, device: str) -> None:
    inputs = INPUTS[name](Case(2, 3, 5, 6, 6, 0))
    inputs["weight"][2, 0, 1, 1] = NAN
    y = outputs_of(getattr(ops, name), on(device, inputs), 0)["y"]
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4]].isfinite().all()


# ---- batch statistics ----------------------------------------------------------------------------


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_statistics_with_a_large_mean(
    ratio: float, device: str, as_exact_as_torch: Callable[..., None]
) -> None:
    """mean / standard deviation = ratio.

    A value z is stored with an error of eps / 2 |mean|, which moves its squared deviation by eps |mean| times
    that deviation: eps ratio of the variance cannot be helped. From sums of squares it would be eps ratio^2.
    """
    case = Case(2, 3, 17, 40, 45, 0)
    inputs = bn_inputs(case)
    inputs["bias"] = ratio * torch.where(torch.arange(case.K) % 2 == 0, 1.0, -1.0)
    ours = [result.cpu() for result in ops.conv_bn_relu_train(**on(device, inputs))]
    torch32 = ops.conv_bn_relu_train_reference(**inputs)
    exact = ops.conv_bn_relu_train_reference(**{key: value.double() for key, value in inputs.items()})
    for key, *found in zip(("y", "mean", "var"), ours, torch32, exact, strict=True):
        as_exact_as_torch(*found, name=f"large mean {key}", magnitude=ratio)


@pytest.mark.usefixtures("algorithm")
def test_variance_is_biased(device: str, as_exact_as_torch: Callable[..., None]) -> None:
    inputs = bn_inputs(Case(1, 2, 3, 4, 4, 0))
    _, mean, var = (result.cpu() for result in ops.conv_bn_relu_train(**on(device, inputs)))
    z = pre_relu("conv_relu", {key: value.double() for key, value in inputs.items()}, 0)
    z32 = pre_relu("conv_relu", inputs, 0)
    as_exact_as_torch(mean, z32.mean((0, 2, 3)), z.mean((0, 2, 3)), 4)
    as_exact_as_torch(var, z32.var((0, 2, 3), correction=0), z.var((0, 2, 3), correction=0), 4)
    assert (var < z.var((0, 2, 3)) * 0.8).all()  # 3 / 4 of the unbiased one


@pytest.mark.usefixtures("algorithm")
def test_inference_is_training_with_the_same_statistics(
    device: str, as_exact_as_torch: Callable[..., None]
) -> None:
    case = Case(2, 5, 9, 8, 7, 1)
    inputs = bn_inputs(case)
    exact, *_ = ops.conv_bn_relu_train_reference(**{k: v.double() for k, v in inputs.items()}, padding=1)
    inputs = on(device, inputs)
    y, mean, var = ops.conv_bn_relu_train(**inputs, padding=1)
    inference = ops.conv_bn_relu(**inputs, mean=mean, var=var, padding=1)
    as_exact_as_torch(inference.cpu(), y.cpu(), exact, 9 * case.C)


# ---- max_pool ------------------------------------------------------------------------------------

POOLS = [(1, 1, 2, 2), (2, 3, 5, 7), (1, 17, 8, 9), (3, 16, 3, 2), (1, 33, 2, 13), (0, 4, 6, 6)]


def pool_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach().cpu(), torch.autograd.grad(y, x, dy)[0].cpu()


def check_pool(x: Tensor, device: str, dy: Tensor | None = None) -> None:
    dy = torch.randn(*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2) if dy is None else dy
    found = pool_and_gradient(ops.max_pool, x.to(device), dy.to(device))
    expected = pool_and_gradient(ops.max_pool_reference, x.cpu(), dy.cpu())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert same_with_nan(ours, theirs)


@pytest.mark.parametrize("shape", POOLS, ids=lambda s: "x".join(map(str, s)))
def test_max_pool(shape: tuple[int, ...], device: str) -> None:
    check_pool(torch.randn(shape), device)


def test_max_pool_ties_go_to_the_first(device: str) -> None:
    check_pool(torch.zeros(2, 3, 6, 8), device)
    check_pool(torch.randint(0, 2, (4, 9, 20, 22)).float(), device)
    check_pool(torch.full((1, 2, 4, 4), -0.0).index_fill(3, torch.tensor([1, 3]), 0.0), device)
    x = torch.zeros(1, 1, 2, 2, device=device)
    _, dx = pool_and_gradient(ops.max_pool, x, torch.full((1, 1, 1, 1), 5.0, device=device))
    assert dx.flatten().tolist() == [5.0, 0.0, 0.0, 0.0]


def test_max_pool_of_infinities_and_nan(device: str) -> None:
    """Every window of {-inf, 0, inf, NaN}: -inf is a number like any, NaN is the maximum wherever it is.

    Of several NaN the first gets the gradient; PyTorch gives it to the last.
    """
    values = torch.tensor([-INF, 0.0, INF, NAN])
    windows = torch.cartesian_prod(values, values, values, values).view(256, 1, 2, 2)
    few = windows[windows.isnan().sum((1, 2, 3)) <= 1]
    check_pool(few, device)
    check_pool(few.permute(1, 0, 2, 3), device)  # as channels
    check_pool(torch.full((1, 3, 4, 6), -INF), device)
    y, dx = pool_and_gradient(ops.max_pool, windows.to(device), torch.ones(256, 1, 1, 1, device=device))
    assert same_with_nan(y, ops.max_pool_reference(windows))
    several = windows.isnan().sum((1, 2, 3)) > 1
    first = windows[several].flatten(1).isnan().int().argmax(1)
    assert torch.equal(dx[several].flatten(1), F.one_hot(first, 4).float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pool_layouts(layout: str, device: str) -> None:
    arrange = LAYOUTS[layout]
    x, dy = torch.randn(2, 5, 7, 9).to(device), torch.randn(2, 5, 3, 4).to(device)
    check_pool(arrange(x), device, arrange(dy))


def test_max_pool_threads_repetition_and_poison(device: str) -> None:
    x, dy = torch.randn(3, 17, 21, 23), torch.randn(3, 17, 10, 11)
    expected = pool_and_gradient(ops.max_pool_reference, x, dy)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        poison([x.numel(), dy.numel()], device)
        found = pool_and_gradient(ops.max_pool, x.to(device), dy.to(device))
        assert all(map(torch.equal, found, expected))


# ---- dense ---------------------------------------------------------------------------------------


# Around 8 samples, 256 columns, 1 to 4 rows and the vectors (csrc/dense_cpu.cpp); the last one is streamed.
DENSE = [(1, 1, 1), (2, 17, 5), (8, 300, 33), (3, 16, 512), (0, 4, 3), (4, 1000, 7), (5, 257, 9), (6, 513, 3)]
DENSE += [(7, 255, 4), (9, 40, 6), (33, 16, 17), (2, 8192, 260)]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("N", "C", "K"), DENSE)
def test_dense(
    N: int, C: int, K: int, relu: bool, device: str, as_exact_as_torch: Callable[..., None]
) -> None:
    """On a GPU it is PyTorch's product."""
    inputs = {"x": torch.randn(N, C), "weight": torch.randn(K, C) / C**0.5, "bias": torch.randn(K)}

    def run(
        function: Callable[..., Tensor], dtype: torch.dtype, dy: Tensor, device: str = "cpu"
    ) -> dict[str, Tensor]:
        leaves = {key: value.to(device, dtype).requires_grad_() for key, value in inputs.items()}
        y = function(**leaves, relu=relu)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(device, dtype))
        found = {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))}
        return on("cpu", found)

    z = F.linear(*(value.double() for value in inputs.values()))
    dy = torch.randn(N, K) * (z.abs() > 1e-4)  # see decided
    ours = run(ops.dense, torch.float32, dy, device)
    torch32 = run(ops.dense_reference, torch.float32, dy)
    exact = run(ops.dense_reference, torch.float64, dy)
    for key, value in ours.items():
        length = {"y": C, "dx": K}.get(key, max(N, 1))
        as_exact_as_torch(value, torch32[key], exact[key], length, f"dense {key}")


@pytest.mark.parametrize("N", [1, 8])
def test_dense_threads_and_poison_change_no_bit(N: int) -> None:
    x, weight = torch.randn(N, 2000).requires_grad_(), torch.randn(70, 2000).requires_grad_()
    bias, dy = torch.randn(70).requires_grad_(), torch.randn(N, 70)

    def run() -> tuple[Tensor, ...]:
        y = ops.dense(x, weight, bias, relu=True)
        return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)

    expected = run()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        poison([N * 2000, 70 * 2000, N * 70, 70], "cpu")
        for ours, first in zip(run(), expected, strict=True):
            assert torch.equal(ours, first), f"with {threads} threads"


# ---- softmax_cross_entropy -----------------------------------------------------------------------


def loss_and_gradient(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, dloss: float
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    loss = function(logits, target)
    return loss.detach().cpu(), torch.autograd.grad(loss * dloss, logits)[0].cpu()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 2), (8, 3), (5, 17), (64, 1000)])
def test_softmax_cross_entropy(
    N: int, K: int, scale: float, device: str, as_exact_as_torch: Callable[..., None]
) -> None:
    logits, target = torch.randn(N, K) * scale, torch.randint(0, K, (N,))
    dloss = float(torch.randn(()))
    ours = loss_and_gradient(ops.softmax_cross_entropy, logits.to(device), target.to(device), dloss)
    reference = ops.softmax_cross_entropy_reference
    torch32 = loss_and_gradient(reference, logits, target, dloss)
    exact = loss_and_gradient(reference, logits.double(), target, dloss)
    for key, length, *found in zip(("loss", "dlogits"), (N, K), ours, torch32, exact, strict=True):
        as_exact_as_torch(*found, length, f"softmax_cross_entropy {key}")


@pytest.mark.parametrize("row", [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [INF, INF, 0.0], [-INF, -INF, -INF]])
def test_softmax_cross_entropy_of_diverged_logits_is_nan(row: list[float], device: str) -> None:
    logits, target = torch.tensor([row, [0.0, 1.0, 2.0]]), torch.tensor([1, 2])
    assert ops.softmax_cross_entropy_reference(logits, target).isnan()
    assert ops.softmax_cross_entropy(logits.to(device), target.to(device)).isnan()


def test_softmax_cross_entropy_of_an_impossible_class(device: str) -> None:
    logits = torch.tensor([[0.0, -INF, 1.0]])
    for target in torch.tensor([[0], [1]]):
        expected = ops.softmax_cross_entropy_reference(logits, target)
        found = ops.softmax_cross_entropy(logits.to(device), target.to(device))
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("arrange", [at_odd_offset, spread_out, lambda t: t.t().contiguous().t()])
def test_softmax_cross_entropy_layouts(arrange: Callable[[Tensor], Tensor], device: str) -> None:
    logits, target = torch.randn(6, 5).to(device), torch.randint(0, 5, (12,)).to(device)[::2]
    expected = loss_and_gradient(ops.softmax_cross_entropy, logits, target.contiguous(), 2.0)
    found = loss_and_gradient(ops.softmax_cross_entropy, arrange(logits), target, 2.0)
    assert all(map(torch.equal, found, expected))


# ---- adam_ ---------------------------------------------------------------------------------------

ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7, "l2": 1e-2}


def adam_state(sizes: Sequence[tuple[int, ...]], step: int, device: str = "cpu") -> list[list[Tensor]]:
    """parameters, gradients, and moments as they are after ``step - 1`` steps (zeros before the first)."""
    started = float(step > 1)
    drawn = [[torch.randn(size).to(device) for size in sizes] for _ in range(4)]
    return [*drawn[:2], [m * started for m in drawn[2]], [v.square() * started for v in drawn[3]]]


@pytest.mark.parametrize("keras_epsilon", [True, False])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_adam_(step: int, keras_epsilon: bool, device: str, as_exact_as_torch: Callable[..., None]) -> None:
    slice_floats = 16 * 1024  # one task of the kernel
    sizes = [(1,), (7, 3), (0,), (), *((slice_floats + i,) for i in (-1, 0, 1)), (4, 3, 3, 3)]
    state = adam_state(sizes, step)
    arguments = {**ADAM, "step": step, "keras_epsilon": keras_epsilon}

    def run(function: Callable[..., None], dtype: torch.dtype, device: str = "cpu") -> list[list[Tensor]]:
        own = [[t.to(device, dtype, copy=True) for t in group] for group in state]
        function(*own, **arguments)
        return [[t.cpu() for t in group] for group in own]

    ours, torch32 = run(ops.adam_, torch.float32, device), run(ops.adam_reference, torch.float32)
    exact = run(ops.adam_reference, torch.float64)
    for key, *lists in zip(("p", "gradient", "m", "v"), ours, torch32, exact, strict=True):
        for found in zip(*lists, strict=True):
            as_exact_as_torch(*found, name=f"adam_ {key}")


def test_adam_threads_and_repetition_change_no_bit(device: str) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        state = adam_state([(50_000,), (3,), (16_385,)], 3, device)
        ops.adam_(*state, **ADAM, step=3, keras_epsilon=True)
        results.append(state)
    for found in results[1:]:
        for ours, expected in zip(found, results[0], strict=True):
            assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[1].pop(), "as many as parameters"),
        (lambda s: s[1].__setitem__(0, s[1][0].flatten()[:3]), "gradients must be dense and laid out"),
        (lambda s: s[2].__setitem__(0, s[2][0].double()), "exp_avgs must be float32"),
        (lambda s: s[3].__setitem__(0, s[3][0].t()[:, ::2]), "exp_avg_sqs must be"),
        (lambda s: s[1].__setitem__(0, s[1][0].t()), "gradients must be dense and laid out"),
        (lambda s: s[0].__setitem__(0, s[0][0].repeat(1, 2)[:, ::2]), "parameters must be dense"),
    ],
)
def test_adam_refuses(change: Callable[[Any], Any], message: str, device: str) -> None:
    state = adam_state([(4, 4)], 1, device)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        ops.adam_(*state, **ADAM, step=1, keras_epsilon=True)


def test_adam_refuses_step_zero(device: str) -> None:
    with pytest.raises(RuntimeError, match="step must count from 1"):
        ops.adam_(*adam_state([(4,)], 1, device), **ADAM, step=0, keras_epsilon=True)


# ---- bad arguments -------------------------------------------------------------------------------


def refused(name: str, device: str, message: str, padding: Any = 0, **changed: Tensor) -> None:
    inputs = {**on(device, INPUTS[name](Case(2, 3, 4, 6, 7, 0))), **changed}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        getattr(ops, name)(**inputs, padding=padding)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_errors_name_the_argument(name: str, device: str) -> None:
    refuse = functools.partial(refused, name, device)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    refuse("x must be a batch of images", x=ones(3, 6, 7))
    # A GPU has kernels of bfloat16.
    for dtype in (torch.float64, torch.float16, *([torch.bfloat16] if device == "cpu" else [])):
        refuse("x must be float32", x=ones(2, 3, 6, 7).to(dtype))
    refuse("x must be at least 3 pixels", x=ones(2, 3, 2, 7))
    refuse("x must be at least 1 pixels", x=ones(2, 3, 0, 7), padding=1)
    refuse("weight must have size", weight=ones(4, 2, 3, 3))
    refuse("weight must have size", weight=ones(4, 3, 3, 5))
    refuse("weight must have 4 dimensions", weight=ones(4, 27))
    refuse("weight must be float32", weight=ones(4, 3, 3, 3).double())
    refuse("weight must have at least one", weight=ones(4, 0, 3, 3), x=ones(2, 0, 6, 7))
    for padding in (-1, 2):
        refuse(f"padding must be 0 or 1, is {padding}", padding=padding)
    vectors = INPUTS[name](Case(2, 3, 4, 6, 7, 0)).keys() - {"x", "weight"}
    for key in vectors:
        for bad in (ones(3), ones(1), ones(4, 1)):
            refuse(f"{key} must have", **{key: bad})
        refuse(f"{key} must be float32", **{key: ones(4).double()})
    for key, value in INPUTS[name](Case(2, 3, 4, 6, 7, 0)).items():
        if key != "x":
            refuse(f"{key} must be on the device of x", **{key: value.to("meta")})


def test_errors_of_the_other_ops_name_the_argument(device: str) -> None:
    weight, bias = torch.ones(1, 1, 3, 3, device=device), torch.ones(1, device=device)
    for function in (ops.max_pool, lambda x: ops.conv_relu_max_pool(x, weight, bias)):
        for bad, message in (
            (torch.randn(1, 5, 5), "x must be a batch of images"),
            (torch.randn(1, 1, 5, 5).double(), "x must be float32"),
            (torch.randn(1, 1, 1, 1), "x .*(at least|too small)"),
        ):
            with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
                function(bad.to(device))
    logits, target = torch.randn(4, 3).to(device), torch.tensor([0, 1, 2, 0]).to(device)
    for bad_logits, bad_target, message in (
        (logits[0], target, "logits must have 2 dimensions"),
        (logits.double(), target, "logits must be float32"),
        (logits, target[:3], "target must have size 4"),
        (logits, target.int(), "target must be int64"),
        (logits[:0], target[:0], "logits must hold at least one sample"),
        (logits, target.to("meta"), "target must be on the device of logits"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.softmax_cross_entropy(bad_logits, bad_target)
    inputs = {"x": torch.randn(2, 5), "weight": torch.randn(3, 5), "bias": torch.randn(3)}
    x, weight, bias = on(device, inputs).values()
    for changed, message in (
        ({"x": x[:, :4]}, "weight must have shape"),
        ({"x": x[:, :, None]}, "x must be"),
        ({"x": x.double()}, "x must be float32"),
        ({"weight": weight.double()}, "weight must be float32"),
        ({"bias": bias[:1]}, "bias must have shape"),
        ({"bias": bias.double()}, "bias must be float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.dense(**{"x": x, "weight": weight, "bias": bias, **changed})


def test_a_target_that_is_no_class(device: str) -> None:
    """A GPU cannot raise an error without a stop: the loss is NaN, and so is the sample's gradient."""
    logits = torch.randn(4, 3)
    for number, target in ((3, torch.tensor([1, 2, 3, 1])), (-1, torch.tensor([-1, 0, 1, -1]))):
        given = logits.to(device), target.to(device)
        if device == "cpu":
            with pytest.raises(RuntimeError, match=f"target must hold classes from 0 to 2, has {number}"):
                ops.softmax_cross_entropy(*given)
        else:
            loss, dlogits = loss_and_gradient(ops.softmax_cross_entropy, *given, 1.0)
            assert loss.isnan()
            assert torch.equal(dlogits.isnan().all(1), (target < 0) | (target > 2))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_meta_tensors_give_shapes(name: str, device: str) -> None:
    """Shape inference alone, as torch.device("meta") users expect."""
    inputs = INPUTS[name](Case(2, 3, 4, 6, 7, 1))
    meta = outputs_of(getattr(ops, name), {key: value.to("meta") for key, value in inputs.items()}, 1)
    for key, value in outputs_of(getattr(ops, name), on(device, inputs), 1).items():
        assert meta[key].is_meta
        assert meta[key].shape == value.shape
        assert meta[key].stride() == value.stride()


# A second derivative is not implemented; it must not come out as a wrong number.
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_max_pool", "conv_bn_relu_train"])
def test_second_derivative_is_refused(name: str, device: str) -> None:
    inputs = on(device, INPUTS[name](Case(1, 2, 3, 6, 6, 0)))
    inputs = {key: value.requires_grad_() for key, value in inputs.items()}
    y = outputs_of(getattr(ops, name), inputs, 0)["y"]
    (dweight,) = torch.autograd.grad(y.square().sum(), inputs["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dweight.square().sum().backward()


# ---- dropout, warp and the Adam that counts --------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 10_000])
def test_dropout(size: int, p: float, device: str) -> None:
    x, dy = torch.randn(size).to(device).requires_grad_(), torch.randn(size).to(device)
    for number in (0, -(2**63), 2**63 - 1):
        seed = torch.tensor([number]).to(device)
        y = ops.dropout(x, seed, p)
        torch.testing.assert_close(y, ops.dropout_reference(x, seed, p))
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, ops.dropout(dy, seed, p))  # the same values are dropped


def test_dropout_is_the_same_for_any_threads_and_layout(device: str) -> None:
    x, seed = torch.randn(2, 3, 50, 70).to(device), torch.tensor([11]).to(device)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ops.dropout(x, seed, 0.5))
    assert torch.equal(*found)
    assert torch.equal(ops.dropout(x.to(memory_format=torch.channels_last), seed, 0.5), found[0])


def test_dropout_of_nan_is_zero_where_it_is_dropped(device: str) -> None:
    y = ops.dropout(torch.full((1000,), torch.nan, device=device), torch.tensor([0]).to(device), 0.5)
    assert 300 < int((y == 0).sum()) < 700
    assert int(y.isnan().sum()) == 1000 - int((y == 0).sum())


def test_dropout_refuses(device: str) -> None:
    x, seed = torch.randn(4).to(device), torch.tensor([1]).to(device)
    with pytest.raises(RuntimeError, match=r"p must lie in \[0, 1\], is 1.5"):
        ops.dropout(x, seed, 1.5)
    with pytest.raises(RuntimeError, match="x must be float32"):
        ops.dropout(x.double(), seed, 0.5)
    with pytest.raises(RuntimeError, match="seed must have size 1 in dimension 0"):
        ops.dropout(x, torch.tensor([1, 2]).to(device), 0.5)


def test_a_layer_draws_the_seeds_that_a_graph_is_given(device: str) -> None:
    """nn.Dropout takes from torch's CPU generator what nn.Dropout.draw does."""
    x, layer = torch.randn(100).to(device), nn.Dropout(0.5)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    assert torch.equal(y, ops.dropout(x, torch.tensor([nn.Dropout.draw()]).to(device), 0.5))


def test_warp_refuses(device: str) -> None:
    pictures = torch.zeros(1, 4, 4, 3, dtype=torch.uint8, device=device)
    matrices = torch.zeros(1, 6, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"dtype must be float32 or bfloat16, is torch.int64"):
        ops.warp(pictures, matrices, dtype=torch.int64)
    if device == "cpu":  # a GPU has kernels of bfloat16
        with pytest.raises(TypeError, match="dtype must be float32 on the CPU"):
            ops.warp(pictures, matrices, dtype=torch.bfloat16)


def test_adam_that_counts_takes_the_same_steps(device: str) -> None:
    settings: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7, "l2": 1e-2}
    plain = adam_state([(33, 2), (4,)], 3, device)
    counted = copy.deepcopy(plain)
    step = torch.tensor(4).to(device)
    for number in (5, 6):
        ops.adam_(*plain, **settings, step=number, keras_epsilon=True)
        ops.adam_counted_(*counted, step, **settings, keras_epsilon=True)
        assert int(step) == number
    for ours, theirs in zip(counted, plain, strict=True):
        assert all(map(torch.equal, ours, theirs))


# ---- registration --------------------------------------------------------------------------------


#: Elsewhere dense is PyTorch's product, and no convolution is Winograd's.
CPU_ONLY = {"dense", "_dense_backward", "transform_filter"}


def op_samples(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every registered operator, as the Python functions above pass them: [N, H, W, C].

    They are on the CPU, and what the operator takes once they are moved to the device.
    """
    on_cpu = device == "cpu"

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    x, dy, z = torch.randn(2, 7, 6, 3), torch.randn(2, 5, 4, 5), torch.randn(2, 5, 4, 5)
    weight, vector, positive = torch.randn(5, 3, 3, 3), torch.randn(5), torch.rand(5) + 0.5
    argmax = torch.randint(0, 4, (2, 2, 2, 5), dtype=torch.uint8)
    half = torch.randn(2, 2, 2, 5)
    probabilities, target = torch.rand(4, 3), torch.tensor([0, 2, 1, 1])
    bn = (leaf(5, 3, 3, 3), leaf(5), leaf(5), leaf(5), 1e-3)
    settings = (1e-3, 0.9, 0.999, 1e-7, 1e-2, 3)
    return {
        "transform_filter": [(weight,), (weight, "bf16")],
        "conv_relu": [(leaf(2, 7, 6, 3), leaf(5, 3, 3, 3), leaf(5), p) for p in (0, 1)]
        + [(x, weight, vector, 0), (x, weight, vector, 0, ops.transform_filter(weight) if on_cpu else None)],
        "conv_relu_max_pool": [(leaf(2, 7, 6, 3), leaf(5, 3, 3, 3), leaf(5), p) for p in (0, 1)],
        "conv_bn_relu_train": [(leaf(2, 7, 6, 3), *bn, p) for p in (0, 1)] + [(x, *bn, 0)],
        "conv_bn_relu_conv_relu_train": [
            (leaf(2, 7, 6, C), leaf(5, C, 3, 3), *bn[1:4], leaf(4, 5, 3, 3), leaf(4), 1e-3, 0, 1, pool)
            for C in (3, 4)
            for pool in (True, False)
        ],
        "_conv_bn_relu_conv_relu_train_backward": [
            (
                *(
                    torch.randn(2, 3, 2, 4),
                    torch.randn(2, 7, 6, C),
                    torch.randn(5, C, 3, 3),
                    vector,
                    vector,
                    vector,
                ),
                *(
                    torch.randn(4, 5, 3, 3),
                    torch.randn(2, 3, 2, 4),
                    torch.empty(0, 3, 2, 4, dtype=torch.uint8),
                ),
                *(
                    # Of pictures the CPU stores products of their own instead.
                    torch.randn(0 if C == 3 and on_cpu else 2, 5, 4, 5),
                    torch.eye(28 if C == 3 and on_cpu else 0, dtype=torch.float64),
                ),
                *(vector, positive, 1e-3, 0, 0, False, "ieee", need),
            )
            for C in (3, 4)
            for need in (True, False)
        ],
        "max_pool": [(leaf(2, 7, 6, 3),), (x,)],
        "dense": [(leaf(4, 7), leaf(3, 7), leaf(3), relu) for relu in (True, False)],
        "_dense_backward": [
            (torch.randn(9, 3), torch.randn(9, 7), torch.randn(3, 7), torch.randn(9, 3), True)
        ],
        "softmax_cross_entropy": [(leaf(4, 3), target)],
        "adam_": [(*adam_state([(3, 2), (4,)], 3), *settings, keras) for keras in (True, False)],
        "adam_counted_": [(*adam_state([(3, 2), (4,)], 3), torch.tensor(2), *settings[:-1], True)],
        "dropout": [(leaf(3, 5), torch.tensor([7]), 0.3), (x, torch.tensor([-1]), 0.0)],
        "warp": [
            (torch.zeros(2, 4, 5, 3, dtype=torch.uint8), torch.zeros(2, 6, dtype=torch.float64), 1.0, 0.5)
        ],
        "_conv_relu_backward": [(dy, x, weight, z, 0, "ieee", need_dx) for need_dx in (True, False)],
        "_conv_relu_max_pool_backward": [
            (half, x, weight, half, argmax, 0, "bf16", need) for need in (True, False)
        ],
        "_conv_bn_relu_train_backward": [
            (dy, x, weight, z, vector, vector, vector, positive, 1e-3, 0, "ieee", need)
            for need in (True, False)
        ],
        "_max_pool_backward": [(half, argmax, 5, 4)],
        "_softmax_cross_entropy_backward": [(torch.tensor(2.0), probabilities, target)],
    }


COMPUTING_NOTHING = {"_fma_loop", "_phase_times", "empty_cache"}
REGISTERED = sorted(
    {
        name.removeprefix("maskcore::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("maskcore::")
    }
    - COMPUTING_NOTHING
)


def test_every_registered_op_has_samples() -> None:
    assert REGISTERED
    assert op_samples("cpu").keys() == set(REGISTERED)


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name: str, device: str) -> None:
    def moved(t: Tensor) -> Tensor:
        return t.detach().to(device).requires_grad_(t.requires_grad)

    operator = getattr(torch.ops.maskcore, name).default
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not device.startswith("emulated"):
        checks.append("test_autograd_registration")  # which knows no device but torch's own
    for drawn in op_samples(device)[name]:
        arguments = tree_map_only(Tensor, moved, drawn)
        if name in CPU_ONLY and device != "cpu":
            with pytest.raises(NotImplementedError, match=f"maskcore::{name}"):
                operator(*arguments)
        else:
            torch.library.opcheck(operator, arguments, test_utils=checks)


# ---- random shapes -------------------------------------------------------------------------------

RANDOM_SECONDS = 10  # for all ops together
FIRST_SEED = int(os.environ.get("MASKCORE_TEST_SEED", "0"))


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_random_shapes(name: str, device: str, as_exact_as_torch: Callable[..., None]) -> None:
    """Shapes drawn until the time is up, after XNNPACK's FuzzTest. A failure prints what repeats it."""
    end = time.monotonic() + RANDOM_SECONDS / len(CONVOLUTIONS)
    seed = FIRST_SEED
    while time.monotonic() < end:
        case = random_case(seed)
        try:
            check_convolution(name, case, device, as_exact_as_torch)
        except Exception as error:
            raise AssertionError(f"{name} {case!r} after torch.manual_seed({seed})") from error
        seed += 1
    assert seed > FIRST_SEED


def random_case(seed: int) -> Case:
    torch.manual_seed(seed)

    def draw(low: int, high: int) -> int:
        """Small sizes as often as large ones."""
        bound = int(torch.randint(low, high + 1, ()))
        return int(torch.randint(low, bound + 1, ()))

    padding = int(torch.randint(0, 2, ()))
    smallest = 4 - 2 * padding
    return Case(draw(1, 4), draw(1, 80), draw(1, 150), draw(smallest, 40), draw(smallest, 70), padding)
