"""The comparison that every benchmark makes: maskcore and its peers in turn, in one process.

A round times each peer and then maskcore, so that a drift of the machine's speed falls on all. The table at
the end has medians; pytest-benchmark's own table has the distribution of maskcore's times. The peers run with a
malloc that keeps what was freed, as maskcore does by itself: no engine's time is that of the system clearing pages.
"""

from __future__ import annotations

import ctypes
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
    peer: str
    ours: float  # seconds, median
    theirs: float
    work: float  # floating-point operations or bytes a call
    unit: str  # "GFLOP/s" or "GB/s"

    def line(self) -> str:
        rates = f"{self.work / self.ours / 1e9:8.1f} {self.work / self.theirs / 1e9:8.1f}"
        times = f"{self.ours * 1e3:9.2f} {self.theirs * 1e3:9.2f} {self.theirs / self.ours:7.2f}x"
        return f"{self.name:40} {self.peer:16} {times} {rates}  {self.unit}"


_comparisons = pytest.StashKey[list[Comparison]]()
_memory = pytest.StashKey[list[str]]()
_phases = pytest.StashKey[list[str]]()
#: csrc/phases.h, in its order.
PHASES = ("filter transform", "input transform", "products", "output transform", "direct")


def keep_freed_memory() -> None:
    """Spares the engines that use malloc (glibc's) the page faults of activations mapped anew each step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
        mallopt(m_top_pad, 64 * 2**20)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("maskcore")
    group.addoption("--rounds", type=int, default=9, help="timed rounds of each comparison")
    group.addoption("--batch-size", type=int, default=8, help="pictures in a batch")
    group.addoption("--image-size", type=int, default=256, help="side of the pictures, 124 or more")
    group.addoption(
        "--phases", action="store_true", help="show where the convolutions' time goes, a row a benchmark"
    )
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    group.addoption(
        "--plain-malloc",
        action="store_true",
        help="leave malloc as it is; by default the peers get one that keeps what they freed, which speeds them up",
    )
    group.addoption("--threads", type=int, default=os.cpu_count(), help="threads of both engines")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--plain-malloc"):
        keep_freed_memory()
    config.stash[_comparisons] = []
    config.stash[_memory] = []
    config.stash[_phases] = []
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


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> Callable[[Any], dict[str, Any]]:
    """compiled(network) -> {"torch.compile": the network compiled}, or {} with --no-compile."""

    def build(network: Any) -> dict[str, Any]:
        return {} if request.config.getoption("--no-compile") else {"torch.compile": torch.compile(network)}

    return build


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """compare(ours, theirs, flops=... or bytes=...) times both and adds a line to the table.

    ``theirs`` is PyTorch's way, or several peers' by their names, each with a line of its own.
    """

    def run(
        ours: Callable[[], Any],
        theirs: Callable[[], Any] | dict[str, Callable[[], Any]],
        *,
        flops: float = 0,
        bytes: float = 0,
    ) -> None:
        peers = theirs if isinstance(theirs, dict) else {"PyTorch": theirs}
        times: dict[str, list[float]] = {name: [] for name in peers}

        def time_peers() -> None:
            for name, call in peers.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)

        time_peers()  # warms up, as the next line does
        ours()
        for found in times.values():
            found.clear()
        benchmark.pedantic(ours, setup=time_peers, rounds=request.config.getoption("--rounds"))
        if request.config.getoption("--phases"):
            request.config.stash[_phases].append(_shares(request.node.name, ours))
        unit = "GFLOP/s" if flops else "GB/s"
        name = request.node.name.removeprefix("bench_")
        mine = benchmark.stats.stats.median
        for peer, found in times.items():
            other = statistics.median(found)
            benchmark.extra_info.update({f"{peer} ms": other * 1e3, f"speed-up over {peer}": other / mine})
            line = Comparison(name, peer, mine, other, flops or bytes, unit)
            request.config.stash[_comparisons].append(line)

    return run


def _shares(name: str, call: Callable[[], Any], calls: int = 5) -> str:
    """Each phase's share of the threads' time; "other" is what no convolution does, and waiting."""
    torch.ops.maskcore._phase_times()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    total = (time.perf_counter() - begin) * torch.get_num_threads()
    shares = [seconds / total for seconds in torch.ops.maskcore._phase_times().tolist()]
    cells = [f"{share:{len(phase)}.0%}" for phase, share in zip(PHASES, shares, strict=True)]
    return f"{name.removeprefix('bench_'):40} {'  '.join(cells)}  {1 - sum(shares):5.0%}"


@pytest.fixture
def compare_memory(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """compare_memory(ours, theirs): each runs a process and returns its resident MiB before the work and at most."""

    def run(ours: Callable[[], tuple[float, float]], theirs: Callable[[], tuple[float, float]]) -> None:
        found = [benchmark.pedantic(ours, rounds=1), theirs()]
        name = request.node.name.removeprefix("bench_")
        (before, peak), (their_before, their_peak) = found
        benchmark.extra_info.update({"peak MiB": peak, "PyTorch peak MiB": their_peak})
        request.config.stash[_memory].append(
            f"{name:40} {peak:9.0f} {their_peak:9.0f} {peak / their_peak:7.2f}  MiB at most; "
            f"above the start {peak - before:.0f} and {their_peak - their_before:.0f}"
        )

    return run


def _median(call: Callable[[], Any], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def fma_lanes(steps: int) -> int:
    """Runs the multiply-add loop; the number of lanes that it does at a step, over all threads."""
    return int(torch.ops.maskcore._fma_loop(steps))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines, memory = config.stash[_comparisons], config.stash[_memory]
    if not lines and not memory:
        return
    steps = 2_000_000
    multiply_add = 2 * fma_lanes(steps) * steps / _median(lambda: fma_lanes(steps)) / 1e9
    source = torch.empty(64 * 2**20)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median(lambda: target.copy_(source)) / 1e9
    write = terminalreporter.write_line
    terminalreporter.section("maskcore beside its peers, medians")
    for name, value in maskcore.config().items():
        write(f"{name}: {value}")
    write(
        f"batch {config.getoption('--batch-size')}, pictures of {config.getoption('--image-size')} pixels, "
        f"{config.getoption('--rounds')} rounds, all engines in turn"
    )
    write(f"this machine's ceilings now: multiply-add {multiply_add:.0f} GFLOP/s, copy {copy:.1f} GB/s")
    write("convolutions count as direct ones; Winograd's multiply a quarter as often")
    write("")
    columns = f"{'maskcore':>9} {'peer':>9} {'speed-up':>8} {'maskcore':>8} {'peer':>8}"
    write(f"{'':40} {'':16} {columns}")
    write(f"{'':40} {'':16} {'ms':>9} {'ms':>9} {'':>8} {'rate':>8} {'rate':>8}")
    for line in lines:
        write(line.line())
    if memory:
        write("")
        write(f"{'':40} {'maskcore':>9} {'PyTorch':>9} {'ratio':>7}")
        for text in memory:
            write(text)
    if config.stash[_phases]:
        write("")
        write(f"{'share of the threads time':40} {'  '.join(PHASES)}  other")
        for text in config.stash[_phases]:
            write(text)
