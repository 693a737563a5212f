"""The two networks of the 2020 report, each as a table of layers, and their exchange with other engines."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskcore import nn, ops
from maskcore.errors import UserError


@dataclasses.dataclass(frozen=True)
class Conv:
    """3x3 convolution + ReLU; ``bn`` between them, a 2x2 max-pool behind them, L2 on the filter."""

    channels: int
    padding: int = 0
    bn: bool = False
    pool: bool = False
    l2: bool = False


@dataclasses.dataclass(frozen=True)
class Flatten:
    pass


@dataclasses.dataclass(frozen=True)
class Dropout:
    rate: float


@dataclasses.dataclass(frozen=True)
class Dense:
    units: int
    relu: bool = False
    l2: bool = False


Layer: TypeAlias = Conv | Flatten | Dropout | Dense
Shape: TypeAlias = tuple[int, ...]  # of one sample: (H, W, C) or (features,)


def _block(channels: int, convolutions: int, l2: bool = False) -> tuple[Conv, ...]:
    """Batch normalisation after the first convolution, the pool after the last."""
    inner = (Conv(channels),) * (convolutions - 2)
    return Conv(channels, bn=True), *inner, Conv(channels, pool=True, l2=l2)


#: The layers between the picture and the last dense layer, which has one unit a class.
ARCHITECTURES: dict[str, tuple[Layer, ...]] = {
    # The report's final network: 13,305,315 parameters for 256 x 256 pixels and 3 classes.
    "final": (
        *_block(32, 2),
        *_block(64, 3),
        *_block(128, 4),
        *_block(256, 4, l2=True),
        Flatten(),
        Dropout(0.5),
        Dense(512, relu=True, l2=True),
        Dropout(0.2),
    ),
    # The report's first model: 4,294,739 parameters.
    "baseline": (
        *(Conv(channels, padding=1, pool=True) for channels in (8, 16, 32, 64, 128)),
        Flatten(),
        Dense(512, relu=True),
    ),
}

NAMES = tuple(ARCHITECTURES)


class Row(NamedTuple):
    """One line of the table that Keras' ``summary()`` prints."""

    name: str
    kind: str
    output_shape: tuple[int | None, ...]  # channels last; None is the batch
    parameters: int
    trainable: int


class Placed(NamedTuple):
    """A layer of a network with its name and the shapes around it."""

    name: str
    layer: Layer
    input_shape: Shape
    output_shape: Shape


class Network(torch.nn.Module):
    """A network of :data:`ARCHITECTURES`: pictures ``[N, 3, S, S]`` float32 in 0..1 -> logits ``[N, classes]``.

    Its children are the layers in order, named as in :attr:`layers`. Probabilities are the softmax of what
    it returns.

    Raises:
        UserError: there is no such model, or ``image_size`` or ``num_classes`` does not fit it.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 3,
        image_size: int = 256,
        precision: ops.Precision = "ieee",
    ) -> None:
        super().__init__()
        self.layers = place(name, num_classes, image_size)
        self.name = name
        self.num_classes = num_classes
        self.image_size = image_size
        for key, layer, shape, _ in self.layers:
            self.add_module(key, _module(layer, shape, precision))

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        while layers:
            first, second = layers[0], layers[1] if len(layers) > 1 else None
            if (
                isinstance(first, nn.ConvBNReLU)
                and isinstance(second, nn.ConvReLU)
                and nn.can_fuse(first, second)
            ):
                x = nn.conv_bn_relu_conv_relu(first, second, x)
                del layers[:2]
            else:
                x = first(x)
                del layers[0]
        return x

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew, layer by layer, from one generator."""
        for layer in self.children():
            if isinstance(layer, nn.ConvReLU | nn.ConvBNReLU | nn.Dense):
                layer.reset_parameters(generator)

    def regularized(self) -> list[torch.nn.Parameter]:
        """The kernels that carry the report's L2 penalty."""
        names = [at.name for at in self.layers if getattr(at.layer, "l2", False)]
        return [self.get_parameter(f"{name}.weight") for name in names]

    def parameter_groups(self, l2: float) -> list[dict[str, Any]]:
        """Groups for :class:`maskcore.optim.Adam`: the regularised kernels with ``l2``, the rest without."""
        kernels = self.regularized()
        chosen = {id(p) for p in kernels}
        rest = [p for p in self.parameters() if id(p) not in chosen]
        groups = [{"params": kernels, "l2": l2}, {"params": rest, "l2": 0.0}]
        return [group for group in groups if group["params"]]

    def penalty(self, l2: float) -> Tensor:
        """``l2 * sum(w^2)`` over the regularised kernels: what Keras adds to the loss. A scalar."""
        squares = [kernel.square().sum() for kernel in self.regularized()]
        return l2 * torch.stack(squares).sum() if squares else torch.zeros(())

    def table(self) -> list[Row]:
        """The rows of Keras' ``summary()`` for this network, with Keras' layer names."""
        counts: Counter[str] = Counter()
        rows: list[Row] = []
        for _, layer, shape, output in self.layers:
            for stem, kind, row_shape, parameters, trainable in _keras_rows(layer, shape, output):
                name = f"{stem}_{counts[stem]}" if counts[stem] else stem
                counts[stem] += 1
                rows.append(Row(name, kind, (None, *row_shape), parameters, trainable))
        return rows


