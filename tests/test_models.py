"""The two networks: their published tables, and loss, gradients and training beside a float64 twin.

A ReLU's sign or a pool's maximum that hangs on the last bit may come out differently in float32 than in
float64; one such flip moves a deep network's gradients by a percent, far more than any rounding. So the twin
takes over the decisions that the network made, after checking that each was right or a tie within rounding:
what remains is one smooth function, on which engines agree to rounding.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskcore import UserError, models, nn, ops
from maskcore.optim import Adam

SMALLEST = {"final": 128, "baseline": 32}
#: The smallest that leaves 2 x 2 pixels to flatten, so that their order counts.
SIZE = {"final": 144, "baseline": 64}
NAMES = list(SIZE)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small work: threads would wait for each other longer than they compute."""
    torch.set_num_threads(1)


# ---- the published tables ------------------------------------------------------------------------

FINAL = [
    ("conv2d", "Conv2D", (None, 254, 254, 32), 896),
    ("batch_normalization", "BatchNormalization", (None, 254, 254, 32), 128),
    ("re_lu", "ReLU", (None, 254, 254, 32), 0),
    ("conv2d_1", "Conv2D", (None, 252, 252, 32), 9248),
    ("max_pooling2d", "MaxPooling2D", (None, 126, 126, 32), 0),
    ("conv2d_2", "Conv2D", (None, 124, 124, 64), 18496),
    ("batch_normalization_1", "BatchNormalization", (None, 124, 124, 64), 256),
    ("re_lu_1", "ReLU", (None, 124, 124, 64), 0),
    ("conv2d_3", "Conv2D", (None, 122, 122, 64), 36928),
    ("conv2d_4", "Conv2D", (None, 120, 120, 64), 36928),
    ("max_pooling2d_1", "MaxPooling2D", (None, 60, 60, 64), 0),
    ("conv2d_5", "Conv2D", (None, 58, 58, 128), 73856),
    ("batch_normalization_2", "BatchNormalization", (None, 58, 58, 128), 512),
    ("re_lu_2", "ReLU", (None, 58, 58, 128), 0),
    ("conv2d_6", "Conv2D", (None, 56, 56, 128), 147584),
    ("conv2d_7", "Conv2D", (None, 54, 54, 128), 147584),
    ("conv2d_8", "Conv2D", (None, 52, 52, 128), 147584),
    ("max_pooling2d_2", "MaxPooling2D", (None, 26, 26, 128), 0),
    ("conv2d_9", "Conv2D", (None, 24, 24, 256), 295168),
    ("batch_normalization_3", "BatchNormalization", (None, 24, 24, 256), 1024),
    ("re_lu_3", "ReLU", (None, 24, 24, 256), 0),
    ("conv2d_10", "Conv2D", (None, 22, 22, 256), 590080),
    ("conv2d_11", "Conv2D", (None, 20, 20, 256), 590080),
    ("conv2d_12", "Conv2D", (None, 18, 18, 256), 590080),
    ("max_pooling2d_3", "MaxPooling2D", (None, 9, 9, 256), 0),
    ("flatten", "Flatten", (None, 20736), 0),
    ("dropout", "Dropout", (None, 20736), 0),
    ("dense", "Dense", (None, 512), 10617344),
    ("dropout_1", "Dropout", (None, 512), 0),
    ("dense_1", "Dense", (None, 3), 1539),
]

BASELINE = [
    ("conv2d", "Conv2D", (None, 256, 256, 8), 224),
    ("max_pooling2d", "MaxPooling2D", (None, 128, 128, 8), 0),
    ("conv2d_1", "Conv2D", (None, 128, 128, 16), 1168),
    ("max_pooling2d_1", "MaxPooling2D", (None, 64, 64, 16), 0),
    ("conv2d_2", "Conv2D", (None, 64, 64, 32), 4640),
    ("max_pooling2d_2", "MaxPooling2D", (None, 32, 32, 32), 0),
    ("conv2d_3", "Conv2D", (None, 32, 32, 64), 18496),
    ("max_pooling2d_3", "MaxPooling2D", (None, 16, 16, 64), 0),
    ("conv2d_4", "Conv2D", (None, 16, 16, 128), 73856),
    ("max_pooling2d_4", "MaxPooling2D", (None, 8, 8, 128), 0),
    ("flatten", "Flatten", (None, 8192), 0),
    ("dense", "Dense", (None, 512), 4194816),
    ("dense_1", "Dense", (None, 3), 1539),
]


