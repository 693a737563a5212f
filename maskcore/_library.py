"""Finds and loads the kernels: one shared object per instruction set, the best that runs here."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

try:
    from maskcore import _native
except ImportError as error:
    raise ImportError(
        f"maskcore in {Path(__file__).parent} has no kernels for Python {sys.version_info[0]}.{sys.version_info[1]}: "
        "run `pip install .` in its source folder"
    ) from error

#: Best first. setup.py builds one ``_kernels_<name>`` object for each that the compiler knows.
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")


def _built() -> dict[str, Path]:
    found = {path.name.split(".")[0]: path for path in Path(__file__).parent.glob("_kernels_*.so")}
    return {name: found[f"_kernels_{name}"] for name in INSTRUCTION_SETS if f"_kernels_{name}" in found}


def available() -> list[str]:
    """Instruction sets that were built and that this processor runs, best first."""
    supported = _native.supported_isa()
    return [name for name in _built() if name in supported]


def _choose() -> str:
    usable = available()
    wanted = os.environ.get("MASKCORE_ISA")
    if wanted:
        if wanted not in usable:
            raise ImportError(
                f"MASKCORE_ISA={wanted} cannot be used: this machine and build have {', '.join(usable)}"
            )
        return wanted
    if not usable:
        raise ImportError(
            "no kernels were built for this processor: run `pip install .` in maskcore's source folder"
        )
    return usable[0]


@functools.cache
def load() -> str:
    """Loads the kernels once and returns the instruction set they were compiled for."""
    isa = _choose()
    algorithm = os.environ.get("MASKCORE_CONV") or "winograd"
    if algorithm not in ("direct", "winograd", "winograd4", "winograd6"):  # the kernels would say so in a run
        raise ImportError(f"MASKCORE_CONV must be direct, winograd, winograd4 or winograd6, is {algorithm}")
    torch.ops.load_library(str(_built()[isa]))
    if torch.cuda.is_available():
        _load_cuda()
    return isa


def _load_cuda() -> None:
    """Loads the CUDA kernels. They call functions of torch's CUDA library without naming it as one that they need,
    since they may have been built beside a torch that has none: it is made visible to them first."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for path in _cuda_objects():
        torch.ops.load_library(str(path))


def _cuda_objects() -> list[Path]:
    return list(Path(__file__).parent.glob("_kernels_cuda.*"))


def _cuda_state() -> str:
    if not _cuda_objects():
        return "not built (no nvcc was found, or MASKCORE_CUDA=0)"
    if torch.version.cuda is None:
        return "built, but this torch has no CUDA"
    if not torch.cuda.is_available():
        return "built, but no GPU was found"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"built, but {name}'s compute capability {major}.{minor} is below the 8.0 that they need"
    return torch.cuda.get_device_name()


def config() -> dict[str, str | int]:
    """What this process computes with: a JSON-able dict, as :func:`show_config` prints it."""
    import maskcore

    caches = _native.cache_sizes()
    return {
        "maskcore": maskcore.__version__,
        "instruction set": load(),
        "instruction sets available": ", ".join(available()),
        "threads": torch.get_num_threads(),
        "caches": ", ".join(f"{name} {size // 1024} KiB" for name, size in caches.items() if size),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "CUDA": _cuda_state(),
    }


def show_config() -> None:
    """Prints which kernels were chosen, threads, caches, torch, and CUDA or why there is none."""
    for name, value in config().items():
        print(f"{name:27} {value}")
