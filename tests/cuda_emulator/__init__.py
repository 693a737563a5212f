"""Runs the CUDA kernels' own sources on the host: compiles them, calls their launchers, raises their faults.

``cuda_emulator.h`` says what is emulated and what is detected. A test is three lines::

    kernels = cuda_emulator.build("max_pool_cuda.cu")
    y = cuda_emulator.Output(torch.empty(2, 4, 4, 8))
    kernels.run("launch_max_pool", x, y, 2, 8, 8, 8, order="random", seed=1)
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import itertools
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from maskcore import _native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
UNUSED_SECONDS = 3 * 24 * 3600

Order: TypeAlias = Literal["forward", "reverse", "random", "interleaved"]
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random", "interleaved")
Memory: TypeAlias = "torch.Tensor | np.ndarray"

COMPILE = ["-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-DMASKCORE_CUDA_EMULATION"]
# Debian's and Ubuntu's longjmp refuses to leave a stack for another one where _FORTIFY_SOURCE is set.
RUNTIME = [*COMPILE, "-O3", "-U_FORTIFY_SOURCE"]
# -O1: the checks take the time, not the kernels, and half of the time to compile is saved.
# bounds-strict: with bounds a struct's last array may be of any length.
# -fno-tree-sra: a float4 is read as the 16 bytes that it is on the GPU, not as four floats.
INSTRUMENT = [
    *COMPILE,
    "-O1",
    "-x",
    "c++",
    "-Wno-unknown-pragmas",
    "-fno-exceptions",
    "-fno-tree-sra",
    "-fsanitize=thread,alignment,bounds-strict,shift,signed-integer-overflow,integer-divide-by-zero,bool",
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


@dataclass(frozen=True)
class Input:
    """Memory that a launcher must not write; said by the parameter itself where it is a pointer to const."""

    memory: Memory


GlobalMemory: TypeAlias = "Memory | Output | Workspace | Input"
HostStruct: TypeAlias = "ctypes.Structure | ctypes.Array[Any]"
Argument: TypeAlias = "GlobalMemory | HostStruct | bool | int | float | None"


class Traffic(NamedTuple):
    """What the warps' accesses at one source line cost; traffic.cpp says how it is counted."""

    place: str
    space: Literal["shared", "global"]
    verb: Literal["reads", "writes"]
    requests: int
    units: int  # wavefronts of shared memory, 32-byte sectors of global memory
    least: int  # that the same bytes could have cost


class Launched(NamedTuple):
    """A launch that was recorded instead of run."""

    kernel: str  # demangled, with its parameters
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


def build(*sources: str | Path, replacements: Iterable[Replacement] = ()) -> Kernels:
    """Compiles sources, of csrc where the path is relative, into a library that runs on the emulator.

    Libraries are kept in ``folder()`` under a hash of all that goes into them.
    """
    return _build(tuple(CSRC / source for source in sources), tuple(replacements))


def folder() -> Path:
    """Where compiled libraries are kept; those that were not used for three days are removed."""
    cache = Path(os.environ.get("MASKCORE_CACHE") or Path.home() / ".cache" / "maskcore")
    path = cache / "cuda_emulator"
    path.mkdir(parents=True, exist_ok=True)
    return path


def has_compiler() -> bool:
    """GCC on Linux: its instrumentation, and its debugging tools for the faults' source lines."""
    return sys.platform == "linux" and all(map(shutil.which, ("g++", "nm", "c++filt", "addr2line")))


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def _fused_multiply_add() -> list[str]:
    """Without the instruction fmaf is a slow function; its results are the same."""
    return ["-mavx2", "-mfma"] if "avx2" in _native.supported_isa() else []


@functools.cache
def _gcc_version() -> str:
    return _run("g++", "--version")


def _hashed(flags: Sequence[str], texts: Iterable[bytes]) -> str:
    digest = hashlib.sha256(repr((flags, _gcc_version())).encode())
    for text in texts:
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()[:16]


def _compile(source: Path, flags: Sequence[str], includes: Sequence[Path], dependencies: bytes) -> Path:
    """The object of one source, which is made anew when it or a header has changed."""
    flags = [*flags, *_fused_multiply_add()]
    key = _hashed(flags, [source.read_bytes(), dependencies])
    made = folder() / f"{source.stem}-{key}.o"
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same tests waits, and finds it
        if not made.exists():
            partial = made.with_suffix(".partial.o")
            search = [f"-I{path}" for path in includes]
            _run("g++", *flags, *search, "-c", source, "-o", partial)
            partial.replace(made)
    made.touch()
    return made


