"""The roofline of the CUDA engine on the final network: what every kernel must move and compute, and how long that
takes at least on three GPUs. Arithmetic, not measurement.

    python benchmarks/roofline.py             writes docs/cuda_roofline.md
    python benchmarks/roofline.py --print     prints it

A kernel's bytes are its tensors once each (what it reads again comes from L2), its operations what its products
execute, channels rounded up to whole slabs included; its time is the larger of bytes / bandwidth and
operations / peak. The comparison counts, in the same way, the tensors that the kernels of PyTorch's eager step read and
write, channels_last, with Adam in its fused form.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from maskcore import models

TABLE = Path(__file__).parents[1] / "docs" / "cuda_roofline.md"
BATCHES = (32, 256)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Dense peaks by the vendor's data sheets, FLOP/s and byte/s, and the share of them that is expected; what one
    multiprocessor has is the GPU's by their number and the clock.

    mma.sync reaches 63 to 65% of an H100's tensor cores, whose full rate only wgmma has (arXiv 2501.12084); of that
    three quarters are expected, as cuBLAS reaches 77% with it. An H100's bandwidths of L2 are measured
    (benchmarks/cuda_ceilings.cu), the others about what microbenchmarks find (chipsandcheese.com).
    """

    name: str
    bf16: float
    tf32: float
    float32: float
    bandwidth: float
    expected: float  # share of the tensor cores' peak, by mma.sync
    expected_wgmma: float  # by wgmma, or 0 where there is none
    reachable: float  # share of it that mma.sync has
    target: str
    multiprocessors: int
    clock: float
    l2: float  # byte/s
    l2_same: float  # of what all blocks read at the same time, such as a filter
    shared_bytes: int  # of a multiprocessor

    def cycles(self, amount: float, rate: float) -> float:
        """Of a multiprocessor, for an amount of what the whole GPU does at this rate a second."""
        return amount / (rate / self.multiprocessors / self.clock)


GPUS = (
    Gpu(
        name="A100",
        bf16=312e12,
        tf32=156e12,
        float32=19.5e12,
        bandwidth=2.04e12,
        expected=0.60,
        expected_wgmma=0.0,
        reachable=1.0,
        target="sm_80",
        multiprocessors=108,
        clock=1.41e9,
        l2=4.5e12,
        l2_same=4.5e12,
        shared_bytes=164 * 1024,
    ),
    Gpu(
        name="H100",
        bf16=989e12,
        tf32=495e12,
        float32=67e12,
        bandwidth=3.35e12,
        expected=0.50,
        expected_wgmma=0.75,
        reachable=0.63,
        target="sm_90a",
        multiprocessors=132,
        clock=1.83e9,
        l2=7.4e12,
        l2_same=15e12,
        shared_bytes=228 * 1024,
    ),
    Gpu(
        name="RTX 4090",
        bf16=165e12,
        tf32=83e12,
        float32=82.6e12,
        bandwidth=1.01e12,
        expected=0.60,
        expected_wgmma=0.0,
        reachable=1.0,
        target="sm_89",
        multiprocessors=128,
        clock=2.52e9,
        l2=5.0e12,
        l2_same=5.0e12,
        shared_bytes=100 * 1024,
    ),
)
EXPECTED_BANDWIDTH = 0.80
#: Of the roof, for the layers of 64 and more channels.
DESIGNED = 0.70


@dataclasses.dataclass(frozen=True)
class Precision:
    name: str
    element: int  # bytes of an activation
    operand: int  # bytes of a packed filter's element
    slab: int  # channels that a product's reduction is rounded up to

    def peak(self, gpu: Gpu) -> float:
        return gpu.bf16 if self.name == "bf16" else gpu.tf32


PRECISIONS = (Precision("bf16", 2, 2, 32), Precision("tf32", 4, 4, 16))


