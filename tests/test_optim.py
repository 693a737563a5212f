"""maskcore.optim.Adam against torch.optim.Adam and against a float64 transcription of Keras' update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from maskcore.optim import Adam

SHAPES = [(5, 3, 3, 3), (7,), (16, 33), (1,)]


def parameters(device: str, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=drawn).to(device, dtype)) for shape in SHAPES]


def gradient(step: int, p: Tensor) -> Tensor:
    """A gradient that depends on the parameter, with noise; small in places, as real ones are."""
    drawn = torch.Generator().manual_seed(step)
    scale = torch.logspace(-6, 0, p.numel()).view(p.shape)
    noise = torch.randn(p.shape, generator=drawn)
    return ((p.detach().cpu() * 0.1 + noise) * scale.to(p.dtype)).to(p.device)


def train(optimizer: torch.optim.Optimizer, owned: list[torch.nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for p in owned:
            p.grad = gradient(step, p)
        optimizer.step()


class KerasAdam:
    """keras.optimizers.Adam.update_step (Keras 3, adam.py) in float64 numpy, with an l2 regularizer."""

    def __init__(self, lr: float, l2: float = 0.0) -> None:
        self.learning_rate, self.l2 = lr, l2
        self.beta_1, self.beta_2, self.epsilon = 0.9, 0.999, 1e-7
        self.iterations = 0
        self.m: npt.NDArray[np.float64] | float = 0.0
        self.v: npt.NDArray[np.float64] | float = 0.0

    def step(self, variable: npt.NDArray[np.float64], gradient: npt.NDArray[np.float64]) -> None:
        gradient = gradient + 2 * self.l2 * variable
        local_step = self.iterations + 1
        beta_1_power = self.beta_1**local_step
        beta_2_power = self.beta_2**local_step
        alpha = self.learning_rate * math.sqrt(1 - beta_2_power) / (1 - beta_1_power)
        self.m = self.m + (gradient - self.m) * (1 - self.beta_1)
        self.v = self.v + (np.square(gradient) - self.v) * (1 - self.beta_2)
        variable -= (self.m * alpha) / (np.sqrt(self.v) + self.epsilon)
        self.iterations += 1


def same_update_in_float32(p: Tensor, optimizer: KerasAdam, step: int) -> None:
    """The yardstick: the same formula in torch, float32."""
    g = gradient(step, p) + 2 * optimizer.l2 * p
    t = step + 1
    m, v = (torch.zeros_like(p) if step == 0 else moment for moment in (optimizer.m, optimizer.v))
    optimizer.m, optimizer.v = m + (g - m) * (1 - 0.9), v + (g.square() - v) * (1 - 0.999)
    alpha = optimizer.learning_rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    p -= optimizer.m * alpha / (optimizer.v.sqrt() + 1e-7)


STEPS = 100


@pytest.mark.parametrize("l2", [0.0, 1e-2])
def test_keras_over_100_steps(l2: float, device: str, as_exact_as_torch: Callable[..., None]) -> None:
    ours = parameters(device)
    train(Adam(ours, lr=1e-3, l2=l2), ours, STEPS)
    for p, start in zip(ours, parameters("cpu"), strict=True):
        exact, theirs = start.detach().double(), KerasAdam(1e-3, l2)
        variable = exact.numpy()  # shares its memory
        torch32, yardstick = start.detach().clone(), KerasAdam(1e-3, l2)
        for step in range(STEPS):
            theirs.step(variable, gradient(step, exact).numpy())
            same_update_in_float32(torch32, yardstick, step)
        assert not torch.equal(p.detach().cpu(), start)
        as_exact_as_torch(p.detach().cpu(), torch32, exact, STEPS, f"Keras Adam {tuple(p.shape)}")


@pytest.mark.parametrize("l2", [0.0, 1e-2])
def test_torch_over_100_steps(l2: float, device: str, as_exact_as_torch: Callable[..., None]) -> None:
    """``weight_decay`` times the weight is added to the gradient: twice l2, the penalty's derivative."""
    ours, torch32, exact = parameters(device), parameters("cpu"), parameters("cpu", torch.float64)
    train(Adam(ours, lr=1e-3, eps=1e-8, l2=l2, epsilon="torch"), ours, STEPS)
    for owned in (torch32, exact):
        train(torch.optim.Adam(owned, lr=1e-3, eps=1e-8, weight_decay=2 * l2), owned, STEPS)
    for found in zip(ours, torch32, exact, strict=True):
        as_exact_as_torch(*(p.detach().cpu() for p in found), STEPS, f"torch Adam {tuple(found[0].shape)}")


