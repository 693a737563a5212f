"""Prediction: ``maskcore predict`` or ``python -m maskcore.predict``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskcore import commandline, data, machine, models
from maskcore.checkpoint import load_model, locate, write_text
from maskcore.errors import UserError
from maskcore.progress import Progress
from maskcore.resources import processors
from maskcore.runfolder import write_csv


@dataclass(frozen=True)
class Classified:
    """What the network says of one picture, or why it could not be read."""

    path: Path
    logits: np.ndarray | None  # float32 [classes]
    reason: str | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, float64 [classes]."""
        assert self.logits is not None
        shifted = np.exp(self.logits.astype(np.float64) - self.logits.max())
        return np.asarray(shifted / shifted.sum())


def classify(
    network: torch.nn.Module,
    preprocess: data.Preprocess,
    paths: Iterable[Path],
    *,
    batch_size: int = 32,
    workers: int | None = None,
) -> Iterator[Classified]:
    """Classifies pictures in the order given; one that cannot be read gives a reason instead.

    ``network`` must be in eval mode. Files are decoded by ``workers`` threads ahead of the network,
    in bounded memory, however many there are.
    """

    def read(path: Path) -> np.ndarray | str:
        try:
            return data.load(path, preprocess)
        except data.BadPicture as error:
            return error.reason

    workers = workers or min(8, processors())
    waiting: deque[tuple[Path, Future[np.ndarray | str]]] = deque()
    remaining = iter(paths)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                for path in islice(remaining, 2 * batch_size - len(waiting)):
                    waiting.append((path, pool.submit(read, path)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                yield from _classify_batch(network, [(p, f.result()) for p, f in batch])
        finally:
            pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def _classify_batch(
    network: torch.nn.Module, batch: Sequence[tuple[Path, np.ndarray | str]]
) -> list[Classified]:
    readable = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
    rows: Iterator[np.ndarray] = iter(())
    if readable:
        logits = network(data.network_input(np.stack(readable)).to(next(network.parameters()).device))
        rows = iter(logits.cpu().numpy())
    return [
        Classified(path, next(rows)) if isinstance(pixels, np.ndarray) else Classified(path, None, pixels)
        for path, pixels in batch
    ]


def files_in(folder: Path) -> list[Path]:
    """All files below ``folder`` that are not hidden, sorted; whatever their names end in."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts))


def _parser() -> commandline.Parser:
    parser = commandline.Parser(
        "predict",
        "Says for each picture which class it is, by a trained network.",
        "A file that cannot be read is listed on stderr with the reason, is left out of the CSV,\n"
        'stands under "skipped" in the JSON, and does not change the exit status; if no file\n'
        "could be read, the exit status is 2.\n\n"
        "examples:\n"
        "  maskcore predict runs/final photo.jpg other.png\n"
        "  maskcore predict runs/final MaskDataset/test --csv submission.csv\n"
        "  maskcore predict runs/final photos --json - | jq .pictures[0]",
    )
    parser.add_argument("checkpoint", help="a run's folder (its best epoch) or a checkpoint file")
    parser.add_argument(
        "pictures", nargs="+", help="picture files, or folders (looked through to the bottom)"
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write Id,Category: file name (below a folder: its path in it) and class code",
    )
    parser.add_argument("--json", metavar="FILE", help="write classes and all probabilities; - is stdout")
    machine.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``predict``; returns the exit status."""
    return commandline.run(_parser(), _predict, argv)


def _predict(namespace: argparse.Namespace) -> int:
    _check_targets(namespace.csv, namespace.json)
    device = machine.use_flags(namespace)
    network, meta = load_model(namespace.checkpoint)
    named = list(_named(namespace.pictures))
    results: list[tuple[str, Classified]] = []
    with Progress("predicting", len(named)) as progress:
        outcomes = classify(
            models.for_inference(network.to(device), namespace.precision),
            meta.preprocess,
            (path for _, path in named),
            batch_size=namespace.batch_size,
        )
        for (name, _), outcome in zip(named, outcomes, strict=True):
            results.append((name, outcome))
            progress.add(1)
    good = [(name, r) for name, r in results if r.logits is not None]
    bad = [(name, r) for name, r in results if r.logits is None]
    if namespace.csv is None and namespace.json is None:
        _print_table(good, meta.classes)
    if namespace.csv is not None:
        rows = ((name, int(r.probabilities.argmax())) for name, r in good)
        write_csv(Path(namespace.csv), ("Id", "Category"), rows)
    if namespace.json is not None:
        _write_json(namespace.json, _report(namespace.checkpoint, good, bad, meta.classes))
    for name, result in bad:
        print(f"skipped: {_printable(name)} {result.reason}", file=sys.stderr)
    written = "".join(f", in {f}" for f in (namespace.csv, namespace.json) if f not in (None, "-"))
    print(f"{len(good)} pictures classified, {len(bad)} skipped{written}", file=sys.stderr)
    if not good:
        raise UserError("none of the files could be read as a picture")
    return 0


def _check_targets(csv: str | None, json_: str | None) -> None:
    """Refuses files that could not be written, before any work is done for them."""
    for name, target in (("csv", csv), ("json", json_)):
        if target is None or (name, target) == ("json", "-"):
            continue
        path = Path(target).absolute()
        if target in ("", "-"):
            raise UserError(f"{name} must be a file's name" + "; - is for --json" * (target == "-"))
        if not path.parent.is_dir():
            raise UserError(f"there is no folder to write {target} into")
        if path.exists() and not path.is_file():
            raise UserError(f"{target} is no regular file: give --{name} another name")
    if csv is not None and json_ is not None and Path(csv).resolve() == Path(json_).resolve():
        raise UserError(f"csv and json are both {csv}: give them different names")


def _named(arguments: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The pictures meant, each with the name it is reported under."""
    for argument in arguments:
        if not argument:
            raise UserError("a picture has an empty name; . is this folder")
        path = Path(argument)
        if path.is_dir():
            files = files_in(path)
            if not files:
                raise UserError(f"there are no files in the folder {argument}")
            yield from ((file.relative_to(path).as_posix(), file) for file in files)
        elif path.exists():
            yield path.name, path
        else:
            raise UserError(f"there is no file or folder {argument}")


def _print_table(good: Sequence[tuple[str, Classified]], classes: Sequence[str]) -> None:
    width = max((len(name) for name, _ in good), default=0)
    for name, result in good:
        probabilities = result.probabilities
        code = int(probabilities.argmax())
        others = ", ".join(
            f"{classes[i]} {probabilities[i]:.3f}"
            for i in np.argsort(-probabilities)[1:6]  # more would not fit a line
        )
        print(f"{_printable(name):<{width}}  {classes[code]} {probabilities[code]:.3f}  ({others})")


def _printable(name: str) -> str:
    """A file name that cannot steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _report(
    checkpoint: str,
    good: Sequence[tuple[str, Classified]],
    bad: Sequence[tuple[str, Classified]],
    classes: Sequence[str],
) -> dict[str, Any]:
    pictures = []
    for name, result in good:
        probabilities = result.probabilities
        code = int(probabilities.argmax())
        pictures.append(
            {
                "file": name,
                "class": classes[code],
                "code": code,
                "probabilities": dict(zip(classes, probabilities.tolist(), strict=True)),
            }
        )
    return {
        "checkpoint": str(locate(checkpoint)),
        "classes": list(classes),
        "pictures": pictures,
        "skipped": [{"file": name, "reason": result.reason} for name, result in bad],
    }


def _write_json(target: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(target), text)


if __name__ == "__main__":
    sys.exit(main())
