"""Evaluation: ``maskcore evaluate`` or ``python -m maskcore.evaluate``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskcore import commandline, data, figures, machine, models
from maskcore.checkpoint import Meta, load_model, locate
from maskcore.errors import UserError
from maskcore.pictures import name_in, picture_root, split_pictures, write_skipped
from maskcore.predict import Classified, classify
from maskcore.progress import Progress
from maskcore.runfolder import write_csv, write_json
from maskcore.settings import Config

WORST = 30  # mistakes on the contact sheet


@dataclass(frozen=True)
class Metrics:
    """What a confusion matrix says. ``matrix``: int64 [true, predicted]; the rest per class."""

    matrix: np.ndarray
    precision: np.ndarray  # right among those predicted so; 0 if none was
    recall: np.ndarray  # right among those that are so; 0 if none is
    f1: np.ndarray  # harmonic mean of the two; 0 if both are
    support: np.ndarray  # pictures that are so

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return float(np.trace(self.matrix) / self.matrix.sum())


def metrics(true: np.ndarray, predicted: np.ndarray, classes: int) -> Metrics:
    """Counts and ratios of int arrays of class codes, both [pictures]."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (true, predicted), 1)
    right = np.diag(matrix).astype(np.float64)
    precision = right / np.maximum(matrix.sum(axis=0), 1)
    recall = right / np.maximum(matrix.sum(axis=1), 1)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return Metrics(matrix, precision, recall, f1, matrix.sum(axis=1))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log of the softmax at the label, float64 [pictures], of logits [pictures, classes]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(wide - top).sum(axis=1))
    return np.asarray(log_sum - wide[np.arange(len(labels)), labels])