@pytest.mark.parametrize(
    ("name", "rows", "total", "trainable"),
    [("final", FINAL, 13_305_315, 13_304_355), ("baseline", BASELINE, 4_294_739, 4_294_739)],
)
def test_published_table(
    name: str, rows: list[tuple[str, str, tuple[int | None, ...], int]], total: int, trainable: int
) -> None:
    network = models.create(name)
    table = network.table()
    assert [row[:4] for row in table] == rows
    assert sum(row.parameters for row in table) == total
    assert sum(row.trainable for row in table) == trainable
    # The table is computed from the architecture: the network itself must agree.
    assert sum(p.numel() for p in network.parameters()) == trainable
    assert sum(t.numel() for t in network.state_dict().values()) == total


@pytest.mark.parametrize("name", NAMES)
def test_table_is_what_the_layers_give(name: str) -> None:
    size = SMALLEST[name] + 5
    network = models.create(name, image_size=size).eval()
    x = torch.rand(2, 3, size, size)
    for at in network.layers:
        x = network.get_submodule(at.name)(x)
        H_W_C = (*x.shape[2:], x.shape[1])
        assert at.output_shape == H_W_C, at.name


# ---- the twin ------------------------------------------------------------------------------------


def rounding_margin(z: Tensor) -> float:
    """Far above the float32 error of a pre-activation (about 1e-6 of the largest), far below their spread."""
    return 1e-4 * float(z.detach().abs().max())


class FollowReLU(torch.nn.Module):
    """A ReLU that passes what another engine passed, and checks that it may."""

    def __init__(self, passed: Tensor) -> None:
        super().__init__()
        self.passed = passed

    def forward(self, z: Tensor) -> Tensor:
        against = z.detach()[(z > 0) != self.passed]
        assert (against.abs() <= rounding_margin(z)).all(), "a ReLU decided against a clear sign"
        return z * self.passed


class FollowPool(torch.nn.Module):
    """ReLU and max-pool that take the places another engine took, and checks that they hold the maximum."""

    def __init__(self, places: Tensor, passed: Tensor) -> None:
        super().__init__()
        self.places, self.relu = places, FollowReLU(passed)

    def forward(self, z: Tensor) -> Tensor:
        P, Q = self.places.shape[2:]
        windows = (
            z[:, :, : 2 * P, : 2 * Q].unflatten(3, (Q, 2)).unflatten(2, (P, 2)).transpose(3, 4).flatten(4)
        )
        chosen = windows.gather(4, self.places[..., None]).squeeze(4)
        # The network pools behind its ReLU: where all four are below zero it sees a tie of zeros.
        short = (windows.max(4).values.relu() - chosen.relu()).detach()
        assert (short <= rounding_margin(z)).all(), "a pool chose less than the maximum"
        return self.relu(chosen)


class FollowDropout(torch.nn.Module):
    def __init__(self, kept: Tensor, rate: float) -> None:
        super().__init__()
        self.kept, self.rate = kept, rate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept / (1 - self.rate)


Recorded = dict[str, tuple[Tensor, Tensor]]


def recorded(network: models.Network, x: Tensor) -> tuple[Tensor, Recorded]:
    """The network's logits, and what went into and came out of each layer."""
    found: Recorded = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            found[name] = inputs[0].detach(), output.detach()

        return hook

    hooks = [layer.register_forward_hook(record(name)) for name, layer in network.named_children()]
    logits = network(x)
    for hook in hooks:
        hook.remove()
    return logits, found


def follow(network: models.Network, twin: torch.nn.Sequential, found: Recorded) -> torch.nn.Sequential:
    """The twin with the network's decisions in place of its own. Shares the twin's parameters."""
    modules = dict(twin.named_children())
    H, W, C = next(at for at in network.layers if at.name == "flatten").input_shape
    for name, layer, shape, _ in network.layers:
        before, after = found[name]
        ours = network.get_submodule(name)
        if isinstance(ours, nn.ConvReLU) and ours.pool:
            nhwc = before.permute(0, 2, 3, 1).contiguous()
            _, places = torch.ops.maskcore.conv_relu_max_pool(nhwc, ours.weight, ours.bias, ours.padding)
            modules[f"{name}_relu"] = torch.nn.Identity()
            modules[f"{name}_pool"] = FollowPool(places.permute(0, 3, 1, 2).long(), after > 0)
        elif f"{name}_relu" in modules:
            modules[f"{name}_relu"] = FollowReLU(after > 0)
        elif isinstance(layer, models.Dropout) and network.training:
            kept = after != 0  # where the input is 0 too, it makes no difference
            if shape == (H * W * C,):  # the twin flattens in C, H, W order
                kept = kept.view(-1, H, W, C).permute(0, 3, 1, 2).flatten(1)
            modules[name] = FollowDropout(kept, layer.rate)
    return torch.nn.Sequential(OrderedDict(modules))