def create(
    name: str,
    num_classes: int = 3,
    image_size: int = 256,
    *,
    precision: ops.Precision = "ieee",
    seed: int | None = None,
) -> Network:
    """A new :class:`Network` with glorot-uniform weights and zero biases.

    ``precision`` is that of the convolutions' products: see :func:`maskcore.ops.conv_relu`. ``seed`` fixes the
    weights whatever state torch's global generator is in; None draws from that generator.
    """
    network = Network(name, num_classes, image_size, precision)
    if seed is not None:
        network.reset_parameters(torch.Generator().manual_seed(seed))
    return network


def for_inference(network: Network, precision: ops.Precision | None = None) -> torch.nn.Sequential:
    """What a network computes in evaluation mode, as a snapshot that is faster to call: see
    :class:`maskcore.nn.InferenceConv`. Input and output as for :class:`Network`; later changes of the network do
    not reach it. ``precision`` is that of the convolutions' products, by default the network's own.
    """
    layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
    for name, layer in network.named_children():
        if isinstance(layer, nn.ConvReLU | nn.ConvBNReLU):
            layers[name] = nn.InferenceConv(layer, precision)
        elif not isinstance(layer, nn.Dropout):
            layers[name] = copy.deepcopy(layer).requires_grad_(False)
    return torch.nn.Sequential(layers).eval()


def place(name: str, num_classes: int = 3, image_size: int = 256) -> list[Placed]:
    """The layers of a network with their names and shapes, without building it. Errors as :class:`Network`."""
    if name not in ARCHITECTURES:
        raise UserError(f"there is no model {name!r}: choose one of {', '.join(NAMES)}")
    if num_classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, not {num_classes}")
    if image_size > 4096:
        raise UserError(f"an image size of {image_size} is too large: at most 4096 pixels")
    placed: list[Placed] = []
    shape: Shape = (image_size, image_size, 3)
    for key, layer in _named((*ARCHITECTURES[name], Dense(num_classes))):
        output = _output_shape(layer, shape)
        if min(output) < 1:
            raise UserError(f"an image size of {image_size} is too small for model {name!r}")
        placed.append(Placed(key, layer, shape, output))
        shape = output
    return placed


def _named(layers: Sequence[Layer]) -> Iterator[tuple[str, Layer]]:
    block, conv = 1, 0
    counts: Counter[str] = Counter()
    for layer in layers:
        if isinstance(layer, Conv):
            conv += 1
            yield f"block{block}_conv{conv}", layer
            if layer.pool:
                block, conv = block + 1, 0
        elif isinstance(layer, Flatten):
            yield "flatten", layer
        else:
            stem = type(layer).__name__.lower()
            counts[stem] += 1
            yield f"{stem}{counts[stem]}", layer


