"""Training: ``maskcore train`` or ``python -m maskcore.train``.

A run is a function of its settings and its pictures: it can be stopped and killed anywhere and,
resumed, ends with the same bits. Order and augmentation are functions of (seed, epoch, picture),
see maskcore.data; dropout draws its seeds from torch's generator, which is seeded anew each epoch and
saved with a checkpoint within one.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

import maskcore
from maskcore import commandline, cuda_graph, data, figures, models, ops, optim, runfolder, settings
from maskcore.checkpoint import (
    FOLDER,
    LAST,
    Meta,
    State,
    best_of,
    epoch_file,
    load_training,
    read_meta,
    save_training,
    save_weights,
    versions,
)
from maskcore.errors import UserError
from maskcore.machine import choose_device
from maskcore.pictures import Pictures, prepare_pictures, write_report, write_skipped
from maskcore.progress import Progress, duration
from maskcore.settings import Config

AVERAGED = 10  # epochs in "the average of the best epochs", as the original report tabulates


class Interrupted(Exception):
    """A signal asked the run to end; everything is saved."""

    def __init__(self, number: int):
        self.number = number


class Diverged(Exception):
    """The loss or a weight is not a finite number any more; the message says which and where."""


@dataclass
class Run:
    """A run in this process."""

    config: Config
    folder: Path
    pictures: Pictures
    network: models.Network
    optimizer: optim.Adam
    device: torch.device
    state: State = field(default_factory=State)
    stop: StopSignals = field(default_factory=lambda: StopSignals())
    saved_at: float = field(default_factory=time.monotonic)  # of the last checkpoint
    told_skipped: int = 0  # files that skipped.csv has
    epoch_seconds: list[float] = field(default_factory=list)  # whole epochs of this process

    def __post_init__(self) -> None:
        self.steps: Steps = GpuSteps(self) if self.device.type == "cuda" else CpuSteps(self)

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / FOLDER / LAST

    def meta(self) -> Meta:
        """What a checkpoint written now says beside its tensors."""
        network = self.network
        return Meta(
            network={
                "name": network.name,
                "num_classes": network.num_classes,
                "image_size": network.image_size,
            },
            preprocess=self.pictures.train.preprocess,
            classes=self.pictures.found.classes,
            config=self.config.to_dict(),
            data=self.pictures.to_dict(),
            state=self.state,
            versions=versions(),
        )


# ---- the loop


def train(run: Run) -> None:
    """Trains ``run`` from where its state is to its end. Raises Interrupted and Diverged."""
    events = runfolder.Events(run.folder, run.state.epoch) if run.config.tensorboard else None
    try:
        while run.state.epoch <= run.config.epochs and not is_stalled(run):
            started = time.monotonic()
            train_epoch(run)
            record = validate(run)
            run.epoch_seconds.append(time.monotonic() - started)
            finish_epoch(run, record)
            if events is not None:
                events.add(record)
            print(epoch_line(run, record), flush=True)
    finally:
        if events is not None:
            events.close()


def train_epoch(run: Run) -> None:
    """Trains what is left of the current epoch: all of it, or after resuming its last batches."""
    config, state, loader = run.config, run.state, run.pictures.train
    if state.batch == 0:
        torch.manual_seed(epoch_seed(config.seed, state.epoch))
    run.network.train()
    started, waited, seconds = time.monotonic(), state.wait_seconds, state.train_seconds
    title = f"epoch {state.epoch}/{config.epochs}"
    if state.batch == loader.batches:  # stopped while validating
        return
    steps = run.steps
    batches = steps.batches(state.epoch, state.batch, augmented(config, state.epoch))
    with Progress(title, len(loader.pictures), state.samples) as progress:
        for batch in batches:
            steps.step(batch)
            count = len(batch.labels)
            state.batch = batch.number + 1
            state.samples += count
            state.train_seconds = seconds + time.monotonic() - started
            state.wait_seconds = waited + loader.waited
            if state.batch % steps.every == 0 or progress.due or is_time_to_save(run):
                note_sums(state, *steps.take_sums())
            progress.add(count, step_text(state) if progress.due else None)
            save_between_batches(run)
        note_sums(state, *steps.take_sums())
    if state.samples == 0:
        raise UserError(f"no picture to train on can be read any more in {run.pictures.found.root}")


def note_sums(state: State, cross_entropy: float, correct: int) -> None:
    """Adds what steps have come to since the last time. Raises Diverged if it is no number any more."""
    state.cross_entropy_sum += cross_entropy
    state.correct += correct
    if not math.isfinite(cross_entropy):
        raise Diverged(f"the loss became {cross_entropy} in epoch {state.epoch}, batch {state.batch}")


class Steps(Protocol):
    """How a run's batches are prepared and what a step is, by the device."""

    every: int  # batches between two readings of the sums

    def batches(self, epoch: int, start: int, augmented: bool) -> Iterator[Any]: ...

    def step(self, batch: Any) -> None:
        """Updates the network."""

    def take_sums(self) -> tuple[float, int]:
        """Cross-entropy summed over pictures, and right answers, since the last call."""