def batch(network: models.Network, N: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(N, 3, network.image_size, network.image_size)
    return x.contiguous(memory_format=torch.channels_last), torch.randint(0, network.num_classes, (N,))


def created(name: str, **changed: Any) -> models.Network:
    """A small network, with biases and batch-normalisation parameters that are not the trivial ones."""
    network = models.create(name, **{"image_size": SIZE[name], "seed": 3, **changed})
    with torch.no_grad():
        for key, value in network.state_dict().items():
            if value.dim() == 1:
                value.add_(torch.rand_like(value) * (1 if key.endswith(("gamma", "var")) else 0.1))
    return network


def chain(network: models.Network) -> int:
    """Numbers that are added up on the way from a picture to the loss."""
    return sum(p[0].numel() for p in network.parameters() if p.dim() > 1)


def by_twin_name(network: models.Network, tensors: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """What belongs to the parameters, one tensor each, under the twin's names and in its layout."""
    holder = copy.deepcopy(network)
    with torch.no_grad():
        for p, tensor in zip(holder.parameters(), tensors, strict=True):
            assert tensor is not None
            p.copy_(tensor)
    state = models.to_torch_state_dict(holder)
    return {key: state[key] for key, _ in models.torch_twin(network).named_parameters()}


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", NAMES)
def test_twin_predicts_the_same(name: str, as_exact_as_torch: Callable[..., None]) -> None:
    network = created(name).eval()
    x, _ = batch(network, 2)
    twin = models.torch_twin(network)
    with torch.no_grad():
        exact = copy.deepcopy(twin).double()(x.double())
        as_exact_as_torch(network(x), twin(x), exact, chain(network), f"{name} logits")
    assert not any(type(m).__module__.startswith("maskcore") for m in twin.modules())


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", NAMES)
def test_for_inference_changes_no_bit_and_is_a_snapshot(name: str) -> None:
    network = created(name).eval()
    x, _ = batch(network, 2)
    fast = models.for_inference(network)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(fast(x), expected)
        for p in network.parameters():
            p.mul_(0.5)
        assert torch.equal(fast(x), expected)
        assert not torch.equal(network(x), expected)
    assert not any(p.requires_grad for p in fast.parameters())
    assert not fast.training


def loss_and_gradients(name: str) -> tuple[models.Network, dict[str, list[Tensor]]]:
    """Loss, gradients and running statistics of one training step: ours, torch32's and torch64's, by name."""
    network = created(name).train()
    x, target = batch(network, 2)
    twins = [models.torch_twin(network), models.torch_twin(network).double()]
    before = copy.deepcopy(network)
    logits, found = recorded(network, x)
    loss = ops.softmax_cross_entropy(logits, target)
    loss.backward()
    results = {"loss": [loss.detach()]} | {
        key: [gradient]
        for key, gradient in by_twin_name(network, (p.grad for p in network.parameters())).items()
    }
    statistics = models.to_torch_state_dict(network)
    for twin in twins:
        twin_loss = F.cross_entropy(follow(before, twin, found)(x.to(next(twin.parameters()).dtype)), target)
        twin_loss.backward()
        results["loss"].append(twin_loss.detach())
        for key, p in twin.named_parameters():
            assert p.grad is not None
            results[key].append(p.grad)
    for key in statistics:
        if "running" in key:
            results[key] = [statistics[key], *(twin.state_dict()[key] for twin in twins)]
    return network, results


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", NAMES)
def test_loss_gradients_and_statistics_of_the_whole_network(
    name: str, as_exact_as_torch: Callable[..., None]
) -> None:
    network, results = loss_and_gradients(name)
    assert len(results) == 1 + len(network.state_dict())
    for key, (ours, torch32, exact) in results.items():
        as_exact_as_torch(ours, torch32, exact, chain(network), f"{name} {key}")
        if (
            "running" not in key and exact.abs().max() > 1e-9
        ):  # the bias before a batch normalisation has none
            with pytest.raises(AssertionError, match="error"):  # one percent would be seen
                as_exact_as_torch(ours * 1.01, torch32, exact, chain(network), f"{name} {key} + 1%")


# ---- ten steps of training -----------------------------------------------------------------------


class KerasAdam:
    """A transcription of keras.optimizers.Adam.update_step, with l2 regularizers on some parameters."""

    def __init__(self, parameters: dict[str, Tensor], lr: float, regularized: set[str], l2: float) -> None:
        self.parameters, self.lr, self.regularized, self.l2 = parameters, lr, regularized, l2
        self.m = {key: torch.zeros_like(p) for key, p in parameters.items()}
        self.v = {key: torch.zeros_like(p) for key, p in parameters.items()}
        self.iterations = 0

    @torch.no_grad()
    def step(self) -> None:
        self.iterations += 1
        alpha = self.lr * math.sqrt(1 - 0.999**self.iterations) / (1 - 0.9**self.iterations)
        for key, p in self.parameters.items():
            assert p.grad is not None
            g = p.grad + (2 * self.l2 * p if key in self.regularized else 0)
            self.m[key] += (g - self.m[key]) * (1 - 0.9)
            self.v[key] += (g.square() - self.v[key]) * (1 - 0.999)
            p -= self.m[key] * alpha / (self.v[key].sqrt() + 1e-7)
            p.grad = None


STEPS, LR, L2 = 10, 1e-4, 1e-2


def root_mean_square(t: Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt())


def median(t: Tensor) -> float:
    """Adam divides a gradient by its size: where that is rounding alone, so is the movement."""
    return float(t.detach().abs().median())


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_of_training(name: str, algorithm: str, as_exact_as_torch: Callable[..., None]) -> None:
    """Adam as Keras has it, L2, batch normalisation and dropout, against float64."""
    network = created(name, image_size=SMALLEST[name]).train()
    start = models.to_torch_state_dict(copy.deepcopy(network))
    twins = [models.torch_twin(network), models.torch_twin(network).double()]
    regularized = {key for key, p in network.named_parameters() if any(p is q for q in network.regularized())}
    assert bool(regularized) == (name == "final")
    ours = Adam(network.parameter_groups(L2), lr=LR, eps=1e-7)
    theirs = [KerasAdam(dict(twin.named_parameters()), LR, regularized, L2) for twin in twins]
    losses = []
    for _ in range(STEPS):
        x, target = batch(network, {"final": 1, "baseline": 4}[name])
        before = copy.deepcopy(network)
        logits, found = recorded(network, x)
        loss = ops.softmax_cross_entropy(logits, target)
        ours.zero_grad()
        loss.backward()
        ours.step()
        step_losses = [loss.detach()]
        for twin, optimizer in zip(twins, theirs, strict=True):
            logits = follow(before, twin, found)(x.to(next(twin.parameters()).dtype))
            loss = F.cross_entropy(logits, target)
            loss.backward()
            optimizer.step()
            step_losses.append(loss.detach())
        losses.append(step_losses)
    as_exact_as_torch(*map(torch.stack, zip(*losses, strict=True)), chain(network), f"{name} losses")
    moments = by_twin_name(network, (ours.state[p]["exp_avg"] for p in network.parameters()))
    for key, m in moments.items():
        found = m, *(optimizer.m[key] for optimizer in theirs)
        as_exact_as_torch(*found, chain(network), f"{name} moment of {key}", measure=root_mean_square)
    state32, state64 = (twin.state_dict() for twin in twins)
    for key, value in models.to_torch_state_dict(network).items():
        if "num_batches" in key:
            continue
        moved = [t - start[key].to(t.dtype) for t in (value, state32[key], state64[key])]
        # Every step rounds the parameter itself; what the gradients are off by, torch32 shows. Running
        # statistics hold sums over the layers before.
        terms = chain(network) if "running" in key else STEPS
        limits = {"terms": terms, "magnitude": root_mean_square(start[key])}
        limits["rounding"] = 1 if algorithm == "direct" else 10  # the gradients' tiles are always 4x4
        exact = value.dim() > 1 and algorithm == "direct"  # Winograd rounds small gradients as large ones
        limits["measure"] = root_mean_square if exact else median
        as_exact_as_torch(*moved, name=f"{name} movement of {key}", **limits)
        if value.dim() > 1:
            # One percent would be seen, ten in Winograd's wider limits.
            wrong = moved[0] * (1.01 if algorithm == "direct" else 1.1)
            with pytest.raises(AssertionError, match="error"):
                as_exact_as_torch(wrong, *moved[1:], name=f"wrong {key}", **limits)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit_of_a_training_step(name: str, precision: ops.Precision) -> None:
    def trained(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(1)  # weights, pictures and dropout
        network = created(name, precision=precision).train()
        optimizer = Adam(network.parameter_groups(L2), lr=LR)
        for _ in range(2):
            x, target = batch(network, 3)
            optimizer.zero_grad()
            ops.softmax_cross_entropy(network(x), target).backward()
            optimizer.step()
        return network.state_dict()

    expected = trained(1)
    for threads in (2, 3):
        for key, value in trained(threads).items():
            assert torch.equal(value, expected[key]), f"{key} with {threads} threads"


# ---- exchange ------------------------------------------------------------------------------------


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
def test_torch_state_dict_round_trip(name: str) -> None:
    network, other = created(name), models.create(name, image_size=SIZE[name], seed=4)
    models.from_torch_state_dict(other, models.torch_twin(network).state_dict())
    assert same_state(network, other)
    x, _ = batch(network, 1)
    assert torch.equal(network.eval()(x), other.eval()(x))


@pytest.mark.parametrize("name", NAMES)
def test_keras_arrays_round_trip(name: str) -> None:
    network, other = created(name), models.create(name, image_size=SIZE[name], seed=4)
    arrays = models.to_keras_arrays(network)
    assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in arrays)
    models.from_keras_arrays(other, arrays)
    assert same_state(network, other)
    arrays[0][:] = 0  # a copy: the network keeps its weights
    assert same_state(network, other)


def keras_predict(
    layers: tuple[models.Layer, ...], weights: list[npt.NDArray[np.float32]], x: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The network as Keras computes it: [N, H, W, C] pictures, HWIO kernels, (in, out) matrices."""
    arrays = iter([w.astype(np.float64) for w in weights])
    for layer in layers:
        if isinstance(layer, models.Conv):
            kernel, bias = next(arrays), next(arrays)
            p = layer.padding
            x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
            H, W = x.shape[1] - 2, x.shape[2] - 2
            taps = [(r, s) for r in range(3) for s in range(3)]
            x = bias + sum(x[:, r : r + H, s : s + W] @ kernel[r, s] for r, s in taps)
            if layer.bn:
                gamma, beta, mean, variance = (next(arrays) for _ in range(4))
                x = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
            x = np.maximum(x, 0)
            if layer.pool:
                H, W = x.shape[1] // 2, x.shape[2] // 2
                x = x[:, : 2 * H, : 2 * W].reshape(len(x), H, 2, W, 2, -1).max((2, 4))
        elif isinstance(layer, models.Flatten):
            x = x.reshape(len(x), -1)
        elif isinstance(layer, models.Dense):
            x = x @ next(arrays) + next(arrays)
            x = np.maximum(x, 0) if layer.relu else x
    assert next(arrays, None) is None
    return x


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", NAMES)
def test_keras_arrays_predict_the_same(name: str, as_exact_as_torch: Callable[..., None]) -> None:
    network = created(name, num_classes=5).eval()
    x, _ = batch(network, 2)
    layers = (*models.ARCHITECTURES[name], models.Dense(5))
    arrays = models.to_keras_arrays(network)
    exact = torch.from_numpy(keras_predict(layers, arrays, x.permute(0, 2, 3, 1).double().numpy()))
    with torch.no_grad():
        as_exact_as_torch(network(x), models.torch_twin(network)(x), exact, chain(network), f"{name} Keras")


def test_keras_arrays_are_in_the_order_of_get_weights() -> None:
    shapes = [array.shape for array in models.to_keras_arrays(models.create("final", image_size=128))]
    assert shapes[:8] == [(3, 3, 3, 32), *[(32,)] * 5, (3, 3, 32, 32), (32,)]
    assert shapes[-4:] == [(256, 512), (512,), (512, 3), (3,)]


def test_from_torch_state_dict_refuses() -> None:
    network = models.create("baseline", image_size=32)
    state = models.to_torch_state_dict(network)
    before = copy.deepcopy(network)
    missing = {key: value for key, value in state.items() if key != "dense1.bias"}
    for bad, message in (
        (missing, "has no 'dense1.bias'"),
        ({**state, "dense9.bias": torch.zeros(3)}, "unknown 'dense9.bias'"),
        ({**state, "dense2.bias": torch.zeros(4)}, "'dense2.bias' must have shape"),
    ):
        with pytest.raises(UserError, match=message):
            models.from_torch_state_dict(network, bad)
        assert same_state(network, before)


def test_from_keras_arrays_refuses() -> None:
    network = models.create("baseline", image_size=32)
    arrays, before = models.to_keras_arrays(network), copy.deepcopy(network)
    with pytest.raises(UserError, match="has 14 arrays, the list has 13"):
        models.from_keras_arrays(network, arrays[1:])
    for i, bad in ((0, arrays[0].transpose(3, 2, 0, 1)), (13, np.zeros(4))):
        with pytest.raises(UserError, match=f"array {i} .* must have shape"):
            models.from_keras_arrays(network, [*arrays[:i], bad, *arrays[i + 1 :]])
    assert same_state(network, before)


# ---- penalty and groups --------------------------------------------------------------------------


def test_only_the_last_convolution_and_the_large_dense_layer_are_regularized() -> None:
    network = models.create("final", image_size=128)
    kernels = [network.get_parameter("block4_conv4.weight"), network.get_parameter("dense1.weight")]
    assert [id(p) for p in network.regularized()] == [id(p) for p in kernels]
    chosen, rest = network.parameter_groups(1e-4)
    assert (chosen["l2"], rest["l2"]) == (1e-4, 0.0)
    assert {id(p) for p in chosen["params"]} == {id(p) for p in kernels}
    assert len(chosen["params"]) + len(rest["params"]) == len(list(network.parameters()))
    assert {id(p) for p in rest["params"]}.isdisjoint(id(p) for p in kernels)


def test_penalty_is_l2_times_the_sum_of_squares(as_exact_as_torch: Callable[..., None]) -> None:
    network = models.create("final", image_size=128, seed=0)
    kernels = network.regularized()
    penalty = network.penalty(1e-4)
    exact = 1e-4 * sum(p.detach().double().square().sum() for p in kernels)
    torch32 = 1e-4 * sum(p.detach().square().sum() for p in kernels)
    as_exact_as_torch(penalty.detach(), torch32, exact, sum(p.numel() for p in kernels))
    penalty.backward()
    for p in kernels:  # the gradient that Adam's l2 stands for: 2 l2 w
        as_exact_as_torch(p.grad, 2e-4 * p.detach(), 2e-4 * p.detach().double())


def test_the_baseline_has_no_penalty() -> None:
    network = models.create("baseline", image_size=32)
    assert network.regularized() == []
    assert float(network.penalty(1.0)) == 0
    (group,) = network.parameter_groups(1e-4)
    assert group["l2"] == 0
    assert len(group["params"]) == len(list(network.parameters()))


# ---- create --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_create_is_reproducible(name: str) -> None:
    size = SMALLEST[name]
    first = models.create(name, image_size=size, seed=7)
    torch.rand(5)  # the state of the global generator is of no account
    state = torch.get_rng_state()
    assert same_state(first, models.create(name, image_size=size, seed=7))
    assert not same_state(first, models.create(name, image_size=size, seed=8))
    unseeded = []
    for _ in range(2):
        torch.set_rng_state(state)
        unseeded.append(models.create(name, image_size=size))
    assert same_state(*unseeded)
    assert not same_state(*(models.create(name, image_size=size) for _ in range(2)))


@pytest.mark.parametrize("name", NAMES)
def test_smallest_image(name: str) -> None:
    smallest = SMALLEST[name]
    assert models.create(name, image_size=smallest)(torch.rand(2, 3, smallest, smallest)).isfinite().all()
    for size in (smallest - 1, 3, 1, 0, -5):
        with pytest.raises(UserError, match=f"image size of {size} is too small for model '{name}'"):
            models.create(name, image_size=size)


def test_create_refuses() -> None:
    with pytest.raises(UserError, match="no model 'resnet': choose one of final, baseline"):
        models.create("resnet")
    for classes in (1, 0, -1):
        with pytest.raises(UserError, match=f"at least 2 classes, not {classes}"):
            models.create("final", num_classes=classes)
    with pytest.raises(UserError, match="too large"):
        models.create("final", image_size=100_000)


@pytest.mark.parametrize("name", NAMES)
def test_other_numbers_of_classes_and_sizes(name: str) -> None:
    network = models.create(name, num_classes=7, image_size=SMALLEST[name] + 9)
    assert network(torch.rand(1, 3, SMALLEST[name] + 9, SMALLEST[name] + 9)).shape == (1, 7)
