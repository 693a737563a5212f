"""The settings of a training run: one dataclass that is the flags, the TOML keys and config.json.

Where a setting is given more than once, a flag wins over the TOML file, that over what ``--quick``
chooses, and that over the default.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from maskcore.commandline import Parser
from maskcore.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUICK: dict[str, Any] = {
    "model": "baseline",
    "image_size": 128,
    "epochs": 36,
    "count": 2000,
    "lr": 3e-4,
    "rotation": 5.0,
    "shift": 5.0,
    "zoom": 0.1,
    "vertical_flip": False,
    "no_augment_epochs": 12,
}
"""What ``--quick`` chooses where neither a flag nor the TOML file does."""


def _setting(
    default: Any,
    text: str,
    group: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    metavar: str | None = None,
    resumable: bool = False,
) -> Any:
    """A Config field. ``resumable``: a resumed run may be given another value."""
    return field(
        default=default,
        metadata={
            "text": text,
            "group": group,
            "low": low,
            "high": high,
            "metavar": metavar,
            "resumable": resumable,
        },
    )


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the help text of each is its documentation."""

    data: str | None = _setting(
        None,
        "pictures to train on, found by looking: images beside a train_gt.json, one folder per "
        "class, or a CSV with file,label. Without it the built-in pictures are drawn once into "
        "a cache folder and trained on",
        "data",
        metavar="DIR",
        resumable=True,
    )
    count: int = _setting(4000, "built-in pictures to draw (without --data)", "data", low=10, high=1_000_000)
    val_split: float = _setting(
        0.2, "share of the pictures held out for validation, 0 to 1", "data", low=0.001, high=0.95
    )
    split: Literal["stratified", "keras"] = _setting(
        "stratified",
        "stratified: drawn per class by --seed; keras: the first pictures by name, as Keras' "
        "validation_split takes them",
        "data",
    )
    limit_train: int | None = _setting(
        None, "train on at most N pictures, evenly from the classes", "data", low=1, metavar="N"
    )
    limit_val: int | None = _setting(
        None, "validate on at most N pictures, evenly from the classes", "data", low=1, metavar="N"
    )
    image_size: int = _setting(256, "side of the network's square input, pixels", "data", low=16, high=4096)
    resize: Literal["nearest", "bilinear", "letterbox"] = _setting(
        "nearest",
        "how a picture becomes square: nearest stretches as Keras' loader did, bilinear stretches with "
        "antialiasing, letterbox keeps the aspect and pads",
        "data",
    )
    workers: int | None = _setting(
        None,
        "threads that decode and augment (default: chosen by the machine); any number gives the same batches",
        "data",
        low=0,
        high=256,
        metavar="N",
        resumable=True,
    )
    cache_gb: float | None = _setting(
        None,
        "memory for decoded pictures, GiB (default: a part of what is free); what does not fit "
        "is decoded again each epoch",
        "data",
        low=0,
        high=1e5,
        metavar="GB",
        resumable=True,
    )

    augment: bool = _setting(
        True, "augment the training pictures; validation is never augmented", "augmentation"
    )
    rotation: float = _setting(10.0, "largest rotation either way, degrees", "augmentation", low=0, high=180)
    shift: float = _setting(
        10.0,
        "largest shift either way, pixels of the network's input, or below 1 a share of its side",
        "augmentation",
        low=0,
    )
    zoom: float = _setting(0.3, "zoom each axis by 1-zoom to 1+zoom", "augmentation", low=0, high=0.95)
    horizontal_flip: bool = _setting(True, "mirror every second picture", "augmentation")
    vertical_flip: bool = _setting(True, "turn every second picture upside down", "augmentation")
    fill: int = _setting(0, "grey level outside the moved picture, 0 to 255", "augmentation", low=0, high=255)
    no_augment_epochs: int = _setting(
        0, "train the first N epochs without augmentation", "augmentation", low=0, metavar="N"
    )

    model: Literal["final", "baseline"] = _setting(
        "final",
        "final: 13 convolutions with batch normalisation, 13.3 million parameters; baseline: 5 "
        "convolutions, 4.3 million",
        "network and optimiser",
    )
    epochs: int = _setting(
        100, "passes over the training pictures", "network and optimiser", low=1, resumable=True
    )
    batch_size: int = _setting(8, "pictures a step", "network and optimiser", low=1, high=65536)
    lr: float = _setting(1e-4, "Adam's learning rate", "network and optimiser", low=0)
    l2: float = _setting(
        1e-4,
        "L2 in the loss: this times the sum of squares of the last convolution's and the dense "
        "layer's weights (Keras' l2(), not decoupled decay)",
        "network and optimiser",
        low=0,
    )
    precision: Literal["ieee", "tf32", "bf16"] = _setting(
        "ieee",
        "what the convolutions' products may round their operands to: ieee nothing (float32), tf32 what a GPU's "
        "TensorFloat-32 keeps, bf16 bfloat16, which processors with AVX-512 BF16 multiply twice as fast; a "
        "processor that is not faster for it computes more precisely",
        "network and optimiser",
    )
    seed: int = _setting(
        0,
        "fixes the split, the initial weights, the order, the augmentation and dropout",
        "network and optimiser",
        low=0,
        high=2**63 - 1,
    )
    patience: int = _setting(
        0,
        "stop when the validation loss (with its penalty, as Keras has it) has not improved for "
        "N epochs; 0 never stops early",
        "network and optimiser",
        low=0,
        metavar="N",
        resumable=True,
    )

    out: str | None = _setting(
        None,
        "the run's folder; one that exists is refused (default: runs/MODEL or "
        "runs/quick, with -2 and so on behind it if there is one)",
        "output",
        metavar="DIR",
    )
    keep_best: int = _setting(
        10,
        "keep the weights of the K epochs with the best validation accuracy (53 MB each for final)",
        "output",
        low=1,
        high=1000,
        metavar="K",
        resumable=True,
    )
    save_minutes: float = _setting(
        10.0,
        "also save within an epoch when this much time has passed, minutes; 0 saves only at the "
        "end of an epoch, on Ctrl-C and on SIGTERM",
        "output",
        low=0,
        metavar="MIN",
        resumable=True,
    )
    tensorboard: bool = _setting(
        True, "write TensorBoard events, if tensorboard is installed", "output", resumable=True
    )

    threads: int | None = _setting(
        None,
        "threads that compute (default: torch's choice)",
        "machine",
        low=1,
        high=1024,
        metavar="N",
        resumable=True,
    )
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto",
        "auto takes the GPU where there is one and maskcore was built for it",
        "machine",
        resumable=True,
    )
    quick: bool = _setting(
        False,
        "a try of about five minutes on two cores: "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in QUICK.items()),
        "start here",
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check(spec, getattr(self, spec.name))
        # What follows concerns values that no range of one field can express.
        if self.lr == 0:
            raise UserError("lr is 0, with which nothing is learned")
        if self.data == "":
            raise UserError("data is an empty name: give a folder, or leave it out")

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Config:
        """A Config of ``values``, refusing unknown names; ``source`` names them in errors."""
        return cls(**checked_names(values, source))