def _parser() -> commandline.Parser:
    parser = commandline.Parser(
        "evaluate",
        "Measures a trained network on labelled pictures: loss, accuracy, precision, recall and "
        "F1 of\neach class, confusion matrix, and a sheet of the worst mistakes.",
        "It writes metrics.json, confusion.csv, confusion.png, mistakes.csv, mistakes.png and\n"
        "skipped.csv.\n\n"
        "examples:\n"
        "  maskcore evaluate runs/final --data OtherPictures\n"
        "  maskcore evaluate runs/final --split val      the pictures that the run validated on",
    )
    parser.add_argument("checkpoint", help="a run's folder (its best epoch) or a checkpoint file")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="labelled pictures in any layout that training takes (default: the run's own)",
    )
    parser.add_argument(
        "--split",
        choices=("all", "val", "train"),
        help="all pictures (default with --data), or those the run validated (default without "
        "--data) or trained on, split again by the run's settings",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write; must not exist (default: evaluation, evaluation-2 and so on, in the "
        "run's folder or beside the checkpoint)",
    )
    machine.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``evaluate``; returns the exit status."""
    return commandline.run(_parser(), _evaluate, argv)


def _evaluate(namespace: argparse.Namespace) -> int:
    if namespace.out is not None and Path(namespace.out).exists():
        raise UserError(f"{namespace.out} is there already: choose another --out")
    device = machine.use_flags(namespace)
    path = locate(namespace.checkpoint)
    network, meta = load_model(path)
    # Before the work, which a place that cannot be written to should not cost.
    folder = _new_folder(namespace.out, namespace.checkpoint)
    try:
        _measure(namespace, device, path, network, meta, folder)
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
        raise
    return 0


def _measure(
    namespace: argparse.Namespace,
    device: torch.device,
    path: Path,
    network: models.Network,
    meta: Meta,
    folder: Path,
) -> None:
    """Classifies the pictures, prints the report and writes it into the folder."""
    split = namespace.split or ("val" if namespace.data is None else "all")
    found, pictures, drawn = _pictures(meta, namespace.data, split)
    labels = _labels(found, pictures, meta)
    with Progress("evaluating", len(pictures)) as progress:
        outcomes = []
        for outcome in classify(
            models.for_inference(network.to(device), namespace.precision),
            meta.preprocess,
            (picture.path for picture in pictures),
            batch_size=namespace.batch_size,
        ):
            outcomes.append(outcome)
            progress.add(1)
    good = np.array([i for i, outcome in enumerate(outcomes) if outcome.logits is not None], int)
    if not len(good):
        raise UserError(f"none of the {len(pictures)} pictures in {found.root} could be read")
    skipped = [*found.skipped] + [data.Skipped(o.path, o.reason) for o in outcomes if o.reason is not None]
    results = [outcomes[i] for i in good]
    report = _Evaluation(
        checkpoint=path,
        meta=meta,
        found=found,
        split=split,
        drawn=drawn,
        results=results,
        labels=labels[good],
        logits=np.stack([r.logits for r in results if r.logits is not None]),
        skipped=skipped,
        penalty=float(network.penalty(meta.config.get("l2", 0.0)).detach()),
    )
    report.tell()
    report.write(folder)
    print(f"\nwritten to {folder}")


def _pictures(meta: Meta, folder: str | None, split: str) -> tuple[data.PictureSet, list[data.Picture], bool]:
    """The pictures to measure on, and whether they are drawn."""
    if folder is None and not meta.config:
        raise UserError("the checkpoint does not say what it was trained on: give --data DIR")
    config = Config.from_dict(meta.config, "the checkpoint")
    root = Path(folder) if folder is not None else picture_root(config)
    found = data.find(root)
    drawn = folder is None and config.data is None
    if split == "all":
        return found, list(found.pictures), drawn
    train_part, val_part = split_pictures(found, config)
    return found, val_part if split == "val" else train_part, drawn


def _labels(found: data.PictureSet, pictures: Sequence[data.Picture], meta: Meta) -> np.ndarray:
    """The network's class codes of the pictures, matched by the classes' names."""
    unknown = [name for name in found.classes if name not in meta.classes]
    if unknown:
        raise UserError(f"{found.root} has a class {unknown[0]!r} and the network knows {list(meta.classes)}")
    codes = [meta.classes.index(name) for name in found.classes]
    return np.array([codes[picture.label] for picture in pictures], dtype=np.int64)


def _new_folder(out: str | None, checkpoint: str) -> Path:
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True)
        return folder
    path = Path(checkpoint)
    parent = path if path.is_dir() else path.parent
    number = 1
    while True:
        folder = parent / ("evaluation" if number == 1 else f"evaluation-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


@dataclass(frozen=True)
class _Evaluation:
    checkpoint: Path
    meta: Meta
    found: data.PictureSet
    split: str
    drawn: bool
    results: list[Classified]
    labels: np.ndarray  # int64 [pictures]
    logits: np.ndarray  # float32 [pictures, classes]
    skipped: list[data.Skipped]
    penalty: float

    @property
    def metrics(self) -> Metrics:
        return metrics(self.labels, self.logits.argmax(axis=1), len(self.meta.classes))

    @property
    def cross_entropy(self) -> float:
        return float(cross_entropy(self.logits, self.labels).mean())

    def mistakes(self) -> list[tuple[Classified, int, int, float]]:
        """(picture, true, predicted, probability of the predicted), the highest loss first."""
        losses = cross_entropy(self.logits, self.labels)
        predicted = self.logits.argmax(axis=1)
        wrong = np.flatnonzero(predicted != self.labels)
        return [
            (
                self.results[i],
                int(self.labels[i]),
                int(predicted[i]),
                float(self.results[i].probabilities[predicted[i]]),
            )
            for i in wrong[np.argsort(-losses[wrong], kind="stable")]
        ]

    def name(self, result: Classified) -> str:
        """A picture's path in the data folder."""
        return name_in(self.found.root, result.path)

    def tell(self) -> None:
        """Prints the figures."""
        found, classes, m = self.found, self.meta.classes, self.metrics
        print(f"checkpoint     {self.checkpoint}")
        drawn = "  (drawn by maskcore, not photographs)" if self.drawn else ""
        print(f"pictures       {len(self.labels)} of {found.root}, {self.split}{drawn}")
        if self.skipped:
            print(f"skipped        {len(self.skipped)} files, listed in skipped.csv")
        print(f"accuracy       {m.accuracy:.4f}")
        print(f"cross-entropy  {self.cross_entropy:.4f}")
        print(f"loss           {self.cross_entropy + self.penalty:.4f} with the L2 penalty")
        width = max(12, *(len(name) for name in classes))
        print(f"\n{'class':<{width}}  precision  recall      F1  pictures")
        for i, name in enumerate(classes):
            print(
                f"{name:<{width}}  {m.precision[i]:9.4f}  {m.recall[i]:6.4f}  {m.f1[i]:6.4f}"
                f"  {m.support[i]:8d}"
            )
        print(
            f"{'mean':<{width}}  {m.precision.mean():9.4f}  {m.recall.mean():6.4f}  "
            f"{m.f1.mean():6.4f}  {m.support.sum():8d}"
        )
        print("\nconfusion matrix, rows true, columns predicted")
        columns = min(16, max(8, *(len(str(cell)) + 2 for cell in (*m.matrix.flat, *classes))))
        print(" " * width + "".join(f"{_short(name, columns):>{columns}}" for name in classes))
        for name, row in zip(classes, m.matrix, strict=True):
            print(f"{name:<{width}}" + "".join(f"{count:{columns}d}" for count in row))

    def write(self, folder: Path) -> None:
        """Writes figures, tables and pictures into ``folder``."""
        classes, m, mistakes = self.meta.classes, self.metrics, self.mistakes()
        write_json(folder / "metrics.json", self.to_dict())
        write_csv(
            folder / "confusion.csv",
            ["true \\ predicted", *classes],
            ([name, *row.tolist()] for name, row in zip(classes, m.matrix, strict=True)),
        )
        write_csv(
            folder / "mistakes.csv",
            ("file", "true", "predicted", "probability"),
            ((self.name(r), classes[t], classes[p], f"{q:.6f}") for r, t, p, q in mistakes),
        )
        write_skipped(folder / "skipped.csv", self.skipped)
        self._draw(folder, mistakes)

    def _draw(self, folder: Path, mistakes: list[tuple[Classified, int, int, float]]) -> None:
        classes, m = self.meta.classes, self.metrics
        drawn = ", drawn pictures" if self.drawn else ""
        title = f"{len(self.labels)} pictures{drawn}, accuracy {m.accuracy:.3f}"
        if figures.available():
            figures.confusion(m.matrix, classes, folder / "confusion.png", title)
        else:
            print("matplotlib is not installed, so confusion.png was not drawn")
        worst = [
            figures.Mistake(
                data.load(result.path, self.meta.preprocess),
                self.name(result),
                classes[true],
                classes[predicted],
                probability,
            )
            for result, true, predicted, probability in mistakes[:WORST]
        ]
        heading = f"the {len(worst)} worst of {len(mistakes)} mistakes in {title}"
        figures.contact_sheet(worst, folder / "mistakes.png", heading if worst else "no mistakes")

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds."""
        m = self.metrics
        return {
            "checkpoint": str(self.checkpoint),
            "epoch": self.meta.state.history[-1]["epoch"] if self.meta.state.history else None,
            "data": str(self.found.root),
            "split": self.split,
            "drawn_pictures": self.drawn,
            "preprocess": self.meta.preprocess.to_dict(),
            "pictures": len(self.labels),
            "skipped": len(self.skipped),
            "accuracy": m.accuracy,
            "cross_entropy": self.cross_entropy,
            "penalty": self.penalty,
            "loss": self.cross_entropy + self.penalty,
            "classes": {
                name: {
                    "precision": float(m.precision[i]),
                    "recall": float(m.recall[i]),
                    "f1": float(m.f1[i]),
                    "pictures": int(m.support[i]),
                }
                for i, name in enumerate(self.meta.classes)
            },
            "mean": {
                "precision": float(m.precision.mean()),
                "recall": float(m.recall.mean()),
                "f1": float(m.f1.mean()),
            },
            "confusion": m.matrix.tolist(),
        }


def _short(name: str, width: int) -> str:
    return name if len(name) < width else name[: width - 2] + "."


if __name__ == "__main__":
    sys.exit(main())
