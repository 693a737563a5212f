"""What every CUDA kernel takes of a multiprocessor, by the compiler's own word, and the table of all of them.

    python tests/cuda_resources.py            compiles for all targets, writes the table
    python tests/cuda_resources.py sm_90a     prints one target's

A kernel's budget stands in its source: __launch_bounds__(threads, blocks) says how many blocks an SM must hold,
from which its registers follow (65,536 / (threads * blocks)), and `problems` holds the compiler to it. Threads and
shared memory are those of the launchers, recorded on the emulator with the network's own shapes and with odd ones;
registers and spills are ptxas', instructions those of nvdisasm (pip install nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import cuda_emulator  # noqa: E402
from cuda_emulator import CSRC, Launched  # noqa: E402

TABLE = HERE.parent / "docs" / "cuda_kernels.md"


class Target(NamedTuple):
    """The limits of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability"); all have 65,536 registers, given to warps by 256."""

    gpus: str
    threads: int
    blocks: int
    shared_bytes: int  # of which each block takes 1 KB more than it asks for
    wgmma: bool = False


TARGETS = {
    "sm_80": Target("A100", 2048, 32, 164 * 1024),
    "sm_86": Target("RTX 30", 1536, 16, 100 * 1024),
    "sm_89": Target("RTX 40, L4", 1536, 24, 100 * 1024),
    "sm_90a": Target("H100, H200", 2048, 32, 228 * 1024, wgmma=True),
    "sm_100": Target("B200", 2048, 32, 228 * 1024),
    "sm_120": Target("RTX 50", 1536, 24, 100 * 1024),
}
OF_WGMMA = ("conv_halo_wgmma_kernel", "conv_weight_gradient_wgmma_kernel")
REGISTERS = 65536
SMALL = 100 * 1024  # bytes of shared memory of the GPUs that are not for data centres
LEAST_OCCUPANCY = 0.25
#: Kernels, as regular expressions, that an SM holds fewer of than LEAST_OCCUPANCY or their __launch_bounds__ ask for,
#: and why that is right.
FEW_THREADS = {
    "adam_count_kernel": "one thread: the two factors of a step",
    r"conv_halo_tile_kernel<HaloTile<\w+, 4, 1, 2, 4, true>": "the whole filter of a 32-channel layer stays in the "
    "block's shared memory: it saves more traffic through L2 than more warps would hide",
    r"conv_halo_tile_kernel<HaloTile<\w+, 2, 2, 4, 2, true>": "the whole filter of a 64-channel layer stays in the "
    "block's shared memory (csrc/conv_halo_tile.cuh says what it saves); "
    "two blocks are eight warps, with no barrier within a slab",
    r"conv_first_layer_gradient_kernel<FirstLayerGradientTile<(Tf32|Ieee)>": "its rows take 71 KB; the loads of one "
    "block's 8 warps are more than an SM with 100 KB gets in a microsecond",
    "conv_weight_gradient_wgmma_kernel": "three warpgroups with 96 sums a thread fill the registers; each has a step's "
    "products in the tensor cores' queue while it loads the next fragments",
}


class Counted(NamedTuple):
    """Machine instructions of a step, the innermost loop with tensor instructions; zeros if there is none."""

    tensor: int
    longest: int  # on the longest way through it: loading an item of aligned tensors
    other: int  # without that item