EXAMPLES = """\
examples:
  maskcore train --quick                     see it learn, on pictures it draws itself
  maskcore train                             the real thing, on drawn pictures
  maskcore train --data MaskDataset          ... on your own pictures
  maskcore train --config run.toml --lr 5e-5 settings from a file, one of them changed
  maskcore train --resume runs/final         go on where a run was stopped
  maskcore train --resume runs/final --epochs 150

A TOML file has the same names without the dashes in front, as in
  data = "MaskDataset"
  batch-size = 16
  horizontal-flip = false
Precedence: flags, then the TOML file, then --quick, then the defaults.
Ctrl-C finishes the step, saves and says how to go on; a second one stops at once.
"""


def parser() -> Parser:
    """The parser of ``maskcore train``; only what was given is set on its namespace."""
    result = Parser(
        "train",
        "Trains a network that tells whether everybody, nobody or not everybody in a picture "
        "wears a mask.\nEverything a run writes is in one folder: settings, log.csv, curves.png, "
        "checkpoints, data report.",
        EXAMPLES,
        usage="maskcore train [--quick] [--data DIR] [options]",
    )
    groups: dict[str, Any] = {}
    for name in ("start here", "data", "augmentation", "network and optimiser", "output"):
        groups[name] = result.add_argument_group(name)
    groups["machine"] = result.add_argument_group("machine")
    for spec in fields(Config):
        _add_flag(groups[spec.metadata["group"]], spec)
    groups["start here"].add_argument(
        "--config", metavar="FILE.toml", default=argparse.SUPPRESS, help="read settings from a file"
    )
    groups["start here"].add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const="",
        default=argparse.SUPPRESS,
        help="go on with a stopped run (default: the newest under runs/); settings are the run's "
        "own, and these may be changed: "
        + ", ".join(_flag(s) for s in fields(Config) if s.metadata["resumable"]),
    )
    return result


