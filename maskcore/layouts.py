"""The pictures of a folder: which files are pictures of which class, in three layouts; and their split.

What the layouts are and what is skipped is told at the top of ``maskcore.data``.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from maskcore import philox
from maskcore.errors import UserError
from maskcore.image import printable

CLASSES = ("nobody", "everybody", "not all")
"""The competition's classes by code: 0 nobody wears a mask, 1 everybody does, 2 not all do."""

KNOWN_NAMES = {
    **dict.fromkeys(("0", "nobody", "no_one", "none"), 0),
    **dict.fromkeys(("1", "everybody", "everyone", "all"), 1),
    **dict.fromkeys(("2", "not_all", "not_everybody", "not_everyone", "some"), 2),
}
"""Class names that mean a class of the competition; case, spaces and hyphens do not matter."""

LABELS_OF_FOLDER = {"training": "train_gt.json", "test": "test_gt.json"}
CSV_HEADERS = (("file", "label"), ("id", "category"))


@dataclass(frozen=True)
class Picture:
    """A file and its class code."""

    path: Path
    label: int


@dataclass(frozen=True)
class Skipped:
    """A file (or an entry of a label file) that is not used, and why; the reason reads on from the path."""

    path: Path
    reason: str


@dataclass
class PictureSet:
    """What ``find`` found: pictures sorted by path, and everything that is not used, with reasons."""

    root: Path
    layout: Literal["json", "folders", "csv"]
    classes: tuple[str, ...]
    pictures: list[Picture]
    skipped: list[Skipped]


def find(root: str | Path) -> PictureSet:
    """The pictures of a data folder, in whichever of the three layouts it has; decodes nothing.

    Raises:
        UserError: No such folder, no layout fits, or the label file cannot be read at all.
    """
    root = Path(root)
    if not root.is_dir():
        problem = "is a file; name the folder it lies in" if root.exists() else "does not exist"
        raise UserError(f"the data folder {root} {problem}")
    for look in (_find_json, _find_csv, _find_folders):
        found = look(root)
        if found is not None:
            return found
    raise UserError(
        f"{root} has no pictures in a layout I know: images with a train_gt.json, a CSV with the header "
        f"file,label, or one folder per class{_hint(root)}"
    )


def _hint(root: Path) -> str:
    """Names a folder one step down that would do: archives often unpack into one of their own."""
    for folder in islice(_subfolders(root), 100):
        try:
            if any(look(folder) for look in (_find_json, _find_csv, _find_folders)):
                return f" (did you mean {folder}?)"
        except UserError:
            continue
    return ""


def _find_json(root: Path) -> PictureSet | None:
    places = [(root / "train_gt.json", root / "training"), (root / "train_gt.json", root)]
    places += [(root / "training" / "train_gt.json", root / "training")]
    itself = root.resolve()  # the name of "." too
    if itself.name in LABELS_OF_FOLDER:
        places.append((itself.parent / LABELS_OF_FOLDER[itself.name], root))
    for label_file, images in places:
        if label_file.is_file() and images.is_dir():
            rows = [_json_row(name, value) for name, value in _json_entries(label_file)]
            return _labelled(root, "json", CLASSES, images, label_file, rows)
    return None


def _json_entries(label_file: Path) -> list[tuple[str, object]]:
    """The name-value pairs of a label file, duplicates and all."""
    try:
        # Objects become tuples of pairs, so that duplicates are seen; arrays stay lists.
        pairs = json.loads(label_file.read_bytes(), object_pairs_hook=tuple)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{label_file} cannot be read as JSON: {printable(str(error))}") from None
    if not isinstance(pairs, tuple):
        raise UserError(f'{label_file} must be one JSON object, {{"10891.jpg": 0, ...}}')
    return list(pairs)


@dataclass(frozen=True)
class _Row:
    """An entry of a label file; ``label`` is a class code or the reason why it has none."""

    name: str
    label: int | str


