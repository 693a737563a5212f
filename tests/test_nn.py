"""The layers as torch modules, and each of Keras' rules where PyTorch's default gives something else."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskcore import nn, ops


def small_network(p: float = 0.0) -> torch.nn.Sequential:
    """[N, 3, 12, 12] -> [N, 3], every layer once."""
    return torch.nn.Sequential(
        nn.ConvBNReLU(3, 8),
        nn.ConvReLU(8, 8, padding=1),
        nn.MaxPool2d(),
        nn.ConvReLU(8, 16, padding=1, pool=True),
        nn.Flatten(),
        nn.Dropout(p),
        nn.Dense(64, 16, relu=True),
        nn.Dense(16, 3),
    )


def pictures(N: int = 2) -> Tensor:
    return torch.rand(N, 3, 12, 12).contiguous(memory_format=torch.channels_last)


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "ConvReLU": (lambda: nn.ConvReLU(3, 5, padding=1), (2, 3, 7, 8)),
    "ConvReLU-pool": (lambda: nn.ConvReLU(3, 5, pool=True), (2, 3, 7, 8)),
    "ConvBNReLU": (lambda: nn.ConvBNReLU(3, 5), (2, 3, 7, 8)),
    "MaxPool2d": (lambda: nn.MaxPool2d(), (2, 3, 7, 8)),
    "Dense": (lambda: nn.Dense(6, 4, relu=True), (2, 6)),
    "Dropout": (lambda: nn.Dropout(0.0), (2, 6)),
    "Flatten": (lambda: nn.Flatten(), (2, 3, 7, 8)),
    "all": (small_network, (2, 3, 12, 12)),
}


# ---- torch modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_state_dict_round_trip(layer: str) -> None:
    make, shape = LAYERS[layer]
    first, second, x = make(), make(), torch.randn(shape)
    first(x)  # moves running statistics
    assert second.load_state_dict(first.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_deepcopy_is_independent(layer: str) -> None:
    make, shape = LAYERS[layer]
    first, x = make(), torch.randn(shape)
    second = copy.deepcopy(first)
    assert torch.equal(first(x), second(x))
    before = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        for p in second.parameters():
            p.add_(1)
    second(x)
    assert all(torch.equal(value, before[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_fire(layer: str) -> None:
    make, shape = LAYERS[layer]
    module, fired = make(), []
    module.register_forward_pre_hook(lambda *_: fired.append("before"))
    module.register_forward_hook(lambda *_: fired.append("forward"))
    module.register_full_backward_hook(lambda *_: fired.append("backward"))
    module(torch.randn(shape, requires_grad=True)).square().sum().backward()
    assert fired == ["before", "forward", "backward"]


@pytest.mark.parametrize("layer", ["ConvReLU", "ConvBNReLU", "Dense", "all"])
@pytest.mark.parametrize("train", [True, False])
def test_to_another_dtype_says_what_is_supported(layer: str, train: bool, device: str) -> None:
    make, shape = LAYERS[layer]
    module, x = make().to(device, torch.float64).train(train), torch.randn(shape).to(device)
    with pytest.raises(TypeError, match=r"x must be float32( or bfloat16)?, is torch\.float64"):
        module(x.double())
    with pytest.raises((TypeError, RuntimeError), match=r"(weight|bias) must be float32"):
        module(x)
    module.to(torch.float32)(x)


def test_to_channels_last_changes_nothing(device: str) -> None:
    network, x = small_network().to(device), pictures().to(device)
    dlogits = torch.randn(2, 3).to(device)
    converted = copy.deepcopy(network).to(memory_format=torch.channels_last)
    assert converted[0].weight.is_contiguous(memory_format=torch.channels_last)
    for module in (network, converted):
        module(x).backward(dlogits)
    for p, q in zip(network.parameters(), converted.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert torch.equal(p, q)


def test_channels_last_goes_through(device: str) -> None:
    """No layer makes the next one convert its input."""
    x = pictures().to(device)
    for layer in small_network().to(device)[:4]:
        x = layer(x)
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert nn.Flatten()(x).data_ptr() == x.data_ptr()


def test_train_and_eval(device: str) -> None:
    layer, x = nn.ConvBNReLU(3, 5).to(device), torch.randn(4, 3, 8, 8).to(device)
    assert not torch.equal(layer.train()(x), layer.eval()(x))
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    layer.train()(x)
    assert not torch.equal(layer.running_mean, before["running_mean"])
    assert not torch.equal(layer.running_var, before["running_var"])


def test_running_statistics_carry_no_graph(device: str) -> None:
    layer = nn.ConvBNReLU(3, 5).to(device)
    layer(torch.randn(2, 3, 6, 6).to(device))
    assert not layer.running_mean.requires_grad
    assert layer.running_mean.grad_fn is None


@pytest.mark.parametrize("make", [nn.ConvReLU, nn.ConvBNReLU])
def test_bad_layers(make: Callable[..., torch.nn.Module]) -> None:
    for padding in (2, -1, "same"):
        with pytest.raises(ValueError, match=r"padding must be 0 \(valid\) or 1 \(same\)"):
            make(3, 4, padding)
    for channels in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match="at least one input and one output"):
            make(*channels)
    with pytest.raises(ValueError, match="moving_variance must be"):
        nn.ConvBNReLU(3, 4, moving_variance="keras")
    with pytest.raises(ValueError, match="at least one input and one output"):
        nn.Dense(0, 3)


@pytest.mark.parametrize("layer", LAYERS)
def test_repr_names_the_layer(layer: str) -> None:
    module = LAYERS[layer][0]()
    assert type(module).__name__ in repr(module)


# ---- export, compile, distributed ----------------------------------------------------------------


def step(network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    torch.manual_seed(0)  # dropout
    return ops.softmax_cross_entropy(network(x), target)


@pytest.mark.parametrize("train", [True, False])
def test_export(train: bool) -> None:
    network = small_network().train(train)
    x = pictures()
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("N", min=2)},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "maskcore.conv_relu.default" in targets  # an opaque operator, not taken apart
    assert "maskcore.max_pool.default" in targets
    other = pictures(5)
    assert torch.equal(exported.module()(other), copy.deepcopy(network)(other))


def check_compiled(backend: str) -> None:
    network, x, target = small_network(0.25), pictures(4), torch.tensor([0, 2, 1, 1])
    eager = copy.deepcopy(network)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    losses = [step(f, x, target) for f in (compiled, eager)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for p, q in zip(network.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for name, value in network.named_buffers():
        torch.testing.assert_close(value, eager.get_buffer(name))


def test_compile_without_graph_breaks() -> None:
    check_compiled("aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor draws dropout masks from a generator of its own unless told to fall back.
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)
    check_compiled("inductor")


def distributed_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0 if rank == 0 else 99)  # rank 0's weights are the ones that count
    network = small_network()
    wrapped = torch.nn.parallel.DistributedDataParallel(network)
    x, target = distributed_batch(rank)
    ops.softmax_cross_entropy(wrapped(x), target).backward()
    torch.save({key: p.grad for key, p in network.named_parameters()}, f"{folder}/gradients{rank}.pt")
    torch.distributed.destroy_process_group()


def distributed_batch(rank: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(rank)
    return torch.rand(3, 3, 12, 12, generator=drawn), torch.randint(0, 3, (3,), generator=drawn)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_distributed_gradients_are_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(distributed_worker, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    network = small_network()
    expected: list[dict[str, Tensor]] = []
    for rank in range(2):
        own = copy.deepcopy(network)  # each process has the statistics of its own batch
        x, target = distributed_batch(rank)
        ops.softmax_cross_entropy(own(x), target).backward()
        expected.append({key: p.grad for key, p in own.named_parameters()})
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True)
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, (expected[0][key] + expected[1][key]) / 2)


# ---- Keras' rules --------------------------------------------------------------------------------


def convolved(layer: nn.ConvBNReLU, x: Tensor) -> Tensor:
    """By PyTorch on the CPU: on a GPU its products are TensorFloat-32 unless told otherwise."""
    return F.conv2d(x, layer.weight.cpu(), layer.bias.cpu(), padding=layer.padding).detach()


@pytest.mark.parametrize(("moving_variance", "correction"), [("unbiased", 1), ("biased", 0)])
def test_moving_statistics(moving_variance: str, correction: int, device: str) -> None:
    """0.99 of the old and 0.01 of the new (PyTorch's default: 0.9 and 0.1), of four values a channel: the two
    variances differ by a third."""
    layer = nn.ConvBNReLU(3, 5, moving_variance=moving_variance).to(device)
    mean, var = torch.zeros(5), torch.ones(5)
    for _ in range(3):
        x = torch.randn(1, 3, 4, 4)
        z = convolved(layer, x)
        layer(x.to(device))
        mean = 0.99 * mean + 0.01 * z.mean((0, 2, 3))
        var = 0.99 * var + 0.01 * z.var((0, 2, 3), correction=correction)
    torch.testing.assert_close(layer.running_mean.cpu(), mean)
    torch.testing.assert_close(layer.running_var.cpu(), var, rtol=1e-6, atol=0.0)
    other = torch.ones(5)
    assert float((var - other).abs().max()) > 1e-4  # what is compared is not the starting value


def test_moving_variance_defaults_to_unbiased() -> None:
    assert nn.ConvBNReLU(3, 5).moving_variance == "unbiased"


def test_moving_variance_of_one_value(device: str) -> None:
    layer = nn.ConvBNReLU(3, 5).to(device)
    layer(torch.randn(1, 3, 3, 3).to(device))
    torch.testing.assert_close(layer.running_var.cpu(), torch.full((5,), 0.99))


@pytest.mark.parametrize("train", [True, False])
def test_batch_normalisation_epsilon_is_a_thousandth(train: bool, device: str) -> None:
    """On a variance of about 1e-4, where PyTorch's 1e-5 would give three times as much."""
    layer, x = nn.ConvBNReLU(3, 5).to(device).train(train), torch.randn(2, 3, 8, 8) / 100
    z = convolved(layer, x)
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    if not train:
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    with torch.no_grad():
        y = layer(x.to(device)).cpu()
    expected = [
        ((z - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()).relu() for eps in (1e-3, 1e-5)
    ]
    torch.testing.assert_close(y, expected[0])
    assert float(expected[1].max()) > 2 * float(expected[0].max())


@pytest.mark.parametrize(
    ("make", "fan_in", "fan_out"),
    [
        (lambda: nn.ConvReLU(32, 64), 9 * 32, 9 * 64),
        (lambda: nn.ConvBNReLU(32, 64), 9 * 32, 9 * 64),
        (lambda: nn.Dense(400, 100), 400, 100),
    ],
)
def test_weights_are_glorot_uniform_and_biases_zero(
    make: Callable[[], torch.nn.Module], fan_in: int, fan_out: int
) -> None:
    """PyTorch's limit would be 1 / sqrt(fan_in), with a random bias."""
    layer = make()
    limit = math.sqrt(6 / (fan_in + fan_out))
    weight = layer.weight.detach()
    assert 0.999 * limit < float(weight.abs().max()) <= limit
    assert abs(limit - 1 / math.sqrt(fan_in)) > 0.1 * limit
    # Of n uniform numbers: the mean within 5 and the variance within 5 standard errors.
    n = weight.numel()
    assert abs(float(weight.mean())) < 5 * limit / math.sqrt(3 * n)
    assert float(weight.square().mean()) == pytest.approx(limit**2 / 3, rel=5 * math.sqrt(0.8 / n))
    assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_batch_normalisation_starts_as_in_keras() -> None:
    layer = nn.ConvBNReLU(3, 5)
    for tensor, value in ((layer.gamma, 1), (layer.beta, 0), (layer.running_mean, 0), (layer.running_var, 1)):
        assert torch.equal(tensor, torch.full((5,), float(value)))


def test_flatten_is_in_height_width_channel_order(device: str) -> None:
    x = torch.arange(2 * 3 * 2 * 4).float().view(2, 3, 2, 4).to(device)
    expected = [
        [float(x[n, c, h, w]) for h in range(2) for w in range(4) for c in range(3)] for n in range(2)
    ]
    for memory in (torch.contiguous_format, torch.channels_last):
        flat = nn.Flatten()(x.contiguous(memory_format=memory))
        assert flat.tolist() == expected
    assert torch.nn.Flatten()(x).tolist() != expected


@pytest.mark.parametrize(("size", "pooled"), [(5, 2), (7, 3), (2, 1), (611, 305)])
def test_pooling_floors(size: int, pooled: int, device: str) -> None:
    """VALID: an odd last row and column are dropped, and have no gradient."""
    x = torch.rand(1, 1, size, size).to(device).requires_grad_()
    y = nn.MaxPool2d()(x)
    assert y.shape == (1, 1, pooled, pooled)
    y.sum().backward()
    assert float(x.grad[:, :, 2 * pooled :].abs().sum() + x.grad[:, :, :, 2 * pooled :].abs().sum()) == 0
    assert float(x.grad.sum()) == pooled**2


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_scales_in_training_only(rate: float, device: str) -> None:
    layer, x = nn.Dropout(rate), torch.rand(100, 100).to(device) + 1
    assert torch.equal(layer.eval()(x), x)
    y = layer.train()(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - rate))
    # The share of 10,000 coins, within 5 standard errors.
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=5 * math.sqrt(rate * (1 - rate) / 1e4))


def test_fused_pool_is_the_layers_apart(device: str) -> None:
    fused = nn.ConvReLU(3, 5, pool=True).to(device)
    apart = nn.ConvReLU(3, 5).to(device)
    apart.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 9, 10).to(device)
    assert torch.equal(fused(x), nn.MaxPool2d()(apart(x)))