class CpuSteps:
    """Pictures are augmented by the loader's threads; each step's loss is known when it ends."""

    every = 1

    def __init__(self, run: Run) -> None:
        self.run = run
        self._sums = (0.0, 0)

    def batches(self, epoch: int, start: int, augmented: bool) -> Iterator[data.Batch]:
        return self.run.pictures.train.epoch(epoch, start, augmented)

    def step(self, batch: data.Batch) -> None:
        loss, correct = train_step(self.run, batch)
        self._sums = (loss * len(batch.labels), correct)

    def take_sums(self) -> tuple[float, int]:
        sums, self._sums = self._sums, (0.0, 0)
        return sums


class GpuSteps:
    """Pictures go up as they are stored and are augmented there; a step is a CUDA graph, and nothing waits for it."""

    every = 20

    def __init__(self, run: Run) -> None:
        self.run = run
        self._graph: cuda_graph.GraphStep | None = None

    def batches(self, epoch: int, start: int, augmented: bool) -> Iterator[data.StoredBatch]:
        return self.run.pictures.train.stored(epoch, start, augmented)

    def step(self, batch: data.StoredBatch) -> None:
        run = self.run
        if self._graph is None:
            if run.config.precision != "ieee":
                torch.backends.cuda.matmul.allow_tf32 = True  # of the dense layers
            device = cuda_graph.Cuda(run.device)
            self._graph = cuda_graph.GraphStep(
                run.network, run.optimizer, device, run.config.batch_size, run.config.fill
            )
        self._graph(batch)

    def take_sums(self) -> tuple[float, int]:
        return (0.0, 0) if self._graph is None else self._graph.take_sums()


def train_step(run: Run, batch: data.Batch) -> tuple[float, int]:
    """One update; returns the batch's mean cross-entropy and how many it had right before it."""
    logits = run.network(batch.images)
    loss = ops.softmax_cross_entropy(logits, batch.labels)
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss.item(), int((logits.argmax(1) == batch.labels).sum())


@torch.no_grad()
def validate(run: Run) -> dict[str, Any]:
    """Validates and returns the epoch's record (the columns of log.csv).

    Never augmented, without dropout, with BatchNorm's moving statistics. The weights change during
    an epoch and the penalty with them: the training penalty is the mean of its values before the
    first and after the last step.
    """
    started = time.monotonic()
    network = models.for_inference(run.network)
    loader, classes = run.pictures.val, run.network.num_classes
    loss_sum, total = 0.0, 0
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    with Progress("validation", len(loader.pictures)) as progress:
        for batch in loader.epoch(0):
            logits = network(batch.images.to(run.device, non_blocking=True))
            labels = batch.labels.to(run.device)
            loss_sum += ops.softmax_cross_entropy(logits, labels).item() * len(labels)
            total += len(labels)
            cells = (labels * classes + logits.argmax(1)).cpu()
            confusion += torch.bincount(cells, minlength=classes * classes)
            progress.add(len(labels))
            save_between_batches(run)
    matrix = confusion.reshape(classes, classes)
    penalty = float(run.network.penalty(run.config.l2))
    if total == 0:
        raise UserError(f"no picture to validate on can be read any more in {run.pictures.found.root}")
    record = epoch_record(
        run, loss_sum / total, int(matrix.trace()) / total, penalty, time.monotonic() - started
    )
    for name in ("val_loss", "train_loss"):
        if not math.isfinite(record[name]):
            raise Diverged(f"{name} is {record[name]} after epoch {run.state.epoch}")
    if best_of([*run.state.history, record])[0] is record:
        run.state.best_confusion = matrix.tolist()
    return record