def _json_row(name: str, value: object) -> _Row:
    if type(value) is not int:
        shown = "a list or object" if isinstance(value, (list, tuple)) else printable(repr(value))
        return _Row(name, f"has the label {shown}, which is no class code")
    return _Row(name, _code_or_reason(value))


def _code_or_reason(code: int) -> int | str:
    if 0 <= code < len(CLASSES):
        return code
    return f"has the label {printable(str(code))}, but class codes go from 0 to {len(CLASSES) - 1}"


def _find_csv(root: Path) -> PictureSet | None:
    tables = [path for path in sorted(root.glob("*.csv")) if path.is_file() and _csv_columns(path)]
    if not tables:
        return None
    if len(tables) > 1:
        tables = [path for path in tables if path.name == "labels.csv"] or tables
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"{root} has several tables of labels ({names}): name the one to use labels.csv")
    classes, rows, skipped = _csv_rows(tables[0])
    found = _labelled(root, "csv", classes, root, tables[0], rows, folders_allowed=True)
    found.skipped += skipped
    return found


def _csv_columns(path: Path) -> tuple[int, int] | None:
    """Where the file names and the labels stand, None if the table is not one of labels."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = [cell.strip().casefold() for cell in next(csv.reader(file), [])]
    except (OSError, ValueError, csv.Error):
        return None
    for names in CSV_HEADERS:
        if all(header.count(name) == 1 for name in names):
            return header.index(names[0]), header.index(names[1])
    return None


def _csv_rows(path: Path) -> tuple[tuple[str, ...], list[_Row], list[Skipped]]:
    columns = _csv_columns(path)
    assert columns is not None
    entries: list[tuple[str, str]] = []
    skipped = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            next(reader)
            for cells in reader:
                if len(cells) > max(columns):
                    entries.append((cells[columns[0]].strip(), cells[columns[1]].strip()))
                elif cells:
                    skipped.append(Skipped(path, f"line {reader.line_num} has no label"))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {printable(str(error))}") from None
    numbers = sum(re.fullmatch("[0-9]+", label) is not None for _, label in entries)
    if 2 * numbers >= len(entries):
        return CLASSES, [_Row(name, _csv_code(label)) for name, label in entries], skipped
    classes, codes = _class_codes({label for _, label in entries if label})
    rows = [_Row(name, codes[label] if label else "has no label") for name, label in entries]
    return classes, rows, skipped


def _csv_code(label: str) -> int | str:
    if re.fullmatch("[0-9]{1,9}", label):
        return _code_or_reason(int(label))
    return f"has the label {printable(label) or '(nothing)'}, which is no class code"


def _class_codes(names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes and each name's code: the competition's if every name is known, else sorted."""
    ordered = sorted(names)
    known = {name: KNOWN_NAMES.get(re.sub(r"[\s\-]+", "_", name.casefold())) for name in ordered}
    codes = {name: code for name, code in known.items() if code is not None}
    if len(codes) == len(ordered) == len(set(codes.values())):
        return CLASSES, codes
    return tuple(ordered), {name: code for code, name in enumerate(ordered)}


def _find_folders(root: Path) -> PictureSet | None:
    folders = [folder for folder in _subfolders(root) if folder.name not in ("test", "__MACOSX")]
    classes, codes = _class_codes(folder.name for folder in folders)
    files = _Files(root)
    if (len(folders) < 2 and classes != CLASSES) or not any(map(files.any_file, folders)):
        return None
    found = PictureSet(root, "folders", classes, [], [])
    for folder in folders:
        problem = files.problem(folder, folder_wanted=True)
        if problem is not None:
            raise UserError(f"the class folder {printable(str(folder))} {problem}")
        for path in files.paths(folder):
            problem = files.problem(path)
            if problem is None:
                found.pictures.append(Picture(path, codes[folder.name]))
            else:
                found.skipped.append(Skipped(_printable_path(path), problem))
    for path in files.paths(root):
        if not path.is_dir() or path.name == "__MACOSX" or path.name.startswith("."):
            found.skipped.append(Skipped(_printable_path(path), "is in no class folder"))
    return found


