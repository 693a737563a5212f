"""Pictures on disk -> batches: what is read, what is refused, and in what order it arrives.

A data set is one of three layouts, found by looking at the folder (``find``):

1. ``json``, the competition's: images beside a ``train_gt.json`` {"10891.jpg": 0, ...}, or the file
   at the root and the images in ``training/``. A folder ``training`` or ``test`` may also be named
   itself; its labels are then ``train_gt.json`` or ``test_gt.json`` beside it.
2. ``csv``: one ``*.csv`` with the header ``file,label`` (or ``Id,Category``); file names are relative
   to the CSV and may have folders. Labels are class codes if at least half are whole numbers, else
   class names.
3. ``folders``: one folder per class; a folder called ``test`` and hidden folders are no class.

Classes: codes are the competition's (``CLASSES``). Class names that all mean one of its classes
(``nobody``, ``everybody``, ``not_all``, ``0``, ``1``, ``2``; other spellings: ``layouts.KNOWN_NAMES``)
get its codes, whatever their order in the alphabet and even where a class is missing; other names are
numbered in sorted order.

What becomes of a picture (by content; the suffix of its name is never looked at):

====================================  =================================================================
unreadable, missing, no permission    skipped
zero bytes, no image, truncated       skipped
other than JPEG, PNG, WebP, GIF, BMP  skipped, and never handed to that format's decoder
over 64 MB or 50 megapixels           skipped without decoding
wrong suffix                          accepted
CMYK, YCCK, palette, grey, bilevel    converted to RGB; colour profiles are ignored
16 bits a channel                     the upper 8 are used
transparent                           composited over black
animated                              the first frame
EXIF-rotated                          turned upright (``Preprocess.exif``)
1x1 and other small ones              stretched like any other
a link that leaves the data folder    skipped; so are folders, pipes and devices in a picture's place
name not in the label file            skipped; so are labels that are no class code, labelled names
                                      without a file, names with ``..``, with separators (the CSV may
                                      have ``/``) or with control characters
listed twice, same label              the first counts, the others are skipped
listed twice, different labels        skipped, since none of the labels can be trusted
====================================  =================================================================

Skipped means: not used, listed as ``Skipped`` with the reason, and the run goes on. A file that turns
bad during a run is skipped from then on; its batch is one picture smaller, the other batches of that
epoch stay as they were.

Everything random is a function of (seed, epoch, picture), drawn from the counter-based Philox
generator: the same whatever the number of workers, and after resuming at any batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from maskcore import _native, philox
from maskcore.augment import IDENTITY, Augment
from maskcore.drawn import builtin
from maskcore.errors import UserError
from maskcore.image import PIXEL_SCALE, BadPicture, Pixels, Preprocess, decode, load, network_input
from maskcore.layouts import CLASSES, Picture, PictureSet, Skipped, find, require_every_class, split
from maskcore.resources import available_memory, processors

__all__ = [
    "CLASSES",
    "Augment",
    "BadPicture",
    "Batch",
    "Loader",
    "Picture",
    "PictureSet",
    "Preprocess",
    "Skipped",
    "builtin",
    "decode",
    "find",
    "load",
    "network_input",
    "require_every_class",
    "split",
]

T = TypeVar("T")
B = TypeVar("B", "Batch", "StoredBatch")


@dataclass(frozen=True)
class Batch:
    """Pictures for one step.

    Attributes:
        images: float32 [N,3,S,S] from 0 to 1, channels_last (a view of an [N,S,S,3] buffer).
        labels: int64 [N], class codes.
        indices: int64 [N], each picture's place in the list that the ``Loader`` was given.
        number: The batch's place in its epoch, from 0; ``epoch(..., start=number + 1)`` goes on behind it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    number: int


@dataclass(frozen=True)
class StoredBatch:
    """Pictures for one step as they are stored, and how each is to be varied: :func:`maskcore.ops.warp` makes of
    them what :class:`Batch` holds, on a GPU.

    Attributes:
        pictures: uint8 [N,S,S,3].
        matrices: float64 [N,6]; of a picture that is not varied the identity.
        labels, indices, number: as of a ``Batch``.
    """

    pictures: torch.Tensor
    matrices: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    number: int


