"""The whole network beside the same network of torch.nn layers in channels_last: step, inference, optimiser, data."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import engines
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskcore import models, nn, ops, optim

Compare = Callable[..., None]
Compiled = Callable[[Any], dict[str, Any]]


def _flops(network: models.Network, n: int) -> int:
    """Floating-point operations of a forward pass of direct convolutions and matrix products."""
    total = 0
    for _, layer, shape, output in network.layers:
        if isinstance(layer, models.Conv):
            H, W, C = shape
            total += 2 * 9 * C * layer.channels * (H + 2 * layer.padding - 2) * (W + 2 * layer.padding - 2)
        elif isinstance(layer, models.Dense):
            total += 2 * shape[0] * output[0]
    return total * n


def _pair(image_size: int, precision: ops.Precision = "ieee") -> tuple[models.Network, Any]:
    network = models.create("final", image_size=image_size, precision=precision, seed=0)
    twin: Any = models.torch_twin(network)
    return network, twin.to(memory_format=torch.channels_last)


def _pictures(n: int, size: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, size, size).to(memory_format=torch.channels_last)
    return x, torch.arange(n) % 3


def _step(network: Any, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, loss_of: Any) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = loss_of(network(x), target)
    loss.backward()
    optimizer.step()
    return loss


def _first_losses(network: models.Network, twin: Any, x: Tensor, target: Tensor) -> list[float]:
    """Of copies in float32 without dropout: the loss of PyTorch's first step, and of the network's second."""
    network, twin = copy.deepcopy(network).train(), copy.deepcopy(twin).train()
    for layer in (*network.modules(), *twin.modules()):
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
        elif isinstance(layer, nn.ConvReLU | nn.ConvBNReLU):
            layer.precision = "ieee"
    optimizer = optim.Adam(network.parameter_groups(1e-4), lr=1e-4)
    _step(network, optimizer, x, target, ops.softmax_cross_entropy)
    with torch.no_grad():
        return [F.cross_entropy(twin(x), target).item(), F.cross_entropy(network(x), target).item()]


@pytest.mark.parametrize("precision", get_args(ops.Precision)[::2])
def bench_training_step(
    compare: Compare, compiled: Compiled, batch_size: int, image_size: int, precision: ops.Precision
) -> None:
    """Forward, loss, backward, Adam with L2; PyTorch's with its fused Adam, in float32 and under bfloat16 autocast.

    Keras joins in float32 where it is installed: its first losses, without dropout, must be PyTorch's first and then
    maskcore's, whose Adam has Keras' epsilon.
    """
    network, twin = _pair(image_size, precision)
    x, target = _pictures(batch_size, image_size)
    ours = optim.Adam(network.parameter_groups(1e-4), lr=1e-4)
    kernels = {"block4_conv4.weight", "dense1.weight"}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in twin.named_parameters() if name in kernels], "weight_decay": 2e-4},
        {"params": [p for name, p in twin.named_parameters() if name not in kernels]},
    ]
    theirs = torch.optim.Adam(groups, lr=1e-4, fused=True)

    def step_ours() -> Tensor:
        return _step(network, ours, x, target, ops.softmax_cross_entropy)

    def step_autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return _step(twin, theirs, x, target, F.cross_entropy)

    peers: dict[str, Callable[[], Any]] = {
        "PyTorch": lambda: _step(twin, theirs, x, target, F.cross_entropy),
        "PyTorch bf16": step_autocast,
    }
    for name, forward in compiled(twin).items():
        peers[name] = functools.partial(_step, forward, theirs, x, target, F.cross_entropy)
    # Dropout draws other masks in another flatten order: what can be compared is the networks without it.
    with torch.no_grad():
        ours_now, theirs_now = network.eval()(x), twin.eval()(x)
    network.train(), twin.train()
    error = ((ours_now - theirs_now).norm() / theirs_now.norm()).item()
    limit = 1e-3 if precision == "ieee" else 0.1
    assert error <= limit, f"the networks disagree by {error:.1e}"
    for name, build in engines.installed_steps().items():
        settings = {"threads": torch.get_num_threads(), "l2": 1e-4, "lr": 1e-4}
        check = build(network, x, target, dropout=False, **settings)
        expected, found = _first_losses(network, twin, x, target), [check(), check()]
        assert np.allclose(found, expected, rtol=1e-3), f"{name}'s losses are {found}, not {expected}"
        peers[name] = build(network, x, target, **settings)
    compare(step_ours, peers, flops=3 * _flops(network, batch_size))


@pytest.mark.parametrize("precision", get_args(ops.Precision)[::2])
@pytest.mark.parametrize("batch", [1, None], ids=["one", "batch"])
def bench_inference(
    compare: Compare,
    compiled: Compiled,
    batch: int | None,
    precision: ops.Precision,
    batch_size: int,
    image_size: int,
    tmp_path: Path,
) -> None:
    """Beside PyTorch and every other engine that is installed (pip install ".[bench,tensorflow]"); with bfloat16
    products also beside the modes that others have for it."""
    network, twin = _pair(image_size)
    fast = models.for_inference(network, precision)
    network.eval(), twin.eval()
    x, _ = _pictures(batch or batch_size, image_size)
    threads, pictures = torch.get_num_threads(), x.contiguous()
    calls: dict[str, Callable[[], Any]] = {}
    for given, builders in (
        (pictures, engines.installed() | engines.installed_bfloat16()),
        (x, engines.installed_channels_last()),
    ):
        for name, build in builders.items():
            calls[name] = functools.partial(build(network, given, tmp_path, threads), given)

    def autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return twin(x)

    with torch.inference_mode():
        peers: dict[str, Callable[[], Any]] = {"PyTorch": lambda: twin(x), "PyTorch bf16": autocast}
        peers |= {name: functools.partial(forward, x) for name, forward in compiled(twin).items()}
        peers |= calls
        expected = twin(x)
        for name, call in {f"maskcore {precision}": lambda: fast(x), **peers}.items():
            logits = torch.as_tensor(call()).float()
            error = ((logits - expected).norm() / expected.norm()).item()
            limit = 0.1 if name.endswith("bf16") else 1e-3
            assert error <= limit, f"{name} disagrees with PyTorch by {error:.1e}"
        compare(lambda: fast(x), peers, flops=_flops(network, len(x)))


_STEPS = """
import pathlib, sys, torch
from maskcore import models, ops, optim
engine, size, batch, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
network = models.create("final", image_size=size, seed=0)
if engine == "PyTorch":
    network = models.torch_twin(network).to(memory_format=torch.channels_last)
    optimizer, loss_of = torch.optim.Adam(network.parameters(), fused=True), torch.nn.functional.cross_entropy
