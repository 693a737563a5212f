"""csrc/ops_cuda.cpp compiled for the host, on torch devices that stand in a GPU's place.

``on_meta``: tensors have sizes of any kind and no memory; launches are recorded, not run. ``load_emulated``: the device
"emulated", whose kernels run on the emulator, so that whatever runs on a GPU by maskcore's operators runs there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import cuda_emulator
import torch
from cuda_emulator import CSRC
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
META = "maskcore_on_meta"
EMULATED = "emulated"

#: What only a GPU has, and what stands for it in meta.h and emulated.h; how often it is there.
STAND_INS = {
    "torch::stable::accelerator::DeviceGuard guard_": ("Guard guard_", 1),
    "cudaDeviceGetAttribute(": ("gpu_attribute(", 1),
    "tensor.is_cuda()": ("on_gpu(tensor)", 3),
    "tensor.get_device_index()": ("gpu_of(tensor)", 4),
    "STABLE_TORCH_LIBRARY_IMPL(maskcore, CUDA, m)": ("STABLE_TORCH_LIBRARY_IMPL({registration}, m)", 1),
}
COMPILE = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared"]
OPERATORS = ["-DUSE_CUDA", "-DMASKCORE_CUDA_EMULATION", "-DMASKCORE_BUILT_FOR_SM90A"]
OPERATORS += ["-DTORCH_TARGET_VERSION=0x020B000000000000", f"-I{cuda_emulator.HERE}", f"-I{CSRC}"]


def _library(name: str, text: str, flags: Sequence[str], links: Sequence[Path]) -> Path:
    """Compiles it against torch and what it links with. Kept like the emulator's libraries."""
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    # The kernels' file is named after their sources and headers, which are those of this one, too.
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    key = hashlib.sha256(f"{text}{headers}{flags}{links}{torch.__version__}".encode()).hexdigest()[:16]
    library = cuda_emulator.folder() / f"{name}-{key}.so"
    if not library.exists():
        source, partial = (library.with_suffix(f".{os.getpid()}.{kind}") for kind in ("cpp", "so"))
        source.write_text(text)
        flags = [*flags, f"-I{HERE}", *(flag for path in include_paths() for flag in ("-isystem", path))]
        libraries += ["-ltorch_cpu", "-lc10"]
        subprocess.run([*COMPILE, *flags, source, *links, *libraries, "-o", partial], check=True)
        source.unlink()
        partial.replace(library)
    library.touch()
    return library


def _operators(header: str, registration: str, changes: Mapping[str, str] | None = None) -> str:
    """ops_cuda.cpp behind the header, registered for that library and dispatch key; ``changes`` are faults to seed."""
    text = (CSRC / "ops_cuda.cpp").read_text()
    for real, (stand_in, times) in STAND_INS.items():
        assert text.count(real) == times, real
        text = text.replace(real, stand_in.format(registration=registration))
    for old, new in (changes or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return f'#include "{header}"\n{text}'


def all_kernels() -> cuda_emulator.Kernels:
    return cuda_emulator.build(*sorted(path.name for path in CSRC.glob("*_cuda.cu")))


def on_meta(kernels: cuda_emulator.Kernels) -> Path:
    """The operators for the meta device, and their schemas, as torch.ops.maskcore_on_meta."""
    schemas = (CSRC / "ops.cpp").read_text().replace("LIBRARY(maskcore,", f"LIBRARY({META},")
    text = _operators("meta.h", f"{META}, Meta") + schemas
    return _library("ops_on_meta", text, OPERATORS, [kernels.path])


@functools.cache
def register_emulated() -> Path:
    """Makes the device known to torch, whose autograd asks for devices once, at the first backward pass."""
    runtime = cuda_emulator.runtime()
    device = _library("emulated_device", (HERE / "emulated.cpp").read_text(), [], [runtime])
    torch.utils.rename_privateuse1_backend(EMULATED)
    module = types.ModuleType(f"torch.{EMULATED}")  # what torch asks of each device
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=0: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=0: None
    torch._register_device_module(EMULATED, module)
    ctypes.CDLL(str(device), ctypes.RTLD_GLOBAL)
    return device


def load_emulated(changes: Mapping[str, str] | None = None) -> cuda_emulator.Kernels:
    """Gives the device maskcore's operators. Once a process."""
    kernels, device = all_kernels(), register_emulated()
    operators = _operators("emulated.h", "maskcore, PrivateUse1", changes)
    library = _library("ops_on_emulated", operators, OPERATORS, [kernels.path, device])
    torch.ops.load_library(str(library))
    return kernels