def epoch_record(
    run: Run, val_cross_entropy: float, val_accuracy: float, penalty: float, val_seconds: float
) -> dict[str, Any]:
    """The columns of log.csv for the epoch that the state has just finished."""
    state = run.state
    cross_entropy = state.cross_entropy_sum / state.samples
    train_penalty = (state.penalty_at_start + penalty) / 2
    return {
        "epoch": state.epoch,
        "train_cross_entropy": cross_entropy,
        "train_penalty": train_penalty,
        "train_loss": cross_entropy + train_penalty,
        "train_accuracy": state.correct / state.samples,
        "val_cross_entropy": val_cross_entropy,
        "val_penalty": penalty,
        "val_loss": val_cross_entropy + penalty,
        "val_accuracy": val_accuracy,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "augmented": int(augmented(run.config, state.epoch)),
        "images_per_second": state.samples / max(state.train_seconds, 1e-9),
        "train_seconds": state.train_seconds,
        "val_seconds": val_seconds,
        "wait_seconds": state.wait_seconds,
        "wait_share": state.wait_seconds / max(state.train_seconds, 1e-9),
    }


def finish_epoch(run: Run, record: dict[str, Any]) -> None:
    """Moves the state on, and writes checkpoints, log and curves.

    Whatever is killed in between, the last checkpoint decides: log and curves are written from it
    again on resuming, and checkpoints that it does not know are removed.
    """
    state = run.state
    run.state = State(
        epoch=state.epoch + 1,
        penalty_at_start=record["val_penalty"],
        history=[*state.history, record],
        best_confusion=state.best_confusion,
    )
    refuse_unusable(run)
    kept = [r["epoch"] for r in best_of(run.state.history, run.config.keep_best)]
    if record["epoch"] in kept:
        path = run.folder / FOLDER / epoch_file(record["epoch"])
        save_weights(path, run.network, run.meta())
    save(run)
    runfolder.tidy(run.folder, kept)
    runfolder.write_log(run.folder, run.state.history)
    if figures.available():
        figures.curves(run.state.history, run.folder / "curves.png", title_of(run))
    tell_skipped(run)


def tell_skipped(run: Run) -> None:
    """Says and notes which files could be read at the start and cannot any more."""
    more = len(run.pictures.skipped) - run.told_skipped
    if more:
        print(f"{more} more files cannot be read any more, see {run.folder / 'skipped.csv'}")
        write_skipped(run.folder / "skipped.csv", run.pictures.skipped)
        run.told_skipped += more


def save(run: Run) -> None:
    """Writes the checkpoint to resume from."""
    refuse_unusable(run)
    run.optimizer.note_counts()
    save_training(run.last, run.network, run.optimizer, run.meta())
    run.saved_at = time.monotonic()


def save_between_batches(run: Run) -> None:
    """Saves if a signal came (then raises Interrupted) or if it is time to."""
    if not is_time_to_save(run):
        return
    # What came between this question and the one before: a checkpoint's sums are those of all of its batches.
    note_sums(run.state, *run.steps.take_sums())
    save(run)
    if run.stop.number is not None:
        raise Interrupted(run.stop.number)


def is_time_to_save(run: Run) -> bool:
    minutes = run.config.save_minutes
    late = minutes > 0 and time.monotonic() - run.saved_at >= 60 * minutes
    return late or run.stop.number is not None


def refuse_unusable(run: Run) -> None:
    """Raises Diverged if a weight is not finite, so that no checkpoint ever holds one."""
    for name, tensor in run.network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise Diverged(f"{name} is no longer finite in epoch {run.state.epoch}")


def is_stalled(run: Run) -> bool:
    """Keras' EarlyStopping(val_loss, patience, min_delta=0): no new lowest for that many epochs."""
    losses = [record["val_loss"] for record in run.state.history]
    if run.config.patience == 0 or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= run.config.patience


def augmented(config: Config, epoch: int) -> bool:
    """Whether the training pictures of ``epoch`` (from 1) are augmented."""
    return config.augment and epoch > config.no_augment_epochs


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of torch's generator, from which dropout draws, at the start of an epoch."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


# ---- beginning, resuming, ending


def main(argv: Sequence[str] | None = None) -> int:
    """The verb ``train``; returns the exit status."""
    return commandline.run(settings.parser(), _start, argv)


def _start(namespace: argparse.Namespace) -> int:
    given = settings.given_settings(namespace)
    if not hasattr(namespace, "resume"):
        run = begin_run(settings.new_config(given), settings.quick_changes(given))
        with runfolder.locked(run.folder):
            return _train_and_tell(run)
    folder = run_folder(Path(namespace.resume)) if namespace.resume else runfolder.newest()
    with runfolder.locked(folder):
        return _train_and_tell(resume_run(folder, given))