def _output_shape(layer: Layer, shape: Shape) -> Shape:
    match layer:
        case Conv():
            H, W = (size + 2 * layer.padding - 2 for size in shape[:2])
            return (H // 2, W // 2, layer.channels) if layer.pool else (H, W, layer.channels)
        case Flatten():
            return (math.prod(shape),)
        case Dense():
            return (layer.units,)
        case Dropout():
            return shape


def _module(layer: Layer, shape: Shape, precision: ops.Precision) -> torch.nn.Module:
    match layer:
        case Conv(bn=True, pool=False):
            return nn.ConvBNReLU(shape[-1], layer.channels, layer.padding, precision=precision)
        case Conv(bn=False):
            return nn.ConvReLU(shape[-1], layer.channels, layer.padding, layer.pool, precision)
        case Flatten():
            return nn.Flatten()
        case Dense():
            return nn.Dense(shape[0], layer.units, relu=layer.relu)
        case Dropout():
            return nn.Dropout(layer.rate)
    raise ValueError(f"there is no layer for {layer}")


def _keras_rows(layer: Layer, shape: Shape, output: Shape) -> Iterator[tuple[str, str, Shape, int, int]]:
    """(name stem, class, output shape, parameters, trainable parameters) of the Keras layers that make up one."""
    match layer:
        case Conv():
            H, W = (size + 2 * layer.padding - 2 for size in shape[:2])
            full = (H, W, layer.channels)
            weights = (9 * shape[-1] + 1) * layer.channels
            yield "conv2d", "Conv2D", full, weights, weights
            if layer.bn:
                statistics = 2 * layer.channels  # moving mean and variance: not trained
                yield "batch_normalization", "BatchNormalization", full, 2 * statistics, statistics
                yield "re_lu", "ReLU", full, 0, 0
            if layer.pool:
                yield "max_pooling2d", "MaxPooling2D", output, 0, 0
        case Dense():
            weights = (shape[0] + 1) * layer.units
            yield "dense", "Dense", output, weights, weights
        case Flatten() | Dropout():
            name = type(layer).__name__
            yield name.lower(), name, output, 0, 0


# ---- exchange with torch.nn and Keras ------------------------------------------------------------
#
# The torch.nn twin has the layers in PyTorch's own order: Flatten in C, H, W order, the first dense layer's
# columns permuted to match. A network's layer "X" is the twin's "X" (convolution, linear), "X_bn", "X_relu"
# and "X_pool".


def torch_twin(network: Network) -> torch.nn.Sequential:
    """The same network of plain ``torch.nn`` layers with the same weights, in the same mode.

    It takes ``[N, 3, S, S]`` in any memory format and knows nothing of maskcore: for comparison and export.
    """
    twin = torch.nn.Sequential(OrderedDict(_twin_layers(network)))
    twin.load_state_dict(to_torch_state_dict(network))
    return twin.to(next(network.parameters()).device).train(network.training)


def _twin_layers(network: Network) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, layer, shape, _ in network.layers:
        match layer:
            case Conv():
                yield name, torch.nn.Conv2d(shape[-1], layer.channels, 3, padding=layer.padding)
                if layer.bn:
                    ours = network.get_submodule(name)
                    assert isinstance(ours, nn.ConvBNReLU)
                    bn = torch.nn.BatchNorm2d(layer.channels, ours.eps, 1 - ours.momentum)
                    yield f"{name}_bn", bn
                yield f"{name}_relu", torch.nn.ReLU()
                if layer.pool:
                    yield f"{name}_pool", torch.nn.MaxPool2d(2)
            case Flatten():
                yield name, torch.nn.Flatten()
            case Dense():
                yield name, torch.nn.Linear(shape[0], layer.units)
                if layer.relu:
                    yield f"{name}_relu", torch.nn.ReLU()
            case Dropout():
                yield name, torch.nn.Dropout(layer.rate)


_BN_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}