@dataclasses.dataclass(frozen=True)
class Kernel:
    layer: str
    name: str
    bytes: float
    operations: float = 0.0  # of tensor cores
    wgmma: bool = (
        False  # by it, where the GPU has it (csrc/conv_halo_wgmma.cuh, csrc/conv_weight_gradient_wgmma.cuh)
    )

    def seconds(self, gpu: Gpu, precision: Precision, expected: bool = False) -> float:
        bandwidth = gpu.bandwidth * (EXPECTED_BANDWIDTH if expected else 1)
        share = gpu.expected_wgmma if self.wgmma and gpu.expected_wgmma else gpu.expected
        peak = precision.peak(gpu) * (share if expected else 1)
        return max(self.bytes / bandwidth, self.operations / peak)

    def bound(self, gpu: Gpu, precision: Precision) -> str:
        return "compute" if self.operations / precision.peak(gpu) > self.bytes / gpu.bandwidth else "memory"


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def splits(blocks: int, c_tiles: int, k_tiles: int) -> int:
    return max(1, blocks // (c_tiles * k_tiles))


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of the network at a batch size."""

    name: str
    N: int
    H: int
    W: int
    C: int
    K: int
    bn: bool
    pool: bool

    @property
    def x(self) -> int:
        return self.N * self.H * self.W * self.C

    @property
    def z(self) -> int:  # the convolution's own output
        return self.N * (self.H - 2) * (self.W - 2) * self.K

    @property
    def y(self) -> int:  # what the layer gives
        P, Q = self.H - 2, self.W - 2
        return self.N * (P // 2) * (Q // 2) * self.K if self.pool else self.z

    @property
    def weights(self) -> int:
        return 9 * self.C * self.K

    @property
    def of_pictures(self) -> bool:
        """Has kernels of its own (csrc/conv_first_layer.cuh), which gather its 27 numbers a pixel, padded to 32."""
        return self.C <= 3

    def operations(self, C: int, K: int, slab: int) -> float:
        """Of C input channels in slabs and K output channels in tiles of 32."""
        numbers = up(9 * C, slab) if C <= 3 else 9 * up(C, slab)
        return 2 * numbers * up(K, 32) * self.N * (self.H - 2) * (self.W - 2)

    @property
    def splits(self) -> int:
        """Of the weight gradient's reduction (csrc/conv_weight_gradient.cuh) on an H100, which has most of these."""
        width = 64 if min(self.C, self.K) > 32 else 32
        c_tiles, k_tiles = up(self.C, width) // width, 1 if self.K <= 32 else up(self.K, 64) // 64
        return splits(132 * 64 // width, c_tiles, k_tiles)


def convolutions(N: int) -> list[Conv]:
    found = []
    for at in models.place("final"):
        if isinstance(at.layer, models.Conv):
            H, W, C = at.input_shape
            found.append(Conv(at.name, N, H, W, C, at.layer.channels, at.layer.bn, at.layer.pool))
    return found


def denses(N: int) -> list[tuple[str, int, int]]:
    """Name, inputs, outputs."""
    return [
        (at.name, at.input_shape[0], at.layer.units)
        for at in models.place("final")
        if isinstance(at.layer, models.Dense)
    ]


def dropouts(N: int) -> list[tuple[str, int]]:
    """Name, elements."""
    return [
        (at.name, N * at.input_shape[0])
        for at in models.place("final")
        if isinstance(at.layer, models.Dropout)
    ]


def parameters() -> int:
    return sum(row.trainable for row in models.Network("final").table())


# ---- maskcore's kernels --------------------------------------------------------------------------


def packed(conv: Conv, p: Precision) -> Kernel:
    return Kernel(conv.name, "pack_filter", conv.weights * (4 + p.operand))


def forward(conv: Conv, p: Precision, training: bool) -> Iterator[Kernel]:
    e, filters = p.element, conv.weights * p.operand
    operations, wgmma = conv.operations(conv.C, conv.K, p.slab), conv.K > 32 and not conv.of_pictures
    if not conv.of_pictures:
        yield packed(conv, p)
    if conv.bn and training:
        yield Kernel(conv.name, "conv, moments", (conv.x + conv.z) * e + filters, operations, wgmma)
        yield Kernel(conv.name, "batch norm, ReLU", 2 * conv.z * e)
    elif conv.pool:
        moved = conv.x * e + conv.y * (e + 1) + filters
        yield Kernel(conv.name, "conv, ReLU, max-pool", moved, operations, wgmma)
    else:
        yield Kernel(conv.name, "conv, ReLU", (conv.x + conv.z) * e + filters, operations, wgmma)


def backward(conv: Conv, p: Precision, need_dx: bool) -> Iterator[Kernel]:
    e, filters = p.element, conv.weights * p.operand
    # The gradient at the convolution's output, computed while it is loaded: of dy and y, and the places of a pool.
    source = conv.y * (2 * e + 1) if conv.pool else 2 * conv.z * e
    if conv.bn:
        yield Kernel(conv.name, "sums of the batch norm's gradient", source)
    if need_dx:
        yield packed(conv, p)
        back = conv.operations(conv.K, conv.C, p.slab) * conv.H * conv.W / ((conv.H - 2) * (conv.W - 2))
        yield Kernel(conv.name, "backward-data", source + conv.x * e + filters, back, wgmma=conv.C > 32)
    partial = 4 * conv.splits * (conv.weights + conv.K)
    # Here the channels are rows and columns, and the pixels are the reduction.
    rows, columns = up(conv.K, 32), 32 if conv.of_pictures else 9 * up(conv.C, 32)
    operations = 2 * rows * columns * conv.N * (conv.H - 2) * (conv.W - 2)
    wgmma = e == 2 and min(conv.C, conv.K) > 32  # which transposes no TF32
    yield Kernel(conv.name, "backward-weight", conv.x * e + source + partial, operations, wgmma)
    yield Kernel(conv.name, "sum of the splits", partial + 4 * (conv.weights + conv.K))


def dense_forward(name: str, N: int, inputs: int, outputs: int, p: Precision) -> Iterator[Kernel]:
    weights, e = inputs * outputs, p.element
    if e == 2:
        yield Kernel(name, "weights to bfloat16", weights * (4 + 2))
    yield Kernel(name, "product, bias, ReLU", (N * inputs + weights + N * outputs) * e, 2 * N * weights)


def dense_backward(name: str, N: int, inputs: int, outputs: int, p: Precision) -> Iterator[Kernel]:
    weights, e = inputs * outputs, p.element
    both = (N * inputs + weights + N * outputs) * e
    yield Kernel(name, "backward-data", both, 2 * N * weights)
    yield Kernel(name, "backward-weight", both, 2 * N * weights)
    if e == 2:
        yield Kernel(name, "gradient to float32", weights * (2 + 4))


def training_apart(N: int, p: Precision) -> list[Kernel]:
    """The step with every convolution as an operator of its own."""
    convs, e = convolutions(N), p.element
    pixels = N * convs[0].H * convs[0].W * 3
    kernels = [Kernel("input", "uint8 to augmented batch", pixels * (1 + e))]
    for conv in convs:
        kernels += forward(conv, p, training=True)
    between = [Kernel(name, "dropout", 2 * size * e) for name, size in dropouts(N)]
    for i, (name, inputs, outputs) in enumerate(denses(N)):
        kernels += between[i : i + 1]
        kernels += dense_forward(name, N, inputs, outputs, p)
    classes = denses(N)[-1][2]
    kernels.append(Kernel("loss", "softmax cross-entropy", 8 * N * (classes + 1)))
    kernels.append(Kernel("loss", "its gradient", 8 * N * (classes + 1)))
    for i, (name, inputs, outputs) in reversed(list(enumerate(denses(N)))):
        kernels += dense_backward(name, N, inputs, outputs, p)
        kernels += [dataclasses.replace(k, name="dropout, backward") for k in between[i : i + 1]]
    for conv in reversed(convs):
        kernels += backward(conv, p, need_dx=conv is not convs[0])
    kernels.append(Kernel("all", "Adam", 28 * parameters()))
    return kernels


def training(N: int, p: Precision) -> list[Kernel]:
    """The step as it is: a convolution, its batch norm and the convolution behind it are one operator
    (csrc/conv_bn_relu_conv_relu_cuda.cu): no pass makes the normalised tensor, and the second one's backward-data
    reads z for the sums of the batch norm's gradient, which no pass makes either."""
    convs = convolutions(N)
    behind = {second.name: first for first, second in itertools.pairwise(convs) if first.bn}
    kernels = []
    for kernel in training_apart(N, p):
        if kernel.name in ("batch norm, ReLU", "sums of the batch norm's gradient"):
            continue
        if kernel.name == "backward-data" and kernel.layer in behind:
            first = behind[kernel.layer]
            # Three floats a channel and tile of 128 pixels, written and read.
            sums = 2 * 12 * first.z / 128
            kernel = dataclasses.replace(kernel, bytes=kernel.bytes + first.z * p.element + sums)
        kernels.append(kernel)
    return kernels


def inference(N: int, p: Precision) -> list[Kernel]:
    kernels = [Kernel("input", "uint8 to batch", N * 256 * 256 * 3 * (1 + p.element))]
    for conv in convolutions(N):
        kernels += forward(conv, p, training=False)
    for name, inputs, outputs in denses(N):
        kernels += dense_forward(name, N, inputs, outputs, p)
    return kernels


# ---- what a multiprocessor has to do -------------------------------------------------------------

KERNELS = TABLE.with_name("cuda_kernels.md")
TILE = 128  # pixels
PATCH = 192
ROW = 64  # bytes: of a pixel's or an output channel's slab
MIDDLE_FILTER, NARROW_FILTER = 72 * 1024, 36 * 1024  # bytes that may stay in shared memory
ROOM = 2 * (256 + 2 * PATCH * ROW + MIDDLE_FILTER + 1024)  # of two blocks that keep so much
WGMMA_FILTER = 144 * 1024  # of a block with two tiles


@functools.cache
def tiling(
    N: int, P: int, Q: int, pooled: bool, most_pixels: int = TILE, most_patch: int = PATCH
) -> tuple[int, int]:
    """Tiles and pixels of a patch, as SpreadTiling::choose of csrc/conv_tiling.cuh has them."""
    step, groups = (2, 2) if pooled else (1, 8)
    if pooled:
        P, Q = P // 2 * 2, Q // 2 * 2

    def crowded(rows: int, cols: int, pitch: int) -> int:
        count = [0] * 8
        for row in range(0, rows, step):
            for i in range(cols // step % groups):
                count[(row * pitch // step + i) % groups] += 1
        shared = rows // step * (cols // step // groups)
        return sum(max(0, count[group] + shared - most_pixels // 8) for group in range(groups))

    least, best = math.inf, (0, 0)
    for cols in range(step, min(Q, most_pixels // step) + 1, step):
        of_one_row = N * P * -(-Q // cols) * most_pixels
        for rows in range(most_pixels // cols // step * step, step - 1, -step):
            if of_one_row / rows >= least:
                break
            for stack in (P, up(P, rows)):
                for pitch in [(cols + 5) // 8 * 8 + 4] if pooled else [cols + 2, cols + 3]:
                    boundaries = 0 if stack % rows == 0 else (stack - 1 + rows - 1) // stack
                    patch = (rows + 2 + 2 * boundaries) * pitch
                    tiles = -(-N * stack // rows) * -(-Q // cols)
                    cost = tiles * (most_pixels + 0.25 * patch)
                    if patch > most_patch or cost >= least:
                        continue
                    cost += tiles * 2 * min(crowded(rows, cols, pitch), most_pixels // 8)
                    if cost < least:
                        least, best = cost, (tiles, patch)
    return best


def strips(N: int, P: int, Q: int, rows: int, most_patch: int) -> tuple[int, int]:
    """The same of StripTiling::choose: tiles of eight columns, of stacks of an even number of rows an image."""

    def patch(stack: int) -> int:
        boundaries = 0 if stack % rows == 0 else (stack - 1 + rows - 1) // stack
        return (rows + 2 + 2 * boundaries) * (8 + 2)

    even = up(P, 2)
    stack = even if patch(even) <= most_patch else up(even, rows)
    return -(-N * stack // rows) * -(-Q // 8), patch(stack)


@functools.cache
def instructions() -> dict[tuple[str, str], tuple[float, float]]:
    """Kernel and target: machine instructions for each of the tensor cores in a step that loads an item, and in one
    without it, of the compiled kernels (tests/cuda_resources.py)."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in KERNELS.read_text().splitlines()
        if line.startswith("| ")
    ]
    targets, found = rows[0][3:], {}
    for kernel, _, _, *cells in rows[2:]:
        for target, cell in zip(targets, cells, strict=True):
            shares = [float(share) for share in re.findall(r"([\d.]+)%", cell)[1:]]
            if shares:
                found[kernel.strip("`"), target] = 100 / shares[0], 100 / shares[1]
    return found


@dataclasses.dataclass(frozen=True)
class Pass:
    """A convolution of the step, as its kernel is compiled: forward, backward-data or backward-weight."""

    conv: Conv
    before: Conv  # the layer in front
    name: str
    p: Precision

    @property
    def math(self) -> tuple[str, str]:
        return ("Bf16", "bf16") if self.p.element == 2 else ("Tf32", "float")

    @property
    def source(self) -> str:
        of_input = "BatchNormRelu" if self.before.bn else "Activation"
        return of_input if self.name == "forward" else self.gradient

    @property
    def gradient(self) -> str:
        bn, pool = "BatchNormReluGradient", "PooledReluGradient"
        return bn if self.conv.bn else pool if self.conv.pool else "ReluGradient"

    def reads(self, source: str) -> float:
        """Tensors that an item is made of; a pool's places are bytes."""
        several = {
            "ReluGradient": 2,
            "BatchNormReluGradient": 2,
            "PooledReluGradient": 2 + 1 / self.p.element,
        }
        return several.get(source, 1)

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """Of the multiprocessor that has most to do, by what it has to do."""
        if self.name != "backward-weight":
            return self.of_pixels(gpu)
        return self.of_weight_by_wgmma(gpu) if self.is_by_wgmma(gpu) else self.of_weight(gpu)

    def is_by_wgmma(self, gpu: Gpu) -> bool:
        both = min(self.conv.C, self.conv.K) if self.p.element == 2 else 0  # wgmma transposes no TF32
        channels = {"forward": self.conv.K, "backward-data": self.conv.C, "backward-weight": both}[self.name]
        return channels > 32 and gpu.expected_wgmma > 0

    def tensor_cycles(self, gpu: Gpu, products: float) -> float:
        return gpu.cycles(products, self.p.peak(gpu) / 2 * (1 if self.is_by_wgmma(gpu) else gpu.reachable))

    def units(
        self,
        gpu: Gpu,
        tiles: int,
        products: float,
        issued: float,
        shared: float,
        l2: float,
        columns: int = 8,
        same: float = 0,
    ) -> dict[str, float]:
        """Of tiles with so many products, instructions for each of the tensor cores', and bytes; `same` are those that
        other blocks read, too."""
        depth = columns * 16 * self.p.slab / 2  # products of a warp's instruction
        return {
            "tensor cores": self.tensor_cycles(gpu, tiles * products),
            "shared memory": tiles * shared / 128,
            "L2": tiles * (gpu.cycles(l2, gpu.l2) + gpu.cycles(same, gpu.l2_same)),
            "issue": tiles * products / depth * issued / 4,
        }

    def of_pixels(self, gpu: Gpu) -> dict[str, float]:
        """csrc/conv_halo_tile.cuh, csrc/conv_halo_wgmma.cuh"""
        conv, p, (math_, element), back = self.conv, self.p, self.math, self.name == "backward-data"
        C, K = (conv.K, conv.C) if back else (conv.C, conv.K)
        P, Q = (conv.H, conv.W) if back else (conv.H - 2, conv.W - 2)
        pooled = conv.pool and not back
        tiles, patch = tiling(conv.N, P, Q, pooled)

        def rounds(columns: int, together: int = 1) -> int:
            """Tiles of the multiprocessor that gets most of them."""
            blocks = -(-tiles // together) * up(K, columns) // columns
            return together * -(-blocks // gpu.multiprocessors)

        columns = 128 if K > 64 else 64 if K > 32 else 32
        together = 1  # tiles that share a filter
        slabs = up(C, p.slab) // p.slab
        if self.is_by_wgmma(gpu):
            filters = 9 * slabs * columns * ROW
            resident = columns == 64 and filters <= WGMMA_FILTER
            together = 2 if resident and filters > MIDDLE_FILTER else 1
            kernel = (
                f"conv_halo_wgmma_kernel<WgmmaTile<{math_}, {columns}, {together}, {str(resident).lower()}>"
            )
            threads, of_instruction, of_loop = 256, columns, 3
            # A step's fragments of 128 rows, and its filter for each 64 of them.
            fragments: float = 9 * slabs * (TILE + 2 * columns) * ROW
        else:
            if columns == 128 and 10 * 64 * rounds(64) <= 9 * 128 * rounds(128):
                columns = 64  # the last round of 128 is short
            filters = 9 * slabs * columns * ROW
            resident = K <= 32 and filters <= NARROW_FILTER
            resident |= 32 < K <= 64 and filters <= MIDDLE_FILTER and gpu.shared_bytes >= ROOM
            shape = {128: "2, 4, 4, 2", 64: f"2, 2, 4, {2 if resident else 4}", 32: "4, 1, 2, 4"}[columns]
            kernel = f"conv_halo_tile_kernel<HaloTile<{math_}, {shape}, {str(resident).lower()}>"
            threads, of_instruction, of_loop = 256 if columns == 128 else 128, 8, 9
            rows = 64 if columns > 32 else 32  # of a warp, by 32 columns
            fragments = 9 * slabs * TILE * columns / (rows * 32) * (rows + 32) * ROW
        sums = back and self.before.bn
        plain = f"StoreOutput<{element}, {str(not back and not conv.bn).lower()}, {str(not back and conv.bn).lower()}>"
        output = f"MaxPoolOutput<{element}>" if pooled else f"ReluSumsOutput<{element}>" if sums else plain
        products = TILE * columns * 9 * slabs * p.slab
        streamed = 0 if resident else filters / together
        staged = 2 * TILE * columns * 4
        written = TILE * columns * p.element * ((1 + 1 / p.element) / 4 if pooled else 2 if sums else 1)
        l2 = patch * slabs * ROW * self.reads(self.source) + written
        shared = fragments + patch * slabs * ROW + streamed + staged
        loading, other = instructions()[f"{kernel}, {self.source}<{element}>, {output}>", gpu.target]
        # Of a thread and a step; the longest way through wgmma's, which is a whole slab, loads three.
        items = patch * ROW / 16 / threads / of_loop
        issued = other + items * (loading - other)
        return self.units(
            gpu, rounds(columns, together), products, issued, shared, l2, of_instruction, streamed
        )

    def of_weight(self, gpu: Gpu) -> dict[str, float]:
        """csrc/conv_weight_gradient.cuh, tiles of 64 output and 64 or 32 input channels."""
        conv, p, (math_, element) = self.conv, self.p, self.math
        width, lanes = 64 if conv.C > 32 else 32, 16 // p.operand
        pixels, most_patch = (14 * lanes, 24 * lanes) if width == 64 else (10 * lanes, 16 * lanes)
        c_tiles, k_tiles, held = up(conv.C, width) // width, up(conv.K, 64) // 64, 64 // width
        of_input = "BatchNormRelu" if self.before.bn else "Activation"
        sources = f"{of_input}<{element}>, {self.gradient}<{element}>"
        tiles, patch = tiling(conv.N, conv.H - 2, conv.W - 2, False, pixels, most_patch)
        parts = min(splits(held * gpu.multiprocessors, c_tiles, k_tiles), -(-tiles // 4))
        most = -(-tiles // parts) * -(-parts * c_tiles * k_tiles // gpu.multiprocessors)
        products = pixels * 64 * 9 * width
        # A warp's 32 x 72 sums take 104 rows of 32 bytes a step.
        fragments = products / (32 * 72 * p.slab / 2) * 104 * ROW / 2
        operands = (pixels * 64 + patch * width) * p.operand
        l2 = (pixels * 64 * self.reads(self.gradient) + patch * width) * p.element
        kernel = f"conv_weight_gradient_kernel<GradientTile<{math_}, 2, {width // 8}>, {sources}>"
        # The longest way is that of a thread whose items all are there.
        loading, other = instructions()[kernel, gpu.target]
        of_threads = lanes * 8 * width  # channels of an item of each
        most_items = sum(-(-n // of_threads) for n in (pixels * 64, most_patch * width))
        items = (pixels * 64 + patch * width) / of_threads / most_items
        return self.units(gpu, most, products, other + items * (loading - other), fragments + operands, l2)

    def of_weight_by_wgmma(self, gpu: Gpu) -> dict[str, float]:
        """csrc/conv_weight_gradient_wgmma.cuh, tiles of 64 by 64 channels and 256 pixels."""
        conv, rows, steps, most_patch, threads = self.conv, 32, 16, 380, 384
        c_tiles, k_tiles = up(conv.C, 64) // 64, up(conv.K, 64) // 64
        tiles, patch = strips(conv.N, conv.H - 2, conv.W - 2, rows, most_patch)
        parts = min(splits(gpu.multiprocessors, c_tiles, k_tiles), -(-tiles // 4))
        most = -(-tiles // parts) * -(-parts * c_tiles * k_tiles // gpu.multiprocessors)
        pixels, chunks = 8 * rows, 8
        # Of x for each product, of g for each three, 64 channels of 16 pixels.
        fragments = steps * (9 + 3) * 64 * 16 * 2
        operands = (pixels + patch) * 64 * 2
        l2 = (pixels * self.reads(self.gradient) + patch) * 64 * self.p.element
        of_input = "BatchNormRelu" if self.before.bn else "Activation"
        kernel = f"conv_weight_gradient_wgmma_kernel<{of_input}<bf16>, {self.gradient}<bf16>>"
        # The longest way through a tile is that of a thread whose items all are there.
        loading, other = instructions()[kernel, gpu.target]
        most_items = -(-pixels * chunks // threads) + -(-most_patch * chunks // threads)
        items = (pixels + patch) * chunks / threads / most_items
        products = pixels * 64 * 9 * 64
        # Beside 48 products there are 16 of the bias, of which each warpgroup takes a third.
        of_products = 1 if self.conv.bn else (48 + 16) / 48
        issued = of_products * (other + items * (loading - other))
        return self.units(gpu, most, products, issued, fragments + operands, l2, 64)


def passes(N: int, p: Precision) -> Iterator[tuple[Pass, Kernel]]:
    """Of the layers of 64 and more channels, with what each must move and compute."""
    named = {"conv, moments", "conv, ReLU", "conv, ReLU, max-pool"}
    kernels = {
        (kernel.layer, "forward" if kernel.name in named else kernel.name): kernel
        for kernel in training(N, p)
    }
    for before, conv in itertools.pairwise(convolutions(N)):
        if conv.K >= 64:
            for name in ("forward", "backward-data", "backward-weight"):
                yield Pass(conv, before, name, p), kernels[conv.name, name]


def share_of_roof(work: Pass, kernel: Kernel, gpu: Gpu) -> tuple[float, str]:
    """Of the roof with mma.sync, and what keeps it there."""
    memory = kernel.bytes / gpu.bandwidth
    products = work.tensor_cycles(gpu, kernel.operations / 2 / gpu.multiprocessors) / gpu.clock
    times = {name: cycles / gpu.clock for name, cycles in work.cycles(gpu).items()} | {"memory": memory}
    bound = max(times, key=lambda name: times[name])
    return max(memory, products) / times[bound], bound


def reached(N: int, p: Precision) -> Iterator[str]:
    names = ("forward", "backward-data", "backward-weight")
    yield row("layer", *(f"{gpu.name} {name}" for gpu in GPUS for name in names))
    yield row("---", *["---"] * len(GPUS) * len(names))
    works = list(passes(N, p))
    for of_layer in (works[i : i + len(names)] for i in range(0, len(works), len(names))):
        cells = []
        for gpu in GPUS:
            for work, kernel in of_layer:
                share, bound = share_of_roof(work, kernel, gpu)
                cells.append(f"{share:.0%} {bound}" if share >= DESIGNED else f"**{share:.0%}** {bound}")
        yield row(of_layer[0][0].conv.name, *cells)


def bounded() -> Iterator[str]:
    yield row("", "batch", *(gpu.name for gpu in GPUS))
    yield row(*["---"] * 2, *["---:"] * len(GPUS))
    for p in PRECISIONS:
        for N in BATCHES:
            cells = []
            for gpu in GPUS:
                expected = total(training(N, p), gpu, p, True)
                longer = 0.0
                for work, kernel in passes(N, p):
                    times = [cycles / gpu.clock for cycles in work.cycles(gpu).values()]
                    longer += max(0.0, max(times) - kernel.seconds(gpu, p, True))
                cells.append(f"{N / expected:,.0f} / {N / (expected + longer):,.0f}")
            yield row(p.name, f"{N}", *cells)


# ---- PyTorch's eager kernels ---------------------------------------------------------------------


def eager_forward(conv: Conv, p: Precision, training: bool) -> Iterator[Kernel]:
    e, z, pooled = p.element, conv.z * p.element, conv.y
    filters = conv.weights * e
    if e == 2:
        yield Kernel(conv.name, "autocast of the filter", conv.weights * (4 + 2))
    yield Kernel(conv.name, "conv", conv.x * e + z + filters, conv.operations(conv.C, conv.K, p.slab))
    yield Kernel(conv.name, "bias", 2 * z)
    if conv.bn:
        yield Kernel(conv.name, "batch norm", (3 if training else 2) * z)
    yield Kernel(conv.name, "ReLU", 2 * z)
    if conv.pool:
        yield Kernel(conv.name, "max-pool", z + pooled * (e + 8))  # places are int64


def eager_backward(conv: Conv, p: Precision, need_dx: bool) -> Iterator[Kernel]:
    e, z = p.element, conv.z * p.element
    filters = conv.weights * e
    if conv.pool:
        yield Kernel(conv.name, "max-pool, backward", z + conv.y * (e + 8))
    yield Kernel(conv.name, "ReLU, backward", 3 * z)
    if conv.bn:
        yield Kernel(conv.name, "batch norm, backward", 5 * z)
    yield Kernel(conv.name, "gradient of the bias", z)
    operations = conv.operations(conv.C, conv.K, p.slab)
    if need_dx:
        yield Kernel(conv.name, "backward-data", z + conv.x * e + filters, operations)
    yield Kernel(conv.name, "backward-weight", z + conv.x * e + filters, operations)
    if e == 2:
        yield Kernel(conv.name, "gradient to float32", conv.weights * (2 + 4))


def eager_training(N: int, p: Precision) -> list[Kernel]:
    convs, e = convolutions(N), p.element
    kernels: list[Kernel] = []
    for conv in convs:
        kernels += eager_forward(conv, p, training=True)
    for name, size in dropouts(N):
        kernels.append(Kernel(name, "dropout and its mask", size * (2 * e + 1)))
        kernels.append(Kernel(name, "dropout, backward", size * (2 * e + 1)))
    for name, inputs, outputs in denses(N):
        kernels += dense_forward(name, N, inputs, outputs, p)
        kernels += dense_backward(name, N, inputs, outputs, p)
    for conv in reversed(convs):
        kernels += eager_backward(conv, p, need_dx=conv is not convs[0])
    kernels.append(Kernel("all", "Adam, fused", 28 * parameters()))
    return kernels


def eager_inference(N: int, p: Precision) -> list[Kernel]:
    kernels: list[Kernel] = []
    for conv in convolutions(N):
        kernels += eager_forward(conv, p, training=False)
    for name, inputs, outputs in denses(N):
        kernels += dense_forward(name, N, inputs, outputs, p)
    return kernels


# ---- the page ------------------------------------------------------------------------------------

Step = Callable[[int, Precision], list[Kernel]]
STEPS: tuple[tuple[str, Step, Step], ...] = (
    ("a training step", training, eager_training),
    ("inference", inference, eager_inference),
)


def total(kernels: Sequence[Kernel], gpu: Gpu, p: Precision, expected: bool = False) -> float:
    return math.fsum(kernel.seconds(gpu, p, expected) for kernel in kernels)


def moved(kernels: Sequence[Kernel]) -> float:
    return math.fsum(kernel.bytes for kernel in kernels)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def summary() -> Iterator[str]:
    yield row(
        "", "batch", "kernels", "GB", "PyTorch eager GB", "share", *(f"{gpu.name} img/s" for gpu in GPUS)
    )
    yield row(*["---"] * 2, *["---:"] * (4 + len(GPUS)))
    for what, ours, theirs in STEPS:
        for p in PRECISIONS:
            for N in BATCHES:
                kernels, eager = ours(N, p), theirs(N, p)
                speeds = []
                for gpu in GPUS:
                    roof, expected, baseline = (
                        N / total(kernels, gpu, p),
                        N / total(kernels, gpu, p, True),
                        N / total(eager, gpu, p),
                    )
                    speeds.append(f"{roof:,.0f} / {expected:,.0f} / {baseline:,.0f}")
                yield row(
                    f"{what}, {p.name}",
                    f"{N}",
                    f"{len(kernels)}",
                    f"{moved(kernels) / 1e9:.2f}",
                    f"{moved(eager) / 1e9:.2f}",
                    f"{moved(kernels) / moved(eager):.0%}",
                    *speeds,
                )


def gains() -> Iterator[str]:
    yield row("", "batch", "GB apart", "GB", *(f"{gpu.name}" for gpu in GPUS))
    yield row(*["---"] * 2, *["---:"] * (2 + len(GPUS)))
    for p in PRECISIONS:
        for N in BATCHES:
            apart, heads = training_apart(N, p), training(N, p)
            cells = []
            for gpu in GPUS:
                saved = [
                    1 - total(heads, gpu, p, expected) / total(apart, gpu, p, expected)
                    for expected in (False, True)
                ]
                cells.append(f"{saved[0]:.1%} / {saved[1]:.1%}")
            yield row(p.name, f"{N}", f"{moved(apart) / 1e9:.2f}", f"{moved(heads) / 1e9:.2f}", *cells)


def hopper() -> Iterator[str]:
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    without = dataclasses.replace(h100, expected_wgmma=0.0)
    yield row("", "batch", "mma.sync img/s", "wgmma img/s", "less time")
    yield row(*["---"] * 2, *["---:"] * 3)
    for what, ours, _ in STEPS:
        for p in PRECISIONS:
            for N in BATCHES:
                kernels = ours(N, p)
                before, now = total(kernels, without, p, True), total(kernels, h100, p, True)
                rates = f"{N / before:,.0f}", f"{N / now:,.0f}"
                yield row(f"{what}, {p.name}", f"{N}", *rates, f"{1 - now / before:.0%}")


def details(step: Step, p: Precision) -> Iterator[str]:
    heads = [
        f"{unit} at {N}" for N in BATCHES for unit in ("MB", "GFLOP", *(f"{gpu.name} us" for gpu in GPUS))
    ]
    yield row("layer", "kernel", *heads)
    yield row("---", "---", *["---:"] * len(heads))
    by_batch = [step(N, p) for N in BATCHES]
    for same in zip(*by_batch, strict=True):
        cells = []
        for kernel in same:
            cells += [
                f"{kernel.bytes / 1e6:.1f}",
                f"{kernel.operations / 1e9:.1f}" if kernel.operations else "",
            ]
            for gpu in GPUS:
                mark = "*" if kernel.bound(gpu, p) == "compute" else ""
                cells.append(f"{1e6 * kernel.seconds(gpu, p):.1f}{mark}")
        yield row(same[0].layer, same[0].name, *cells)
    sums = []
    for kernels in by_batch:
        sums += [f"{moved(kernels) / 1e6:.0f}", f"{math.fsum(k.operations for k in kernels) / 1e9:.0f}"]
        sums += [f"{1e6 * total(kernels, gpu, p):.0f}" for gpu in GPUS]
    yield row("sum", "", *sums)


PEAKS = ";\n".join(
    f"{gpu.name} {gpu.bf16 / 1e12:.0f} TFLOP/s in bf16, {gpu.tf32 / 1e12:.0f} in TF32, {gpu.bandwidth / 1e12:.2f} TB/s"
    for gpu in GPUS
)
EXPECTED = ", ".join(
    f"{gpu.expected:.0%} of {gpu.name}'s"
    + (f", {gpu.expected_wgmma:.0%} by wgmma" if gpu.expected_wgmma else "")
    for gpu in GPUS
)
HEAD = f"""# The roofline of the CUDA engine

Written by `python benchmarks/roofline.py` from the layer table. **Predicted, by arithmetic; what an H200 took is in
[cuda_measured.md](cuda_measured.md), and is 1.8 to 2.4 times what is called expected here:** the arithmetic counts what
each unit has to do, not what a kernel waits for between barriers; and in bf16 the filters' gradients there are older.

A kernel's bytes are its tensors once each, its operations those that its products execute (channels rounded up to
whole slabs), its time the larger of bytes / bandwidth and operations / peak; `*` marks what is bound by compute. Peaks:
{PEAKS}.
Starts of kernels, gaps between them and tiles that do not fill the last wave come on top.

PyTorch eager is the network of `torch.nn` layers in channels_last memory, under autocast for bf16 and with TF32 allowed
for tf32, as its kernels read and write tensors: convolution, bias, batch norm (statistics, then normalisation), ReLU,
max-pool with int64 places; each again in backward, and the bias' gradient; Adam fused, as here. How its input is made
is not counted.

Images a second are three figures: this engine's roof / what is expected of it ({EXPECTED_BANDWIDTH:.0%} of the
bandwidth; of the tensor cores {EXPECTED}) / PyTorch eager's roof.

"""


HEADS = """## A block's head as one operator

With each convolution as an operator of its own, a step has a pass that makes max(batch_norm(z), 0) and one for the sums
of its gradient. In `conv_bn_relu_conv_relu_train`, which the step takes, the next convolution makes the one while it
loads z, and its backward-data the other; the gain is that of the step's predicted time, by the roof / as expected.

"""


L2 = ", ".join(f"{gpu.l2 / 1e12:.1f}" for gpu in GPUS)
REACHED = f"""## How near the roof the kernels can come

Of the layers of 64 and more channels: the share of the roof above which the unit with most to do leaves, were all units
at work all the time: the tensor cores, shared memory (128 bytes a cycle), L2 (taken as {L2} TB/s, an H100's of
a filter as 15; each patch with all that makes it), the issue of instructions (four a cycle, as many as [the compiled
kernels](cuda_kernels.md) have in the longest way through a step, although what asks for the next patch comes once in
nine), memory. What a tile has beyond its image and the multiprocessor that gets most tiles count. An H100's forward and
backward-data are by wgmma, and in bf16 the filters' gradients; these in TF32, by mma.sync, are held against the
{GPUS[1].reachable:.0%} of its tensor cores that mma.sync has. Less than {DESIGNED:.0%} is in bold.

Where it is less:

- Filters' gradients in TF32 on an H100: for 18 products a step reads 22 fragments by 64 and 32 bits, which ldmatrix
  cannot transpose, beside the addresses, and the items that a batch norm makes are computed in float32. wgmma does
  not transpose 32 bits either.
- 128 columns on an H100: of the 2,304 cycles that the tensor cores take for a tile's slab shared memory is read for
  1,728 and written for 576 by the filter. Two tiles that share it, in a block that has the multiprocessor to itself,
  were slower when measured.
- Backward-data of block 2's first layer on A100 and H100: the items, a batch norm's gradient, are counted in each step.
- The last layers at batch 32 on an H100: of one or two rounds of tiles the last is not full.

Images a second of a training step, as expected above / if each kernel takes at least as long as its busiest unit:

"""


HOPPER = """## What wgmma brings on an H100, and what TMA would

mma.sync reaches at most 63 to 65% of an H100's tensor cores: a warp's 64 x 32 sums take its operands 24 cycles through
shared memory, and the tensor cores 16 cycles. wgmma reads 64 x 128 of four warps in 48 cycles for 64 of products
(csrc/conv_halo_wgmma.cuh: forward and backward-data of more than 32 output channels). In bf16 it also takes the
filters' gradients of more than 32 channels (csrc/conv_weight_gradient_wgmma.cuh), x from shared memory as it lies. TF32
cannot be transposed on the way, and convolutions of 32 channels are bound by memory: they are as on any GPU. An H100 is
expected to give, without wgmma (`MASKCORE_WGMMA=0`) and with it:

"""
DECISION = """

Measured on one, at batch 256 and before the kernels were tuned there: 11 and 12% less time for the kernels of a
training step in bf16 and in TF32, 28 and 29% for inference, without wgmma for the filters' gradients, which is newer
and has not run on a GPU. cuDNN's own wgmma convolutions, which do nothing but convolve, took 0.6 times as long as these
forward, and half to a third as long as mma.sync's for the filters' gradients.

TMA would bring a patch, zeros outside the image included, with one instruction of one thread, and a cluster's blocks
one filter for all of them, which would take half of the filter's bytes off L2. It can load plain tensors alone: a
ReLU's mask, a max-pool's unpooling and a batch norm are computed on the way into shared memory here. It is not written.
A B200 has tcgen05 in wgmma's place, and takes the kernels that every
GPU takes."""


def page() -> str:
    parts = [
        HEAD + "\n".join(summary()),
        HEADS + "\n".join(gains()),
        REACHED
        + "\n".join(bounded())
        + "\n\n"
        + "\n\n".join(
            f"{p.name}, batch {N}:\n\n" + "\n".join(reached(N, p)) for p in PRECISIONS for N in BATCHES
        ),
        HOPPER + "\n".join(hopper()) + DECISION,
    ]
    for what, ours, _ in STEPS:
        for p in PRECISIONS:
            parts.append(f"## {what[0].upper()}{what[1:]}, {p.name}\n\n" + "\n".join(details(ours, p)))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    if parser.parse_args().print:
        print(page(), end="")
    else:
        TABLE.write_text(page())


if __name__ == "__main__":
    main()
