"""The devices and the yardstick of every numerical test, and what keeps the tests independent."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator

import cuda_emulator
import pytest
import torch
import torch_devices
from torch import Tensor

import maskcore

EPS32 = torch.finfo(torch.float32).eps


def largest(values: Tensor) -> float:
    """max|values|; NaN if there is one."""
    return float(values.detach().abs().max())


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same random state and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


CUDA_STATE = str(maskcore.config()["CUDA"])
#: The GPUs that are there and that maskcore's kernels run on.
GPUS = [
    f"cuda:{i}"
    for i in range(torch.cuda.device_count())
    if torch.cuda.get_device_name() == CUDA_STATE and torch.cuda.get_device_capability(i) >= (8, 0)
]


#: Where there is none, devices that run the kernels' sources on the emulator: of compute capability 8.0 and 9.0.
EMULATED = ["emulated:0", "emulated:1"] if not GPUS and cuda_emulator.has_compiler() else []
#: Of the tests on those, which take twenty minutes, one in so many is not marked slow.
SAMPLED = 12


@pytest.fixture(scope="session")
def emulated() -> cuda_emulator.Kernels:
    """The kernels of the devices "emulated", which are there from then on."""
    return torch_devices.load_emulated()


def _ready(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device that the fixture is asked for; a test on the emulator ends well if that has found nothing."""
    kernels = request.getfixturevalue("emulated") if request.param in EMULATED else None
    yield str(request.param)
    if kernels is not None:
        kernels.raise_fault()


@pytest.fixture(params=["cpu", *GPUS, *EMULATED[:1]])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device that operators can run on.

    Numbers are drawn, and references computed, on the CPU: they are the same for all devices.
    """
    yield from _ready(request)


@pytest.fixture(params=[*GPUS, *EMULATED] or ["cuda:0"])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every GPU, or what stands for one; where there is neither the test is skipped."""
    if request.param not in (*GPUS, *EMULATED):
        pytest.skip(f"needs a GPU or a C++ compiler: maskcore's CUDA kernels are {CUDA_STATE}")
    yield from _ready(request)


@pytest.fixture(params=GPUS or ["cuda:0"])
def cuda(request: pytest.FixtureRequest) -> str:
    """Every GPU; where there is none the test is skipped."""
    if not GPUS:
        pytest.skip(f"needs a GPU: maskcore's CUDA kernels are {CUDA_STATE}")
    return str(request.param)


def _on_one_of(item: pytest.Item, devices: list[str]) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("device") in devices or params.get("gpu") in devices


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the CPU's algorithms a GPU knows nothing: there a test runs once. On the emulator most are slow."""

    def repeats(item: pytest.Item) -> bool:
        algorithm = getattr(getattr(item, "callspec", None), "params", {}).get("algorithm", "direct")
        return _on_one_of(item, [*GPUS, *EMULATED]) and algorithm != "direct"

    repeated = [item for item in items if repeats(item)]
    if repeated:
        config.hook.pytest_deselected(items=repeated)
        items[:] = [item for item in items if not repeats(item)]
    for item in items:
        if _on_one_of(item, EMULATED) and zlib.crc32(item.name.encode()) % SAMPLED:
            item.add_marker("slow")


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(_on_one_of(item, EMULATED) for item in session.items):
        torch_devices.register_emulated()


# Rounding errors of Winograd's F(4x4, 3x3) and F(6x6, 3x3) over those of a direct convolution: 5.3 and 23 in the root
# mean square (measured with the points of csrc/winograd_transforms.h), and a tile's largest is farther from its mean.
WINOGRAD_ROUNDING = {"winograd4": 10, "winograd6": 43}


@pytest.fixture(params=["direct", *WINOGRAD_ROUNDING])
def algorithm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every convolution of the test on the CPU is computed this way, whatever its shape."""
    monkeypatch.setenv("MASKCORE_CONV", request.param)
    return str(request.param)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution of the test is computed directly, as on a GPU: sums of small whole numbers are exact."""
    monkeypatch.setenv("MASKCORE_CONV", "direct")


@pytest.fixture
def as_exact_as_torch(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``check(ours, torch32, exact, terms=1, name="")``: our error is at most twice PyTorch's own.

    Where MASKCORE_CONV names Winograd's tiles, ``rounding`` times as much, by default WINOGRAD_ROUNDING.

    ``exact`` is the float64 result, ``torch32`` PyTorch's float32 one. PyTorch may be exact by luck, or by a
    shorter chain of additions, so a floor is allowed besides: a sum of ``terms`` numbers is rounded ``terms``
    times, each time evenly within eps / 2 of the partial sum (standard deviation eps / sqrt(12)), so that
    sqrt(terms) eps of the largest result is 3.5 standard deviations. ``magnitude`` is the size of the partial
    sums where the results may be smaller, as the difference of large numbers is. ``measure`` is the largest
    error, or another norm of it.
    """

    def check(
        ours: Tensor,
        torch32: Tensor,
        exact: Tensor,
        terms: int = 1,
        name: str = "result",
        magnitude: float = 0.0,
        measure: Callable[[Tensor], float] = largest,
        rounding: float | None = None,
    ) -> None:
        assert ours.dtype == torch.float32, f"{name} is {ours.dtype}"
        assert exact.dtype == torch.float64, f"the reference of {name} is {exact.dtype}"
        assert ours.shape == torch32.shape == exact.shape, f"{name}: {ours.shape}, reference {exact.shape}"
        if exact.numel() == 0:
            return
        error, yardstick = measure(ours.double() - exact), measure(torch32.double() - exact)
        floor = math.sqrt(terms) * EPS32 * max(measure(exact), magnitude)
        limit = 2 * yardstick + floor
        usual = WINOGRAD_ROUNDING.get(os.environ.get("MASKCORE_CONV", ""), 1)
        limit *= usual if rounding is None else rounding
        record_property(name, f"error {error:.3g} torch {yardstick:.3g} floor {floor:.3g}")
        # A NaN on either side makes the comparison false.
        assert error <= limit, (
            f"{name}: error {error:.3g} > {limit:.3g} (torch {yardstick:.3g}, floor {floor:.3g})"
        )

    return check


@pytest.fixture(scope="session")
def forward() -> cuda_emulator.Kernels:
    """The CUDA kernels of conv_relu, on the emulator."""
    return cuda_emulator.build("conv_relu_cuda.cu")


@pytest.fixture(scope="session")
def backward() -> cuda_emulator.Kernels:
    """Those of its backward pass."""
    return cuda_emulator.build("conv_relu_backward_cuda.cu")
