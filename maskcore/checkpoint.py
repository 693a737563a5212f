"""Checkpoints: one safetensors file each, written so that a kill at any moment loses nothing.

A file holds tensors named ``network.NAME`` (state dict), and in a training checkpoint also
``optimizer.KEY.NAME`` (Adam's moments by parameter name) and ``rng.cpu``/``rng.cuda`` (torch's
generator state). Everything else is one JSON text under ``maskcore`` in the safetensors metadata,
so a checkpoint cannot be half new and half old. Nothing is ever pickled.

Writing goes to a hidden file in the same folder, is synced, renamed over the old file, and the
folder is synced: before the rename the old checkpoint is whole, after it the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy
import PIL
import safetensors
import torch
from safetensors.torch import save_file

from maskcore import models
from maskcore.data import Preprocess
from maskcore.errors import UserError

SCHEMA = 1
FOLDER = "checkpoints"
LAST = "last.safetensors"

# A checkpoint that claims more than this is refused before anything is allocated for it.
MAX_IMAGE_SIZE = 4096
MAX_CLASSES = 100_000
MAX_HEADER = 64 * 2**20  # bytes of JSON


@dataclass
class State:
    """Where a run stands. ``sums`` are over the samples of the current epoch's trained batches."""

    epoch: int = 1  # the epoch being trained, from 1
    batch: int = 0  # batches of it that are done
    cross_entropy_sum: float = 0.0
    correct: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    penalty_at_start: float = 0.0  # of this epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # one record a finished epoch
    best_confusion: list[list[int]] = field(default_factory=list)  # [true][predicted], best epoch

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> State:
        names = {spec.name for spec in fields(cls)}
        if set(values) != names:
            raise ValueError(f"state has {sorted(set(values) ^ names)} too few or too many")
        return cls(**values)


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself beside its tensors."""

    network: dict[str, Any]  # name, num_classes, image_size
    preprocess: Preprocess
    classes: tuple[str, ...]
    config: dict[str, Any]  # the run's settings
    data: dict[str, Any]  # root, drawn, fingerprint of the split
    state: State
    versions: dict[str, str]
    optimizer: dict[str, dict[str, float]] = field(default_factory=dict)  # numbers per parameter
    digests: dict[str, str] = field(default_factory=dict)  # sha256 per part

    @property
    def training(self) -> bool:
        """Whether the file also has what resuming needs."""
        return "rng" in self.digests


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from maskcore import __version__

    return {
        "maskcore": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "safetensors": safetensors.__version__,
    }


# ---- writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what is written there then replaces it atomically.

    Raises UserError if the disk refuses, or if ``path`` is a folder or a device; it is then as it was.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {path}: what is there is no regular file")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        if os.name == "posix":  # a folder cannot be opened on Windows
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces the file at ``path`` by ``text`` (UTF-8, line ends as given), atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: str) -> None:
    """A safetensors file of contiguous CPU copies, with ``meta`` under ``maskcore``; atomic."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode  # save_file would leave a file that only its owner may read
        try:
            save_file(ready, temporary, metadata={"format": "pt", "maskcore": meta})
        except safetensors.SafetensorError as error:
            raise OSError(0, str(error)) from error
        temporary.chmod(usual)


def save_weights(path: Path, network: models.Network, meta: Meta) -> None:
    """Writes a checkpoint for inference: the network without optimizer and generator state."""
    _save(path, _part("network", network.state_dict()), meta, {})


def save_training(path: Path, network: models.Network, optimizer: torch.optim.Optimizer, meta: Meta) -> None:
    """Writes a checkpoint from which a run goes on with the same bits."""
    moments, numbers = _optimizer_by_name(network, optimizer)
    generators = {"cpu": torch.get_rng_state()}
    device = next(network.parameters()).device
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    tensors = _part("network", network.state_dict()) | _part("optimizer", moments) | _part("rng", generators)
    _save(path, tensors, meta, numbers)


def _save(
    path: Path,
    tensors: dict[str, torch.Tensor],
    meta: Meta,
    numbers: dict[str, dict[str, float]],
) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "schema": SCHEMA,
        "network": meta.network,
        "preprocess": meta.preprocess.to_dict(),
        "classes": list(meta.classes),
        "config": meta.config,
        "data": meta.data,
        "state": asdict(meta.state),
        "versions": versions(),
        "optimizer": numbers,
        "digests": {part: _digest(part, tensors) for part in sorted({n.split(".")[0] for n in tensors})},
    }
    write_tensors(path, tensors, json.dumps(header, allow_nan=False))