class Resources(NamedTuple):
    """One kernel on one target."""

    registers: int
    spilled_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    threads: int  # of __launch_bounds__
    blocks: int  # an SM must hold; 0 where the source does not say
    counted: Counted  # zeros without a disassembler
    serialized: bool = False  # its wgmmas, each of which would be waited for

    def occupancy(self, target: Target, threads: int, shared_bytes: int) -> float:
        """Resident warps of those that an SM could hold."""
        warps = -(-threads // 32)
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256) // warps
        by_shared = target.shared_bytes // (-(-(shared_bytes + self.static_shared_bytes) // 128) * 128 + 1024)
        blocks = min(target.threads // (32 * warps), target.blocks, by_registers, by_shared)
        return blocks * warps / (target.threads // 32)


# ---- the compiler's word -------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(CSRC.glob("*_cuda.cu"))


def find_disassembler() -> str | None:
    """nvdisasm of the PATH, or of PyPI's package."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "nvdisasm"), None)


def plain(name: str) -> str:
    """A demangled kernel's name without what compilers spell differently: namespaces, its type, its parameters."""
    name = re.sub(r"_GLOBAL__N__\w+::|\(anonymous namespace\)::|maskcore::|^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i].replace("> >", ">>")
    return name.replace("> >", ">>")


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _compiled(source: Path, target: str) -> Path:
    """A folder with the cubin, the ptx and what ptxas said; made anew when csrc has changed."""
    headers = b"".join(path.read_bytes() for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh")]))
    key = hashlib.sha256(headers + source.read_bytes()).hexdigest()[:16]
    folder = cuda_emulator.folder() / f"{source.stem}-{target}-{key}"
    if not folder.exists():
        number = target.removeprefix("sm_")
        partial = Path(tempfile.mkdtemp(dir=cuda_emulator.folder()))
        flags = [
            "-std=c++20",
            "-O3",
            "--Werror",
            "all-warnings",
            "-Xptxas",
            "-v",
            "--keep",
            "--keep-dir",
            partial,
        ]
        generation = f"-gencode=arch=compute_{number},code={target}"
        text = _run("nvcc", *flags, generation, "-cubin", source, "-o", partial / "kernels.cubin")
        (partial / "ptxas.txt").write_text(text)
        for path in partial.iterdir():
            if path.suffix not in (".ptx", ".cubin", ".txt"):
                path.unlink()
        partial.rename(folder)
    return folder


def _ptxas(text: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Mangled names and numbers of `ptxas -v`."""
    numbers = {
        "stack": r"(\d+) bytes stack frame",
        "stores": r"(\d+) bytes spill stores",
        "loads": r"(\d+) bytes spill loads",
        "registers": r"Used (\d+) registers",
        "shared": r"(\d+) bytes smem",
    }
    for part in text.split("Compiling entry function '")[1:]:
        # What follows of a function that the kernel calls would count as the kernel's.
        lines = part.splitlines()
        own = "\n".join(line for line in lines[:3] if "Function properties" not in line) + "\n"
        own += next((line for line in lines if "Used " in line), "")
        matches = {name: re.search(pattern, own) for name, pattern in numbers.items()}
        yield part.split("'")[0], {name: int(found[1]) if found else 0 for name, found in matches.items()}


def _bounds(ptx: str) -> Iterator[tuple[str, int, int]]:
    for entry in re.split(r"\.entry\s+", ptx)[1:]:
        head = entry.partition("{")[0]
        threads, blocks = re.search(r"\.maxntid (\d+)", head), re.search(r"\.minnctapersm (\d+)", head)
        yield (
            entry.partition("(")[0].strip(),
            int(threads[1]) if threads else 0,
            int(blocks[1]) if blocks else 0,
        )


TENSOR = re.compile(r"[HIOQ]G?MMA")
#: A load of less than 8 bytes and its condition, which is another one for each element of a tensor's tail.
ELEMENT = r"@\S+(?= LDG\.E(?!.*\.(64|128)))"


class Operation(NamedTuple):
    text: str  # with the condition in front
    to: str  # the label that it branches to
    goes_on: bool  # whether the next one may follow


def _instructions(cubin: Path) -> dict[str, Counted]:
    """Of each kernel."""
    disassembler = find_disassembler()
    if disassembler is None:
        return {}
    found: dict[str, Counted] = {}
    for part in re.split(r"\n\.text\.", _run(disassembler, "-c", cubin))[1:]:
        operations: list[Operation] = []
        labels: dict[str, int] = {}
        for line in part.splitlines():
            if line.startswith(".L_"):
                labels[line.strip().removesuffix(":")] = len(operations)
            match = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
            if match and match[2] != "NOP":
                to = re.search(r"`\((\.L_\w+)\)", line) if match[2].startswith("BRA") else None
                filled = " or zeros" if re.search(r"LDGSTS.*\], !?P\d", line) else ""
                text = f"{(match[1] or '').strip()} {match[2]}{filled}".strip()
                operations.append(Operation(text, to[1] if to else "", text not in ("BRA", "EXIT")))
        found[part.partition(":")[0]] = counted(operations, labels)
    return found


def counted(operations: Sequence[Operation], labels: dict[str, int]) -> Counted:
    def multiplies(first: int, end: int) -> int:
        return sum(bool(TENSOR.search(operation.text)) for operation in operations[first:end])

    jumps = {i: labels[operation.to] for i, operation in enumerate(operations) if operation.to in labels}
    loops = {(to, i + 1) for i, to in jumps.items() if to <= i and multiplies(to, i + 1)}
    if not loops:
        return Counted(0, 0, 0)
    first, end = max(loops, key=lambda loop: (multiplies(*loop), loop[0] - loop[1]))
    of_blocks = {first, end} | {i + 1 for i in jumps if first <= i < end}
    bounds = sorted(of_blocks | {to for to in jumps.values() if first <= to < end})
    blocks = dict(itertools.pairwise(bounds))

    def way(sign: int, without: frozenset[int]) -> list[int]:
        """The beginnings of the blocks of the longest way (sign 1) or the shortest one (-1)."""
        ways = {first: (0, [first])}
        for begin, after in blocks.items():
            if begin in without or begin not in ways:
                continue
            reached = [jumps[after - 1]] if begin < jumps.get(after - 1, -1) <= end else []
            if operations[after - 1].goes_on or after == end:
                reached.append(after)
            length = ways[begin][0] + sign * (after - begin)
            for to in reached:
                if to not in ways or ways[to][0] < length:
                    ways[to] = length, [*ways[begin][1], to]
        return ways[end][1][:-1] if end in ways else []

    def found(begin: int, pattern: str) -> set[str]:
        texts = [operation.text for operation in operations[begin : blocks[begin]]]
        return {match[0] for text in texts if (match := re.search(pattern, text))}

    # A tensor that is not aligned is loaded element by element, in code of its own if not merged with the other.
    elements = frozenset(begin for begin in blocks if len(found(begin, ELEMENT)) > 2)
    if not way(1, elements):
        elements = frozenset()
    longest, shortest = way(1, elements) or [*blocks], way(-1, elements)  # all, if a block lies out of line
    # A step always copies the filter, which is whole: never zeros.
    filters = {begin for begin in blocks if found(begin, "LDGSTS") and not found(begin, "LDGSTS.*zeros")}
    other = way(1, elements | frozenset(longest) - frozenset(shortest) - filters) or longest
    lengths = (sum(blocks[begin] - begin for begin in of_way) for of_way in (longest, other))
    return Counted(multiplies(first, end), *lengths)


@functools.cache
def compiled(target: str) -> dict[str, Resources]:
    """Every kernel of csrc on one target, by plain name."""
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda source: _compiled(source, target), sources()))
    found: dict[str, Resources] = {}
    for folder in folders:
        ptx = "\n".join(path.read_text() for path in folder.glob("*.ptx"))
        bounds = {name: rest for name, *rest in _bounds(ptx)}
        of_kernels = _instructions(folder / "kernels.cubin")
        text = (folder / "ptxas.txt").read_text()
        serialized = set(re.findall(r"instructions are serialized .* in the function '(\w+)'", text))
        for mangled, said in _ptxas(text):
            kernel = plain(_run("c++filt", mangled).strip())
            if kernel.startswith(OF_WGMMA) and not TARGETS[target].wgmma:
                continue  # it only stops there, should anybody start it
            found[kernel] = Resources(
                said["registers"],
                said["stores"] + said["loads"],
                said["stack"],
                said["shared"],
                *bounds[mangled],
                of_kernels.get(mangled, Counted(0, 0, 0)),
                mangled in serialized,
            )
    return found


# ---- the launchers' word -------------------------------------------------------------------------


class ConvSize(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("N", "H", "W", "C", "K", "padding", "P", "Q")]


class ConvCall(ctypes.Structure):
    _fields_ = [
        ("size", ConvSize),
        ("dtype", ctypes.c_int),
        ("precision", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("wgmma", ctypes.c_bool),
    ]


class AdamTensor(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_size_t) for name in "pgmv"), ("size", ctypes.c_int64)]


class AdamSettings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "b1", "b2", "eps", "l2")),
        ("keras", ctypes.c_bool),
    ]


#: N, H, W, C, K of convolutions: the final network's, at batch 32, and odd ones.
CONVOLUTIONS = [
    (32, 256, 256, 3, 32),
    (32, 254, 254, 32, 32),
    (32, 126, 126, 32, 64),
    (32, 124, 124, 64, 64),
    (32, 59, 59, 64, 128),
    (32, 57, 57, 128, 128),
    (32, 25, 25, 128, 256),
    (32, 23, 23, 256, 256),
    (2, 9, 9, 5, 7),
    (2, 20, 20, 256, 32),
    (2, 20, 20, 32, 256),
    (2, 20, 20, 64, 32),
    (2, 20, 20, 128, 64),
    (2, 20, 20, 256, 64),
    (2, 20, 20, 64, 256),
    (2, 20, 20, 64, 512),
    (1, 40, 40, 8, 16),
    (1, 40, 40, 2, 40),
]
#: Channels behind the two convolutions of a block's head.
HEADS = [(32, 32), (64, 64), (128, 128), (256, 256), (7, 5), (256, 32), (32, 256), (32, 64), (64, 32)]
HEADS += [(128, 64), (512, 64), (64, 128), (64, 512)]
ADDRESS = 1 << 20
#: (DataType, Precision) of csrc/conv_size.h
TYPES = {"float32 ieee": (0, 0), "float32 tf32": (0, 1), "float32 bf16": (0, 2), "bfloat16": (1, 2)}


def _launches(target: Target) -> Iterator[Launched]:
    x = ADDRESS
    for file, calls in {
        "max_pool_cuda.cu": [
            (name, x, x, dtype, 2, 8, 8, C, x) if "backward" in name else (name, x, dtype, 2, 8, 8, C, x, x)
            for name in ("launch_max_pool", "launch_max_pool_backward")
            for dtype in (0, 1)
            for C in (32, 3)
        ],
        "softmax_cross_entropy_cuda.cu": [
            ("launch_softmax_cross_entropy", x, x, 2048, 3, x, x),
            ("launch_softmax_cross_entropy_backward", x, x, x, 2048, 3, x),
        ],
        "adam_cuda.cu": [
            (
                "launch_adam_counted",
                (AdamTensor * 1)(AdamTensor(x, x, x, x, 10**6)),
                *(1, AdamSettings(1e-4, 0.9, 0.999, 1e-7, 0, True), x, x),
            )
        ],
        "dropout_cuda.cu": [("launch_dropout", x, x, dtype, 10**6, 0.5, x) for dtype in (0, 1)],
        "warp_cuda.cu": [
            ("launch_warp", x, x, 32, 256, W, 0.0, 1 / 255, dtype, x) for dtype in (0, 1) for W in (256, 255)
        ],
    }.items():
        library = cuda_emulator.build(file)
        for name, *arguments in calls:
            yield from library.record(name, *arguments)
    # Few tiles are narrower where there are many multiprocessors; a device with wgmma may be told to do without.
    for multiprocessors, wgmma in itertools.product((132, 1), {False, target.wgmma}):
        yield from _conv_launches(multiprocessors, target.shared_bytes, wgmma)


def _conv_launches(*device: int) -> Iterator[Launched]:
    x = ADDRESS
    forward = cuda_emulator.build("conv_relu_cuda.cu")
    backward = cuda_emulator.build("conv_relu_backward_cuda.cu")
    bn = cuda_emulator.build("conv_bn_relu_cuda.cu")
    head = cuda_emulator.build("conv_bn_relu_conv_relu_cuda.cu")
    for types in TYPES.values():
        for N, H, W, C, K in CONVOLUTIONS:
            call = ConvCall(ConvSize(N, H, W, C, K, 0, H - 2, W - 2), *types, *device)
            yield from forward.record("launch_conv_relu", call, *[x] * 5)
            yield from forward.record("launch_conv_relu_max_pool", call, *[x] * 6)
            yield from backward.record("launch_conv_relu_backward", call, *[x] * 8)
            yield from backward.record("launch_conv_relu_max_pool_backward", call, *[x] * 9)
            yield from bn.record("launch_conv_bn_relu_train", call, *[x] * 5, 1e-3, *[x] * 5)
            yield from bn.record("launch_conv_bn_relu_train_backward", call, *[x] * 8, 1e-3, *[x] * 5)
        for K, K2 in HEADS:
            call = ConvCall(ConvSize(2, 20, 20, 8, K, 0, 18, 18), *types, *device)
            for argmax in (x, None):
                outputs = (x, argmax, *[x] * 4)
                yield from head.record("launch_conv_bn_relu_conv_relu", call, K2, 0, *[x] * 7, 1e-3, *outputs)
                inputs = (*[x] * 7, argmax, *[x] * 3)
                name = "launch_conv_bn_relu_conv_relu_backward"
                yield from head.record(name, call, K2, 0, *inputs, 1e-3, *[x] * 7)


def launched(target: Target) -> dict[str, tuple[int, int]]:
    """Threads, and the most dynamic shared memory, of each kernel launched on such a GPU."""
    return _launched(target._replace(gpus="", threads=0, blocks=0))


@functools.cache
def _launched(target: Target) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for launch in _launches(target):
        name = plain(launch.kernel)
        threads, shared = found.get(name, (0, 0))
        found[name] = max(threads, launch.threads), max(shared, launch.shared_bytes)
    return found


# ---- budgets and the table -----------------------------------------------------------------------


def is_excused(kernel: str) -> bool:
    return any(re.match(pattern, kernel) for pattern in FEW_THREADS)


def problems(target: str) -> list[str]:
    """Sentences about kernels that break their budgets."""
    limits, found = TARGETS[target], []
    for kernel, r in compiled(target).items():
        if r.spilled_bytes or r.stack_bytes:
            found.append(f"{kernel}: {r.spilled_bytes} bytes spilled, {r.stack_bytes} of stack")
        if r.serialized:
            found.append(f"{kernel}: ptxas waits for each of its wgmmas")
        if kernel not in launched(limits):
            if not any(kernel in launched(other) for other in TARGETS.values()):
                found.append(f"{kernel}: no launcher was seen to launch it")
            continue
        threads, shared = launched(limits)[kernel]
        occupancy = r.occupancy(limits, threads, shared)
        if r.threads == 0:
            found.append(f"{kernel}: has no __launch_bounds__")
        elif threads > r.threads:
            found.append(f"{kernel}: launched with {threads} threads, bound to {r.threads}")
        elif r.registers > REGISTERS // (max(r.blocks, 1) * r.threads) // 8 * 8:
            found.append(f"{kernel}: {r.registers} registers are too many for {r.blocks} blocks")
        # Smaller multiprocessors hold fewer blocks; what counts there is the occupancy.
        elif limits.shared_bytes > SMALL and not is_excused(kernel):
            held = round(occupancy * limits.threads / threads)
            if held < min(r.blocks, limits.threads // threads):
                found.append(
                    f"{kernel}: an SM holds {held} blocks, not {r.blocks} ({shared} bytes of shared memory)"
                )
        if occupancy < LEAST_OCCUPANCY and not is_excused(kernel):
            found.append(f"{kernel}: occupancy {occupancy:.0%}, without a reason in FEW_THREADS")
    return [f"{target}, {sentence}" for sentence in found]


def rows(targets: Sequence[str]) -> Iterator[str]:
    yield "| kernel | threads | shared memory | " + " | ".join(targets) + " |"
    yield "| --- | ---: | ---: |" + " --- |" * len(targets)
    for kernel in sorted({kernel for target in targets for kernel in compiled(target)}):
        cells, sizes = [], set()
        for target in targets:
            if kernel not in compiled(target):
                cells.append("")
                continue
            r = compiled(target)[kernel]
            launch = launched(TARGETS[target]).get(kernel)
            if launch is None:
                cells.append(f"{r.registers}, not launched")
                continue
            threads, shared = launch
            sizes.add(shared + r.static_shared_bytes)
            tensor, *ways = r.counted
            share = f", {' / '.join(f'{tensor / way:.1%}' for way in ways)}" if tensor else ""
            spills = f" **{r.spilled_bytes} spilled**" if r.spilled_bytes else ""
            cells.append(f"{r.registers}, {r.occupancy(TARGETS[target], threads, shared):.0%}{share}{spills}")
        of_shared = " or ".join(f"{size:,}" for size in sorted(sizes))
        yield f"| `{kernel}` | {threads} | {of_shared} | {' | '.join(cells)} |"


HEAD = """# What the CUDA kernels take of a multiprocessor

Written by `python tests/cuda_resources.py`: nvcc {nvcc}, every kernel for every target. A cell is registers a thread,
occupancy (resident warps of those that an SM can hold, by the published limits) and, where the kernel uses them, the
share of the machine's instructions that the tensor cores execute (HMMA, of 16 x 8 sums, and HGMMA, of which a warp's
part are 16 x 64 or 16 x 128; the others load fragments, copy and count), in a step that loads an item of aligned
tensors, by the longest way through the innermost loop / in one without it; HGMMA's loop is a whole slab, nine steps and
up to three items, or a whole tile of a filter's gradient, 16 steps and all its items. Bytes spilled stand behind them:
there are {spilled} in all. Threads and shared memory (static and dynamic, in bytes, the most of the network's layers)
are those of the launchers, which take less where a multiprocessor has less, and keep some kernels to those that have
most.

`tests/test_cuda_resources.py` holds every kernel to the budget in its `__launch_bounds__(threads, blocks)`: no spills,
registers for so many blocks on every target, and on those with more than 100 KB of shared memory so many blocks; at
least {least:.0%} occupancy. All of it is the compiler's; [what a GPU took](cuda_measured.md).

"""
REASONS = """
Kernels under {least:.0%} occupancy, with the reason:

"""


def main(arguments: Sequence[str]) -> int:
    targets = list(arguments) or list(TARGETS)
    table = "\n".join(rows(targets)) + "\n"
    found = [sentence for target in targets for sentence in problems(target)]
    if arguments:
        print(table)
    else:
        version = _run("nvcc", "--version").partition("release ")[2].partition(",")[0]
        spilled = sum(r.spilled_bytes for target in targets for r in compiled(target).values())
        text = (
            HEAD.format(nvcc=version, spilled=spilled or "none", least=LEAST_OCCUPANCY)
            + table
            + REASONS.format(least=LEAST_OCCUPANCY)
        )
        TABLE.write_text(text + "".join(f"- `{name}`: {why}\n" for name, why in FEW_THREADS.items()))
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
