"""Trains one network through three engines and draws their loss curves together.

    python benchmarks/loss_curves.py OUT [--seeds 3] [-- settings of maskcore train]

The engines are Winograd's convolutions, direct ones, and PyTorch's own layers under the same training loop, all in
float32, and Winograd's with bfloat16 products; each seed fixes the split, the weights, the order and the augmentation
of all. What an engine's rounding does to training is then the distance between the engines' curves of one seed,
beside that between seeds.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ENGINES = ("winograd", "direct", "PyTorch")
BFLOAT16 = "winograd bf16"
COLOURS = {"winograd": "#c8553d", "direct": "#3b6ea8", "PyTorch": "#5f8a4c", BFLOAT16: "#8a5fa8"}

#: What a training process runs first, to have PyTorch's layers in place of the kernels.
_WITH_PYTORCH = """
import sys
from maskcore import nn, ops, train

def plain(reference):
    return lambda *tensors, transformed=None, precision="ieee": reference(*tensors[:parameters[reference]])

parameters = {ops.conv_relu_reference: 4, ops.conv_relu_max_pool_reference: 4}
parameters |= {ops.conv_bn_relu_reference: 9, ops.conv_bn_relu_train_reference: 7}
ops.conv_relu = plain(ops.conv_relu_reference)
ops.conv_relu_max_pool = plain(ops.conv_relu_max_pool_reference)
ops.conv_bn_relu = plain(ops.conv_bn_relu_reference)
ops.conv_bn_relu_train = plain(ops.conv_bn_relu_train_reference)
nn.can_fuse = lambda *_: False
ops.max_pool = ops.max_pool_reference
ops.softmax_cross_entropy = ops.softmax_cross_entropy_reference
sys.exit(train.main(sys.argv[1:]))
"""


def train(engine: str, seed: int, out: Path, settings: list[str]) -> list[dict[str, str]]:
    """The rows of a run's log.csv; a run that is there already is not made again."""
    folder = out / f"{engine.replace(' ', '-')}-seed{seed}"
    if not (folder / "result.json").exists():
        program = ["-c", _WITH_PYTORCH] if engine == "PyTorch" else ["-m", "maskcore.train"]
        arguments = [*settings, "--seed", str(seed), "--out", str(folder)]
        if engine == BFLOAT16:
            arguments += ["--precision", "bf16"]
        environment = os.environ | ({"MASKCORE_CONV": engine.split()[0]} if engine != "PyTorch" else {})
        subprocess.run([sys.executable, *program, *arguments], check=True, env=environment)
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def draw(logs: dict[tuple[str, int], list[dict[str, str]]], path: Path) -> None:
    """Training and validation cross-entropy of every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (engine, seed), rows in logs.items():
        for at, column in zip(axes, ("train_cross_entropy", "val_cross_entropy"), strict=True):
            epochs, values = [int(row["epoch"]) for row in rows], [float(row[column]) for row in rows]
            style: dict[str, Any] = {"linestyle": ("-", "--", ":")[seed % 3], "color": COLOURS[engine]}
            at.plot(epochs, values, label=f"{engine}, seed {seed}", linewidth=1.2, **style)
    for at, title in zip(axes, ("training", "validation"), strict=True):
        at.set(title=f"{title} cross-entropy (nats)", xlabel="epoch")
        at.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def distances(
    logs: dict[tuple[str, int], list[dict[str, str]]], engines: tuple[str, ...], column: str
) -> tuple[list[float], list[float]]:
    """The mean over epochs of the largest distance between engines, of each seed; and between seeds, of each engine."""

    def spread(runs: list[list[dict[str, str]]]) -> float:
        curves = [[float(row[column]) for row in rows] for rows in runs]
        steps = [max(values) - min(values) for values in zip(*curves, strict=True)]
        return sum(steps) / len(steps)

    seeds = sorted({seed for _, seed in logs})
    between_engines = [spread([logs[engine, seed] for engine in engines]) for seed in seeds]
    between_seeds = [spread([logs[engine, seed] for seed in seeds]) for engine in engines]
    return between_engines, between_seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs and of loss_curves.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="settings of maskcore train, behind --")
    given = parser.parse_args()
    settings = given.settings or ["--quick", "--epochs", "16", "--no-augment"]
    given.out.mkdir(parents=True, exist_ok=True)
    logs = {
        (engine, seed): train(engine, seed, given.out, settings)
        for seed in range(given.seeds)
        for engine in (*ENGINES, BFLOAT16)
    }
    draw(logs, given.out / "loss_curves.png")
    for compared in (ENGINES, ("winograd", BFLOAT16)):
        for column in ("train_cross_entropy", "val_cross_entropy"):
            engines, seeds = distances(logs, compared, column)
            print(
                f"{', '.join(compared)}: {column} of one seed {statistics.mean(engines):.3f} apart (at most "
                f"{max(engines):.3f}), of one engine {statistics.mean(seeds):.3f} (at least {min(seeds):.3f}), "
                "means of the epochs"
            )
    print(f"drawn into {given.out / 'loss_curves.png'}")


if __name__ == "__main__":
    main()
