"""Which pictures a run trains and validates on, and the report of it in the run's folder."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from maskcore import data
from maskcore.errors import UserError
from maskcore.runfolder import write_csv, write_json
from maskcore.settings import Config


@dataclass
class Pictures:
    """The pictures of a run, each decoded once to see that it can be."""

    found: data.PictureSet
    train: data.Loader
    val: data.Loader
    drawn: bool
    fingerprint: str  # SHA-256 of names, labels and split: what must be unchanged to go on

    @property
    def skipped(self) -> list[data.Skipped]:
        """Every file that is not used, with those that could not be read any more meanwhile."""
        return [*self.found.skipped, *self.train.skipped, *self.val.skipped]

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint notes of them."""
        return {
            "root": str(self.found.root),
            "drawn": self.drawn,
            "fingerprint": self.fingerprint,
            "unreadable": [self.name(skipped.path) for skipped in [*self.train.skipped, *self.val.skipped]],
        }

    def name(self, path: Path) -> str:
        """A picture's path in the data folder."""
        return name_in(self.found.root, path)


def name_in(root: Path, path: Path) -> str:
    """``path`` as seen from ``root`` if it lies below."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _fingerprint(root: Path, **parts: list[data.Picture]) -> str:
    digest = hashlib.sha256()
    for part, pictures in parts.items():
        for picture in pictures:
            digest.update(f"{part}\t{name_in(root, picture.path)}\t{picture.label}\n".encode())
    return digest.hexdigest()


def preprocess_of(config: Config) -> data.Preprocess:
    """The preprocessing that training, evaluation, prediction and export share."""
    return data.Preprocess(size=config.image_size, resize=config.resize)


def augment_of(config: Config) -> data.Augment | None:
    """The augmentation of the training pictures, None without."""
    if not config.augment:
        return None
    return data.Augment(
        rotation=config.rotation,
        shift=config.shift,
        zoom=config.zoom,
        horizontal_flip=config.horizontal_flip,
        vertical_flip=config.vertical_flip,
        fill=config.fill,
    )


def split_pictures(found: data.PictureSet, config: Config) -> tuple[list[data.Picture], list[data.Picture]]:
    """The pictures to train and to validate on, by the run's settings."""
    train_part, val_part = data.split(found.pictures, config.val_split, config.seed, method=config.split)
    return (
        limited(train_part, config.limit_train, config.seed),
        limited(val_part, config.limit_val, config.seed),
    )


def limited(pictures: list[data.Picture], limit: int | None, seed: int) -> list[data.Picture]:
    """At most ``limit`` pictures, drawn by ``seed``, the classes in turn; in their old order."""
    if limit is None or limit >= len(pictures):
        return pictures
    by_class: dict[int, list[int]] = defaultdict(list)
    for index in random.Random(seed).sample(range(len(pictures)), len(pictures)):
        by_class[pictures[index].label].append(index)
    in_turn = (i for row in zip_longest(*by_class.values()) for i in row if i is not None)
    return [pictures[i] for i in sorted(islice(in_turn, limit))]


def picture_root(config: Config) -> Path:
    """The folder of the pictures; the built-in ones are drawn if they are not there yet."""
    return data.builtin(config.count) if config.data is None else Path(config.data)


def prepare_pictures(config: Config) -> Pictures:
    """Finds (or draws) the pictures, splits them, and decodes each once to see that it can be.

    Raises UserError if a class has no picture left to train on.
    """
    found = data.find(picture_root(config))
    train_part, val_part = split_pictures(found, config)
    preprocess = preprocess_of(config)

    def cache_bytes(part: list[data.Picture]) -> int | None:
        if config.cache_gb is None:
            return None
        return int(config.cache_gb * 2**30 * len(part) / (len(train_part) + len(val_part)))

    train_loader = data.Loader(
        train_part,
        preprocess,
        config.batch_size,
        augment=augment_of(config),
        shuffle=True,
        seed=config.seed,
        workers=config.workers,
        cache_bytes=cache_bytes(train_part),
    )
    val_loader = data.Loader(
        val_part,
        preprocess,
        config.batch_size,
        workers=config.workers,
        cache_bytes=cache_bytes(val_part),
    )
    for loader in (train_loader, val_loader):
        loader.scan(progress=True)
    fingerprint = _fingerprint(found.root, train=train_part, val=val_part)
    pictures = Pictures(found, train_loader, val_loader, config.data is None, fingerprint)
    _refuse_missing_classes(pictures)
    return pictures


def _refuse_missing_classes(pictures: Pictures) -> None:
    counts = Counter(picture.label for picture in pictures.train.pictures)
    missing = [name for i, name in enumerate(pictures.found.classes) if not counts[i]]
    hint = f" ({len(pictures.skipped)} were skipped)" if pictures.skipped else ""
    root = pictures.found.root
    if missing:
        raise UserError(f"no picture to train on is left of {', '.join(missing)} in {root}{hint}")
    if not pictures.val.pictures:
        raise UserError(f"no picture to validate on is left in {root}{hint}: raise --val-split")


def write_report(pictures: Pictures, folder: Path) -> None:
    """Writes data.json, split.csv and skipped.csv into ``folder``."""
    found = pictures.found
    parts = (("train", pictures.train), ("val", pictures.val))

    def counts(loader: data.Loader) -> dict[str, int]:
        counter = Counter(picture.label for picture in loader.pictures)
        return {name: counter[i] for i, name in enumerate(found.classes)}

    write_json(
        folder / "data.json",
        {
            "root": str(Path(found.root).resolve()),
            "layout": found.layout,
            "drawn": pictures.drawn,
            "classes": list(found.classes),
            "pictures": {name: counts(loader) for name, loader in parts},
            "skipped": len(pictures.skipped),
            "preprocess": pictures.train.preprocess.to_dict(),
            "fingerprint": pictures.fingerprint,
        },
    )
    write_csv(
        folder / "split.csv",
        ("file", "class", "set"),
        (
            (pictures.name(picture.path), found.classes[picture.label], name)
            for name, loader in parts
            for picture in loader.pictures
        ),
    )
    write_skipped(folder / "skipped.csv", pictures.skipped)


def write_skipped(path: Path, skipped: Iterable[data.Skipped]) -> None:
    """Writes the files that were not used, each with the reason."""
    write_csv(path, ("file", "reason"), ((str(each.path), each.reason) for each in skipped))