class Loader:
    """Batches of pictures, prepared ahead of the step by threads.

    Args:
        pictures: The pictures; ``Batch.indices`` counts in this list.
        preprocess: How they become pixels.
        batch_size: Pictures a batch; the last one of an epoch may be smaller.
        augment: How they are varied, None for not at all.
        shuffle: Whether each epoch has an order of its own; else that of the list.
        seed: Decides order and augmentation.
        workers: Threads; 0 prepares each batch when it is asked for. Default: the processors this
            process may use, at most 4. The pictures are the same for any number.
        cache_bytes: RAM for decoded pictures (uint8). Default: a quarter of what is available. The
            first pictures of the list that fit are kept, the others decoded anew each epoch.

    Attributes:
        waited: Seconds that the consumer waited for data in the current or last epoch.

    Raises UserError for arguments that make no sense.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        preprocess: Preprocess,
        batch_size: int,
        *,
        augment: Augment | None = None,
        shuffle: bool = False,
        seed: int = 0,
        workers: int | None = None,
        cache_bytes: int | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {batch_size}")
        if workers is not None and workers < 0:
            raise UserError(f"the number of workers must be at least 0, not {workers}")
        if cache_bytes is not None and cache_bytes < 0:
            raise UserError(f"the cache must have at least 0 bytes, not {cache_bytes}")
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.augment = augment
        self.shuffle = shuffle
        self.seed = seed
        self.workers = min(4, processors()) if workers is None else workers
        self.waited = 0.0
        self._given = tuple(pictures)
        self._kept = list(range(len(self._given)))
        self._bad: dict[int, Skipped] = {}
        self._cache = _Cache(len(self._given), preprocess.size, cache_bytes)

    @property
    def pictures(self) -> list[Picture]:
        """The pictures in use: those given, less those found bad before the current epoch."""
        return [self._given[i] for i in self._kept]

    @property
    def skipped(self) -> list[Skipped]:
        """The pictures found bad so far, in the order given."""
        noted = list(self._bad.items())  # a copy in one step: threads may be adding
        return [skipped for _, skipped in sorted(noted, key=lambda item: item[0])]

    @property
    def batches(self) -> int:
        """Batches an epoch; constant during an epoch."""
        return -(-len(self._kept) // self.batch_size)

    def scan(self, progress: bool = False) -> list[Skipped]:
        """Decodes every picture once, fills the cache, and drops the bad ones.

        Args:
            progress: Whether to show a bar on a terminal.

        Returns:
            All pictures found bad so far.
        """
        chunks = (self._kept[i : i + 8] for i in range(0, len(self._kept), 8))
        jobs = [partial(self._check, indices=chunk) for chunk in chunks]
        with tqdm(
            total=len(self._kept),
            desc="reading pictures",
            unit=" images",
            leave=False,
            delay=1,
            dynamic_ncols=True,
            disable=None if progress else True,
        ) as bar:
            for count in _in_order(jobs, self.workers):
                bar.update(count)
        self._forget_bad()
        return self.skipped

    def epoch(self, epoch: int, start: int = 0, augmented: bool = True) -> Iterator[Batch]:
        """The batches of an epoch, from number ``start`` on.

        Args:
            epoch: Any number not below 0; with the seed it decides order and augmentation.
            start: The first batch wanted, to go on after an interruption.
            augmented: False leaves the augmentation out, in the same order.

        Dropping the iterator, or an exception in its consumer, ends its threads.
        """
        return self._batches(self._prepare, epoch, start, augmented)

    def stored(self, epoch: int, start: int = 0, augmented: bool = True) -> Iterator[StoredBatch]:
        """The batches of ``epoch(...)``, in the same order and with the same variation, for a GPU to make."""
        return self._batches(self._gather, epoch, start, augmented)

    def _batches(
        self, prepare: Callable[..., B | None], epoch: int, start: int, augmented: bool
    ) -> Iterator[B]:
        self._forget_bad()
        if not 0 <= start <= self.batches:
            raise UserError(f"the epoch has {self.batches} batches, so it cannot go on at batch {start}")
        order = self._order(epoch)
        augment = self.augment if augmented else None
        jobs = [
            partial(
                prepare,
                number=number,
                indices=order[first : first + self.batch_size],
                epoch=epoch,
                augment=augment,
            )
            for number, first in enumerate(range(0, len(order), self.batch_size))
            if number >= start
        ]
        self.waited = 0.0
        return self._timed(jobs)

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(self._kept)
        # Drawn for all pictures given, so that a dropped one does not change the order of the others.
        order = philox.permutation(philox.ORDER, self.seed, epoch, 0, len(self._given))
        return [i for i in order.tolist() if i not in self._bad]

    def _timed(self, jobs: Sequence[Callable[[threading.Event], B | None]]) -> Iterator[B]:
        prepared = _in_order(jobs, self.workers)
        try:
            while True:
                began = time.perf_counter()
                try:
                    batch = next(prepared)
                except StopIteration:
                    return
                finally:
                    self.waited += time.perf_counter() - began
                if batch is not None:
                    yield batch
        finally:
            prepared.close()

    def _prepare(
        self, stop: threading.Event, number: int, indices: list[int], epoch: int, augment: Augment | None
    ) -> Batch | None:
        """One batch; None if it has no picture left that can be read."""
        size = self.preprocess.size
        images = torch.empty((len(indices), size, size, 3), dtype=torch.float32)
        rows = images.numpy()
        good: list[int] = []
        for index, pixels in self._readable(stop, indices):
            row = rows[len(good)]
            if augment is None:
                _native.to_float(pixels, row, PIXEL_SCALE)
            else:
                matrix = augment.draw(size, self.seed, epoch, index).matrix(size)
                _native.warp(pixels, matrix, augment.fill, row, PIXEL_SCALE)
            good.append(index)
        if not good or stop.is_set():
            return None
        return Batch(images[: len(good)].permute(0, 3, 1, 2), *self._named(good), number)

    def _gather(
        self, stop: threading.Event, number: int, indices: list[int], epoch: int, augment: Augment | None
    ) -> StoredBatch | None:
        """One batch as it is stored; None if it has no picture left that can be read."""
        size = self.preprocess.size
        pictures = torch.empty((len(indices), size, size, 3), dtype=torch.uint8)
        rows = pictures.numpy()
        good: list[int] = []
        for index, pixels in self._readable(stop, indices):
            rows[len(good)] = pixels
            good.append(index)
        if not good or stop.is_set():
            return None
        matrices = [
            IDENTITY if augment is None else augment.draw(size, self.seed, epoch, index).matrix(size)
            for index in good
        ]
        variation = torch.tensor(matrices, dtype=torch.float64)
        return StoredBatch(pictures[: len(good)], variation, *self._named(good), number)

    def _readable(self, stop: threading.Event, indices: list[int]) -> Iterator[tuple[int, Pixels]]:
        """The pictures that can be read, until nobody wants them any more."""
        for index in indices:
            if stop.is_set():
                return
            pixels = self._pixels(index)
            if pixels is not None:
                yield index, pixels

    def _named(self, good: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and indices."""
        labels = torch.tensor([self._given[i].label for i in good], dtype=torch.int64)
        return labels, torch.tensor(good, dtype=torch.int64)

    def _check(self, stop: threading.Event, indices: list[int]) -> int:
        for index in indices:
            if not stop.is_set():
                self._pixels(index)
        return len(indices)

    def _pixels(self, index: int) -> Pixels | None:
        """A picture from the cache or from its file; None, and a note of it, if it is bad."""
        pixels = self._cache.get(index)
        if pixels is not None:
            return pixels
        path = self._given[index].path
        try:
            pixels = load(path, self.preprocess)
        except BadPicture as error:
            self._bad[index] = Skipped(path, error.reason)
            return None
        self._cache.put(index, pixels)
        return pixels

    def _forget_bad(self) -> None:
        self._kept = [i for i in self._kept if i not in self._bad]


