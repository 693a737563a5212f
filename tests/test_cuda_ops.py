"""csrc/ops_cuda.cpp without a GPU: compiled for the host, on tensors of the meta device in a GPU's place.

Of every operator: what it refuses, in a sentence that names the argument; the sizes and types of what it returns, which
are those of shape inference; and that it launches kernels. What it computes is tested as on a GPU, on the emulated
device; here only that faults seeded into the file are found there.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cuda_emulator
import pytest
import torch
import torch_devices
from cuda_emulator import CSRC
from torch import Tensor

from maskcore import ops  # noqa: F401 - registers shape inference

pytestmark = pytest.mark.skipif(not cuda_emulator.has_compiler(), reason="there is no C++ compiler")


class Device:
    """The GPU that is made up: its operators, its compute capability, and the kernels launched on it."""

    def __init__(self, kernels: cuda_emulator.Kernels, library: Path) -> None:
        self.emulator = kernels.emulator
        self.library = ctypes.CDLL(str(library))
        torch.ops.load_library(str(library))
        self.operators = getattr(torch.ops, torch_devices.META)
        self.launches = 0
        self.kernel = 0  # the one launched last

        def launched(kernel: int, *_: Any) -> None:
            self.launches += 1
            self.kernel = kernel

        size = ctypes.c_uint
        self.told = ctypes.CFUNCTYPE(None, ctypes.c_void_p, size, size, size, size, ctypes.c_size_t)(launched)

    def call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """The operator's results; launches are counted."""
        self.launches = 0
        self.emulator.cuda_emulator_set_shared_limit(227 * 1024)
        self.emulator.cuda_emulator_record_launches(self.told)
        try:
            found = getattr(self.operators, name)(*arguments)
        finally:
            self.emulator.cuda_emulator_record_launches(None)
        return found if isinstance(found, tuple) else () if found is None else (found,)


@pytest.fixture(scope="module")
def device() -> Device:
    kernels = torch_devices.all_kernels()
    return Device(kernels, torch_devices.on_meta(kernels))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Case(NamedTuple):
    """A call that must pass: the operator's arguments, tensors by their names in errors."""

    name: str
    tensors: dict[str, Tensor]
    rest: tuple[Any, ...]
    order: Callable[..., tuple[Any, ...]] | None = None  # where tensors do not all come first

    def arguments(self, **changed: Tensor) -> tuple[Any, ...]:
        tensors = {**self.tensors, **changed}
        return self.order(tensors, *self.rest) if self.order else (*tensors.values(), *self.rest)