def moved_by_first_step(epsilon: str, g: float, device: str) -> float:
    p = torch.nn.Parameter(torch.zeros(1, device=device))
    p.grad = torch.full((1,), g, device=device)
    Adam([p], lr=1e-3, eps=1e-7, epsilon=epsilon).step()
    return float(p.detach())


def test_epsilon_is_where_keras_has_it(device: str) -> None:
    """A gradient of 1e-7, the size of epsilon: the two placements differ thirtyfold on the first step."""
    assert moved_by_first_step("keras", 1e-7, device) == pytest.approx(-3.065e-5, rel=1e-3)
    # Inside the bias correction the same epsilon halves the step; PyTorch's default of 1e-8 gives this:
    p = torch.nn.Parameter(torch.zeros(1, device=device))
    p.grad = torch.full((1,), 1e-7, device=device)
    Adam([p], lr=1e-3, eps=1e-8, epsilon="torch").step()
    assert float(p.detach()) == pytest.approx(-9.09e-4, rel=1e-3)
    assert moved_by_first_step("torch", 1e-7, device) == pytest.approx(-5e-4, rel=1e-3)
    # Where epsilon is small beside the gradient, the two are the same.
    assert moved_by_first_step("keras", 1.0, device) == pytest.approx(-1e-3, rel=1e-5)


def test_l2_goes_through_the_moments(device: str) -> None:
    """Not decoupled as in AdamW: with no other gradient the first step is lr towards zero, whatever l2 is."""
    for l2 in (1e-4, 1.0):
        p = torch.nn.Parameter(torch.tensor([2.0, -3.0], device=device))
        p.grad = torch.zeros_like(p)
        Adam([p], lr=1e-3, l2=l2).step()
        assert p.tolist() == pytest.approx([2.0 - 1e-3, -3.0 + 1e-3], abs=1e-5)


def test_groups_have_their_own_settings(device: str) -> None:
    together, apart = parameters(device), parameters(device)
    settings: list[dict[str, Any]] = [
        {"lr": 1e-3, "l2": 1e-2},
        {"lr": 1e-2, "betas": (0.8, 0.99)},
        {"eps": 1e-3, "epsilon": "torch"},
        {},
    ]
    optimizer = Adam([{"params": [p], **s} for p, s in zip(together, settings, strict=True)], lr=5e-3)
    train(optimizer, together, 5)
    for p, s in zip(apart, settings, strict=True):
        train(Adam([p], **{"lr": 5e-3, **s}), [p], 5)
    assert all(map(torch.equal, together, apart))


def test_parameters_without_a_gradient_stay(device: str) -> None:
    ours, before = parameters(device), parameters(device)
    for p in ours[1:]:
        p.grad = torch.ones_like(p)
    optimizer = Adam(ours, lr=1e-2, l2=1.0)
    optimizer.step()
    assert torch.equal(ours[0], before[0])
    assert ours[0] not in optimizer.state
    assert not any(torch.equal(p, q) for p, q in zip(ours[1:], before[1:], strict=True))


def test_a_parameter_that_joins_late_counts_its_own_steps(device: str) -> None:
    late, fresh = parameters(device)[:2], parameters(device)[:2]
    optimizer = Adam(late, lr=1e-2)
    for step in range(3):
        late[1].grad = gradient(step, late[1])
        optimizer.step()
    late[0].grad, late[1].grad = gradient(7, late[0]), gradient(7, late[1])
    optimizer.step()
    fresh[0].grad = gradient(7, fresh[0])
    Adam(fresh[:1], lr=1e-2).step()
    assert torch.equal(late[0], fresh[0])
    assert [optimizer.state[p]["step"] for p in late] == [1, 4]


