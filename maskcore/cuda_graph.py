"""A training step on a GPU: uploaded while the step before runs, then one CUDA graph.

A step is one launch for the processor: the graph holds augmentation, forward and backward pass, Adam, and the sums of
loss and right answers, which stay on the device until somebody asks. What differs from step to step lies in memory
that the graph reads: pictures, their matrices, labels, dropout's seeds, and Adam's count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from maskcore import models, nn, ops, optim
from maskcore.data import StoredBatch
from maskcore.image import PIXEL_SCALE

#: Steps before the capture, as PyTorch's notes on CUDA graphs ask for: libraries choose and allocate in them.
WARM_UP = 3
ALIGNMENT = 256  # bytes

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Packed:
    """Tensors in one block of memory, so that one copy moves all of them."""

    def __init__(self, block: Tensor, shapes: Shapes) -> None:
        self.block = block
        self.tensors: dict[str, Tensor] = {}
        begin = 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            self.tensors[name] = block[begin : begin + size].view(dtype).view(shape)
            begin += -(-size // ALIGNMENT) * ALIGNMENT

    @staticmethod
    def bytes_of(shapes: Shapes) -> int:
        sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


class Device(Protocol):
    """What a step asks of a GPU. An event is whatever the methods below return."""

    def on_host(self, size: int) -> Tensor:
        """Memory of the processor from which the device copies by itself."""

    def on_device(self, size: int) -> Tensor: ...

    def upload(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copies beside the steps, once ``after`` has happened; returns at once the event of its end."""

    def take(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copies between two steps, once ``after`` has happened; returns at once the event of its end."""

    def wait(self, event: Any) -> None:
        """Lets the processor wait."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs the work a few times."""

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """A call that does what the work would do, without the processor's part in it."""


class Cuda:
    """A GPU by torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.beside = torch.cuda.Stream(device)

    def on_host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def on_device(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def upload(self, target: Tensor, source: Tensor, after: Any) -> Any:
        with torch.cuda.stream(self.beside):
            return self._copy(target, source, after)

    def take(self, target: Tensor, source: Tensor, after: Any) -> Any:
        return self._copy(target, source, after)

    def _copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        stream = torch.cuda.current_stream(self.device)
        if after is not None:
            stream.wait_event(after)
        target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, event: Any) -> None:
        event.synchronize()

    def warm_up(self, work: Callable[[], object]) -> None:
        beside, usual = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        beside.wait_stream(usual)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                work()
        usual.wait_stream(beside)

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


class Upload:
    """Batches on their way to the memory that steps read.

    Two buffers of the processor and two of the device take turns: while a step runs, the next batch is written into
    pinned memory and copied up. The processor waits only if it is two batches ahead.
    """

    def __init__(self, device: Device, shapes: Shapes) -> None:
        self._device = device
        size = Packed.bytes_of(shapes)
        self._hosts = [Packed(device.on_host(size), shapes) for _ in range(2)]
        self._rooms = [device.on_device(size) for _ in range(2)]
        self._uploaded: list[Any] = [None, None]
        self._taken: list[Any] = [None, None]
        self._turn = 0
        self.current = Packed(device.on_device(size), shapes)

    def send(self, values: Mapping[str, Tensor]) -> None:
        """Makes ``values`` the first rows of what the next step reads in ``current``."""
        turn, self._turn = self._turn, 1 - self._turn
        host, room = self._hosts[turn], self._rooms[turn]
        if self._uploaded[turn] is not None:  # of two batches ago: until then the host buffer is still read
            self._device.wait(self._uploaded[turn])
        for name, value in values.items():
            host[name][: len(value)].copy_(value)
        self._uploaded[turn] = self._device.upload(room, host.block, self._taken[turn])
        self._taken[turn] = self._device.take(self.current.block, room, self._uploaded[turn])


class GraphStep:
    """Steps of one network on one device, each the same for any batch of ``batch_size`` pictures.

    A batch of another size, such as the last one of an epoch, goes through the same operators one by one. The step
    is captured when the first whole batch comes; the steps of the warm-up are undone.

    Args:
        fill: what comes from outside of an augmented picture, 0 to 255.
    """

    def __init__(
        self, network: models.Network, optimizer: optim.Adam, device: Device, batch_size: int, fill: float
    ) -> None:
        self._network, self._optimizer, self._device = network, optimizer, device
        self._fill = fill
        self._batch_size = batch_size
        convolution = next(m for m in network.modules() if isinstance(m, nn.ConvReLU | nn.ConvBNReLU))
        on_cuda = convolution.weight.device.type == "cuda"
        # Where products round to bfloat16, activations are kept so: half of the memory that bounds the step.
        self._dtype = torch.bfloat16 if on_cuda and convolution.precision == "bf16" else torch.float32
        self._dropouts = [m for m in network.modules() if isinstance(m, nn.Dropout)]
        size = network.image_size
        self._upload = Upload(
            device,
            {
                "pictures": ((batch_size, size, size, 3), torch.uint8),
                "matrices": ((batch_size, 6), torch.float64),
                "labels": ((batch_size,), torch.int64),
                "seeds": ((max(len(self._dropouts), 1),), torch.int64),
            },
        )
        self._sums = torch.zeros(2, dtype=torch.float64, device=convolution.weight.device)
        self._replay: Callable[[], None] | None = None
        optimizer.count_on_device()

    def __call__(self, batch: StoredBatch) -> None:
        """Updates the network by a batch; returns before the device has begun."""
        count = len(batch.labels)
        if count > self._batch_size:
            raise ValueError(f"the step takes batches of up to {self._batch_size} pictures, not {count}")
        values = {"pictures": batch.pictures, "matrices": batch.matrices, "labels": batch.labels}
        if self._dropouts:
            values["seeds"] = torch.tensor([layer.draw() for layer in self._dropouts])
        self._upload.send(values)
        with _Seeds(self._dropouts, self._upload.current["seeds"]):
            if count < self._batch_size:
                self._update(count)
            else:
                if self._replay is None:
                    self._replay = self._captured()
                self._replay()

    def take_sums(self) -> tuple[float, int]:
        """Cross-entropy summed over pictures, and right answers, since the last call. Waits for the device."""
        loss, correct = self._sums.tolist()
        self._sums.zero_()
        return loss, int(correct)

    def _update(self, count: int) -> None:
        current = {name: tensor[:count] for name, tensor in self._upload.current.tensors.items()}
        images = ops.warp(current["pictures"], current["matrices"], self._fill, PIXEL_SCALE, self._dtype)
        logits = self._network(images).float()
        loss = ops.softmax_cross_entropy(logits, current["labels"])
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            correct = (logits.argmax(1) == current["labels"]).sum()
            self._sums += torch.stack([loss.double() * count, correct.double()])

    def _captured(self) -> Callable[[], None]:
        def work() -> None:
            self._update(self._batch_size)

        before = [tensor.clone() for tensor in self._state()]
        self._device.warm_up(work)
        for tensor, value in zip(self._state(), before, strict=True):
            tensor.copy_(value)
        return self._device.capture(work)

    def _state(self) -> list[Tensor]:
        """Everything that a step changes."""
        parameters = [p.detach() for p in self._network.parameters()]
        states = [self._optimizer.state[p] for p in self._network.parameters()]
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        return [*parameters, *self._network.buffers(), *moments, *(self._optimizer.counts or []), self._sums]


class _Seeds:
    """Gives the dropout layers their seeds in memory for the time of a step."""

    def __init__(self, layers: list[nn.Dropout], seeds: Tensor) -> None:
        self._layers, self._seeds = layers, seeds

    def __enter__(self) -> None:
        for i, layer in enumerate(self._layers):
            layer.seed = self._seeds[i : i + 1]

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.seed = None
