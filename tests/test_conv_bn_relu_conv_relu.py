"""A block's head as one operator: the first convolution's output is normalised where the second loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskcore import models, nn, ops

NAN = float("nan")


class Head(NamedTuple):
    N: int
    C: int
    K1: int
    K2: int
    H: int
    W: int
    padding1: int = 0
    padding2: int = 0
    pool: bool = False

    def __str__(self) -> str:
        kind = "_pool" if self.pool else ""
        return f"N{self.N}_C{self.C}_K{self.K1}_{self.K2}_{self.H}x{self.W}_p{self.padding1}{self.padding2}{kind}"


# Up to 3 channels nothing between the two is stored (csrc/conv_patches.h): 128 pixels a product, 16 rows a sum,
# rings of 8 rows. Rows of tiles in pieces that begin within an image, blocks of several rows and parts of one, odd
# sizes, widths that leave tails, and a second convolution whose backward pass is shared by all threads
# (K1 K2 > 128 * 128).
FEW_CHANNELS = [
    Head(2, 3, 32, 32, 40, 36, pool=True),
    Head(3, 3, 5, 7, 23, 17, padding1=1),
    Head(2, 3, 32, 32, 21, 64, padding1=1, padding2=1, pool=True),
    Head(1, 1, 16, 16, 66, 66, pool=True),
    Head(1, 2, 20, 40, 90, 135, padding2=1),
    Head(1, 3, 33, 8, 38, 262, pool=True),
    Head(5, 3, 8, 8, 9, 9, pool=True),
    Head(1, 3, 8, 4, 5, 5),
    Head(2, 3, 160, 160, 20, 12),
]
MORE_CHANNELS = [
    Head(2, 16, 48, 33, 22, 19, padding2=1, pool=True),
    Head(1, 64, 64, 64, 36, 20),
    Head(3, 32, 17, 70, 13, 11, padding1=1, pool=True),
    Head(2, 4, 5, 3, 21, 70),
    Head(1, 20, 150, 130, 17, 14, pool=True),
]
CASES = [*FEW_CHANNELS, *MORE_CHANNELS]
NAMES = ("x", "weight1", "bias1", "gamma", "beta", "weight2", "bias2")


def draw(case: Head) -> dict[str, Tensor]:
    def filters(K: int, C: int) -> Tensor:
        return torch.randn(K, C, 3, 3) / (9 * C) ** 0.5

    x = torch.randn(case.N, case.C, case.H, case.W).contiguous(memory_format=torch.channels_last)
    vectors = torch.randn(case.K1) / 2, torch.rand(case.K1) + 0.5, torch.randn(case.K1) / 2
    second = filters(case.K2, case.K1), torch.randn(case.K2) / 2
    return dict(zip(NAMES, (x, filters(case.K1, case.C), *vectors, *second), strict=True))


def settings(case: Head) -> dict[str, Any]:
    return {"padding1": case.padding1, "padding2": case.padding2, "pool": case.pool}


def decided(inputs: dict[str, Tensor], case: Head) -> tuple[bool, Tensor]:
    """Whether every decision of the first ReLU is the same for any rounding, and 1 where the second's and the pool's
    are."""
    x, weight1, bias1, gamma, beta, weight2, bias2 = (inputs[name].double() for name in NAMES)
    z = F.conv2d(x, weight1, bias1, padding=case.padding1)
    between = F.batch_norm(z, None, None, gamma, beta, training=True, eps=1e-3)
    after = F.conv2d(between.relu(), weight2, bias2, padding=case.padding2)
    # The errors here are 2e-7 of a direct convolution and 1e-6 of Winograd's, in the root mean square.
    edge = (2e-6 if case.C <= 3 else 1e-5) * between.abs().max()
    clear = bool((between.abs() > edge).all())
    margin = 1e-4 * after.abs().max()
    if not case.pool:
        return clear, (after.abs() > margin).float()
    P, Q = after.shape[2] // 2 * 2, after.shape[3] // 2 * 2
    windows = after[:, :, :P, :Q].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
    first, second = windows.topk(2, dim=4).values.unbind(4)
    return clear, ((first < -margin) | ((first > margin) & (first - second > margin))).float()


def drawn(case: Head) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs without a value so near to the first ReLU's edge that rounding decides, and an upstream gradient."""
    for _ in range(100):
        inputs = draw(case)
        clear, mask = decided(inputs, case)
        if clear:
            return inputs, torch.randn(mask.shape) * mask
    raise AssertionError(f"{case} always has a value at the edge")


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in inputs.items()}


