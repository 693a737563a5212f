"""The whole network on a GPU: maskcore's operators one by one and as one CUDA graph, beside PyTorch's in channels_last
memory, eager and compiled. Rows of one group stand together; rates are pictures a second.

docs/cuda_roofline.md has the times that the bytes and operations of these steps allow.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import maskcore
from maskcore import cuda_graph, data, models, ops, optim
from maskcore.augment import IDENTITY

ENGINES = ("maskcore eager", "maskcore graph", "PyTorch", "torch.compile max-autotune")
PRECISIONS: tuple[ops.Precision, ...] = ("tf32", "bf16")
BATCHES = (32, 256)
CALLS = 10


@pytest.fixture
def device() -> torch.device:
    state = str(maskcore.config()["CUDA"])
    if not torch.cuda.is_available() or state != torch.cuda.get_device_name():
        pytest.skip(f"needs a GPU: maskcore's CUDA kernels are {state}")
    return torch.device("cuda")


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Callable[[], Any], int], None]:
    """measure(call, pictures) times CALLS calls in a row, as training makes them, until the GPU has ended the last."""

    def run(call: Callable[[], Any], pictures: int) -> None:
        def whole() -> None:
            for _ in range(CALLS):
                call()
            torch.cuda.synchronize()

        benchmark.group = request.node.name.replace(request.node.callspec.params["engine"], "")
        for _ in range(2):
            whole()
        torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(whole, rounds=request.config.getoption("--rounds"))
        seconds = benchmark.stats.stats.median / CALLS
        benchmark.extra_info.update(
            {
                "GPU": torch.cuda.get_device_name(),
                "images/s": pictures / seconds,
                "peak MiB": torch.cuda.max_memory_allocated() / 2**20,
            }
        )

    return run


@contextlib.contextmanager
def fastest_settings() -> Iterator[None]:
    """What PyTorch does not do by itself: TF32, and the choice of cuDNN's algorithms by trying them."""
    wanted: list[tuple[Any, str]] = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
    ]
    before = [getattr(backend, name) for backend, name in wanted]
    for backend, name in wanted:
        setattr(backend, name, True)
    yield
    for (backend, name), value in zip(wanted, before, strict=True):
        setattr(backend, name, value)


def _stored(batch: int, size: int) -> data.StoredBatch:
    pictures = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    matrices = torch.tensor([IDENTITY] * batch, dtype=torch.float64)
    return data.StoredBatch(pictures, matrices, torch.arange(batch) % 3, torch.arange(batch), 0)


def _images(batch: data.StoredBatch, device: torch.device, dtype: torch.dtype) -> Tensor:
    return ops.warp(batch.pictures.to(device), batch.matrices.to(device), dtype=dtype)


def _autocast(precision: ops.Precision) -> Any:
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16")


def _peer(network: models.Network, engine: str, device: torch.device) -> Any:
    twin: Any = models.torch_twin(network)
    twin = twin.to(device, memory_format=torch.channels_last)
    return torch.compile(twin, mode="max-autotune") if "compile" in engine else twin


@dataclasses.dataclass(frozen=True)
class Case:
    """An engine at a precision and a batch: the network, on the GPU, and pictures for it."""

    engine: str
    precision: ops.Precision
    device: torch.device
    network: models.Network
    stored: data.StoredBatch


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> ops.Precision:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(device: torch.device, image_size: int, batch: int, precision: ops.Precision, engine: str) -> Case:
    network = models.create("final", image_size=image_size, precision=precision, seed=0).to(device)
    return Case(engine, precision, device, network, _stored(batch, image_size))


def bench_cuda_training_step(case: Case, measure: Callable[..., None]) -> None:
    """Forward, loss, backward, Adam with L2. The graph's rows have the upload and the augmentation besides."""
    network, stored, device = case.network.train(), case.stored, case.device
    engine, precision, batch = case.engine, case.precision, len(case.stored.labels)
    target = stored.labels.to(device)
    with fastest_settings():
        if engine.startswith("maskcore"):
            optimizer = optim.Adam(network.parameter_groups(1e-4), lr=1e-4)
            if engine == "maskcore graph":
                graph = cuda_graph.GraphStep(network, optimizer, cuda_graph.Cuda(device), batch, fill=0)
                measure(lambda: graph(stored), batch)
                return
            x = _images(stored, device, torch.bfloat16 if precision == "bf16" else torch.float32)

            def step() -> None:
                ops.softmax_cross_entropy(network(x).float(), target).backward()
                optimizer.step()
                optimizer.zero_grad()
        else:
            twin = _peer(network, engine, device)
            adam = torch.optim.Adam(twin.parameters(), lr=1e-4, fused=True)
            x = _images(stored, device, torch.float32)

            def step() -> None:
                with _autocast(precision):
                    loss = F.cross_entropy(twin(x), target)
                loss.backward()
                adam.step()
                adam.zero_grad()

        measure(step, batch)


def bench_cuda_inference(case: Case, measure: Callable[..., None]) -> None:
    network, device = case.network.eval(), case.device
    engine, precision, batch = case.engine, case.precision, len(case.stored.labels)
    with fastest_settings(), torch.inference_mode():
        x = _images(case.stored, device, torch.float32)
        expected = models.torch_twin(network)(x)
        if engine.startswith("maskcore"):
            fast = models.for_inference(network)
            given = x.bfloat16() if precision == "bf16" else x

            def call() -> Tensor:
                return fast(given)

            if engine == "maskcore graph":
                device_of_graph = cuda_graph.Cuda(device)
                device_of_graph.warm_up(call)
                logits: list[Tensor] = []
                replay = device_of_graph.capture(lambda: logits.append(call()))
                measure(replay, batch)
                found = logits[0]
            else:
                measure(call, batch)
                found = call()
        else:
            twin = _peer(network, engine, device).eval()

            def autocast_call() -> Tensor:
                with _autocast(precision):
                    return twin(x)  # type: ignore[no-any-return]

            measure(autocast_call, batch)
            found = autocast_call()
    error = float((found.float() - expected).norm() / expected.norm())
    assert error <= (0.1 if precision == "bf16" else 1e-2), f"{engine} is off by {error:.1e}"
