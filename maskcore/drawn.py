"""The built-in picture set: drawn once into a cache folder, in the competition's layout."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from maskcore.errors import UserError
from maskcore.layouts import CLASSES
from maskcore.resources import processors

_DRAW_AT_ONCE = 16  # pictures a task: about a second, so that Ctrl-C does not wait longer
_WORTH_PROCESSES = 200  # fewer pictures are drawn sooner than processes start
MAX_COUNT = 1_000_000


def builtin(
    count: int,
    seed: int = 0,
    size: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The folder of the built-in picture set, in the competition's layout; drawn if it is not there.

    The folder appears under its name only when it is complete; a damaged one is drawn anew.

    Args:
        count: Pictures to have.
        seed: Which set.
        size: Side of the pictures in pixels; None gives each its own size, as photographs have.
        cache: Where sets are kept. Default: $MASKCORE_CACHE, else ~/.cache/maskcore.
        progress: Whether to show a bar on a terminal.

    Raises:
        UserError: ``count`` or ``seed`` makes no sense, or there is no home folder to keep a cache in.
        OSError: The folder cannot be written.
    """
    check_drawing(count, seed, size)
    home = _cache_folder(cache)
    sides = f"-{size}px" if size is not None else ""
    target = home / f"drawn-{count}-seed{seed}{sides}-{_drawing_version()}"
    if _complete(target):
        return target
    print(f"maskcore: drawing the {count} pictures of the built-in set into {target}", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=".drawing-", dir=home))
    try:
        set_folder = room / "set"
        labels = draw_pictures(set_folder / "training", range(count), seed, size, progress=progress)
        write_json(set_folder / "train_gt.json", labels)
        files = (path for path in sorted(set_folder.rglob("*")) if path.is_file())
        sizes = {path.relative_to(set_folder).as_posix(): path.stat().st_size for path in files}
        write_json(set_folder / _MANIFEST, sizes)
        _put_in_place(set_folder, target, room)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return target


_MANIFEST = "manifest.json"


def _cache_folder(cache: str | Path | None) -> Path:
    chosen = cache or os.environ.get("MASKCORE_CACHE") or "~/.cache/maskcore"
    try:
        return Path(chosen).expanduser()
    except RuntimeError:
        raise UserError("there is no home folder for the picture cache; set MASKCORE_CACHE") from None


def _drawing_version() -> str:
    """Changes with the drawing code, so that a set drawn by another version is not taken for this one's."""
    source = Path(__file__).with_name("scene.py").read_bytes()
    return hashlib.sha256(source).hexdigest()[:8]


def _complete(folder: Path) -> bool:
    """Whether every file of a drawn set is there with the size it had."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_bytes())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _put_in_place(made: Path, target: Path, room: Path) -> None:
    """Renames a finished set to its name, whatever lies there; another process may be doing the same."""
    for attempt in range(3):
        try:
            made.rename(target)
            return
        except OSError:
            if not target.exists():
                raise
        if _complete(target):
            return
        target.rename(room / f"damaged-{attempt}")
    made.rename(target)


def check_drawing(count: int, seed: int, size: int | None) -> None:
    """UserError unless so many pictures of that size can be drawn."""
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"the number of pictures must be at least 1 and at most {MAX_COUNT}, not {count}")
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed of drawn pictures must be at least 0 and below 2^63, not {seed}")
    if size is not None and not 32 <= size <= 4096:
        raise UserError(f"the size of drawn pictures must be from 32 to 4096, not {size}")


def write_json(path: Path, value: object) -> None:
    """Writes ``value`` as one JSON text with a line break at its end."""
    path.write_text(json.dumps(value, indent=0) + "\n", encoding="utf-8")


def picture_name(index: int) -> str:
    """File name of drawn picture number ``index``: five digits, as in the competition."""
    return f"{10001 + index:05d}.jpg"


def folder_name(label: int) -> str:
    """Folder of a class in the layout of one folder per class."""
    return CLASSES[label].replace(" ", "_")


def draw_pictures(
    folder: Path,
    indices: range,
    seed: int,
    size: int | None = None,
    *,
    by_class: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Draws pictures into a folder, in several processes where that pays.

    Args:
        folder: Where to; made if it is not there.
        indices: Which pictures of the set ``seed``.
        seed, size: As for ``builtin``.
        by_class: Whether each class gets a folder of its own in ``folder``.
        workers: Processes. Default: the processors this process may use.
        progress: Whether to show a bar on a terminal.

    Returns:
        The class codes by file name relative to ``folder``, in the order of ``indices``.
    """
    for name in map(folder_name, range(len(CLASSES))) if by_class else [""]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    parts = [indices[i : i + _DRAW_AT_ONCE] for i in range(0, len(indices), _DRAW_AT_ONCE)]
    tasks = [_Drawing(folder, part, seed, size, by_class) for part in parts]
    count = processors() if workers is None else max(1, workers)
    if len(indices) < _WORTH_PROCESSES or multiprocessing.current_process().daemon:
        count = 1
    with tqdm(
        total=len(indices),
        desc="drawing pictures",
        unit=" images",
        dynamic_ncols=True,
        disable=None if progress else True,
    ) as bar:
        done = _draw_in_processes(tasks, count, bar) if count > 1 else {}
        for number, task in enumerate(tasks):
            if number not in done:
                done[number] = task.draw()
                bar.update(len(done[number]))
    return {name: label for number in range(len(tasks)) for name, label in done[number].items()}


@dataclass(frozen=True)
class _Drawing:
    """Some pictures to draw: what a process is sent."""

    folder: Path
    indices: range
    seed: int
    size: int | None
    by_class: bool

    def draw(self) -> dict[str, int]:
        from maskcore import scene  # only here: whoever brings pictures never needs it

        labels = {}
        for index in self.indices:
            content, label = scene.jpeg(self.seed, index, self.size)
            name = picture_name(index)
            if self.by_class:
                name = f"{folder_name(label)}/{name}"
            (self.folder / name).write_bytes(content)
            labels[name] = label
        return labels


def _draw_in_processes(tasks: Sequence[_Drawing], count: int, bar: tqdm[Any]) -> dict[int, dict[str, int]]:
    """The tasks' results by number; some are missing if processes could not be started or died."""
    done: dict[int, dict[str, int]] = {}
    # Not fork: threads of torch may be running. Ctrl-C is left to this process. A script that calls this
    # without a main guard is run again by every process it starts; those stop with multiprocessing's own
    # explanation, and the pictures are drawn here after all.
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)
    try:
        pool = ProcessPoolExecutor(count, context, initializer=signal.signal, initargs=ignore)
    except (OSError, NotImplementedError):  # no semaphores here
        return done
    try:
        futures = {pool.submit(task.draw): number for number, task in enumerate(tasks)}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            bar.update(len(done[futures[future]]))
    except BrokenProcessPool:
        pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return done