def begin_run(config: Config, quick_changes: Sequence[str] = ()) -> Run:
    """Makes everything a new run needs, and its folder with a first checkpoint."""
    if config.out is not None:
        runfolder.refuse_existing(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    if config.quick:
        print(f"quick: a try, not the real training: {'; '.join(quick_changes)}")
    # Before the pictures: a size that the network cannot have is said at once.
    models.place(config.model, 2, config.image_size)
    pictures = prepare_pictures(config)
    network, optimizer = make_network(config, len(pictures.found.classes), device)
    folder = runfolder.new_folder(config.out, "quick" if config.quick else config.model)
    run = Run(config, folder, pictures, network, optimizer, device)
    with torch.no_grad():
        run.state.penalty_at_start = float(network.penalty(config.l2))
    runfolder.note_session(folder, config.to_dict(), 1, 0)
    write_report(pictures, folder)
    save(run)
    introduce(run)
    return run


def resume_run(folder: Path, given: Mapping[str, Any]) -> Run:
    """Makes a run as it was when its last checkpoint was written."""
    meta = read_meta(folder / FOLDER / LAST)
    saved = Config.from_dict(meta.config, f"the checkpoint in {folder}")
    config = settings.resumed_config(saved, given)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    pictures = prepare_pictures(config)
    network, optimizer = make_network(config, len(pictures.found.classes), device)
    run = Run(config, folder, pictures, network, optimizer, device)
    if pictures.fingerprint != meta.data.get("fingerprint"):
        raise UserError(
            f"the pictures in {pictures.found.root} are not those that {folder} was trained on: "
            "a resumed run needs the same files with the same classes"
        )
    if pictures.to_dict()["unreadable"] != meta.data.get("unreadable"):
        print(
            "warning: other files than before cannot be read, so that the run will not end with the "
            "same bits as one never stopped"
        )
    run.state = load_training(run.last, network, optimizer).state
    kept = [r["epoch"] for r in best_of(run.state.history, config.keep_best)]
    runfolder.tidy(folder, kept)
    runfolder.write_log(folder, run.state.history)
    runfolder.note_session(folder, config.to_dict(), run.state.epoch, run.state.batch)
    write_report(pictures, folder)
    introduce(run)
    where = f", after batch {run.state.batch}" if run.state.batch else ""
    print(f"resumed   in epoch {run.state.epoch}{where}")
    return run


def make_network(config: Config, classes: int, device: torch.device) -> tuple[models.Network, optim.Adam]:
    """A new network and its optimizer, by the run's settings."""
    network = models.create(
        config.model, classes, config.image_size, precision=config.precision, seed=config.seed
    ).to(device)
    return network, optim.Adam(network.parameter_groups(config.l2), lr=config.lr)


def run_folder(path: Path) -> Path:
    """The run's folder for what was given to --resume: itself or something inside it."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / FOLDER / LAST).is_file():
            return folder
    raise UserError(f"{path} is not a run's folder: it has no {FOLDER}/{LAST}")


def _train_and_tell(run: Run) -> int:
    try:
        with run.stop:
            train(run)
        conclude(run)
        return 0
    except Interrupted as interrupt:
        where = f"epoch {run.state.epoch}, after batch {run.state.batch}"
        print(f"\nstopped and saved in {where}; go on with:  maskcore train --resume {run.folder}")
        return 128 + interrupt.number
    except Diverged as error:
        good = read_meta(run.last).state
        print(
            f"maskcore train: stopped: {error}; the last good checkpoint is {run.last} (epoch "
            f"{good.epoch}, after batch {good.batch}), and a lower --lr may help",
            file=sys.stderr,
        )
        return 1


def conclude(run: Run) -> None:
    """Says and writes what the run came to."""
    history, config = run.state.history, run.config
    best = best_of(history, AVERAGED)
    mean = {
        key: sum(record[key] for record in best) / len(best)
        for key in ("val_accuracy", "val_loss", "val_cross_entropy")
    }
    first = best[0]
    if len(history) < config.epochs:
        print(f"stopped early: {config.patience} epochs without a lower validation loss")
    print(
        f"best epoch {first['epoch']}: validation accuracy {first['val_accuracy']:.4f}, "
        f"loss {first['val_loss']:.4f}"
    )
    print(
        f"average of the best {len(best)} epochs: validation accuracy {mean['val_accuracy']:.4f}, "
        f"loss {mean['val_loss']:.4f} (cross-entropy {mean['val_cross_entropy']:.4f})"
    )
    if run.pictures.drawn:
        print("these figures are for pictures drawn by maskcore, not for photographs")
    runfolder.write_json(
        run.folder / "result.json",
        {
            "best": first,
            "average_of_best": {"epochs": [record["epoch"] for record in best], **mean},
            "drawn_pictures": run.pictures.drawn,
        },
    )
    classes = run.pictures.found.classes
    runfolder.write_csv(
        run.folder / "confusion.csv",
        ["true \\ predicted", *classes],
        ([name, *row] for name, row in zip(classes, run.state.best_confusion, strict=True)),
    )
    if figures.available():
        figures.confusion(
            run.state.best_confusion,
            classes,
            run.folder / "confusion.png",
            f"{title_of(run)}, validation, epoch {first['epoch']}",
        )
    print(f"everything is in {run.folder}; try it:  maskcore predict {run.folder} PICTURES")


# ---- what is said


def introduce(run: Run) -> None:
    """Says what is trained, on what, where."""
    found, pictures = run.pictures.found, run.pictures
    parameters = sum(row.parameters for row in run.network.table())
    side = run.network.image_size
    counts = Counter(p.label for p in [*pictures.train.pictures, *pictures.val.pictures])
    per_class = ", ".join(f"{counts[i]} {name}" for i, name in enumerate(found.classes))
    print(f"network   {run.network.name}, {parameters:,} parameters, {side}x{side} pictures")
    print(
        f"pictures  {found.root}: {len(pictures.train.pictures)} to train, "
        f"{len(pictures.val.pictures)} to validate ({per_class})"
    )
    if pictures.drawn:
        print("          these are drawn by maskcore, not photographs; --data trains on your own")
    run.told_skipped = len(pictures.skipped)
    if pictures.skipped:
        print(
            f"          {len(pictures.skipped)} files skipped, with reasons in {run.folder / 'skipped.csv'}"
        )
    threads, kernels = torch.get_num_threads(), maskcore.config()["instruction set"]
    print(f"machine   {run.device}, {threads} thread{'s' * (threads != 1)}, {kernels} kernels")
    print(f"run       {run.folder}  (Ctrl-C saves and stops)")
    for missing, name in (
        (run.config.tensorboard and not _installed("tensorboard"), "tensorboard for events"),
        (not figures.available(), "matplotlib for curves.png"),
    ):
        if missing:
            print(f"          not installed, so not written: {name}")
    sys.stdout.flush()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def title_of(run: Run) -> str:
    """A headline for the run's pictures."""
    drawn = ", drawn pictures" if run.pictures.drawn else ""
    network = run.network.name
    name = network if run.folder.name == network else f"{run.folder.name}, network {network}"
    return f"{name}{drawn}"


def step_text(state: State) -> str:
    """Means of the current epoch so far, for the progress bar."""
    return (
        f"loss {state.cross_entropy_sum / state.samples:.4f}, "
        f"accuracy {state.correct / state.samples:.3f}, "
        f"waiting {state.wait_seconds / max(state.train_seconds, 1e-9):.1%}"
    )


def epoch_line(run: Run, record: dict[str, Any]) -> str:
    """One line for a finished epoch; * marks a new best validation accuracy."""
    width = len(str(run.config.epochs))
    left = (run.config.epochs - record["epoch"]) * sum(run.epoch_seconds) / len(run.epoch_seconds)
    star = "*" if best_of(run.state.history)[0] is record else " "
    return (
        f"epoch {record['epoch']:>{width}}/{run.config.epochs}  "
        f"train loss {record['train_loss']:.4f} (ce {record['train_cross_entropy']:.4f}) "
        f"acc {record['train_accuracy']:.3f}  "
        f"val loss {record['val_loss']:.4f} (ce {record['val_cross_entropy']:.4f}) "
        f"acc {record['val_accuracy']:.3f}{star} "
        f"{record['images_per_second']:.1f} images/s  waiting {record['wait_share']:.1%}  "
        f"{duration(run.epoch_seconds[-1])}, {duration(left)} left"
    )


# ---- signals


class StopSignals:
    """Notes the first Ctrl-C or SIGTERM; a second one does what it does without us.

    A context manager. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        print("\nfinishing this step and saving; once more stops at once", file=sys.stderr)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._previous[each])


if __name__ == "__main__":
    sys.exit(main())
