"""Measures and draws maskcore beside its peers: a bar an engine, and cost against batch and picture size.

    python benchmarks/speed_figures.py OUT [--rounds 5] [--threads 2]

Writes speed.png and speed.csv. All engines run in turn in one process, float32, medians of the rounds.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import engines
import torch
import torch.nn.functional as F
from conftest import keep_freed_memory

import maskcore
from maskcore import models, ops, optim

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (128, 192, 256, 384, 512)
HEIGHTS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)
OURS, THEIRS, QUIET = "#c8553d", "#8a8a8a", "#555555"


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds by name; every call is made once before the rounds, in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def pictures(n: int, size: int) -> torch.Tensor:
    return torch.rand(n, 3, size, size).to(memory_format=torch.channels_last)


def inference_calls(n: int, size: int, threads: int, everybody: bool) -> dict[str, Callable[[], Any]]:
    network = models.create("final", image_size=size, seed=0).eval()
    twin: Any = models.torch_twin(network)
    twin.to(memory_format=torch.channels_last)
    fast, x = models.for_inference(network), pictures(n, size)
    plain = x.contiguous()
    calls: dict[str, Callable[[], Any]] = {}
    if everybody:
        folder = Path(tempfile.mkdtemp())
        for given, builders in ((plain, engines.installed()), (x, engines.installed_channels_last())):
            for name, build in builders.items():
                calls[name] = functools.partial(build(network, given, folder, threads), given)
    return {"maskcore": lambda: fast(x), "PyTorch": lambda: twin(x), **calls}


def step_calls(n: int, size: int) -> dict[str, Callable[[], Any]]:
    network = models.create("final", image_size=size, seed=0)
    twin: Any = models.torch_twin(network)
    twin.to(memory_format=torch.channels_last)
    x, target = pictures(n, size), torch.arange(n) % 3
    ours, theirs = optim.Adam(network.parameters()), torch.optim.Adam(twin.parameters(), fused=True)

    def step(network: Any, loss: Callable[..., torch.Tensor], optimizer: Any) -> None:
        optimizer.zero_grad()
        loss(network(x), target).backward()
        optimizer.step()

    return {
        "maskcore": lambda: step(network, ops.softmax_cross_entropy, ours),
        "PyTorch": lambda: step(twin, F.cross_entropy, theirs),
    }


def measure(rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row a (work, engine, batch, size): milliseconds a picture."""
    rows: list[dict[str, Any]] = []

    def take(work: str, n: int, size: int, calls: dict[str, Callable[[], Any]]) -> None:
        for engine, seconds in medians(calls, rounds).items():
            row = {"work": work, "engine": engine, "batch": n, "size": size, "ms": seconds / n * 1e3}
            rows.append(row)
            print(f"{work:10} batch {n:3} {size:4} px  {engine:14} {row['ms']:8.1f} ms a picture", flush=True)

    with torch.inference_mode():
        take("inference", 8, 256, inference_calls(8, 256, threads, everybody=True))
    take("training", 8, 256, step_calls(8, 256))
    for n in BATCHES:
        if n != 8:
            take("training", n, 256, step_calls(n, 256))
            with torch.inference_mode():
                take("inference", n, 256, inference_calls(n, 256, threads, everybody=False))
    for size in SIZES:
        if size != 256:
            take("training", 8, size, step_calls(8, size))
            with torch.inference_mode():
                take("inference", 8, size, inference_calls(8, size, threads, everybody=False))
    return rows


def draw(rows: list[dict[str, Any]], path: Path, about: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def chosen(**wanted: Any) -> list[dict[str, Any]]:
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]

    figure, (bars, batches, sizes) = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    found = sorted(chosen(batch=8, size=256), key=lambda row: (row["work"], -row["ms"]))
    labels = [f"{row['engine']}, {row['work']}" for row in found]
    colours = [OURS if row["engine"] == "maskcore" else THEIRS for row in found]
    drawn = bars.barh(labels, [row["ms"] for row in found], color=colours)
    bars.bar_label(drawn, fmt="%.0f", padding=3, color=QUIET)
    bars.set_title("ms a picture (batch 8, 256 pixels)")
    for axes, key, title, fixed in (
        (batches, "batch", "by batch (256 pixels)", {"size": 256}),
        (sizes, "size", "by side in pixels (batch 8)", {"batch": 8}),
    ):
        for work, style in (("training", "-"), ("inference", "--")):
            for engine, colour in (("PyTorch", THEIRS), ("maskcore", OURS)):
                line = sorted(chosen(work=work, engine=engine, **fixed), key=lambda row: row[key])
                values = [row["ms"] for row in line]
                axes.plot(
                    [row[key] for row in line], values, style, color=colour, marker="o", markersize=3,
                    label=f"{engine}, {work}",
                )  # fmt: skip
        axes.set(title=f"ms a picture {title}", xscale="log", yscale="log")
        ticks = sorted({row[key] for row in chosen(**fixed)})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        heights = [tick for tick in HEIGHTS if axes.get_ylim()[0] < tick < axes.get_ylim()[1]]
        axes.set_yticks(heights, [str(tick) for tick in heights])
        axes.minorticks_off()
    sizes.legend(frameon=False, fontsize=8)
    for axes in (bars, batches, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(about, fontsize=8, color=QUIET)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = measure(given.rounds, given.threads)
    with open(given.out / "speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    kernels = maskcore.config()["instruction set"]
    about = f"{given.threads} threads, {kernels} kernels, float32, medians of {given.rounds} rounds"
    draw(rows, given.out / "speed.png", about)


if __name__ == "__main__":
    main()
