"""A run's folder: what is in it, and how it is written so that a kill never spoils it.

config.json     settings, versions, machine and git revision of every session
data.json       the pictures: where from, how many of each class; skipped.csv: which not, and why
split.csv       which picture trained and which validated
log.csv         one line an epoch (COLUMNS)
curves.png      the same as a picture
confusion.png, confusion.csv    of the best epoch, when the run has ended
result.json     best epoch and the average of the best ten, when the run has ended
events/         TensorBoard
checkpoints/    last.safetensors, epoch-NNNN.safetensors (see maskcore.checkpoint)
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskcore.checkpoint import FOLDER, LAST, epoch_file, versions, write_text
from maskcore.errors import UserError
from maskcore.machine import describe, git_revision

try:
    import fcntl
except ImportError:  # Windows has no advisory locks
    fcntl = None  # type: ignore[assignment]

COLUMNS = (
    "epoch",
    "train_cross_entropy",
    "train_penalty",  # mean of the L2 penalty before the epoch's first and after its last step
    "train_loss",  # cross-entropy + penalty, what Keras reports as loss
    "train_accuracy",
    "val_cross_entropy",
    "val_penalty",  # of the weights that were validated
    "val_loss",  # cross-entropy + penalty, what Keras reports as val_loss
    "val_accuracy",
    "learning_rate",
    "augmented",  # 1 or 0
    "images_per_second",  # training
    "train_seconds",
    "val_seconds",
    "wait_seconds",  # of train_seconds, waiting for data
    "wait_share",  # wait_seconds / train_seconds
)


def new_folder(out: str | None, name: str) -> Path:
    """Creates the folder of a new run: ``out``, or ``runs/name``, ``runs/name-2`` and so on.

    Raises UserError if ``out`` is there already and is not an empty folder.
    """
    if out is not None:
        refuse_existing(out)
        path = Path(out)
        path.mkdir(parents=True, exist_ok=True)
    else:
        path = _first_free(Path("runs"), name)
    (path / FOLDER).mkdir()
    return path


def refuse_existing(out: str) -> None:
    """Raises UserError if a run cannot be written to ``out``."""
    path = Path(out)
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{out} is a file: give --out a folder that does not exist yet")
    if any(path.iterdir()):
        how = f", or go on with it: --resume {out}" if (path / FOLDER / LAST).is_file() else ""
        raise UserError(f"{out} is not empty: choose another --out{how}")


def _first_free(parent: Path, name: str) -> Path:
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def newest(parent: Path = Path("runs")) -> Path:
    """The run under ``parent`` whose last checkpoint is the newest. Raises UserError if none."""
    lasts = list(parent.glob(f"*/{FOLDER}/{LAST}"))
    if not lasts:
        raise UserError(f"there is no run under {parent}/ to resume: name its folder, --resume RUN")
    return max(lasts, key=lambda last: last.stat().st_mtime_ns).parent.parent


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder, so that the same run resumed twice at once cannot mix.

    Raises UserError if another process holds it. The lock goes with the process, however it ends.
    """
    with (folder / FOLDER / "lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is being trained by another process") from None
        yield


def tidy(folder: Path, kept_epochs: Iterable[int]) -> None:
    """Removes what a killed process left half written, and checkpoints no longer kept."""
    kept = {epoch_file(epoch) for epoch in kept_epochs}
    for path in [*folder.glob(".*.tmp"), *(folder / FOLDER).iterdir()]:
        stale = path.name.startswith(".") or (path.name.startswith("epoch-") and path.name not in kept)
        if stale:
            path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replaces ``path`` by ``content`` as readable JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replaces ``path`` by a CSV (LF line ends) that no spreadsheet runs formulas from."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([safe_cell(cell) for cell in row] for row in rows)
    write_text(path, text.getvalue())


def safe_cell(cell: Any) -> Any:
    """A text that a spreadsheet would take for a formula, with an apostrophe in front."""
    if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + cell
    return cell


def write_log(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Writes log.csv afresh, so that it always holds the epochs of the last checkpoint."""
    write_csv(folder / "log.csv", COLUMNS, ([r[c] for c in COLUMNS] for r in history))


def note_session(folder: Path, config: dict[str, Any], epoch: int, batch: int) -> None:
    """Adds to config.json under what circumstances this process trains, from where on."""
    path = folder / "config.json"
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        sessions = []
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "from": {"epoch": epoch, "batch": batch},
        "versions": versions(),
        "git": git_revision(),
        "machine": describe(),
    }
    write_json(path, {"settings": config, "sessions": [*sessions, session]})


class Events:
    """TensorBoard scalars, one point an epoch; does nothing where tensorboard is missing or cannot be imported."""

    def __init__(self, folder: Path, first_epoch: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
            return
        except Exception as error:  # what a protobuf of another version raises is no ImportError
            reason = str(error).partition(". ")[0]
            print(f"warning: no TensorBoard events, since importing it fails: {reason}", file=sys.stderr)
            self._writer = None
            return
        # Points that a killed process wrote after its last checkpoint are purged on resuming.
        self._writer = SummaryWriter(str(folder / "events"), purge_step=first_epoch)

    def add(self, record: dict[str, Any]) -> None:
        """Writes the record of one epoch."""
        if self._writer is None:
            return
        for column in COLUMNS[1:]:
            part, _, rest = column.partition("_")
            tag = f"{rest}/{part}" if part in ("train", "val") else f"run/{column}"
            self._writer.add_scalar(tag, record[column], record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finishes the file."""
        if self._writer is not None:
            self._writer.close()
