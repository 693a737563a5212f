"""The whole network beside the same network of torch.nn layers in channels_last: step, inference, optimiser, data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskcore import models, ops, optim

Compare = Callable[..., None]


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


def _pair(image_size: int) -> tuple[models.Network, torch.nn.Module]:
    network = models.create("final", image_size=image_size, seed=0)
    twin: Any = models.torch_twin(network)
    return network, twin.to(memory_format=torch.channels_last)


def _pictures(n: int, size: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, size, size).to(memory_format=torch.channels_last)
    return x, torch.arange(n) % 3


def bench_training_step(compare: Compare, batch_size: int, image_size: int) -> None:
    """Forward, loss, backward, Adam with L2; PyTorch's with its fused Adam."""
    network, twin = _pair(image_size)
    x, target = _pictures(batch_size, image_size)
    ours = optim.Adam(network.parameter_groups(1e-4), lr=1e-4)
    kernels = {"block4_conv4.weight", "dense1.weight"}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in twin.named_parameters() if name in kernels], "weight_decay": 2e-4},
        {"params": [p for name, p in twin.named_parameters() if name not in kernels]},
    ]
    theirs = torch.optim.Adam(groups, lr=1e-4, fused=True)

    def step_ours() -> Tensor:
        ours.zero_grad()
        loss = ops.softmax_cross_entropy(network(x), target)
        loss.backward()
        ours.step()
        return loss

    def step_theirs() -> Tensor:
        theirs.zero_grad()
        loss = F.cross_entropy(twin(x), target)
        loss.backward()
        theirs.step()
        return loss

    first, second = step_ours().item(), step_theirs().item()
    # Dropout draws other masks in another flatten order: only the size of the loss can be compared.
    assert abs(first - second) < 0.5, f"the losses {first} and {second} are not of one network"
    compare(step_ours, step_theirs, flops=3 * _flops(network, batch_size))


@pytest.mark.parametrize("batch", [1, None], ids=["one", "batch"])
def bench_inference(compare: Compare, batch: int | None, batch_size: int, image_size: int) -> None:
    network, twin = _pair(image_size)
    network.eval()
    twin.eval()
    x, _ = _pictures(batch or batch_size, image_size)
    with torch.inference_mode():
        error = ((network(x) - twin(x)).norm() / twin(x).norm()).item()
        assert error <= 1e-4, f"the engines disagree by {error:.1e}"
        compare(lambda: network(x), lambda: twin(x), flops=_flops(network, len(x)))


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
