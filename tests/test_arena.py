"""The memory of the CPU operators' results: no two tensors share it, steps reuse it, and it can be given back."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from maskcore import ops


def held(value: int, height: int, width: int) -> Tensor:
    """[1, 64, height, width] of one value, as an operator's result: max-pooling makes it from four times as much."""
    source = torch.full((1, 64, 2 * height, 2 * width), float(value))
    return ops.max_pool(source)


def make_and_free(seed: int, rounds: int = 150) -> None:
    """Tensors of random sizes, small and large, freed in random order: each must keep its value till then."""
    chance = random.Random(seed)
    alive: list[tuple[int, Tensor]] = []
    for value in range(rounds):
        alive.append((value, held(value, chance.randint(1, 60), chance.randint(1, 60))))
        while len(alive) > 12 or (alive and chance.random() < 0.4):
            expected, tensor = alive.pop(chance.randrange(len(alive)))
            assert tensor.min() == tensor.max() == expected
    for expected, tensor in alive:
        assert tensor.min() == tensor.max() == expected


def test_no_two_results_share_memory() -> None:
    make_and_free(seed=0)


def test_several_threads_may_make_and_free_results() -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(make_and_free, seed) for seed in range(4)]:
            done.result()


def test_a_result_outlives_views_and_the_thread_that_made_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        view = pool.submit(lambda: held(3, 40, 40)[:, 1:, 2:]).result()
    held(4, 40, 40)
    assert view.min() == view.max() == 3


def run(program: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return [int(number) for number in done.stdout.split()]


STEPS = """
import resource, torch
from maskcore import models, ops, optim
torch.set_num_threads(2)
network = models.create("final", image_size=160, seed=0)
optimizer = optim.Adam(network.parameters())
x, target = torch.rand(4, 3, 160, 160).to(memory_format=torch.channels_last), torch.arange(4) % 3
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(4):
    before = faults()
    optimizer.zero_grad()
    ops.softmax_cross_entropy(network(x), target).backward()
    optimizer.step()
    print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the arena needs Linux' mmap")
def test_steady_steps_map_no_memory() -> None:
    """A step's activations and gradients are about 20 MB; malloc would map most of them anew, 4 KiB a fault."""
    _, _, third, fourth = run(STEPS)
    assert max(third, fourth) < 300


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux' /proc")
def test_empty_cache_gives_memory_back() -> None:
    program = """
import pathlib, torch
from maskcore import ops
def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024
x = torch.ones(1, 64, 1024, 1024).to(memory_format=torch.channels_last)
kept = ops.max_pool(x[:, :, :64, :64])
y = ops.max_pool(x)  # 64 MiB, and 16 of indices
with_y = resident()
del y
without_y = resident()
ops.empty_cache()
print(with_y, without_y, resident(), int(kept.min() == 1))
"""
    with_y, without_y, trimmed, intact = run(program)
    assert without_y > with_y - 16  # kept for the next result
    assert trimmed < with_y - 60
    assert intact


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux'")
def test_a_limited_address_space_is_left_alone() -> None:
    """Where the address space is limited (ulimit -v), torch's allocator has to do."""
    program = """
import pathlib, resource, torch
from maskcore import ops
def size():
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) // 1024
before = size()
resource.setrlimit(resource.RLIMIT_AS, ((before + 1024) * 2**20, resource.RLIM_INFINITY))
y = ops.max_pool(torch.ones(1, 64, 256, 256).to(memory_format=torch.channels_last))
print(size() - before, int(y.min() == 1))
"""
    grown, right = run(program)
    assert grown < 1024
    assert right


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux' /proc")
def test_backward_needs_little_more_than_forward_left() -> None:
    """At its largest it holds the first two blocks' activations and three gradients beside few gaps: 1.16 times what
    forward left, with the parameters' gradients 1.31 times. Where these lay among the
    activations, those took 809 MiB instead of 647."""
    program = """
import pathlib, torch
from maskcore import models, ops, optim
torch.set_num_threads(2)
network = models.create("final", image_size=256, seed=0)
optimizer = optim.Adam(network.parameters())
def resident(of):
    return int(pathlib.Path("/proc/self/status").read_text().partition(of)[2].split()[0])
def forward(batch):
    x, target = torch.rand(batch, 3, 256, 256).to(memory_format=torch.channels_last), torch.arange(batch) % 3
    return ops.softmax_cross_entropy(network(x), target)
forward(4).backward()
optimizer.step()
optimizer.zero_grad()
ops.empty_cache()
start = resident("VmRSS:")
loss = forward(32)
print(resident("VmHWM:") - start)
loss.backward()
print(resident("VmHWM:") - start)
"""
    forward, all_of_it = run(program)
    assert all_of_it < 1.4 * forward