def run(
    function: Callable[..., Any],
    inputs: dict[str, Tensor],
    case: Head,
    dy: Tensor,
    need_dx: bool,
    device: str = "cpu",
    **more: Any,
) -> dict[str, Tensor]:
    """Outputs and gradients by name, brought back to the CPU."""
    leaves = {k: v.detach().requires_grad_(need_dx or k != "x") for k, v in on(device, inputs).items()}
    y, mean, var = function(**leaves, **settings(case), **more)
    wanted = [key for key in leaves if leaves[key].requires_grad]
    gradients = torch.autograd.grad(y, [leaves[key] for key in wanted], dy.to(device, y.dtype))
    found = {"y": y, "mean": mean, "var": var} | {f"d{k}": g for k, g in zip(wanted, gradients, strict=True)}
    return {key: value.detach().cpu() for key, value in found.items()}


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("need_dx", [False, True], ids=["", "dx"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_bn_relu_conv_relu(
    case: Head, need_dx: bool, device: str, as_exact_as_torch: Callable[..., None]
) -> None:
    inputs, dy = drawn(case)
    ours = run(ops.conv_bn_relu_conv_relu_train, inputs, case, dy, need_dx, device)
    reference = ops.conv_bn_relu_conv_relu_train_reference
    torch32 = run(reference, inputs, case, dy, need_dx)
    exact = run(reference, {key: value.double() for key, value in inputs.items()}, case, dy, need_dx)
    assert ours.keys() == exact.keys()
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    # The mean takes the first bias away: what the references find is rounding alone.
    assert torch.equal(ours.pop("dbias1"), torch.zeros(case.K1))
    pixels = case.N * case.H * case.W
    for key, value in ours.items():
        terms = {"y": 9 * (case.C + case.K1), "mean": 9 * case.C, "var": 9 * case.C}.get(key, pixels)
        as_exact_as_torch(value, torch32[key], exact[key], terms, name=key)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize(
    "case", [FEW_CHANNELS[0], FEW_CHANNELS[1], FEW_CHANNELS[8], *MORE_CHANNELS[:3]], ids=str
)
def test_threads_and_repetition_change_no_bit(case: Head, precision: ops.Precision, device: str) -> None:
    inputs = draw(case)
    _, mask = decided(inputs, case)
    dy = torch.randn(mask.shape)

    def compute() -> dict[str, Tensor]:
        return run(ops.conv_bn_relu_conv_relu_train, inputs, case, dy, False, device, precision=precision)

    torch.set_num_threads(1)
    expected = compute()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for key, value in compute().items():
            assert torch.equal(value, expected[key]), f"{key} with {threads} threads"


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("case", CASES[:4] + MORE_CHANNELS[:2], ids=str)
def test_uninitialised_memory_is_never_read(case: Head, device: str) -> None:
    inputs, dy = drawn(case)
    expected = run(ops.conv_bn_relu_conv_relu_train, inputs, case, dy, False, device)
    wider = case._replace(H=case.H + 3, W=case.W + 9, K1=case.K1 + 17, K2=case.K2 + 5)
    nothing = {key: torch.full_like(value, NAN) for key, value in draw(wider).items()}
    shape = ops.conv_bn_relu_conv_relu_train(**on(device, nothing), **settings(wider))[0].shape
    run(ops.conv_bn_relu_conv_relu_train, nothing, wider, torch.full(shape, NAN), False, device)
    blocks = [torch.full_like(value, NAN, device=device) for value in expected.values() for _ in range(4)]
    del blocks
    for key, value in run(ops.conv_bn_relu_conv_relu_train, inputs, case, dy, False, device).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
def test_statistics_with_a_large_mean(mean: float, device: str) -> None:
    """They follow from moments less a shift: a large mean costs no precision."""
    case = Head(2, 3, 8, 8, 40, 40)
    inputs = draw(case)
    inputs["x"] = inputs["x"] + mean
    _, mean32, var32 = (result.cpu() for result in ops.conv_bn_relu_conv_relu_train(**on(device, inputs)))
    exact = F.conv2d(inputs["x"].double(), inputs["weight1"].double(), inputs["bias1"].double())
    var, centre = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(var32, var.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean32, centre.float(), rtol=1e-5, atol=1e-5)


def test_a_constant_picture_has_no_variance(device: str) -> None:
    inputs = draw(Head(1, 3, 8, 8, 12, 12))
    inputs["x"] = torch.full_like(inputs["x"], 0.7)
    y, _, var = (result.cpu() for result in ops.conv_bn_relu_conv_relu_train(**on(device, inputs)))
    assert float(var.abs().max()) < 1e-12
    between = inputs["beta"].relu()[None, :, None, None].expand(1, 8, 10, 10)
    expected = ops.conv_relu_reference(between, inputs["weight2"], inputs["bias2"])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("C", [3, 16])
def test_nan_reaches_what_it_may(C: int, device: str) -> None:
    """One NaN in x makes NaN of every statistic, as in PyTorch, and so of every output."""
    inputs = draw(Head(2, C, 8, 8, 14, 14))
    inputs["x"][1, 0, 3, 3] = NAN
    y, mean, var = ops.conv_bn_relu_conv_relu_train(**on(device, inputs))
    assert mean.isnan().all()
    assert var.isnan().all()
    assert y.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight2": torch.randn(4, 7, 3, 3)}, "weight2 must have size 8 in dimension 1"),
        ({"bias2": torch.randn(5)}, "bias2 must have size 4"),
        ({"gamma": torch.randn(5)}, "gamma must have size 8"),
        ({"padding2": 2}, "padding2 must be 0 or 1, is 2"),
        ({"x": torch.randn(1, 3, 4, 4)}, "too small"),
        ({"x": torch.randn(0, 3, 9, 9)}, "at least one image"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str, device: str) -> None:
    given = {**draw(Head(1, 3, 8, 4, 9, 9)), **change}
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.conv_bn_relu_conv_relu_train(**given)


# ---- where a network uses it ---------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by one whenever a network takes a head as one operator."""
    made: list[str] = []
    fused = nn.conv_bn_relu_conv_relu

    def counted(*arguments: Any) -> Tensor:
        made.append("fused")
        return fused(*arguments)

    monkeypatch.setattr(nn, "conv_bn_relu_conv_relu", counted)
    return made


def _network(device: str) -> models.Network:
    network = models.create("final", image_size=160, seed=0).to(device)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return network


def _step(network: models.Network) -> dict[str, Tensor]:
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    device = next(network.parameters()).device
    x = x.to(device, memory_format=torch.channels_last)
    loss = ops.softmax_cross_entropy(network(x), torch.tensor([0, 2]).to(device))
    loss.backward()
    found = {f"d{name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **dict(network.named_buffers())}


def test_a_network_with_hooks_calls_its_layers(calls: list[str], device: str) -> None:
    """The four heads are fused; with a hook on one of their layers only three are, and all results agree."""
    expected = _step(_network(device))
    assert len(calls) == 4
    calls.clear()
    seen: list[tuple[int, ...]] = []
    network = _network(device)
    network.get_submodule("block2_conv1").register_forward_hook(lambda *a: seen.append(tuple(a[2].shape)))
    found = _step(network)
    assert len(calls) == 3
    assert seen == [(2, 64, 76, 76)]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value - expected[name]).norm()
        assert error <= 1e-3 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("where", ["forward", "pre", "backward", "global"])
def test_every_kind_of_hook_is_respected(where: str) -> None:
    first, second = nn.ConvBNReLU(3, 4), nn.ConvReLU(4, 4)
    assert nn.can_fuse(first, second)
    register = {
        "forward": second.register_forward_hook,
        "pre": first.register_forward_pre_hook,
        "backward": first.register_full_backward_hook,
        "global": torch.nn.modules.module.register_module_forward_hook,
    }[where]
    handle = register(lambda *_: None)
    assert not nn.can_fuse(first, second)
    handle.remove()
    assert nn.can_fuse(first, second)


def test_what_is_not_fused() -> None:
    first, second = nn.ConvBNReLU(3, 4), nn.ConvReLU(4, 4)
    assert not nn.can_fuse(second, second)
    assert not nn.can_fuse(first, torch.nn.Identity())
    assert not nn.can_fuse(first, nn.ConvReLU(4, 4, precision="bf16"))
    assert not nn.can_fuse(first.eval(), second)