def _subfolders(root: Path) -> Iterator[Path]:
    for path in _Files(root).paths(root):
        if path.is_dir() and not path.name.startswith("."):
            yield path


class _Files:
    """What lies below a root; each folder is read once."""

    def __init__(self, root: Path):
        self.root = root
        self._real_root = root.resolve()
        self._folders: dict[Path, dict[str, os.DirEntry[str]]] = {}

    def paths(self, folder: Path) -> list[Path]:
        """Everything in a folder, sorted by name."""
        return [folder / name for name in sorted(self._entries(folder))]

    def any_file(self, folder: Path) -> bool:
        return any(entry.is_file() for entry in self._entries(folder).values())

    def problem(self, path: Path, folder_wanted: bool = False) -> str | None:
        """Why ``path`` cannot be used, None if it can (as far as one sees without reading it)."""
        entry = self._entries(path.parent).get(path.name)
        if entry is None:
            return "is missing"
        unsafe = _unsafe_name(path.name)
        if unsafe is not None:
            return unsafe
        try:
            if entry.is_symlink() and not path.resolve().is_relative_to(self._real_root):
                return f"is a link that leaves {self.root}"
            if entry.is_dir() != folder_wanted:
                return "is a folder" if not folder_wanted else "is not a folder"
            if not folder_wanted and not entry.is_file():
                return "is a link to nothing" if entry.is_symlink() else "is not a regular file"
        except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
            return "is a link that cannot be followed"
        return None

    def inside(self, folder: Path) -> bool:
        """Whether a folder named by a label file exists and lies below the root, links followed."""
        try:
            return folder.is_dir() and folder.resolve().is_relative_to(self._real_root)
        except (OSError, RuntimeError, ValueError):
            return False

    def _entries(self, folder: Path) -> dict[str, os.DirEntry[str]]:
        if folder not in self._folders:
            try:
                with os.scandir(folder) as entries:
                    self._folders[folder] = {entry.name: entry for entry in entries}
            except OSError as error:
                raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from None
        return self._folders[folder]


