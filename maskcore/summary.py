"""The table of a network: ``maskcore summary`` or ``python -m maskcore.summary``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from maskcore import commandline, models
from maskcore.checkpoint import MAX_CLASSES, locate, read_meta
from maskcore.errors import UserError


def table(network: models.Network) -> str:
    """The text that Keras' ``model.summary()`` prints for this network."""
    rows = [
        (f"{row.name} ({row.kind})", _shape(row.output_shape), f"{row.parameters:,}")
        for row in network.table()
    ]
    heads = ("Layer (type)", "Output Shape", "Param #")
    name_width = max(len(cell) for cell in (heads[0], *(row[0] for row in rows))) + 3
    shape_width = max(len(cell) for cell in (heads[1], *(row[1] for row in rows))) + 3
    width = name_width + shape_width + 14

    def line(cells: tuple[str, str, str]) -> str:
        return f" {cells[0]:<{name_width}}{cells[1]:<{shape_width}}{cells[2]}".rstrip()

    total = sum(row.parameters for row in network.table())
    trainable = sum(row.trainable for row in network.table())
    return "\n".join(
        [
            f'Model: "{network.name}"',
            "_" * width,
            line(heads),
            "=" * width,
            *(line(row) for row in rows),
            "=" * width,
            f"Total params: {total:,}",
            f"Trainable params: {trainable:,}",
            f"Non-trainable params: {total - trainable:,}",
            "_" * width,
        ]
    )


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join(str(size) for size in shape)})"


def _parser() -> commandline.Parser:
    parser = commandline.Parser(
        "summary",
        "Prints a network's layers, their output shapes and parameters, as Keras' summary() does.",
        "examples:\n"
        "  maskcore summary final\n"
        "  maskcore summary baseline --image-size 96 --num-classes 5\n"
        "  maskcore summary runs/final",
    )
    parser.add_argument("network", help=f"{' or '.join(models.NAMES)}, a run's folder, or a checkpoint file")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="side of the input, pixels (default: 256)"
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="classes (default: 3)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``summary``; returns the exit status."""
    return commandline.run(_parser(), _summary, argv)


def _summary(namespace: argparse.Namespace) -> int:
    size, classes = namespace.image_size, namespace.num_classes
    name = namespace.network
    if name in models.NAMES:
        size = 256 if size is None else size
        classes = 3 if classes is None else classes
        if classes > MAX_CLASSES:
            raise UserError(f"num-classes must be at most {MAX_CLASSES}, not {classes}")
    elif not Path(name).exists():
        raise UserError(f"{name!r} is neither a network ({', '.join(models.NAMES)}) nor a checkpoint here")
    elif size is not None or classes is not None:
        raise UserError("a checkpoint has its own image size and classes: leave the flags out")
    else:
        of = read_meta(locate(name)).network
        name, size, classes = of["name"], of["image_size"], of["num_classes"]
    with torch.device("meta"):  # shapes without memory for weights
        print(table(models.create(name, classes, size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
