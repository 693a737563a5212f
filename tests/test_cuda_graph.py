"""A GPU's training step, on a device that is made up: the uploads' order, and that graph steps are train's steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maskcore import models, nn, ops, optim
from maskcore.cuda_graph import ALIGNMENT, WARM_UP, GraphStep, Packed, Upload
from maskcore.data import StoredBatch

SHAPES = {"a": ((4, 3), torch.uint8), "b": ((4,), torch.float64), "c": ((2, 2), torch.int64)}


def test_packed_tensors_share_a_block() -> None:
    size = Packed.bytes_of(SHAPES)
    assert size == 3 * ALIGNMENT
    block = torch.zeros(size, dtype=torch.uint8)
    packed = Packed(block, SHAPES)
    for name, (shape, dtype) in SHAPES.items():
        assert packed[name].shape == shape
        assert packed[name].dtype == dtype
        packed[name].fill_(7)
    copy = Packed(block.clone(), SHAPES)
    assert all(torch.equal(copy[name], packed[name]) for name in SHAPES)


# ---- uploads -------------------------------------------------------------------------------------


class Event:
    done = False


class LateDevice:
    """Two queues whose heads are executed at random times, and late: whatever may go wrong in order does."""

    def __init__(self, seed: int, waits: bool = True) -> None:
        self.random, self.waits = random.Random(seed), waits
        self.queues: dict[str, list[tuple[Callable[[], Any], Event | None, Event]]] = {
            "beside": [],
            "usual": [],
        }

    def on_host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    on_device = on_host

    def put(self, queue: str, work: Callable[[], Any], after: Event | None = None) -> Event:
        event = Event()
        self.queues[queue].append((work, after, event))
        for _ in range(self.random.randrange(2)):
            self.execute_one()
        return event

    def execute_one(self) -> None:
        ready = [
            queue for queue in self.queues.values() if queue and (queue[0][1] is None or queue[0][1].done)
        ]
        if ready:
            work, _, event = self.random.choice(ready).pop(0)
            work()
            event.done = True

    def upload(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
        return self.put("beside", lambda: target.copy_(source), after)

    def take(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
        return self.put("usual", lambda: target.copy_(source), after)

    def wait(self, event: Event) -> None:
        while self.waits and not event.done:
            self.execute_one()

    def warm_up(self, work: Callable[[], None]) -> None:
        raise AssertionError("nothing is captured here")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        raise AssertionError("nothing is captured here")


def arrived(device: LateDevice, upload: Upload) -> bool:
    """Whether each of 30 steps reads its own batch."""
    sent = [torch.randint(0, 255, (4, 3), dtype=torch.uint8) for _ in range(30)]
    found: list[Tensor] = []
    for batch in sent:
        upload.send({"a": batch})
        device.put("usual", lambda: found.append(upload.current["a"].clone()))
    while any(device.queues.values()):
        device.execute_one()
    return all(map(torch.equal, sent, found))


@pytest.mark.parametrize("seed", range(20))
def test_every_step_reads_its_own_batch(seed: int) -> None:
    device = LateDevice(seed)
    assert arrived(device, Upload(device, SHAPES))


def test_a_processor_that_does_not_wait_is_found() -> None:
    devices = [LateDevice(seed, waits=False) for seed in range(20)]
    assert not all(arrived(device, Upload(device, SHAPES)) for device in devices)


def test_an_upload_that_does_not_wait_is_found() -> None:
    class Hasty(LateDevice):
        def upload(self, target: Tensor, source: Tensor, after: Event | None) -> Event:
            return super().upload(target, source, None)

    devices = [Hasty(seed) for seed in range(20)]
    assert not all(arrived(device, Upload(device, SHAPES)) for device in devices)


# ---- steps ---------------------------------------------------------------------------------------


class Immediate:
    """The CPU in a GPU's place."""

    def __init__(self) -> None:
        self.captured = self.replayed = self.warmed = 0

    def on_host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    on_device = on_host

    def upload(self, target: Tensor, source: Tensor, after: Any) -> str:
        target.copy_(source)
        return "event"

    take = upload

    def wait(self, event: str) -> None:
        assert event == "event"

    def warm_up(self, work: Callable[[], None]) -> None:
        for _ in range(WARM_UP):
            work()
            self.warmed += 1

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


SIZE, BATCH = 140, 2


