"""Runs the CUDA kernels' own sources on the host: compiles them, calls their launchers, raises their faults.

``cuda_emulator.h`` says what is emulated and what is detected. A test is three lines::

    kernels = cuda_emulator.build("max_pool_cuda.cu")
    y = cuda_emulator.Output(torch.empty(2, 4, 4, 8))
    kernels.run("launch_max_pool", x, y, 2, 8, 8, 8, order="random", seed=1)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

Order: TypeAlias = Literal["forward", "reverse", "random", "interleaved"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random", "interleaved")
Memory: TypeAlias = "torch.Tensor | np.ndarray"

COMPILE = ["-std=c++20", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-DMASKCORE_CUDA_EMULATION"]
# Debian's and Ubuntu's longjmp refuses to leave a stack for another one where this is set.
RUNTIME = [*COMPILE, "-U_FORTIFY_SOURCE"]
# -fno-tree-sra: a float4 is read as the 16 bytes that it is on the GPU, not as four floats.
INSTRUMENT = [
    *COMPILE,
    "-x",
    "c++",
    "-Wno-unknown-pragmas",
    "-fno-exceptions",
    "-fno-tree-sra",
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,bool",
]


class Fault(Exception):
    """What the emulator found wrong with a kernel; its message names the place."""


class LaunchError(Exception):
    """A launcher returned a cudaError_t, and no fault explains it."""


class Replacement(NamedTuple):
    """A change to a source of csrc, such as a fault to seed: ``old`` must be there ``times`` times."""

    file: str
    old: str
    new: str
    times: int = 1


@dataclass(frozen=True)
class Output:
    """Memory that a launcher must write, every element of it, before anything reads it."""

    memory: Memory


@dataclass(frozen=True)
class Workspace:
    """Memory that a launcher may write, and must have written before it reads it."""

    memory: Memory


Argument: TypeAlias = "Memory | Output | Workspace | bool | int | float | None"


def build(*sources: str | Path, replacements: Iterable[Replacement] = ()) -> Kernels:
    """Compiles sources, of csrc where the path is relative, into a library that runs on the emulator.

    Libraries are kept in ``folder()`` under a hash of all that goes into them.
    """
    return _build(tuple(CSRC / source for source in sources), tuple(replacements))


def folder() -> Path:
    default = Path(tempfile.gettempdir()) / f"maskcore-cuda-emulator-{os.getuid()}"
    path = Path(os.environ.get("MASKCORE_CUDA_EMULATOR", default))
    path.mkdir(parents=True, exist_ok=True)
    return path


def has_compiler() -> bool:
    return shutil.which(_compiler()) is not None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


@functools.cache
def _fused_multiply_add() -> list[str]:
    """Without the instruction fmaf is a slow function; its results are the same."""
    done = subprocess.run(
        [_compiler(), "-march=native", "-dM", "-E", "-xc++", os.devnull], capture_output=True
    )
    return ["-mavx2", "-mfma"] if b"__FMA__" in done.stdout and b"__AVX2__" in done.stdout else []


def _hashed(flags: Sequence[str], texts: Iterable[bytes]) -> str:
    digest = hashlib.sha256(repr((flags, _compiler())).encode())
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()[:16]


def _compile(source: Path, flags: Sequence[str], includes: Sequence[Path], dependencies: bytes) -> Path:
    """The object of one source, which is made anew when it or a header has changed."""
    flags = [*flags, *_fused_multiply_add()]
    key = _hashed(flags, [source.read_bytes(), dependencies])
    made = folder() / f"{source.stem}-{key}.o"
    if not made.exists():
        partial = made.with_suffix(f".{os.getpid()}.o")
        search = [f"-I{path}" for path in includes]
        _run(_compiler(), *flags, *search, "-c", source, "-o", partial)
        partial.replace(made)
    return made


def _link(name: str, objects: Sequence[Path], libraries: Sequence[Path]) -> Path:
    made = folder() / f"{name}-{_hashed([], [str(path).encode() for path in (*objects, *libraries)])}.so"
    if not made.exists():
        partial = made.with_suffix(f".{os.getpid()}.so")
        _run(_compiler(), "-shared", *objects, *libraries, "-Wl,-z,defs", "-o", partial)
        partial.replace(made)
    return made


def _headers(path: Path) -> bytes:
    return b"".join(file.read_bytes() for pattern in ("*.h", "*.cuh") for file in sorted(path.glob(pattern)))


@functools.cache
def _runtime() -> Path:
    """The emulator itself, which every library of kernels shares."""
    sources = [HERE / "machine.cpp", HERE / "memory.cpp", HERE / "warp.cpp"]
    headers = _headers(HERE)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, RUNTIME, [HERE], headers), sources))
    return _link("emulator", objects, [])


def _replaced(changes: Sequence[Replacement], into: Path) -> None:
    """A copy of csrc with the changes made."""
    for pattern in ("*.h", "*.cuh", "*.cu"):
        for file in CSRC.glob(pattern):
            shutil.copy(file, into)
    for change in changes:
        path = into / change.file
        text = path.read_text()
        if text.count(change.old) != change.times:
            found = text.count(change.old)
            raise ValueError(f"{change.file} has {change.old!r} {found} times, not {change.times}")
        path.write_text(text.replace(change.old, change.new))


@functools.cache
def _build(sources: tuple[Path, ...], changes: tuple[Replacement, ...]) -> Kernels:
    runtime = _runtime()
    with tempfile.TemporaryDirectory() as scratch:
        csrc = CSRC
        if changes:
            csrc = Path(scratch)
            _replaced(changes, csrc)
        headers = _headers(csrc) + _headers(HERE)
        moved = [csrc / source.name if source.parent == CSRC else source for source in sources]
        with ThreadPoolExecutor(2) as pool:
            objects = list(
                pool.map(lambda source: _compile(source, INSTRUMENT, [HERE, csrc], headers), moved)
            )
    return Kernels(_link(sources[0].stem, objects, [runtime]), runtime)


# Parameters as the demangler writes them; every pointer is a c_void_p.
SCALARS = {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int32,
    "unsigned int": ctypes.c_uint32,
    "long": ctypes.c_int64,
    "unsigned long": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
STREAM = "CUstream_st*"


@dataclass(frozen=True)
class Launcher:
    symbol: str
    parameters: tuple[str, ...]


class Kernels:
    """A library of kernels; ``run`` calls one of its launchers."""

    def __init__(self, library: Path, runtime: Path) -> None:
        self.path = library
        self.emulator = ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        self.emulator.cuda_emulator_take_fault.restype = ctypes.c_char_p
        self.emulator.cuda_emulator_first_unwritten.restype = ctypes.c_longlong
        self.emulator.cuda_emulator_first_unwritten.argtypes = [ctypes.c_size_t]
        self.emulator.cuda_emulator_accesses.restype = ctypes.c_ulonglong
        self.emulator.cuda_emulator_set_shared_limit.argtypes = [ctypes.c_size_t]
        self.library = ctypes.CDLL(str(library))
        self.launchers = self._find_launchers()

    def _find_launchers(self) -> dict[str, list[Launcher]]:
        """The library's functions by their names without namespaces, with what the demangler says they take."""
        listed = subprocess.run(
            ["nm", "-D", "--defined-only", "-P", self.path], capture_output=True, text=True, check=True
        )
        symbols = [line.split()[0] for line in listed.stdout.splitlines()]
        readable = subprocess.run(
            ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
        )
        found: dict[str, list[Launcher]] = {}
        for symbol, name in zip(symbols, readable.stdout.splitlines(), strict=True):
            match = re.fullmatch(r"(?:\w+::)*(\w+)\((.*)\)", name)
            if match:
                parameters = tuple(part for part in match[2].split(", ") if part)
                found.setdefault(match[1], []).append(Launcher(symbol, parameters))
        return found

    def run(
        self,
        name: str,
        *arguments: Argument,
        order: Order = "forward",
        seed: int = 0,
        shared_limit: int = 227 * 1024,
    ) -> None:
        """Calls the launcher with tensors in the pointers' places; its last parameter, the stream, is added.

        A tensor may be read and, where the parameter is no pointer to const, written. Raises Fault if the
        emulator finds something wrong, and LaunchError if the launcher returns an error by itself.
        """
        launcher = self._choose(name, len(arguments))
        parameters = [part for part in launcher.parameters if part != STREAM]
        values: list[object] = []
        outputs: list[tuple[int, int]] = []
        tensors: dict[int, tuple[int, int, bool, bool, int]] = {}
        for position, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            if "*" not in parameter and "&" not in parameter:
                values.append(SCALARS[parameter](argument))  # type: ignore[arg-type]
                continue
            if argument is None:
                values.append(ctypes.c_void_p(None))
                continue
            fresh = isinstance(argument, (Output, Workspace))
            address, size, element = _extent(argument)
            values.append(ctypes.c_void_p(address))
            if size == 0:
                continue
            if fresh:
                ctypes.memset(address, 0xFF, size)
            if isinstance(argument, Output):
                outputs.append((position, address))
            read_only = parameter.endswith("const*")
            if address in tensors:  # one tensor in two places: what either of them allows
                read_only &= tensors[address][3]
                fresh &= tensors[address][2]
            tensors[address] = (size, element, fresh, read_only, position)
        if STREAM in launcher.parameters:
            values.append(ctypes.c_void_p(None))

        emulator = self.emulator
        emulator.cuda_emulator_forget_tensors()
        emulator.cuda_emulator_set_order(ORDERS.index(order), seed)
        emulator.cuda_emulator_set_shared_limit(shared_limit)
        _check_overlaps(tensors)
        for address, (size, element, fresh, read_only, position) in tensors.items():
            called = f"argument {position} of {name}".encode()
            emulator.cuda_emulator_add_tensor(
                ctypes.c_void_p(address),
                ctypes.c_size_t(size),
                element.bit_length() - 1,
                int(not fresh),
                int(read_only),
                called,
            )
        error = self.library[launcher.symbol](*values)
        self._raise_fault()
        if error != 0:
            raise LaunchError(f"{name} returned cudaError_t {error}")
        places = list(tensors)
        for position, address in outputs:
            element = emulator.cuda_emulator_first_unwritten(places.index(address))
            if element >= 0:
                raise Fault(
                    f"{name} never wrote element {element} of argument {position}, which is an output"
                )

    def accesses(self) -> int:
        """Memory accesses checked so far, of all libraries together."""
        return int(self.emulator.cuda_emulator_accesses())

    def _choose(self, name: str, given: int) -> Launcher:
        candidates = [
            launcher
            for launcher in self.launchers.get(name, [])
            if sum(part != STREAM for part in launcher.parameters) == given
        ]
        if len(candidates) != 1:
            raise TypeError(
                f"{len(candidates)} launchers named {name} take {given} arguments: {self.launchers.get(name)}"
            )
        return candidates[0]

    def _raise_fault(self) -> None:
        kernel, code = ctypes.c_void_p(), ctypes.c_void_p()
        sentence = self.emulator.cuda_emulator_take_fault(ctypes.byref(kernel), ctypes.byref(code))
        if sentence is None:
            return
        name = self._source_lines(kernel.value, 0)[0][0]
        # A return address: the call is the instruction before. The emulator's inline functions are not the place.
        lines = self._source_lines(code.value, 1)
        place = next((line for _, line in lines if not line.startswith("cuda_emulator.h")), "?")
        raise Fault(f"kernel {name}, {sentence.decode()} [{place}]")

    def _source_lines(self, address: int | None, back: int) -> list[tuple[str, str]]:
        """Function and file:line of an address in the library, and of those it is inlined into."""
        base = next(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(self.path.resolve()))
        )
        offset = hex((address or base) - base - back)
        done = subprocess.run(
            ["addr2line", "-fiC", "-e", self.path, offset], capture_output=True, text=True, check=True
        )
        lines = done.stdout.splitlines()
        functions = [re.sub(r"\(.*|.*::(?=\w)", "", line) for line in lines[::2]]
        places = [re.sub(r" \(discriminator.*", "", line.rpartition("/")[2]) for line in lines[1::2]]
        return list(zip(functions, places, strict=True))


def _extent(argument: Argument) -> tuple[int, int, int]:
    """Address, bytes, and bytes of an element."""
    memory = argument.memory if isinstance(argument, (Output, Workspace)) else argument
    if not isinstance(memory, (torch.Tensor, np.ndarray)):
        raise TypeError(f"a launcher takes a tensor for a pointer, not {memory!r}")
    if isinstance(memory, torch.Tensor):
        if not memory.is_contiguous():
            raise ValueError("a launcher takes contiguous tensors")
        return memory.data_ptr(), memory.numel() * memory.element_size(), memory.element_size()
    if not memory.flags.c_contiguous:
        raise ValueError("a launcher takes contiguous arrays")
    return memory.ctypes.data, memory.nbytes, memory.itemsize


def _check_overlaps(tensors: dict[int, tuple[int, int, bool, bool, int]]) -> None:
    end = 0
    for address in sorted(tensors):
        if address < end:
            raise ValueError("two arguments overlap in part")
        end = address + tensors[address][0]