def test_state_dict_round_trip(device: str) -> None:
    straight, resumed = parameters(device), parameters(device)
    optimizer = Adam([{"params": straight[:2], "l2": 1e-2}, {"params": straight[2:]}], lr=1e-2)
    train(optimizer, straight, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(straight)
    train(optimizer, straight, 4)
    with torch.no_grad():
        for p, q in zip(resumed, weights, strict=True):
            p.copy_(q)
    other = Adam([{"params": resumed[:2], "l2": 0.5}, {"params": resumed[2:]}], lr=1.0)
    other.load_state_dict(saved)
    assert [group["l2"] for group in other.param_groups] == [1e-2, 0.0]
    assert all(type(state["step"]) is int for state in other.state.values())
    train(other, resumed, 4)
    assert all(map(torch.equal, straight, resumed))


@pytest.mark.parametrize("gradient_format", [torch.contiguous_format, torch.channels_last])
def test_channels_last_parameter(gradient_format: torch.memory_format, device: str) -> None:
    plain = torch.nn.Parameter(torch.randn(5, 4, 3, 3).to(device))
    nhwc = torch.nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizers = [Adam([p], lr=1e-2, l2=0.1) for p in (plain, nhwc)]
    for step in range(3):
        drawn = torch.Generator().manual_seed(step)
        plain.grad = torch.randn(plain.shape, generator=drawn).to(device)
        nhwc.grad = plain.grad.clone(memory_format=gradient_format)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, nhwc)
    assert nhwc.is_contiguous(memory_format=torch.channels_last)


def test_gradients_of_other_layouts(device: str) -> None:
    for arrange in (lambda g: g.t().contiguous().t(), lambda g: g[:1].expand_as(g), lambda g: g.flip(0)):
        ours, plain = (torch.nn.Parameter(torch.ones(4, 6, device=device)) for _ in range(2))
        ours.grad = arrange(torch.randn(4, 6).to(device))
        plain.grad = ours.grad.clone(memory_format=torch.contiguous_format)
        for p in (ours, plain):
            Adam([p], lr=1e-2).step()
        assert torch.equal(ours, plain)


def test_empty_parameter(device: str) -> None:
    owned = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in ((0, 3), (2,))]
    for p in owned:
        p.grad = torch.ones_like(p)
    Adam(owned, lr=1e-2).step()
    assert owned[0].shape == (0, 3)
    assert owned[1].tolist() == pytest.approx([-1e-2, -1e-2], rel=1e-5)


def test_closure_and_scheduler(device: str) -> None:
    (p,) = parameters(device)[1:2]
    optimizer = Adam([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return float(loss.detach())

    before = p.detach().clone()
    assert optimizer.step(closure) == float(before.square().sum())
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    middle = p.detach().clone()
    optimizer.step(closure)
    assert float((p.detach() - middle).abs().max()) < 0.6 * float((middle - before).abs().max())


def test_nan_gradient_is_seen_in_the_parameter(device: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    p.grad = torch.tensor([1.0, float("nan"), 1.0], device=device)
    Adam([p]).step()
    assert p.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"lr": float("nan")}, "lr must not be negative"),
        ({"betas": (1.0, 0.9)}, "betas must lie in"),
        ({"betas": (0.9, -0.1)}, "betas must lie in"),
        ({"eps": -1e-8}, "eps must not be negative"),
        ({"l2": -1.0}, "l2 must not be negative"),
        ({"epsilon": "adam"}, "epsilon must be 'keras' or 'torch', is 'adam'"),
    ],
)
def test_bad_settings(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adam(parameters("cpu"), **bad)
    with pytest.raises(ValueError, match=message):
        Adam([{"params": parameters("cpu"), **bad}])


def test_sparse_gradients_are_refused(device: str) -> None:
    if device.startswith("emulated"):
        pytest.skip("the emulated device has no sparse tensors")
    p = torch.nn.Parameter(torch.zeros(4, 4, device=device))
    p.grad = torch.eye(4).to(device).to_sparse()
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        Adam([p]).step()


def test_bad_parameters(device: str) -> None:
    (q,) = parameters(device, torch.float64)[:1]
    q.grad = torch.ones_like(q)
    with pytest.raises(RuntimeError, match="parameters must be float32"):
        Adam([q]).step()