def batches(counts: list[int]) -> list[StoredBatch]:
    found = []
    for number, n in enumerate(counts):
        matrices = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]) + 0.01 * torch.randn(n, 6)
        pictures = torch.randint(0, 256, (n, SIZE, SIZE, 3), dtype=torch.uint8)
        labels = torch.randint(0, 3, (n,))
        found.append(StoredBatch(pictures, matrices.double(), labels, torch.arange(n), number))
    return found


def new_run() -> tuple[models.Network, optim.Adam]:
    network = models.create("final", image_size=SIZE, seed=1).train()
    return network, optim.Adam(network.parameter_groups(1e-4), lr=1e-3)


def plain_steps(
    network: models.Network, optimizer: optim.Adam, given: list[StoredBatch]
) -> tuple[float, int]:
    """What train does on the CPU."""
    total, correct = 0.0, 0
    for batch in given:
        logits = network(ops.warp(batch.pictures, batch.matrices, 3.0))
        loss = ops.softmax_cross_entropy(logits, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item() * len(batch.labels)
        correct += int((logits.argmax(1) == batch.labels).sum())
    return total, correct


def state_of(network: models.Network, optimizer: optim.Adam) -> dict[str, Tensor]:
    optimizer.note_counts()
    found = dict(network.state_dict())
    for name, p in network.named_parameters():
        for key, value in optimizer.state[p].items():
            found[f"{key}.{name}"] = torch.as_tensor(value)
    return found


def test_graph_steps_are_the_steps_of_train() -> None:
    """To the bit, dropout included, with a ragged batch first, between and last; the warm-up leaves no trace."""
    given = batches([1, BATCH, BATCH, 1, BATCH, 1])
    plain, ours = new_run(), new_run()
    torch.manual_seed(5)
    expected = plain_steps(*plain, given)
    torch.manual_seed(5)
    device = Immediate()
    step = GraphStep(*ours, device, BATCH, fill=3.0)
    for batch in given:
        step(batch)
    assert (device.warmed, device.captured, device.replayed) == (WARM_UP, 1, 3)
    total, correct = step.take_sums()
    assert total == pytest.approx(expected[0], rel=1e-12)
    assert correct == expected[1]
    assert step.take_sums() == (0.0, 0)
    theirs = state_of(*plain)
    for name, value in state_of(*ours).items():
        assert torch.equal(value, theirs[name]), name
    assert all(layer.seed is None for layer in ours[0].modules() if isinstance(layer, nn.Dropout))


def test_a_batch_that_is_too_large_is_refused() -> None:
    step = GraphStep(*new_run(), Immediate(), BATCH, fill=0.0)
    with pytest.raises(ValueError, match="batches of up to 2 pictures, not 3"):
        step(batches([3])[0])


def test_adam_goes_on_counting_where_it_was() -> None:
    given = batches([BATCH] * 3)
    plain, ours = new_run(), new_run()
    torch.manual_seed(5)
    plain_steps(*plain, given)
    torch.manual_seed(5)
    plain_steps(*ours, given[:1])
    for batch in given[1:2]:
        GraphStep(*ours, Immediate(), BATCH, fill=3.0)(batch)
    saved = ours[1].state_dict()
    assert {entry["step"] for entry in saved["state"].values()} == {2}
    generator = torch.get_rng_state()  # a checkpoint has it too
    network = models.create("final", image_size=SIZE, seed=9).train()
    torch.set_rng_state(generator)
    network.load_state_dict(ours[0].state_dict())
    optimizer = optim.Adam(network.parameter_groups(1e-4), lr=1e-3)
    optimizer.load_state_dict(saved)
    GraphStep(network, optimizer, Immediate(), BATCH, fill=3.0)(given[2])
    theirs = state_of(*plain)
    for name, value in state_of(network, optimizer).items():
        assert torch.equal(value, theirs[name]), name


def test_steps_that_differ_cannot_be_counted_together() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = optim.Adam([p, q])
    p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"have done \[0, 1\] steps"):
        optimizer.count_on_device()


def test_counted_steps_need_every_gradient() -> None:
    optimizer = optim.Adam([torch.nn.Parameter(torch.ones(2))])
    optimizer.count_on_device()
    with pytest.raises(RuntimeError, match="needs a gradient of every parameter"):
        optimizer.step()