class _Cache:
    """Decoded pictures in bounded RAM: the first ones by index, as many as fit.

    One block, whose pages take memory only once they are written.
    """

    def __init__(self, count: int, size: int, limit: int | None):
        room = (available_memory() // 4 if limit is None else limit) // (size * size * 3)
        self._room = min(count, room)
        try:
            self._block = np.empty((self._room, size, size, 3), dtype=np.uint8)
        except MemoryError:
            raise UserError(
                f"no room for a picture cache of {self._room * size * size * 3 / 1e9:.1f} GB; ask for less"
            ) from None
        self._filled = np.zeros(self._room, dtype=np.bool_)

    def get(self, index: int) -> Pixels | None:
        return self._block[index] if index < self._room and self._filled[index] else None

    def put(self, index: int, pixels: Pixels) -> None:
        if index < self._room:
            self._block[index] = pixels
            self._filled[index] = True  # after the pixels: other threads look without a lock


def _in_order(jobs: Iterable[Callable[[threading.Event], T]], workers: int) -> Generator[T, None, None]:
    """The jobs' results, in order; threads work a few jobs ahead of the one that is waited for.

    Jobs get an event that is set when nobody wants their result any more.
    """
    stop = threading.Event()
    if workers == 0:
        yield from (job(stop) for job in jobs)
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="maskcore-pictures")
    try:
        for job in jobs:
            waiting.append(pool.submit(job, stop))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