def _part(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def _digest(part: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes of the tensors of one part, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(part + "."):
            digest.update(name.encode())
            array: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
            digest.update(array)
    return digest.hexdigest()


def _parameter_names(network: torch.nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in network.named_parameters()}


def _optimizer_by_name(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """The optimizer's state as tensors named ``KEY.PARAMETER`` and numbers per parameter."""
    names = _parameter_names(network)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for parameter, entries in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}.{name}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


# ---- reading


def read_meta(path: Path) -> Meta:
    """The JSON part of a checkpoint, checked; the tensors are not read.

    Raises UserError if the file is not a checkpoint that this version can read.
    """
    with _opened(path) as file:
        return _meta(path, file)


def load_model(path: str | Path) -> tuple[models.Network, Meta]:
    """The network of a checkpoint on the CPU in eval mode, and what the file says about it.

    ``path`` is a checkpoint file or a run's folder (then its best checkpoint, see best_of).
    Raises UserError.
    """
    file_path = locate(path)
    with _opened(file_path) as file:
        meta = _meta(file_path, file)
        network = _network_for(file_path, file, meta)
        _load_network(file_path, file, meta, network)
    return network.eval(), meta


def load_training(
    path: Path,
    network: models.Network,
    optimizer: torch.optim.Optimizer,
) -> Meta:
    """Puts weights, optimizer and generator state back, bit for bit, and returns the rest.

    ``network`` and ``optimizer`` must be made as for a new run with the same settings.
    Raises UserError if the file is not a training checkpoint of that network.
    """
    with _opened(path) as file:
        meta = _meta(path, file)
        if not meta.training:
            raise UserError(f"{path} holds weights only: resume from the run's folder or its {LAST}")
        _load_network(path, file, meta, network)
        _load_optimizer(path, file, meta, network, optimizer)
        generators = _verified(path, file, meta, "rng")
    try:
        torch.set_rng_state(generators["rng.cpu"])
        device = next(network.parameters()).device
        if device.type == "cuda" and "rng.cuda" in generators:
            torch.cuda.set_rng_state(generators["rng.cuda"], device)
    except (KeyError, RuntimeError, TypeError):
        raise _refusal(path, "its generator state does not fit this torch") from None
    return meta


def locate(path: str | Path) -> Path:
    """The checkpoint file meant by ``path``: itself, or the best one of a run's folder."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"there is no checkpoint or run folder {path}")
    folder = path if (path / LAST).is_file() else path / FOLDER
    if not (folder / LAST).is_file():
        raise UserError(f"{path} is not a run's folder: it has no {FOLDER}/{LAST}")
    ranking = best_of(read_meta(folder / LAST).state.history)
    kept = (folder / epoch_file(int(record["epoch"])) for record in ranking)
    return next((file for file in kept if file.is_file()), folder / LAST)


def epoch_file(epoch: int) -> str:
    """The name of the checkpoint kept of a good epoch."""
    return f"epoch-{epoch:04d}.safetensors"


def best_of(history: list[dict[str, Any]], count: int | None = None) -> list[dict[str, Any]]:
    """The ``count`` best records: highest validation accuracy, then lowest loss, then first."""
    ranking = sorted(history, key=lambda r: (-r["val_accuracy"], r["val_loss"], r["epoch"]))
    return ranking[:count]


def _refusal(path: Path, why: str) -> UserError:
    return UserError(f"{path} cannot be used as a checkpoint: {why}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except safetensors.SafetensorError as error:
        raise _refusal(path, f"it is no whole safetensors file ({error})") from None
    except OSError as error:
        raise _refusal(path, str(error.strerror or error)) from None


def _meta(path: Path, file: Any) -> Meta:
    text = (file.metadata() or {}).get("maskcore")
    if text is None:
        raise _refusal(path, "it was not written by maskcore's training")
    if len(text) > MAX_HEADER:
        raise _refusal(path, "its description is absurdly long")
    try:
        header = json.loads(text)
        schema = header.pop("schema")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        raise _refusal(path, "its description is damaged") from None
    if schema != SCHEMA:
        raise _refusal(path, f"it has schema {schema!r:.40} and this version of maskcore reads {SCHEMA}")
    expected = {spec.name for spec in fields(Meta)}
    if set(header) != expected:
        raise _refusal(path, f"its description lacks or adds {sorted(set(header) ^ expected)}")
    try:
        return _checked(Meta(**header))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise _refusal(path, f"its description is damaged ({error})") from None


def _checked(raw: Meta) -> Meta:
    """``raw`` with its parts as objects; ValueError and the like where something is wrong."""
    network, classes = raw.network, raw.classes
    if set(network) != {"name", "num_classes", "image_size"} or network["name"] not in models.NAMES:
        raise ValueError("unknown network")
    for key, limit in (("num_classes", MAX_CLASSES), ("image_size", MAX_IMAGE_SIZE)):
        if type(network[key]) is not int or not 1 <= network[key] <= limit:
            raise ValueError(f"{key} out of range")
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("class names")
    if len(classes) != network["num_classes"]:
        raise ValueError("number of class names")
    preprocess = Preprocess.from_dict(raw.preprocess)  # type: ignore[arg-type]
    if preprocess.size != network["image_size"]:
        raise ValueError("picture size of preprocessing and network differ")
    state = State.from_dict(raw.state)  # type: ignore[arg-type]
    _check_state(state)
    for part in (raw.config, raw.data, raw.versions, raw.optimizer, raw.digests):
        if not isinstance(part, dict):
            raise TypeError("a table is missing")
    return Meta(
        network,
        preprocess,
        tuple(classes),
        raw.config,
        raw.data,
        state,
        raw.versions,
        raw.optimizer,
        raw.digests,
    )


def _check_state(state: State) -> None:
    for name in ("epoch", "batch", "correct", "samples"):
        if type(getattr(state, name)) is not int or getattr(state, name) < 0:
            raise ValueError(f"state.{name}")
    for name in ("cross_entropy_sum", "train_seconds", "wait_seconds", "penalty_at_start"):
        if not math.isfinite(getattr(state, name)):
            raise ValueError(f"state.{name}")
    for record in state.history:
        for key in ("epoch", "val_accuracy", "val_loss"):
            if not math.isfinite(record[key]):
                raise ValueError(f"history {key}")


def _network_for(path: Path, file: Any, meta: Meta) -> models.Network:
    """A new network for the file's tensors, after a look at their shapes."""
    name, classes, size = (meta.network[k] for k in ("name", "num_classes", "image_size"))
    with torch.device("meta"):
        _compare_shapes(path, file, models.create(name, classes, size))
    return models.create(name, classes, size)


def _compare_shapes(path: Path, file: Any, network: torch.nn.Module) -> None:
    expected = _part("network", network.state_dict())
    present = set(_names_of(file, "network"))
    if present != set(expected):
        name = min(present ^ set(expected))
        raise _refusal(path, f"{name} is {'unknown' if name in present else 'missing'} in this network")
    for name, tensor in expected.items():
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(tensor.shape):
            raise _refusal(path, f"{name} has shape {shape}, not {tuple(tensor.shape)}")


def _load_network(path: Path, file: Any, meta: Meta, network: torch.nn.Module) -> None:
    _compare_shapes(path, file, network)
    own = network.state_dict()
    tensors = _verified(path, file, meta, "network")
    for name, tensor in tensors.items():
        target = own[name.removeprefix("network.")]
        if tensor.dtype != target.dtype:
            raise _refusal(path, f"{name} is {tensor.dtype}, not {target.dtype}")
        target.copy_(tensor)


def _load_optimizer(
    path: Path,
    file: Any,
    meta: Meta,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = _verified(path, file, meta, "optimizer")
    parameters = dict(network.named_parameters())
    entries: dict[str, dict[str, Any]] = {name: dict(n) for name, n in meta.optimizer.items()}
    for full_name, tensor in tensors.items():
        _, key, name = full_name.split(".", 2)
        if name not in parameters or tensor.shape != parameters[name].shape:
            raise _refusal(path, f"{full_name} fits no parameter")
        # Laid out in memory as the parameter is: the update walks both in step.
        entries.setdefault(name, {})[key] = torch.empty_like(parameters[name]).copy_(tensor)
    names = _parameter_names(network)
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if not set(entries) <= set(order):
        raise _refusal(path, "it has optimizer state of unknown parameters")
    optimizer.load_state_dict(
        {
            "state": {i: entries[name] for i, name in enumerate(order) if name in entries},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _names_of(file: Any, part: str) -> list[str]:
    names: list[str] = list(file.keys())
    return [name for name in names if name.startswith(part + ".")]


def _verified(path: Path, file: Any, meta: Meta, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, their SHA-256 compared with the one noted while saving."""
    tensors = {name: file.get_tensor(name) for name in _names_of(file, part)}
    if tensors and _digest(part, tensors) != meta.digests.get(part):
        raise _refusal(path, f"the bytes of its {part} have changed since they were written")
    return tensors