else:
    optimizer, loss_of = optim.Adam(network.parameters()), ops.softmax_cross_entropy
x, target = torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last), torch.arange(batch) % 3
def peak():  # the resource module's figure would include the parent's at the fork
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
before = peak()
for _ in range(3):
    optimizer.zero_grad()
    loss_of(network(x), target).backward()
    optimizer.step()
print(before, peak())
"""


@pytest.mark.parametrize("batch", [8, 32])
def bench_peak_memory(compare_memory: Callable[..., None], image_size: int, batch: int) -> None:
    """The largest resident size of a process that makes three training steps, and what of it the steps added."""

    if not Path("/proc/self/status").exists():
        pytest.skip("the largest resident size is read from Linux' /proc")

    def measure(engine: str) -> tuple[float, float]:
        arguments = [engine, str(image_size), str(batch), str(torch.get_num_threads())]
        command = [sys.executable, "-c", _STEPS, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        before, peak = (int(number) / 2**10 for number in done.stdout.split())
        return before, peak

    compare_memory(lambda: measure("maskcore"), lambda: measure("PyTorch"))


def bench_adam(compare: Compare, image_size: int) -> None:
    """One step over all parameters beside torch.optim.Adam(fused=True): 4 floats read and 3 written each."""
    network, twin = _pair(image_size)
    parameters = sum(p.numel() for p in network.parameters())
    for module in (network, twin):
        for p in module.parameters():
            p.grad = torch.full_like(p, 1e-3)
    ours = optim.Adam(network.parameters(), lr=1e-4)
    theirs = torch.optim.Adam(twin.parameters(), lr=1e-4, fused=True)
    compare(ours.step, theirs.step, bytes=7 * 4 * parameters)


def bench_data(compare: Compare, image_size: int, tmp_path: Path, batch_size: int) -> None:
    """An epoch of cached, augmented pictures beside torch.nn.functional's affine warp of the same batch."""
    from maskcore import data

    n = 8 * batch_size
    generator = np.random.default_rng(0)
    for i in range(n):
        pixels = generator.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    pictures = [data.Picture(tmp_path / f"{i}.png", i % 3) for i in range(n)]
    preprocess = data.Preprocess(size=image_size)
    loader = data.Loader(pictures, preprocess, batch_size, augment=data.Augment(), shuffle=True, workers=0)
    loader.scan(progress=False)
    source = torch.from_numpy(np.stack([data.load(picture.path, preprocess) for picture in pictures]))
    matrices = torch.eye(2, 3).repeat(batch_size, 1, 1) * 1.1

    def epoch_ours() -> None:
        for _ in loader.epoch(0):
            pass

    def epoch_theirs() -> None:
        for chunk in source.split(batch_size):
            x = chunk.permute(0, 3, 1, 2).float().mul_(1 / 255)
            grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
            F.grid_sample(x, grid, align_corners=False)

    compare(epoch_ours, epoch_theirs, bytes=5 * source.nbytes)