def _link(name: str, objects: Sequence[Path], libraries: Sequence[Path]) -> Path:
    made = folder() / f"{name}-{_hashed([], [str(path).encode() for path in (*objects, *libraries)])}.so"
    if not made.exists():
        partial = made.with_suffix(f".{os.getpid()}-{threading.get_ident()}.so")
        _run("g++", "-shared", *objects, *libraries, "-Wl,-z,defs", "-o", partial)
        partial.replace(made)
    made.touch()
    return made


def _headers(path: Path) -> bytes:
    return b"".join(file.read_bytes() for pattern in ("*.h", "*.cuh") for file in sorted(path.glob(pattern)))


@functools.cache
def runtime() -> Path:
    """The emulator itself, which every library of kernels shares."""
    for file in folder().iterdir():
        if time.time() - file.stat().st_mtime > UNUSED_SECONDS:
            file.unlink(missing_ok=True)
    sources = sorted(HERE.glob("*.cpp"))
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
    emulator = runtime()
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
    return Kernels(_link(sources[0].stem, objects, [emulator]), emulator)


def sparse(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Zeros, of which only those that are touched take memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    no_reserve = 0x4000  # mmap.MAP_NORESERVE of Linux, which Python has from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype).reshape(shape)


def address_of(memory: Memory) -> int:
    """The pointer, for a struct that a launcher takes."""
    return memory.data_ptr() if isinstance(memory, torch.Tensor) else memory.ctypes.data


def _function_name(signature: str) -> str:
    """Without result, namespaces, template arguments and parameters."""
    name = re.split(r"[<(]", signature.replace("(anonymous namespace)::", ""))[0]
    return re.split(r"::| ", name.strip())[-1]


# Parameters as the demangler writes them. Every pointer is a c_void_p, every enumeration an int.
SCALARS = {
    "bool": ctypes.c_bool,
    "unsigned int": ctypes.c_uint32,
    "long": ctypes.c_int64,
    "unsigned long": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
STREAM = "CUstream_st*"


class Launcher(NamedTuple):
    symbol: str
    parameters: tuple[str, ...]  # without the stream
    takes_stream: bool


@dataclass
class Tensor:
    """Global memory as the emulator knows it."""

    name: str
    size: int
    element: int  # bytes
    initialised: bool
    read_only: bool
    is_output: bool


class GlobalTensors:
    """The global memory of one call, by address."""

    def __init__(self, poisoned: bool) -> None:
        self.poisoned = poisoned
        self.at: dict[int, Tensor] = {}

    def add(self, name: str, argument: GlobalMemory, read_only: bool = False) -> int:
        """Returns the address. Memory that is to be written begins as NaN."""
        memory = argument.memory if isinstance(argument, (Output, Workspace, Input)) else argument
        if isinstance(memory, torch.Tensor):
            contiguous, size, element = memory.is_contiguous(), memory.nbytes, memory.element_size()
        elif isinstance(memory, np.ndarray):
            contiguous, size, element = memory.flags.c_contiguous, memory.nbytes, memory.itemsize
        else:
            raise TypeError(f"{name} is a pointer, for which there must be a tensor, not {memory!r}")
        if not contiguous:
            raise ValueError(f"{name} is not contiguous")
        address = address_of(memory)
        if size == 0:
            return address
        fresh = isinstance(argument, (Output, Workspace))
        if fresh and self.poisoned:
            ctypes.memset(address, 0xFF, size)
        read_only = read_only or isinstance(argument, Input)
        tensor = Tensor(name, size, element, not fresh, read_only, isinstance(argument, Output))
        if address in self.at:  # the same memory in two places: what either of them allows
            tensor.initialised |= self.at[address].initialised
            tensor.read_only &= self.at[address].read_only
            tensor.is_output |= self.at[address].is_output
        self.at[address] = tensor
        return address

    def check_overlaps(self) -> None:
        end = 0
        for address in sorted(self.at):
            if address < end:
                raise ValueError(f"{self.at[address].name} overlaps with another one in part")
            end = address + self.at[address].size


class Kernels:
    """A library of kernels; ``run`` calls one of its launchers."""

    def __init__(self, library: Path, runtime: Path) -> None:
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.launchers = self._find_launchers()
        self.names: dict[int, str] = {}  # kernels', by address
        emulator = self.emulator = ctypes.CDLL(str(runtime))
        emulator.cuda_emulator_take_fault.restype = ctypes.c_char_p
        emulator.cuda_emulator_accesses.restype = ctypes.c_ulonglong
        emulator.cuda_emulator_set_shared_limit.argtypes = [ctypes.c_size_t]
        emulator.cuda_emulator_first_unwritten.argtypes = [ctypes.c_size_t]
        emulator.cuda_emulator_first_unwritten.restype = ctypes.c_longlong
        emulator.cuda_emulator_add_tensor.argtypes = [
            *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
        ]

    def _find_launchers(self) -> dict[str, list[Launcher]]:
        """The library's functions by their names without namespaces, with what the demangler says they take."""
        listed = _run("nm", "-D", "--defined-only", "-P", self.path)
        symbols = [line.split()[0] for line in listed.splitlines()]
        found: dict[str, list[Launcher]] = {}
        for symbol, name in zip(symbols, _run("c++filt", *symbols).splitlines(), strict=True):
            match = re.fullmatch(r"(?:\w+::)*(\w+)\((.*)\)", name)
            if match:
                parameters = [part for part in match[2].split(", ") if part]
                takes_stream = parameters[-1:] == [STREAM]
                taken = tuple(parameters[:-1] if takes_stream else parameters)
                found.setdefault(match[1], []).append(Launcher(symbol, taken, takes_stream))
        return found

    def run(
        self,
        name: str,
        *arguments: Argument,
        beside: Mapping[str, GlobalMemory] | None = None,
        order: Order = "forward",
        seed: int = 0,
        shared_limit: int = 227 * 1024,
        count_traffic: bool = False,
        only_blocks: Sequence[int] = (),
    ) -> list[Traffic]:
        """Calls the launcher with tensors in the pointers' places; the stream, its last parameter, is added.

        A tensor may be read and, where the parameter is no pointer to const, written. ``beside`` are the tensors
        that the structs among the arguments point to. Raises Fault if the emulator finds something wrong, and
        LaunchError if the launcher returns an error by itself. Returns the traffic where it is to be counted.

        ``only_blocks``, counted along the grid, leaves out all others: so a tensor may be too large for this
        machine's memory (``sparse``), and its outputs need not be whole.
        """
        launcher = self._choose(name, len(arguments))
        tensors = GlobalTensors(poisoned=not only_blocks)
        for called, memory in (beside or {}).items():
            tensors.add(called, memory)
        values: list[object] = []
        for i, (argument, parameter) in enumerate(zip(arguments, launcher.parameters, strict=True)):
            if isinstance(argument, (ctypes.Structure, ctypes.Array)):
                values.append(ctypes.byref(argument) if parameter[-1] in "*&" else argument)
            elif parameter[-1] not in "*&":
                values.append(SCALARS.get(parameter, ctypes.c_int32)(argument))  # type: ignore[arg-type]
            elif argument is None:
                values.append(ctypes.c_void_p(None))
            else:
                read_only = parameter.endswith("const*")
                address = tensors.add(f"argument {i} of {name}", argument, read_only)  # type: ignore[arg-type]
                values.append(ctypes.c_void_p(address))
        if launcher.takes_stream:
            values.append(ctypes.c_void_p(None))
        tensors.check_overlaps()

        self.emulator.cuda_emulator_set_order(ORDERS.index(order), seed)
        self.emulator.cuda_emulator_set_shared_limit(shared_limit)
        self.emulator.cuda_emulator_count_traffic(int(count_traffic))
        chosen = (ctypes.c_uint64 * len(only_blocks))(*only_blocks)
        self.emulator.cuda_emulator_set_only_blocks(chosen, ctypes.c_size_t(len(only_blocks)))
        self.emulator.cuda_emulator_forget_tensors()
        for address, tensor in tensors.at.items():
            granule_log2 = tensor.element.bit_length() - 1
            self.emulator.cuda_emulator_add_tensor(
                *(
                    address,
                    tensor.size,
                    granule_log2,
                    tensor.initialised,
                    tensor.read_only,
                    tensor.name.encode(),
                )
            )
        error = self.library[launcher.symbol](*values)
        self.raise_fault()
        if error != 0:
            raise LaunchError(f"{name} returned cudaError_t {error}")
        for i, tensor in enumerate(tensors.at.values()):
            whole = tensor.is_output and not only_blocks
            element = self.emulator.cuda_emulator_first_unwritten(i) if whole else -1
            if element >= 0:
                raise Fault(f"{name}: nothing wrote element {element} of {tensor.name}, which is an output")
        return self._traffic()

    def record(self, name: str, *arguments: HostStruct | bool | int | float | None) -> list[Launched]:
        """What the launcher would launch, without running it. A pointer may be any address, such as 1 << 20."""
        launcher = self._choose(name, len(arguments))
        values: list[object] = []
        for argument, parameter in zip(arguments, launcher.parameters, strict=True):
            if isinstance(argument, (ctypes.Structure, ctypes.Array)):
                values.append(ctypes.byref(argument) if parameter[-1] in "*&" else argument)
            elif parameter[-1] in "*&":
                values.append(ctypes.c_void_p(argument))  # type: ignore[arg-type]
            else:
                values.append(SCALARS.get(parameter, ctypes.c_int32)(argument))  # type: ignore[arg-type]
        if launcher.takes_stream:
            values.append(ctypes.c_void_p(None))
        found: list[Launched] = []

        def told(kernel: int, x: int, y: int, z: int, threads: int, shared: int) -> None:
            found.append(Launched(self._kernel_name(kernel), (x, y, z), threads, shared))

        size = ctypes.c_uint
        callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, size, size, size, size, ctypes.c_size_t)(told)
        self.emulator.cuda_emulator_set_shared_limit(227 * 1024)
        self.emulator.cuda_emulator_record_launches(callback)
        try:
            error = self.library[launcher.symbol](*values)
        finally:
            self.emulator.cuda_emulator_record_launches(None)
        if error != 0:
            raise LaunchError(f"{name} returned cudaError_t {error}")
        return found

    @functools.cache  # noqa: B019 - libraries live as long as the process
    def _kernel_name(self, address: int) -> str:
        """A kernel's name as the demangler writes it, with its template's arguments."""
        if address not in self.names:
            mangled = _run("addr2line", "-f", "-e", self.path, hex(address - self._base())).splitlines()[0]
            self.names[address] = _run("c++filt", mangled).strip()
        return self.names[address]

    def accesses(self) -> int:
        """Memory accesses checked so far, of all libraries together."""
        return int(self.emulator.cuda_emulator_accesses())

    def _choose(self, name: str, given: int) -> Launcher:
        named = self.launchers.get(name, [])
        fitting = [launcher for launcher in named if len(launcher.parameters) == given]
        if len(fitting) != 1:
            raise TypeError(
                f"{len(fitting)} launchers named {name} take {given} arguments; there are {named}"
            )
        return fitting[0]

    def raise_fault(self) -> None:
        """What the emulator has found wrong since the last call, if anything."""
        kernel, code = ctypes.c_void_p(), ctypes.c_void_p()
        sentence = self.emulator.cuda_emulator_take_fault(ctypes.byref(kernel), ctypes.byref(code))
        if sentence is None:
            return
        where = f"kernel {self._source_lines(kernel.value)[0][0]}, " if kernel.value else ""
        place = f" [{self._place(code.value)}]" if code.value else ""
        raise Fault(f"{where}{sentence.decode()}{place}")

    def _traffic(self) -> list[Traffic]:
        code, shared, writes = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        counts = (ctypes.c_uint64 * 3)()
        found: dict[tuple[str, bool, bool], list[int]] = {}
        for i in itertools.count():
            passed = (ctypes.byref(value) for value in (code, shared, writes))
            if not self.emulator.cuda_emulator_traffic(ctypes.c_size_t(i), *passed, counts):
                break
            key = self._place(code.value or 0), bool(shared.value), bool(writes.value)
            found[key] = [
                before + count for before, count in zip(found.get(key, [0] * 3), counts, strict=True)
            ]
        return [
            Traffic(place, "shared" if shared else "global", "writes" if writes else "reads", *summed)
            for (place, shared, writes), summed in sorted(found.items())
        ]

    def _place(self, code: int) -> str:
        """file:line of a return address, whose call is just before, outside of the emulator's inline functions."""
        lines = (line for _, line in self._source_lines(code - 1))
        return next((line for line in lines if not line.startswith("cuda_emulator.h")), "?")

    def _base(self) -> int:
        """Where in memory the library begins."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        return next(int(line.split("-")[0], 16) for line in maps if line.endswith(str(self.path.resolve())))

    @functools.cache  # noqa: B019 - libraries live as long as the process
    def _source_lines(self, address: int) -> list[tuple[str, str]]:
        """Function and file:line of an address in the library, and of those it is inlined into."""
        lines = _run("addr2line", "-fiC", "-e", self.path, hex(max(address - self._base(), 0))).splitlines()
        functions = [_function_name(line) for line in lines[::2]]
        places = [re.sub(r" \(discriminator.*", "", line.rpartition("/")[2]) for line in lines[1::2]]
        return list(zip(functions, places, strict=True))