def given_settings(namespace: argparse.Namespace) -> dict[str, Any]:
    """What flags and TOML file set explicitly, flags over file; ranges are not checked here."""
    flags = {key: value for key, value in vars(namespace).items() if key in _names()}
    file = getattr(namespace, "config", None)
    return {**(read_toml(Path(file)) if file is not None else {}), **flags}


def new_config(given: Mapping[str, Any]) -> Config:
    """The settings of a new run: ``given`` over --quick's over the defaults."""
    quick = QUICK if given.get("quick") else {}
    return Config.from_dict({**quick, **given}, "the settings")


def resumed_config(saved: Config, given: Mapping[str, Any]) -> Config:
    """The settings of a resumed run: the saved ones with the given ones that may change.

    Raises UserError if another setting would differ from the run's own.
    """
    values = saved.to_dict()
    for spec in fields(Config):
        if spec.name not in given or given[spec.name] == values[spec.name]:
            continue
        if not spec.metadata["resumable"]:
            raise UserError(
                f"a resumed run keeps its {_flag(spec)}, here {values[spec.name]}: start a new run "
                f"to use {given[spec.name]}"
            )
        values[spec.name] = given[spec.name]
    return Config.from_dict(values, "the settings")


def quick_changes(given: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting that --quick changes in a run with the ``given`` settings."""
    defaults = Config().to_dict()
    return [
        f"{name.replace('_', ' ')} {value} instead of {defaults[name]}"
        for name, value in QUICK.items()
        if name not in given and value != defaults[name]
    ]


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, by field name (``batch-size`` and ``batch_size`` both fit)."""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read the settings in {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from None
    return checked_names({key.replace("-", "_"): value for key, value in values.items()}, str(path))


def checked_names(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``values`` with integers made floats where a float is meant; UserError at unknown names."""
    for name in values:
        if name not in _names():
            close = difflib.get_close_matches(name, _names(), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{source} has a setting {name!r} that does not exist{hint}")
    return {
        spec.name: _as_declared(spec, values[spec.name]) for spec in fields(Config) if spec.name in values
    }


def _names() -> list[str]:
    return [spec.name for spec in fields(Config)]


def _flag(spec: Field[Any]) -> str:
    return "--" + spec.name.replace("_", "-")


def _choices(spec: Field[Any]) -> tuple[str, ...]:
    """The values of a field that is declared as a Literal; none for others."""
    hint = typing.get_type_hints(Config)[spec.name]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _kinds(spec: Field[Any]) -> tuple[type, bool]:
    """The type of a field, and whether None is allowed too."""
    hint = typing.get_type_hints(Config)[spec.name]
    if _choices(spec):
        return str, False
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def _as_declared(spec: Field[Any], value: Any) -> Any:
    kind, _ = _kinds(spec)
    if kind is float and type(value) is int:
        return float(value)
    return value


def _check(spec: Field[Any], value: Any) -> None:
    kind, optional = _kinds(spec)
    flag = spec.name.replace("_", "-")
    if value is None and optional:
        return
    if type(value) is not kind:
        expected = {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind]
        raise UserError(f"{flag} must be {expected}, not {value!r}")
    if kind is str:
        choices = _choices(spec)
        if choices and value not in choices:
            raise UserError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
        if "\0" in str(value):  # a TOML file can have one
            raise UserError(f"{flag} must not have a NUL character, is {value!r}")
        return
    number: Any = value
    low, high = spec.metadata["low"], spec.metadata["high"]
    if not (math.isfinite(number) and low <= number <= high):
        raise UserError(f"{flag} must be {' and '.join(_bounds(low, high))}, not {value}")


def _bounds(low: float, high: float) -> Iterator[str]:
    if math.isinf(low) and math.isinf(high):
        yield "finite"
    if math.isfinite(low):
        yield f"at least {low:g}" if low < 1e6 else f"at least {low}"
    if math.isfinite(high):
        yield f"at most {high:g}" if high < 1e6 else f"at most {high}"


def _add_flag(group: Any, spec: Field[Any]) -> None:
    kind, _ = _kinds(spec)
    text, default = spec.metadata["text"], spec.default
    if default is not None and not (kind is bool and not default):
        shown = default if kind is not bool else "yes" if default else "no"
        text = f"{text} (default: {shown})"
    text = text.replace("%", "%%")
    if kind is bool:
        group.add_argument(
            _flag(spec), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    group.add_argument(
        _flag(spec),
        type=kind,
        choices=_choices(spec) or None,
        metavar=spec.metadata["metavar"] or (None if _choices(spec) else "N" if kind is int else "X"),
        default=argparse.SUPPRESS,
        help=text,
    )
