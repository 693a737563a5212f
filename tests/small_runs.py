"""Tiny picture sets and runs for the tests of training and of the verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from maskcore import train

#: The smallest run: one thread, 32x32 pixels, no drawing of events.
SMALL = ["--model", "baseline", "--image-size", "32", "--threads", "1", "--no-tensorboard"]

#: Columns of log.csv that differ between two runs of the same bits.
TIMES = ("images_per_second", "train_seconds", "val_seconds", "wait_seconds", "wait_share")


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """``count`` pictures in the competition's layout; the class is which colour the middle has."""
    random = np.random.default_rng(seed)
    (folder / "training").mkdir(parents=True)
    labels = {}
    for i in range(count):
        pixels = random.integers(0, 120, (40, 52, 3), dtype=np.uint8)
        pixels[10:30, 12:40, i % 3] += 120
        name = f"{10001 + i}.jpg"
        Image.fromarray(pixels).save(folder / "training" / name, quality=90)
        labels[name] = i % 3
    (folder / "train_gt.json").write_text(json.dumps(labels))
    return folder


def run(*arguments: object) -> int:
    """``maskcore train`` in this process; the exit status."""
    return train.main([str(argument) for argument in arguments])


def small(pictures: Path, out: Path, *more: object) -> list[str]:
    """The arguments of a new small run."""
    return [str(a) for a in (*SMALL, "--data", pictures, "--out", out, *more)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a checkpoint file (what safe_open gives are views of the file)."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def description(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint file."""
    with safe_open(path, framework="pt") as file:
        result: dict[str, Any] = json.loads(file.metadata()["maskcore"])
        return result


def result_of(folder: Path) -> dict[str, Any]:
    """Everything that a run must reproduce to the bit: tensors as bytes, history without times."""
    result: dict[str, Any] = {}
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        for name, tensor in tensors(path).items():
            result[f"{path.name}:{name}"] = tensor.numpy().tobytes()
        header = description(path)
        state = header["state"]
        for record in state["history"]:
            for column in TIMES:
                del record[column]
        result[f"{path.name}:state"] = {k: v for k, v in state.items() if "seconds" not in k}
        result[f"{path.name}:optimizer"] = header["optimizer"]
    return result
