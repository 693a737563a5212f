"""Where things run: the device, the threads, and what to note of the machine beside a result."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, get_args

import torch

import maskcore
from maskcore.errors import UserError
from maskcore.ops import Precision


def choose_device(name: str) -> torch.device:
    """The device of ``--device auto|cpu|cuda``.

    Raises UserError if a GPU is asked for that cannot be used.
    """
    if name == "cpu":
        return torch.device("cpu")
    state = str(maskcore.config()["CUDA"])
    usable = torch.cuda.is_available() and state == torch.cuda.get_device_name()
    if name == "cuda" and not usable:
        raise UserError(f"device cuda cannot be used: maskcore's CUDA kernels are {state}")
    return torch.device("cuda" if usable else "cpu")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every verb with a forward pass and no settings file."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="pictures at once (default: 32)"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads that compute (default: torch's choice)"
    )
    group.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="ieee",
        help="what the convolutions' products may round their operands to: ieee (default) nothing, bf16 bfloat16, "
        "which is faster on a processor with AVX-512 BF16; probabilities then differ in the third digit",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default) takes the GPU where there is one and maskcore was built for it",
    )


def use_flags(namespace: argparse.Namespace) -> torch.device:
    """Applies --threads and returns the device. Raises UserError where a value cannot be."""
    for name, highest in (("batch_size", 65536), ("threads", 1024)):
        value = getattr(namespace, name)
        if value is not None and not 1 <= value <= highest:
            raise UserError(f"{name.replace('_', '-')} must be 1 to {highest}, not {value}")
    if namespace.threads is not None:
        torch.set_num_threads(namespace.threads)
    return choose_device(namespace.device)


def describe() -> dict[str, Any]:
    """What the speed of a run, and the last bits of its results, depend on; JSON-able."""
    return {
        "system": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "maskcore": maskcore.config(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The revision of the checkout that maskcore is imported from, ``-dirty`` if changed."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(maskcore.__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
