"""The comparison that every benchmark makes: maskcore and PyTorch in turn, in one process.

A round times PyTorch and then maskcore, so that a drift of the machine's speed falls on both. The table at
the end has medians; pytest-benchmark's own table has the distribution of maskcore's times.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import maskcore
from maskcore import models


@dataclasses.dataclass
class Comparison:
    name: str
    ours: float  # seconds, median
    theirs: float
    work: float  # floating-point operations or bytes a call
    unit: str  # "GFLOP/s" or "GB/s"

    def line(self) -> str:
        rate = self.work / self.ours / 1e9
        other = self.work / self.theirs / 1e9
        ours, theirs = self.ours * 1e3, self.theirs * 1e3
        speedup = self.theirs / self.ours
        return (
            f"{self.name:44} {ours:9.2f} {theirs:9.2f} {speedup:7.2f}x {rate:8.1f} {other:8.1f}  {self.unit}"
        )


_comparisons = pytest.StashKey[list[Comparison]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("maskcore")
    group.addoption("--rounds", type=int, default=9, help="timed rounds of each comparison")
    group.addoption("--batch-size", type=int, default=8, help="pictures in a batch")
    group.addoption("--image-size", type=int, default=256, help="side of the pictures, 124 or more")
    group.addoption("--threads", type=int, default=os.cpu_count(), help="threads of both engines")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_comparisons] = []
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "conv" in metafunc.fixturenames:
        size = metafunc.config.getoption("--image-size")
        convs = [at for at in models.place("final", image_size=size) if isinstance(at.layer, models.Conv)]
        metafunc.parametrize("conv", convs, ids=[at.name for at in convs])


@pytest.fixture
def batch_size(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--batch-size"))


@pytest.fixture
def image_size(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--image-size"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """compare(ours, theirs, flops=... or bytes=...) times both and adds a line to the table."""

    def run(
        ours: Callable[[], Any], theirs: Callable[[], Any], *, flops: float = 0, bytes: float = 0
    ) -> None:
        their_times: list[float] = []

        def time_theirs() -> None:
            begin = time.perf_counter()
            theirs()
            their_times.append(time.perf_counter() - begin)

        time_theirs()  # warms up, as the next line does
        ours()
        their_times.clear()
        benchmark.pedantic(ours, setup=time_theirs, rounds=request.config.getoption("--rounds"))
        unit = "GFLOP/s" if flops else "GB/s"
        name = request.node.name.removeprefix("bench_")
        mine, other = benchmark.stats.stats.median, statistics.median(their_times)
        line = Comparison(name, mine, other, flops or bytes, unit)
        benchmark.extra_info.update({"torch_ms": other * 1e3, "speedup": other / mine})
        request.config.stash[_comparisons].append(line)

    return run


def _median(call: Callable[[], Any], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[_comparisons]
    if not lines:
        return
    a = torch.randn(1024, 1024)
    product = 2 * 1024**3 / _median(lambda: a @ a) / 1e9
    source = torch.empty(64 * 2**20)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median(lambda: target.copy_(source)) / 1e9
    write = terminalreporter.write_line
    about = maskcore.config()
    terminalreporter.section("maskcore beside PyTorch, medians")
    for name, value in about.items():
        write(f"{name}: {value}")
    write(
        f"batch {config.getoption('--batch-size')}, pictures of {config.getoption('--image-size')} pixels, "
    )
    write(f"{config.getoption('--rounds')} rounds, both engines in turn")
    write(f"this machine's ceilings now: matrix product {product:.0f} GFLOP/s, copy {copy:.1f} GB/s")
    write("")
    head = f"{'':44} {'maskcore':>9} {'PyTorch':>9} {'speed-up':>8} {'maskcore':>8} {'PyTorch':>8}"
    write(head)
    write(f"{'':44} {'ms':>9} {'ms':>9} {'':>8} {'rate':>8} {'rate':>8}")
    for line in lines:
        write(line.line())