def _labelled(
    root: Path,
    layout: Literal["json", "csv"],
    classes: tuple[str, ...],
    base: Path,
    label_file: Path,
    rows: Sequence[_Row],
    folders_allowed: bool = False,
) -> PictureSet:
    """The pictures that a label file names, checked against what lies in ``base``."""
    found = PictureSet(root, layout, classes, [], [])
    files = _Files(root)
    by_name: dict[str, list[_Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    named: set[Path] = set()
    folders = {base}
    for name, same in by_name.items():
        problem = _unsafe_key(name, folders_allowed)
        if problem is not None:
            found.skipped += [Skipped(Path(printable(name)), problem)] * len(same)
            continue
        path = base / name
        if not files.inside(path.parent):
            found.skipped += [Skipped(path, "lies in a folder that is missing or outside")] * len(same)
            continue
        named.add(path)
        folders.add(path.parent)
        picture, reasons = _one_picture(path, same, label_file.name, files)
        found.pictures += [picture] if picture else []
        found.skipped += [Skipped(path, reason) for reason in reasons]
    found.pictures.sort(key=lambda picture: picture.path.as_posix())
    found.skipped += _unlabelled(folders, named, label_file, files)
    return found


def _one_picture(
    path: Path, rows: Sequence[_Row], source: str, files: _Files
) -> tuple[Picture | None, list[str]]:
    """The picture of the rows that name one file, and a reason for each row that does not count."""
    if len({row.label for row in rows}) > 1:
        return None, [f"is listed {len(rows)} times in {source}, with different labels"] * len(rows)
    extra = [f"is listed more than once in {source}; the first entry counts"] * (len(rows) - 1)
    label = rows[0].label
    problem = label if isinstance(label, str) else files.problem(path)
    if isinstance(label, str) or problem is not None:
        return None, [str(problem), *extra]
    return Picture(path, label), extra


def _unlabelled(folders: Iterable[Path], named: set[Path], label_file: Path, files: _Files) -> list[Skipped]:
    skipped = []
    for folder in sorted(folders):
        for path in files.paths(folder):
            expected = path == label_file or path in named or path in folders or path.name == "test"
            if not expected:
                what = "is a folder" if path.is_dir() else f"has no label in {label_file.name}"
                skipped.append(Skipped(_printable_path(path), what))
    return skipped


def _unsafe_key(key: str, folders_allowed: bool) -> str | None:
    """Why a file name from a label file is not to be joined to a folder, None if it may be."""
    parts = key.split("/")
    if "\\" in key or (len(parts) > 1 and not folders_allowed):
        return "is refused: a file name must have no folder"
    if any(part in ("", ".", "..") for part in parts):
        return "is refused: a file name must lie below the data folder"
    return next(filter(None, map(_unsafe_name, parts)), None)


def _unsafe_name(name: str) -> str | None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is refused: its name is not valid UTF-8"
    if not name.isprintable():
        return "is refused: its name has control characters"
    return None


def _printable_path(path: Path) -> Path:
    return path.with_name(printable(path.name, 255)) if _unsafe_name(path.name) else path


# ---- training and validation part


def require_every_class(pictures: Iterable[Picture], classes: Sequence[str], at_least: int = 1) -> None:
    """UserError if a class has fewer than ``at_least`` pictures."""
    counts = [0] * len(classes)
    for picture in pictures:
        counts[picture.label] += 1
    short = [name for name, count in zip(classes, counts, strict=True) if count < at_least]
    if short:
        fewest = "no picture" if at_least == 1 else f"fewer than {at_least} pictures"
        raise UserError(f"{fewest} can be used of class {', '.join(short)}")


def split(
    pictures: Sequence[Picture],
    val_split: float,
    seed: int,
    method: Literal["stratified", "keras"] = "stratified",
) -> tuple[list[Picture], list[Picture]]:
    """Divides pictures into a training and a validation part, each class for itself.

    Args:
        pictures: In any order; both parts keep it.
        val_split: Share of each class that goes to validation, rounded, at least one picture and not
            all. 0: everything is for training.
        seed: Decides which, for "stratified".
        method: "stratified" draws; "keras" takes the first share of the files sorted by name (rounded
            down), as ``ImageDataGenerator(validation_split=...)`` does.

    Raises:
        UserError: A class has fewer than two pictures, or a value makes no sense.
    """
    if not 0 <= val_split < 1:
        raise UserError(f"the validation share must be at least 0 and below 1, not {val_split}")
    if method not in ("stratified", "keras"):
        raise UserError(f"the split must be stratified or keras, not {method!r}")
    if val_split == 0:
        return list(pictures), []
    held: set[int] = set()
    for label in sorted({picture.label for picture in pictures}):
        mine = [i for i, picture in enumerate(pictures) if picture.label == label]
        mine.sort(key=lambda i: (pictures[i].path.name, pictures[i].path.as_posix()))
        if len(mine) < 2:
            raise UserError(
                f"class {label} has only one picture ({pictures[mine[0]].path}), "
                f"too few for training and validation"
            )
        share = val_split * len(mine)
        count = min(max(1, round(share) if method == "stratified" else int(share)), len(mine) - 1)
        if method == "stratified":
            mine = [mine[i] for i in philox.permutation(philox.SPLIT, seed, 0, label, len(mine))]
        held.update(mine[:count])
    train = [picture for i, picture in enumerate(pictures) if i not in held]
    return train, [pictures[i] for i in sorted(held)]