def _flattened(network: Network) -> tuple[str, Shape]:
    """The dense layer behind the flatten, and the shape (H, W, C) that is flattened."""
    places = network.layers
    flatten = next(i for i, at in enumerate(places) if isinstance(at.layer, Flatten))
    dense = next(at for at in places[flatten:] if isinstance(at.layer, Dense))
    return f"{dense.name}.weight", places[flatten].input_shape


def to_torch_state_dict(network: Network) -> dict[str, Tensor]:
    """The network's weights under the names, and in the layout, of :func:`torch_twin`."""
    state: dict[str, Tensor] = {}
    flat, (H, W, C) = _flattened(network)
    for key, value in network.state_dict().items():
        name, leaf = key.rsplit(".", 1)
        if leaf in _BN_NAMES:
            state[f"{name}_bn.{_BN_NAMES[leaf]}"] = value
            if leaf == "running_var":
                # PyTorch's own count of batches; it is not used with a fixed momentum.
                state[f"{name}_bn.num_batches_tracked"] = torch.tensor(0)
        elif key == flat:
            state[key] = value.view(-1, H, W, C).permute(0, 3, 1, 2).flatten(1)
        else:
            state[key] = value
    return state


def from_torch_state_dict(network: Network, state: Mapping[str, Tensor]) -> None:
    """Takes over the weights of a :func:`torch_twin` (or of any model with its names).

    Raises:
        UserError: a name is missing, unknown, or has another shape.
    """
    flat, (H, W, C) = _flattened(network)
    expected = to_torch_state_dict(network)
    given = {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}
    wanted = {key for key in expected if not key.endswith("num_batches_tracked")}
    for key in sorted(wanted ^ given.keys()):
        problem = "has no" if key in wanted else "has an unknown"
        raise UserError(f"the state dict {problem} {key!r}")
    own: dict[str, Tensor] = {}
    for key, value in given.items():
        if value.shape != expected[key].shape:
            raise UserError(f"{key!r} must have shape {tuple(expected[key].shape)}, has {tuple(value.shape)}")
        name, leaf = key.rsplit(".", 1)
        if name.endswith("_bn"):
            ours = next(mine for mine, theirs in _BN_NAMES.items() if theirs == leaf)
            own[f"{name.removesuffix('_bn')}.{ours}"] = value
        elif key == flat:
            own[key] = value.view(-1, C, H, W).permute(0, 2, 3, 1).flatten(1)
        else:
            own[key] = value
    network.load_state_dict(own)


def _keras_order(network: Network) -> list[str]:
    """State-dict keys in the order of Keras' ``get_weights()``."""
    leaves = ("weight", "bias", "gamma", "beta", "running_mean", "running_var")
    state = network.state_dict()
    keys = [f"{at.name}.{leaf}" for at in network.layers for leaf in leaves]
    return [key for key in keys if key in state]


def _to_keras(value: Tensor) -> Tensor:
    """OIHW -> HWIO, (out, in) -> (in, out); vectors as they are."""
    return value.permute(2, 3, 1, 0) if value.dim() == 4 else value.t()


def to_keras_arrays(network: Network) -> list[npt.NDArray[np.float32]]:
    """The weights as the list that ``keras.Model.get_weights()`` returns for this network.

    Kernels are HWIO, dense matrices (in, out) with the flatten in H, W, C order.
    """
    state = network.state_dict()
    return [_to_keras(state[key]).contiguous().cpu().numpy().copy() for key in _keras_order(network)]


def from_keras_arrays(network: Network, arrays: Sequence[npt.NDArray[Any]]) -> None:
    """Takes over what ``keras.Model.get_weights()`` returned for this network.

    Raises:
        UserError: the number of arrays or the shape of one differs.
    """
    keys = _keras_order(network)
    if len(arrays) != len(keys):
        raise UserError(f"{network.name!r} has {len(keys)} arrays, the list has {len(arrays)}")
    state = network.state_dict()
    for i, (key, array) in enumerate(zip(keys, arrays, strict=True)):
        shape = tuple(_to_keras(state[key]).shape)
        if array.shape != shape:
            raise UserError(f"array {i} ({key}) must have shape {shape}, has {array.shape}")
        value = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        state[key] = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.t()
    network.load_state_dict(state)