def lists(tensors: dict[str, Tensor], *rest: Any) -> tuple[Any, ...]:
    """Adam's: a list of each; the step, which is the counted one's first, behind them."""
    four = [[tensors[name]] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")]
    return (*four, *([tensors["step"]] if "step" in tensors else []), *rest)


def cases(dtype: torch.dtype = torch.float32, precision: str = "tf32") -> list[Case]:
    """Every operator of ops_cuda.cpp. Images of 9 x 10 pixels, 5 -> 6 -> 7 channels, padding 1."""
    x, y, z2 = meta(2, 9, 10, 5, dtype=dtype), meta(2, 9, 10, 6, dtype=dtype), meta(2, 9, 10, 7, dtype=dtype)
    pooled, pooled2 = meta(2, 4, 5, 6, dtype=dtype), meta(2, 4, 5, 7, dtype=dtype)
    place, place2 = (tensor.to(torch.uint8) for tensor in (pooled, pooled2))
    weight, weight2, of_6, of_7 = meta(6, 5, 3, 3), meta(7, 6, 3, 3), meta(6), meta(7)
    first = {"x": x, "weight": weight}
    norm = {"gamma": of_6, "beta": of_6}
    statistics = {"mean": of_6, "var": of_6}
    head = {"weight1": weight, "bias1": of_6, **norm, "weight2": weight2}
    of_head = {"gram": meta(0, 0, dtype=torch.float64), **statistics}
    back = (1, precision, True)
    target = {"target": meta(4, dtype=torch.int64)}
    adam = {name: meta(3, 4) for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")}
    settings = (1e-3, 0.9, 0.999, 1e-7, 0.0)
    pictures = {"pictures": meta(2, 9, 10, 3, dtype=torch.uint8), "matrices": meta(2, 6, dtype=torch.float64)}
    return [
        Case("conv_relu", {**first, "bias": of_6}, (1, None, precision)),
        Case("conv_relu_max_pool", {**first, "bias": of_6}, (1, None, precision)),
        Case("_conv_relu_backward", {"dy": y, **first, "y": y}, back),
        Case("_conv_relu_max_pool_backward", {"dy": pooled, **first, "y": pooled, "argmax": place}, back),
        Case("conv_bn_relu_train", {**first, "bias": of_6, **norm}, (1e-3, 1, precision)),
        Case("_conv_bn_relu_train_backward", {"dy": y, **first, "z": y, **norm, **statistics}, (1e-3, *back)),
        Case("conv_bn_relu_conv_relu_train", {"x": x, **head, "bias2": of_7}, (1e-3, 1, 1, True, precision)),
        Case(
            "_conv_bn_relu_conv_relu_train_backward",
            {"dy": pooled2, "x": x, **head, "y": pooled2, "argmax": place2, "z": y, **of_head},
            (1e-3, 1, 1, True, precision, True),
        ),
        Case(
            "_conv_bn_relu_conv_relu_train_backward",
            {"dy": z2, "x": x, **head, "y": z2, "argmax": meta(0, 9, 10, 7, dtype=torch.uint8), "z": y, **of_head},
            (1e-3, 1, 1, False, precision, True),
        ),
        Case("max_pool", {"x": x}, ()),
        Case("_max_pool_backward", {"dy": pooled, "argmax": place}, (9, 10)),
        Case("softmax_cross_entropy", {"logits": meta(4, 3), **target}, ()),
        Case("_softmax_cross_entropy_backward", {"dloss": meta(), "probabilities": meta(4, 3), **target}, ()),
        Case("adam_", adam, (*settings, 1, True), lists),
        Case("adam_counted_", {**adam, "step": meta(dtype=torch.int64)}, (*settings, True), lists),
        Case("dropout", {"x": x, "seed": meta(1, dtype=torch.int64)}, (0.5,)),
        Case("warp", pictures, (0.0, 1 / 255, dtype == torch.bfloat16)),
    ]  # fmt: skip


CASES = cases()
IDS = [f"{i}{case.name}" for i, case in enumerate(CASES)]
TYPES = [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float32, "bf16"), (torch.bfloat16, "bf16")]


def test_every_operator_has_a_case() -> None:
    text = (CSRC / "ops_cuda.cpp").read_text()
    registered = {line.split('"')[1] for line in text.splitlines() if line.strip().startswith("m.impl(")}
    assert {case.name for case in CASES} == registered


@pytest.mark.parametrize(("dtype", "precision"), TYPES, ids=str)
@pytest.mark.parametrize("i", range(len(CASES)), ids=IDS)
def test_results_are_those_of_shape_inference(
    device: Device, i: int, dtype: torch.dtype, precision: str
) -> None:
    case = cases(dtype, precision)[i]
    found = device.call(case.name, *case.arguments())
    assert device.launches > 0
    expected = getattr(torch.ops.maskcore, case.name)(*case.arguments())
    expected = expected if isinstance(expected, tuple) else () if expected is None else (expected,)
    assert [(t.shape, t.stride(), t.dtype) for t in found] == [
        (t.shape, t.stride(), t.dtype) for t in expected
    ]


TENSORS = [(i, name) for i, case in enumerate(CASES) for name in case.tensors]
TENSOR_IDS = [f"{IDS[i]}-{name}" for i, name in TENSORS]


@pytest.mark.parametrize(("i", "name"), TENSORS, ids=TENSOR_IDS)
def test_a_tensor_that_does_not_fit_is_named(device: Device, i: int, name: str) -> None:
    """On another device, of another type, with another number of dimensions, not contiguous."""
    case = CASES[i]
    given = case.tensors[name]
    wrong = {
        rf"{name} must be on (the device of |a CUDA device)": torch.empty_like(given, device="cpu"),
        rf"{name} must be \w+( or bfloat16)?, is another type": given.to(torch.int16),
    }
    if not name.startswith(("parameters", "gradients", "exp_avg")):
        if case.name != "dropout" or name != "x":
            wrong[rf"{name} must have \d dimensions, has \d"] = given[None]
        if given.dim() >= 2 and given.numel() > 0:
            turned = given.transpose(0, -1).contiguous().transpose(0, -1)
            wrong[f"{name} must be contiguous"] = turned
    elif name != "parameters":
        wrong[f"{name} must be dense and laid out in memory as the parameter is"] = given.t().contiguous().t()
    if len(case.tensors) == 1:
        wrong = {sentence: tensor for sentence, tensor in wrong.items() if "device" not in sentence}
    for sentence, tensor in wrong.items():
        with pytest.raises(RuntimeError, match=sentence):
            device.call(case.name, *case.arguments(**{name: tensor}))
        assert device.launches == 0


@pytest.mark.parametrize("i", range(len(CASES)), ids=IDS)
def test_a_gpu_that_is_too_old_is_named(device: Device, i: int) -> None:
    device.library.meta_device_set_capability(75)
    try:
        with pytest.raises(
            RuntimeError, match=r"is on cuda:0, whose compute capability 7\.5 is below 8\.0: maskcore's"
        ):
            device.call(CASES[i].name, *CASES[i].arguments())
    finally:
        device.library.meta_device_set_capability(80)


def test_hoppers_own_products_are_for_hopper(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And left out where MASKCORE_WGMMA is 0: then it launches what every other GPU does."""

    def kernel(capability: int, wanted: str) -> int:
        monkeypatch.setenv("MASKCORE_WGMMA", wanted)
        device.library.meta_device_set_capability(capability)
        try:
            x, weight = meta(1, 8, 8, 64, dtype=torch.bfloat16), meta(64, 64, 3, 3)
            device.call("conv_relu", x, weight, meta(64), 1, None, "bf16")
        finally:
            device.library.meta_device_set_capability(80)
        return device.kernel

    own = kernel(90, "")
    assert kernel(90, "1") == own
    assert all(kernel(capability, "1") == kernel(80, "") != own for capability in (80, 86, 89, 100, 120))
    assert kernel(90, "0") == kernel(80, "")
    with pytest.raises(RuntimeError, match="MASKCORE_WGMMA must be 0 or 1, is yes"):
        kernel(90, "yes")


IMAGE, WEIGHT, BIAS = meta(1, 8, 8, 5), meta(6, 5, 3, 3), meta(6)
SECOND = (WEIGHT, BIAS, BIAS, BIAS, meta(7, 6, 3, 3), meta(7), 1e-3)
HEAD = "conv_bn_relu_conv_relu_train"
TWO = [meta(2)]
SETTINGS = (1e-3, 0.9, 0.99, 1e-7, 0.0)
LONG = r"must have fewer than 2\^31 elements in a row"


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("conv_relu", (meta(1, 8, 8, 4), WEIGHT, BIAS, 0), "weight must have size 4 in dimension 1, has 5"),
        ("conv_relu", (IMAGE, meta(6, 5, 5, 5), BIAS, 0), "weight must have size 3 in dimension 2, has 5"),
        ("conv_relu", (IMAGE, WEIGHT, meta(7), 0), "bias must have size 6 in dimension 0, has 7"),
        ("conv_relu", (IMAGE, WEIGHT, BIAS, 2), "padding must be 0 or 1, is 2"),
        (HEAD, (IMAGE, *SECOND, 2, 0, True), "padding1 must be 0 or 1, is 2"),
        (HEAD, (IMAGE, *SECOND, 0, 2, True), "padding2 must be 0 or 1, is 2"),
        (HEAD, (meta(1, 5, 8, 5), *SECOND, 0, 0, True), "the second convolution gives 1 x 4"),
        ("conv_relu", (IMAGE, WEIGHT, BIAS, 0, None, "fp8"), "precision must be ieee, tf32 or bf16, is fp8"),
        ("conv_relu", (IMAGE, WEIGHT, BIAS, 0, meta(1)), "transformed must be None on a CUDA device"),
        ("conv_relu", (meta(1, 2, 8, 5), WEIGHT, BIAS, 0), "x must be at least 3 pixels high and wide, is 2 x 8"),
        ("conv_relu", (meta(1, 8, 8, 0), meta(6, 0, 3, 3), BIAS, 0), "weight must have at least one input"),
        ("conv_relu_max_pool", (meta(1, 3, 8, 5), WEIGHT, BIAS, 0), "x is too small to be pooled: .* gives 1 x 6"),
        ("conv_bn_relu_train", (meta(0, 8, 8, 5), WEIGHT, *[BIAS] * 3, 1e-3, 0), "x must hold at least one image"),
        ("max_pool", (meta(1, 1, 8, 5),), "x must be at least 2 pixels high and wide, is 1 x 8"),
        ("dropout", (meta(8), meta(1, dtype=torch.int64), 1.5), r"p must lie in \[0, 1\], is 1\.5"),
        ("softmax_cross_entropy", (meta(0, 3), meta(0, dtype=torch.int64)), "logits must hold at least one sample"),
        ("adam_", (TWO, [], [], [], *SETTINGS, 1, True), "must be as many as parameters"),
        ("adam_", (TWO, TWO, TWO, TWO, *SETTINGS, 0, True), "step must count from 1, is 0"),
        # Sizes that the kernels' arithmetic does not reach: a row of 2^31 elements, 2^31 pixels.
        ("conv_relu", (meta(1, 8, 2**29, 5), WEIGHT, BIAS, 0), f"x {LONG}, has 536870912 x 5"),
        ("conv_relu", (meta(1, 8, 2**28, 5), meta(9, 5, 3, 3), meta(9), 0), f"the convolution's output {LONG}"),
        ("max_pool", (meta(1, 8, 2**29, 5),), f"x {LONG}"),
        (
            "warp",
            (meta(1, 8, 2**30, 3, dtype=torch.uint8), meta(1, 6, dtype=torch.float64), 0.0, 1.0),
            f"pictures {LONG}",
        ),
        ("conv_relu", (meta(2**25, 8, 8, 5), WEIGHT, BIAS, 0), r"x must have fewer than 2\^31 pixels, has 33554432"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(
    device: Device, name: str, arguments: tuple[Any, ...], sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        device.call(name, *arguments)
    assert device.launches == 0


@pytest.mark.parametrize("C", [3, 32])
def test_tensors_of_more_than_2_31_elements_are_taken(device: Device, C: int) -> None:
    x, weight, bias = meta(4096, 256, 256, C), meta(32, C, 3, 3), meta(32)
    y = device.call("conv_relu", x, weight, bias, 0)[0]
    assert y.shape == (4096, 254, 254, 32)
    assert y.numel() > 2**31
    assert device.launches >= 1
    device.call("_conv_relu_backward", y, x, weight, y, 0, "tf32", True)
    assert device.launches >= 2


def test_nothing_is_launched_for_no_images(device: Device) -> None:
    assert device.call("conv_relu", meta(0, 8, 8, 5), WEIGHT, BIAS, 0)[0].shape == (0, 6, 6, 6)
    assert device.launches == 0


# In a process of its own, since an operator can be registered once.
CALLS = """
import os, sys, torch, torch_devices
from maskcore import ops
kernels = torch_devices.load_emulated({changes!r})
operands = torch.randn(2, 5, 9, 10), torch.randn(6, 5, 3, 3), *torch.randn(3, 6)
operands = [operand.to("emulated:0").requires_grad_() for operand in operands]
try:
    ops.conv_bn_relu_train(*operands)[0].sum().backward()
except RuntimeError as error:
    kernels.raise_fault()
    sys.exit(str(error))
os._exit(0)  # autograd's thread may be about to let go of what it holds, for which Python must still be there
"""
#: Faults of ops_cuda.cpp, and what is said of them.
FAULTS = {
    "none": ({}, ""),
    "workspace too small": (
        {"{bytes}, ScalarType::Byte": "{bytes / 2}, ScalarType::Byte"},
        r"kernel conv_halo_tile_kernel, .* out of bounds: .* past the end of a tensor of \d+ bytes",
    ),
    "result not written": (
        {
            "data<float>(dgamma),\n          data<float>(dbeta), room": "data<float>(dbeta), data<float>(dbeta), room"
        },
        "nothing wrote element 0 of a result of 24 bytes",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulated_device_finds_faults(name: str) -> None:
    changes, sentence = FAULTS[name]
    command = [sys.executable, "-c", CALLS.format(changes=changes)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode == 0) == (not changes), done.stderr
    assert re.search(sentence, done.stderr), done.stderr
