"""Draws a labelled picture set: ``maskcore generate`` or ``python -m maskcore.generate``."""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskcore import commandline
from maskcore.drawn import MAX_COUNT, check_drawing, draw_pictures, write_json
from maskcore.errors import UserError
from maskcore.layouts import CLASSES, CSV_HEADERS, LABELS_OF_FOLDER

LAYOUTS = ("json", "folders", "csv")

EPILOG = """\
layouts:
  json     training/10001.jpg ... and train_gt.json {"10001.jpg": 0, ...}: as the competition's
           MaskDataset has it. The test pictures are in test/ and have no labels there; those are in
           test_gt.json, which training never opens, so that a score can be computed.
  folders  nobody/10001.jpg, everybody/..., not_all/... and test/nobody/... the same way
  csv      pictures/10001.jpg ... and labels.csv with the header file,label;
           test/10601.jpg ... and test/labels.csv

Classes: 0 nobody wears a mask, 1 everybody does, 2 not all; equally many of each. The pictures depend
on --seed and --size alone: a larger --count begins with the pictures of a smaller one, and the test
pictures are those that come after. They are drawings, not photographs: a network that has learned
them has not learned yours.

examples:
  maskcore generate pictures --count 600 --test 150
  maskcore train --data pictures
  maskcore evaluate runs/NAME --data pictures/test"""


def write_set(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    size: int | None = None,
    test: int = 0,
    layout: str = "json",
    workers: int | None = None,
    progress: bool = True,
) -> Counter[int]:
    """Draws ``count`` training and ``test`` test pictures into an empty or new folder.

    They are drawn into a hidden folder inside and moved when all are there, so an interrupted run leaves
    nothing that looks like a set.

    Args:
        folder: Where to.
        count, test: Pictures to train and to test on.
        seed: Which set of pictures.
        size: Side in pixels; None gives each picture its own size, as photographs have.
        layout: "json", "folders" or "csv".
        workers: Processes that draw. Default: the processors this process may use.
        progress: Whether to show a bar on a terminal.

    Returns:
        How many training pictures each class code has.

    Raises:
        UserError: The folder is not empty, or a number makes no sense.
        OSError: The folder cannot be written.
    """
    check_drawing(count, seed, size)
    if not 0 <= test <= MAX_COUNT:
        raise UserError(f"the number of test pictures must be at least 0 and at most {MAX_COUNT}, not {test}")
    if layout not in LAYOUTS:
        raise UserError(f"the layout must be {', '.join(LAYOUTS)}, not {layout!r}")
    _refuse_used(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=".drawing-", dir=folder))
    counts: Counter[int] = Counter()
    finished = False
    try:
        for part, indices in (("training", range(count)), ("test", range(count, count + test))):
            if not indices:
                continue
            labels = draw_pictures(
                _picture_folder(room, part, layout),
                indices,
                seed,
                size,
                by_class=layout == "folders",
                workers=workers,
                progress=progress,
            )
            _write_labels(room, part, layout, labels)
            counts.update(labels.values() if part == "training" else ())
        for path in sorted(room.iterdir()):
            path.rename(folder / path.name)
        finished = True
    finally:
        shutil.rmtree(room, ignore_errors=True)
        if new and not finished:
            shutil.rmtree(folder, ignore_errors=True)
    return counts


def _refuse_used(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder")
    elif folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} is not a folder: name a new one")


def _picture_folder(room: Path, part: str, layout: str) -> Path:
    if layout == "json" or part == "test":
        return room / part
    return room / "pictures" if layout == "csv" else room


def _write_labels(room: Path, part: str, layout: str, labels: Mapping[str, int]) -> None:
    if layout == "json":
        write_json(room / LABELS_OF_FOLDER[part], labels)
    elif layout == "csv":
        table, prefix = (
            (room / "labels.csv", "pictures/") if part == "training" else (room / "test/labels.csv", "")
        )
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(CSV_HEADERS[0])
            writer.writerows((prefix + name, label) for name, label in labels.items())


def _parser() -> commandline.Parser:
    parser = commandline.Parser(
        "generate",
        "Draws a labelled set of pictures of people with and without masks, to train and test on.",
        EPILOG,
    )
    parser.add_argument("folder", metavar="DIR", help="where to; must be new or empty")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="pictures to train on")
    parser.add_argument("--test", type=int, default=0, metavar="N", help="test pictures (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which set (default: 0)")
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of every picture, 32 to 4096 (default: each its own size and shape, about 325 to 612)",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="json", help="how they are laid out (default: json)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that draw (default: one a processor)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``generate``; returns the exit status."""
    return commandline.run(_parser(), _generate, argv)


def _generate(namespace: argparse.Namespace) -> int:
    if namespace.workers is not None and namespace.workers < 1:
        raise UserError(f"the number of workers must be at least 1, not {namespace.workers}")
    folder = Path(namespace.folder)
    counts = write_set(
        folder,
        namespace.count,
        seed=namespace.seed,
        size=namespace.size,
        test=namespace.test,
        layout=namespace.layout,
        workers=namespace.workers,
    )
    per_class = ", ".join(f"{counts[code]} {name}" for code, name in enumerate(CLASSES))
    print(f"{folder}: {namespace.count} pictures to train on ({per_class}), {namespace.test} to test on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
