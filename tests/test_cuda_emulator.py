"""The emulator that proves the CUDA kernels: its instructions do what the PTX ISA says, its detectors detect."""

from __future__ import annotations

import re
from typing import NamedTuple

import cuda_emulator
import numpy as np
import pytest
import torch
from cuda_emulator import (
    HERE,
    ORDERS,
    Fault,
    Kernels,
    LaunchError,
    Order,
    Output,
    Replacement,
    Traffic,
    Workspace,
    ptx_fragments,
)
from numpy.typing import NDArray
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not cuda_emulator.has_compiler(), reason="the emulator needs g++, addr2line and nm"
)

WARP, WARPGROUP = 32, 128
ELEMENTS = 256


@pytest.fixture(scope="module")
def instructions() -> Kernels:
    return cuda_emulator.build(HERE / "instructions.cu")


@pytest.fixture(scope="module")
def seeded() -> Kernels:
    return cuda_emulator.build(HERE / "seeded_faults.cu")


# Instructions. ----------------------------------------------------------------------------------------------


def fragments(
    matrix: NDArray[np.uint32], figure: ptx_fragments.Figure, elements: int, lanes: int = WARP
) -> NDArray[np.uint32]:
    """``[lane, element]``: what each lane holds of a matrix."""
    held = np.zeros((lanes, elements), np.uint32)
    for row, entries in enumerate(figure):
        for column, (lane, element) in enumerate(entries):
            held[lane, element] = matrix[row, column]
    return held


def pairs(elements: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Registers of two 16-bit elements each, the first one in the low half."""
    return np.ascontiguousarray(elements[:, 0::2] | elements[:, 1::2] << np.uint32(16))


def float_bits(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    return x.astype(np.float32).view(np.uint32)


@pytest.mark.parametrize(
    "figure",
    [
        ptx_fragments.MMA_M16N8K8_A,
        ptx_fragments.MMA_M16N8K8_B,
        ptx_fragments.MMA_M16N8_D,
        ptx_fragments.MMA_M16N8K16_A,
        ptx_fragments.MMA_M16N8K16_B,
        ptx_fragments.LDMATRIX,
        ptx_fragments.LDMATRIX_TRANS,
        ptx_fragments.WGMMA_M64K16_A,
        ptx_fragments.WGMMA_M64K8_A,
        ptx_fragments.wgmma_d(64),
        ptx_fragments.wgmma_d(128),
    ],
)
def test_a_figure_has_every_element_once(figure: ptx_fragments.Figure) -> None:
    entries = [entry for row in figure for entry in row]
    lanes = WARPGROUP if len(figure) == 64 else WARP
    each = len(entries) // lanes
    assert sorted(entries) == [(lane, element) for lane in range(lanes) for element in range(each)]


def test_the_figures_agree_with_the_formulas_beside_them() -> None:
    """The document gives row and column of each element besides: these are its words for the A matrices."""
    for row, entries in enumerate(ptx_fragments.MMA_M16N8K8_A):
        for column, (lane, i) in enumerate(entries):
            assert row == (lane >> 2 if i in (0, 2) else (lane >> 2) + 8)
            assert column == (lane % 4 if i in (0, 1) else lane % 4 + 4)
    for row, entries in enumerate(ptx_fragments.MMA_M16N8K16_A):
        for column, (lane, i) in enumerate(entries):
            assert row == (lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8)
            assert column == (lane % 4 * 2 + (i & 1) if i < 4 else lane % 4 * 2 + (i & 1) + 8)


def test_a_warpgroup_has_the_fragments_of_four_warps() -> None:
    """16 rows each; of D, eight columns beside another."""
    for figure, of_mma in (
        (ptx_fragments.WGMMA_M64K16_A, ptx_fragments.MMA_M16N8K16_A),
        (ptx_fragments.WGMMA_M64K8_A, ptx_fragments.MMA_M16N8K8_A),
    ):
        for row, entries in enumerate(figure):
            warp = row // 16 * WARP
            assert entries == [(warp + lane, element) for lane, element in of_mma[row % 16]]
    for row, entries in enumerate(ptx_fragments.wgmma_d(128)):
        for column, (thread, element) in enumerate(entries):
            lane, of_eight = ptx_fragments.MMA_M16N8_D[row % 16][column % 8]
            assert (thread, element) == (row // 16 * WARP + lane, column // 8 * 4 + of_eight)


def test_the_swizzled_rows_agree_with_the_formula() -> None:
    for row in range(32):
        for chunk in range(4):
            place = ptx_fragments.chunk_place(row, chunk, stride=512)
            assert place == ptx_fragments.swizzle(row * 64 + chunk * 16, bits=2, base=4, shift=3)


@pytest.mark.parametrize("order", ORDERS)
def test_mma_tf32(instructions: Kernels, order: Order) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-99, 100, shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    d = fragments(float_bits(c), ptx_fragments.MMA_M16N8_D, 4)
    # The 13 low bits of an operand are not looked at.
    noise_a, noise_b = rng.integers(0, 1 << 13, (2, WARP, 4)).astype(np.uint32)
    held_a = fragments(float_bits(a), ptx_fragments.MMA_M16N8K8_A, 4) | noise_a
    held_b = fragments(float_bits(b), ptx_fragments.MMA_M16N8K8_B, 2) | noise_b[:, :2]
    instructions.run("launch_mma_tf32", held_a, held_b, d, order=order)
    np.testing.assert_array_equal(d, fragments(float_bits(a @ b + c), ptx_fragments.MMA_M16N8_D, 4))


@pytest.mark.parametrize("order", ORDERS)
def test_mma_bf16(instructions: Kernels, order: Order) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-99, 100, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    d = fragments(float_bits(c), ptx_fragments.MMA_M16N8_D, 4)
    held_a = pairs(fragments(float_bits(a) >> np.uint32(16), ptx_fragments.MMA_M16N8K16_A, 8))
    held_b = pairs(fragments(float_bits(b) >> np.uint32(16), ptx_fragments.MMA_M16N8K16_B, 4))
    instructions.run("launch_mma_bf16", held_a, held_b, d, order=order)
    np.testing.assert_array_equal(d, fragments(float_bits(a @ b + c), ptx_fragments.MMA_M16N8_D, 4))


class Product(NamedTuple):
    """A wgmma's types."""

    of_bf16: bool
    depth: int
    figure: ptx_fragments.Figure

    def chunks(self, b: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Rows' words, by 16 bytes: of bfloat16 two a word; of TF32 with low bits that are not looked at."""
        bits = float_bits(b)
        if self.of_bf16:
            bits = bits[:, 0::2] >> np.uint32(16) | bits[:, 1::2]
        else:
            bits = bits | np.random.default_rng(1).integers(0, 1 << 13, bits.shape).astype(np.uint32)
        return bits.reshape(len(b), -1, 4)

    def fragments(self, a: NDArray[np.float32]) -> NDArray[np.uint32]:
        bits = float_bits(a)
        if self.of_bf16:
            return pairs(fragments(bits >> np.uint32(16), self.figure, 8, WARPGROUP))
        noise = np.random.default_rng(2).integers(0, 1 << 13, (WARPGROUP, 4)).astype(np.uint32)
        return fragments(bits, self.figure, 4, WARPGROUP) | noise


PRODUCTS = [Product(True, 16, ptx_fragments.WGMMA_M64K16_A), Product(False, 8, ptx_fragments.WGMMA_M64K8_A)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("product", PRODUCTS, ids=["bf16", "tf32"])
@pytest.mark.parametrize(
    ("columns", "groups", "stride"), [(64, 1, 512), (128, 1, 512), (64, 2, 512), (128, 2, 512), (64, 2, 1536)]
)
def test_wgmma(
    instructions: Kernels, columns: int, groups: int, stride: int, product: Product, order: Order
) -> None:
    """Two products on the same sums, of the two halves of b's rows; each warpgroup has its own a and b."""
    rng = np.random.default_rng(0)
    depth, figure = 2 * product.depth, ptx_fragments.wgmma_d(columns)
    shapes = ((groups, 64, depth), (groups, columns, depth), (groups, 64, columns))
    a, b, c = (rng.integers(-99, 100, shape).astype(np.float32) for shape in shapes)
    begins = [group * columns // 8 * stride for group in range(groups)]
    places = [
        begin + ptx_fragments.chunk_place(row, chunk, stride)
        for begin in begins
        for row in range(columns)
        for chunk in range(4)
    ]
    mode, unused = 2, 16
    descriptors = [
        ptx_fragments.matrix_descriptor(begin + half, unused, stride, 0, mode)
        for begin in begins
        for half in (0, 32)
    ]
    halves = a.reshape(groups, 64, 2, product.depth).transpose(2, 0, 1, 3)
    held = np.array([[product.fragments(of_group) for of_group in half] for half in halves])
    d = np.array([fragments(float_bits(of_group), figure, columns // 2, WARPGROUP) for of_group in c])
    chunks = np.concatenate([product.chunks(of_group) for of_group in b])
    memory = (held, chunks, np.array(places, np.int32), len(places), np.array(descriptors, np.uint64), d)
    instructions.run("launch_wgmma", *memory, columns, product.of_bf16, groups, order=order)
    for group in range(groups):
        exact = float_bits(a[group] @ b[group].T + c[group])
        np.testing.assert_array_equal(d[group], fragments(exact, figure, columns // 2, WARPGROUP))


def test_the_descriptor_of_swizzled_rows(instructions: Kernels) -> None:
    """Of sixteen times eight rows, and of the second half of each."""
    addresses, descriptors = np.zeros(32, np.uint32), np.zeros(32, np.uint64)
    instructions.run("launch_descriptor", Output(addresses), Output(descriptors))
    steps = [512 * (i // 2) + 32 * (i % 2) for i in range(32)]
    assert (addresses - addresses[0]).tolist() == steps
    assert addresses[0] % 512 == 0
    made = [ptx_fragments.matrix_descriptor(int(address), 16, 512, 0, mode=2) for address in addresses]
    assert descriptors.tolist() == made


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("leading", "stride", "shift"),
    [(128, 512, 256), (160, 592, 16), (128, 4112, 2048)],
    ids=["dense", "rows of ten pixels", "far apart"],
)
def test_wgmma_trans(
    instructions: Kernels, leading: int, stride: int, shift: int, groups: int, order: Order
) -> None:
    """Two products on the same sums, the second one of a matrix that begins ``shift`` bytes further, which may be
    within the first one: bytes are those of an image here, of which both read what they find."""
    rng = np.random.default_rng(0)
    columns, depth = 64, 16
    figure, of_a = ptx_fragments.wgmma_d(columns), PRODUCTS[0]
    size = 7 * stride + leading + 128 + shift  # bytes of both
    begins = [group * (size + 48) for group in range(groups)]
    memory = rng.integers(-9, 10, (groups, size // 2)).astype(np.float32)
    a = rng.integers(-99, 100, (groups, 2, 64, depth)).astype(np.float32)
    c = rng.integers(-99, 100, (groups, 64, columns)).astype(np.float32)
    places = [begin + at for begin in begins for at in range(0, size, 16)]
    descriptors = [
        ptx_fragments.matrix_descriptor(begin + i * shift, leading, stride, 0, mode=0)
        for begin in begins
        for i in range(2)
    ]
    halves = a.transpose(1, 0, 2, 3)
    held = np.array([[of_a.fragments(of_group) for of_group in half] for half in halves])
    d = np.array([fragments(float_bits(of_group), figure, columns // 2, WARPGROUP) for of_group in c])
    chunks = of_a.chunks(memory.reshape(1, -1)).reshape(-1, 4)
    given = (held, chunks, np.array(places, np.int32), len(places), np.array(descriptors, np.uint64), d)
    instructions.run("launch_wgmma_trans", *given, groups, order=order)
    for group in range(groups):
        exact = c[group].copy()
        for i in range(2):
            b = [
                [
                    memory[group, (i * shift + ptx_fragments.columns_place(k, n, leading, stride)) // 2]
                    for n in range(columns)
                ]
                for k in range(depth)
            ]
            exact += a[group, i] @ np.array(b)
        expected = fragments(float_bits(exact), figure, columns // 2, WARPGROUP)
        np.testing.assert_array_equal(d[group], expected)


def test_the_descriptor_of_unswizzled_columns(instructions: Kernels) -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(1, 1 << 14, (2, 32)).astype(np.int32) * 16
    addresses, descriptors = np.zeros(32, np.uint32), np.zeros(32, np.uint64)
    instructions.run("launch_columns_descriptor", rows, columns, Output(addresses), Output(descriptors))
    assert (addresses - addresses[0]).tolist() == [16 * i for i in range(32)]
    assert descriptors.tolist() == [
        ptx_fragments.matrix_descriptor(int(address), int(leading), int(stride), 0, mode=0)
        for address, leading, stride in zip(addresses, rows, columns, strict=True)
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("count", "transposed"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_ldmatrix(instructions: Kernels, count: int, transposed: bool, order: Order) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8) + 1000
    r = np.zeros((WARP, count), np.uint32)
    instructions.run("launch_ldmatrix", matrices, Output(r), count, transposed, order=order)
    figure = ptx_fragments.LDMATRIX_TRANS if transposed else ptx_fragments.LDMATRIX
    for j in range(count):
        expected = pairs(fragments(matrices[j].astype(np.uint32), figure, 2))
        np.testing.assert_array_equal(r[:, j], expected[:, 0])


def test_ldmatrix_reads_rows_of_four_floats_as_tf32_fragments(instructions: Kernels) -> None:
    """A 8 x 4 corner of the tf32 matrix A lies in the register that mma wants it in."""
    corner = np.arange(32, dtype=np.float32).reshape(8, 4) + 0.5
    matrices = np.concatenate([corner.view(np.uint16).reshape(1, 8, 8), np.zeros((3, 8, 8), np.uint16)])
    r = np.zeros((WARP, 1), np.uint32)
    instructions.run("launch_ldmatrix", matrices, Output(r), 1, False)
    for row in range(8):
        for column in range(4):
            lane, register = ptx_fragments.MMA_M16N8K8_A[row][column]
            assert register == 0
            assert r[lane, 0] == corner[row, column : column + 1].view(np.uint32)[0]


# What lane 0, 1, ... 31 gets, from the CUDA C++ guide's description of the four shuffles.
SHUFFLES = [
    ("index", 0, 5, 32, [5] * 32),
    ("index past the width", 0, 9, 8, [1] * 8 + [9] * 8 + [17] * 8 + [25] * 8),
    ("up", 1, 3, 32, [0, 1, 2, *range(29)]),
    ("up", 1, 2, 4, [0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13,
      16, 17, 16, 17, 20, 21, 20, 21, 24, 25, 24, 25, 28, 29, 28, 29]),
    ("down", 2, 16, 32, [*range(16, 32), *range(16, 32)]),
    ("down", 2, 1, 8, [1, 2, 3, 4, 5, 6, 7, 7, 9, 10, 11, 12, 13, 14, 15, 15,
      17, 18, 19, 20, 21, 22, 23, 23, 25, 26, 27, 28, 29, 30, 31, 31]),
    ("xor", 3, 1, 32, [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14,
      17, 16, 19, 18, 21, 20, 23, 22, 25, 24, 27, 26, 29, 28, 31, 30]),
    ("xor", 3, 16, 32, [*range(16, 32), *range(16)]),
    # From a later segment a lane gets its own value, an earlier one it may read.
    ("xor past the width", 3, 8, 8, [*range(8), *range(8), *range(16, 24), *range(16, 24)]),
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "kind", "operand", "width", "expected"), SHUFFLES)
def test_shuffles(
    instructions: Kernels, name: str, kind: int, operand: int, width: int, expected: list[int], order: Order
) -> None:
    values = np.arange(WARP, dtype=np.int32) + 100
    results = np.zeros(WARP, np.int32)
    instructions.run("launch_shuffle", values, Output(results), kind, operand, width, order=order)
    assert (results - 100).tolist() == expected
    wide = values * 1e-300
    wide_results = np.zeros(WARP)
    instructions.run("launch_shuffle_64", wide, Output(wide_results), kind, operand, width, order=order)
    np.testing.assert_array_equal(wide_results, wide[expected])


@pytest.mark.parametrize("order", ORDERS)
def test_votes(instructions: Kernels, order: Order) -> None:
    votes = np.zeros(WARP, np.int32)
    votes[[0, 3, 17, 31]] = 1, -1, 7, 1
    results = np.zeros((WARP, 4), np.uint32)
    instructions.run("launch_vote", votes, Output(results), order=order)
    assert results.tolist() == [[0b1001, 0x80020009, 1, 0]] * 16 + [[0, 0x80020009, 1, 0]] * 16
    for vote, any_of_them, all_of_them in ((0, 0, 0), (2, 1, 1)):
        instructions.run("launch_vote", np.full(WARP, vote, np.int32), Output(results), order=order)
        assert results[:, 2:].tolist() == [[any_of_them, all_of_them]] * 32


def test_conversions(instructions: Kernels) -> None:
    values = [1.0, -2.5, 0.0, 1e-42, float("inf"), float("-inf"), 3.4028235e38]
    # Half of the last bit kept, a little less, a little more; with an even and an odd bit before it.
    tf32 = {0x3F801000: 0x3F802000, 0x3F800FFF: 0x3F800000, 0x3F801001: 0x3F802000, 0x3F803000: 0x3F804000,
            0xBF801000: 0xBF802000, 0x7F7FFFFF: 0x7F800000, 0x00000FFF: 0x00000000}  # fmt: skip
    bf16 = {0x3F808000: 0x3F80, 0x3F807FFF: 0x3F80, 0x3F808001: 0x3F81, 0x3F818000: 0x3F82, 0xBF818000: 0xBF82,
            0x7F7FFFFF: 0x7F80, 0x7FC00001: 0x7FFF}  # fmt: skip
    bits = [*tf32, *bf16, *float_bits(np.array(values)).tolist()]
    x = np.array(bits, np.uint32).view(np.float32)
    n = len(x)
    rounded, packed = np.zeros(n, np.uint32), np.zeros(n, np.uint32)
    unpacked = np.zeros((n, 2), np.float32)
    instructions.run("launch_convert", x, Output(rounded), Output(packed), Output(unpacked), n)
    assert rounded[: len(tf32)].tolist() == list(tf32.values())
    assert (packed & 0xFFFF)[len(tf32) : len(tf32) + len(bf16)].tolist() == list(bf16.values())
    np.testing.assert_array_equal(packed >> 16, (packed & 0xFFFF)[::-1])
    np.testing.assert_array_equal(unpacked[:, 0].view(np.uint32), packed << 16)
    np.testing.assert_array_equal(unpacked[:, 1].view(np.uint32), packed & 0xFFFF0000)
    finite = np.isfinite(x)
    ours = torch.from_numpy(unpacked[finite, 0])
    assert torch.equal(ours, torch.from_numpy(x[finite]).bfloat16().float())


def test_pairs_of_bfloat16(instructions: Kernels) -> None:
    """max.NaN, prmt of signs and cvt.relu of every kind of number, in both halves of a word."""
    # a, b, the larger one, max(a, 0): +0 is above -0, and every NaN, of either sign, becomes 0x7fff.
    table = [(0x3F80, 0x4000, 0x4000, 0x3F80), (0xBF80, 0x0000, 0x0000, 0x0000), (0x8000, 0x0000, 0x0000, 0x0000),
             (0x0000, 0x8000, 0x0000, 0x0000), (0x0001, 0x0000, 0x0001, 0x0001), (0x8001, 0x0000, 0x0000, 0x0000),
             (0xFF80, 0x0000, 0x0000, 0x0000), (0x7F80, 0x0000, 0x7F80, 0x7F80), (0x7FC0, 0x0000, 0x7FFF, 0x7FFF),
             (0xFFC0, 0x0000, 0x7FFF, 0x7FFF), (0xC000, 0xBF80, 0xBF80, 0x0000), (0x8000, 0x8000, 0x8000, 0x0000),
             (0x3F80, 0xFF81, 0x7FFF, 0x3F80)]  # fmt: skip
    rows = np.array(table, np.uint32)
    a, b, larger, relu = (rows[:, i] | rows[::-1, i] << 16 for i in range(4))
    n = len(a)
    ours, masks, of_relu = np.zeros(n, np.uint32), np.zeros((n, 2), np.uint32), np.zeros(n, np.uint32)
    instructions.run("launch_pairs", a, b, Output(ours), Output(masks), Output(of_relu), n)
    assert ours.tolist() == larger.tolist()
    assert of_relu.tolist() == relu.tolist()
    low, high = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    signs = [(a >> (8 * byte + 7) & 1).astype(bool) for byte in range(4)]
    assert masks[:, 0].tolist() == (np.where(signs[1], low, 0) | np.where(signs[3], high, 0)).tolist()
    assert masks[:, 1].tolist() == (np.where(signs[2], low, 0) | np.where(signs[0], high, 0)).tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("valid", range(8))
def test_cp_async_copies_or_zeroes(instructions: Kernels, valid: int, order: Order) -> None:
    x, y = torch.randn(64, 8), torch.empty(64, 7)
    instructions.run("launch_cp_async", x, Output(y), valid, order=order)
    parts = [x[:, 0:4] * (valid & 1), x[:, 4:6] * (valid >> 1 & 1), x[:, 6:7] * (valid >> 2 & 1)]
    assert torch.equal(y, torch.cat(parts, 1) + 0.0)


@pytest.mark.parametrize("order", ORDERS)
def test_indices(instructions: Kernels, order: Order) -> None:
    seen = np.zeros((2 * 3 * 2, 3 * 2 * 4, 6), np.int32)
    instructions.run("launch_index", Output(seen), order=order)
    blocks = [(x, y, z) for z in range(2) for y in range(3) for x in range(2)]
    threads = [(x, y, z) for z in range(3) for y in range(2) for x in range(4)]
    assert seen.tolist() == [[[*block, *thread] for thread in threads] for block in blocks]


def sequence_of(instructions: Kernels, order: Order, seed: int = 0) -> list[int]:
    sequence = np.zeros(256, np.int32)
    instructions.run("launch_order", Output(sequence), np.zeros(1, np.int32), order=order, seed=seed)
    assert sorted(sequence.tolist()) == sorted([*range(128), *range(128)])
    return [int(thread) for thread in sequence]


def test_orders_of_blocks_and_threads(instructions: Kernels) -> None:
    """64 threads a block; each comes before and after its warp's barrier."""
    forward = [*range(32), *range(32), *range(32, 64), *range(32, 64)]
    assert sequence_of(instructions, "forward") == forward + [t + 64 for t in forward]
    reverse = sequence_of(instructions, "reverse")
    assert reverse == [127 - t for t in forward + [t + 64 for t in forward]]
    interleaved = sequence_of(instructions, "interleaved")
    assert interleaved[:4] == [95, 127, 94, 126]
    random = sequence_of(instructions, "random", seed=1)
    assert random == sequence_of(instructions, "random", seed=1)
    assert random not in (sequence_of(instructions, "random", seed=2), forward)


def test_constants_may_be_read(instructions: Kernels) -> None:
    x, y = torch.ones(32), torch.empty(32)
    instructions.run("launch_constants", x, Output(y))
    assert y[:5].tolist() == [1.5, 2.5, 3.5, 4.5, 1.5]


def test_a_launch_that_a_gpu_refuses(instructions: Kernels) -> None:
    for launcher, error in (("launch_too_much_shared_memory", 1), ("launch_empty_grid", 9)):
        with pytest.raises(LaunchError, match=f"{launcher} returned cudaError_t {error}"):
            instructions.run(launcher, torch.zeros(1))


def cost(traffic: list[Traffic], line: str) -> tuple[str, str, int, int, int]:
    """The counts at the line of instructions.cu that has this text."""
    lines = (HERE / "instructions.cu").read_text().splitlines()
    (number,) = (i for i, text in enumerate(lines, 1) if line in text)
    (found,) = (entry for entry in traffic if entry.place == f"instructions.cu:{number}")
    return found[1:]


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts_and_sectors_of_a_stride(instructions: Kernels, stride: int, conflicts: int) -> None:
    """One warp, four bytes a lane: lanes meet in a bank where 32 divides the distance of their words."""
    x, y = torch.randn(33 * 32), torch.empty(32)
    traffic = instructions.run("launch_traffic", x, Output(y), stride, count_traffic=True)
    sectors = {1: 4, 2: 8}.get(stride, 32)
    assert cost(traffic, "const float mine = x[") == ("global", "reads", 1, sectors, 4)
    assert cost(traffic, "s[lane * stride] = mine") == ("shared", "writes", 1, conflicts, 1)
    assert cost(traffic, "sum += s[i * stride]") == ("shared", "reads", 3, 3, 3)
    assert cost(traffic, "y[lane] = sum") == ("global", "writes", 1, 4, 4)


@pytest.mark.parametrize(("pitch", "wavefronts"), [(16, 4), (128, 32), (144, 4), (64, 16), (80, 4)])
def test_bank_conflicts_of_ldmatrix(instructions: Kernels, pitch: int, wavefronts: int) -> None:
    """Eight rows of 16 bytes are free of conflicts where they fall into different eighths of 128 bytes."""
    y = torch.empty(32)
    traffic = instructions.run("launch_ldmatrix_traffic", Output(y), pitch, count_traffic=True)
    assert cost(traffic, "ldmatrix_x4(r, s + lane * pitch)") == ("shared", "reads", 1, wavefronts, 4)
    assert cost(traffic, "= make_float4(") == ("shared", "writes", 1, wavefronts, 4)


def test_only_some_blocks_on_more_than_2_to_the_31_elements(instructions: Kernels) -> None:
    """The last block of 2^25 + 1 copies the last 64 of 2^31 + 64 elements, and no memory is used but theirs."""
    blocks = 2**25 + 1
    x = cuda_emulator.sparse((blocks * 64,), "float32")
    y = cuda_emulator.sparse((blocks * 64,), "float32")
    x[-64:] = np.arange(64)
    instructions.run("launch_copy", x, Output(y), blocks, only_blocks=[0, blocks - 1])
    np.testing.assert_array_equal(y[-64:], np.arange(64))


# Detectors. ---------------------------------------------------------------------------------------------------

RACE_OR_NEVER_WRITTEN = "race: (reads|writes) .* with no barrier between|which nothing has written"

# What the sentence must say of each kernel of seeded_faults.cu.
SENTENCES = {
    "no_barrier_after_writing": RACE_OR_NEVER_WRITTEN,
    "no_barrier_before_the_next_tile": "race: (reads|writes) dynamic shared memory at byte .* no barrier between",
    "no_warp_barrier": RACE_OR_NEVER_WRITTEN,
    "shuffle_for_a_warp_barrier": "race: reads dynamic shared memory .* wrote with no barrier between",
    "warp_barrier_for_a_barrier": RACE_OR_NEVER_WRITTEN,
    "two_write_one_place": "race: writes static shared memory .* wrote with no barrier between",
    "race_through_global_memory": RACE_OR_NEVER_WRITTEN,
    "barrier_in_a_branch": r"barrier divergence: thread \(0,0,0\) waits at __syncthreads .*, .* has ended",
    "two_different_barriers": "barrier divergence: waits at __syncthreads .* waits at __syncthreads",
    "return_before_a_barrier": r"barrier divergence: .* waits at .*, thread \(50,0,0\) has ended",
    "shuffle_in_a_branch": "warp divergence: .* waits at __shfl_xor_sync .*, .* has ended",
    "masks_that_differ": "warp divergence: .* with mask 0xffffffff, .* with mask 0x0000ffff",
    "mask_without_itself": "__ballot_sync with mask 0x0000ffff, in which its own lane .* is not",
    "shuffle_from_outside_of_the_mask": "reads lane .*, which is not in the mask 0x0000ffff",
    "mma_in_a_branch": "warp divergence: .* waits at mma.m16n8k8.tf32 .*, .* has ended",
    "off_by_one_border": r"reads 4 bytes, 4 of them past the end of argument 0 .*, which has 1024 bytes",
    "before_the_beginning": "reads 4 bytes, 4 of them before the beginning of argument 0",
    "past_the_end_of_shared_memory": "writes 4 bytes at byte 256 of the block's 256 bytes of dynamic shared",
    "past_the_end_of_a_local_array": "out of bounds: an index beyond an array",
    "pointer_to_nowhere": "out of bounds: reads 4 bytes at 0x1.*, which is in no tensor",
    "misaligned_vector": "misaligned: ",
    "misaligned_vector_in_shared_memory": "misaligned: ",
    "shared_memory_never_written": "reads dynamic shared memory at byte 80 of 1024, which nothing has written",
    "static_shared_memory_never_written": "reads static shared memory .*, which nothing has written",
    "global_memory_never_written": "reads argument 1 .*, which nothing has written",
    "write_through_const": "writes argument 0 .*, which is const",
    "output_left_out": "nothing wrote element 77 of argument 1 of .*, which is an output",
    "overflow_of_an_index": "overflow of a signed product",
    "overflow_in_the_launcher": "^in the launcher: overflow of a signed product",
    "no_wait_group": "reads dynamic shared memory .*, which a cp.async of its own still owns",
    "no_commit": "reads dynamic shared memory .*, which a cp.async of .* still owns",
    "wait_group_for_one_too_few": "which a cp.async of its own still owns",
    "no_barrier_after_wait_group": "race: reads .* wrote|which nothing has written|which a cp.async of thread",
    "no_barrier_before_cp_async": "race: .* with no barrier between|which a cp.async of thread",
    "write_under_cp_async": "writes dynamic shared memory .*, which a cp.async of its own still owns",
    "misaligned_cp_async": "misaligned: reads 16 bytes of argument 0 .* not a multiple of 16",
    "cp_async_past_the_end": "out of bounds: reads 16 bytes, 16 of them past the end of argument 0",
    "end_with_cp_async_in_flight": "ends with 1 cp.async in flight",
    "misaligned_ldmatrix": "misaligned: reads 16 bytes of dynamic shared memory .* not a multiple of 16",
    "operand_without_its_fence": r"wgmma reads dynamic .*, which thread \(36,0,0\) wrote without a fence.proxy.async",
    "operand_fence_behind_the_barrier": "wgmma reads dynamic shared memory .* wrote without a fence.proxy.async",
    "operand_fence_before_its_copies": "wgmma reads dynamic shared memory .* wrote without a fence.proxy.async",
    "no_barrier_before_wgmma": RACE_OR_NEVER_WRITTEN,
    "no_wgmma_fence": "wgmma.k8.tf32 without a wgmma.fence behind the last write of its registers",
    "fragment_loaded_behind_the_fence": "wgmma.k8.tf32 without a wgmma.fence behind the last write of its registers",
    "fragment_made_behind_the_fence": "wgmma.k8.tf32 without a wgmma.fence behind the last write of its registers",
    "sums_made_behind_the_fence": "wgmma.k8.tf32 without a wgmma.fence behind the last write of its registers",
    "sums_written_in_flight": "sums of a wgmma in flight were written: no wgmma.wait_group has ended it",
    "sums_written_between_two_products": "sums of a wgmma in flight were written: no wgmma.wait_group has ended it",
    "fragment_written_in_flight": "fragments of a wgmma in flight were written: no wgmma.wait_group has ended it",
    "operand_written_in_flight": "writes dynamic shared memory .*, which a wgmma in flight still reads",
    "copy_into_an_operand_in_flight": "copies with cp.async to dynamic .*, which a wgmma in flight still reads",
    "operand_written_behind_its_own_wait": "race: writes dynamic .* read with no barrier|a wgmma in flight still reads",
    "wgmma_wait_for_one_too_few": "fragments of a wgmma in flight were written",
    "wgmma_without_a_commit": "ends with 1 wgmmas in flight",
    "end_with_wgmma_in_flight": "ends with 1 wgmmas in flight",
    "warp_without_its_wgmma": r"block \(0,0,0\): warp 2 issued 0 of its warpgroup's 1 wgmmas",
    "warpgroup_without_its_last_warp": "wgmma by a warpgroup of 3 warps",
    "wgmma_in_a_branch": r"warp divergence: .* waits at wgmma.k8.tf32 .*, thread \(70,0,0\) waits at wgmma.wait_group",
    "warps_with_different_descriptors": "the warps of a warpgroup issue different ones",
    "lanes_with_different_descriptors": "wgmma: lanes 0 and 9 have different descriptors",
    "rows_amid_a_swizzle": "wgmma: rows that do not begin at a multiple of 512 bytes",
    "rows_past_the_end_of_shared_memory": "out of bounds: reads 16 bytes at byte 4096 of the block's 4096 bytes",
    "blocks_write_one_place": "race of blocks: writes argument 1 .* another block of this launch wrote",
    "block_reads_what_another_wrote": "race of blocks|which nothing has written",
    "block_writes_what_another_read": "race of blocks: (writes|reads) argument 1 .* another block of this launch",
}


def seeded_run(seeded: Kernels, kernel: str, faulty: bool, order: Order) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(ELEMENTS), torch.empty(ELEMENTS)
    whole = kernel in ("output_left_out", "off_by_one_border")
    seeded.run(f"launch_{kernel}", x, (Output if whole else Workspace)(y), faulty, order=order, seed=3)
    return x, y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", SENTENCES)
def test_a_seeded_fault_is_found(seeded: Kernels, kernel: str, order: Order) -> None:
    with pytest.raises(Fault, match=SENTENCES[kernel]):
        seeded_run(seeded, kernel, True, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", SENTENCES)
def test_its_right_twin_passes(seeded: Kernels, kernel: str, order: Order) -> None:
    seeded_run(seeded, kernel, False, order)


def test_every_seeded_kernel_has_its_sentence(seeded: Kernels) -> None:
    kernels = {name.removeprefix("launch_") for name in seeded.launchers if name.startswith("launch_")}
    assert kernels == {*SENTENCES, "swapped_fragment_index", "sums_read_before_the_wait"}


def test_sums_read_before_the_wait_are_not_there(seeded: Kernels) -> None:
    for order in ORDERS:
        _, y = seeded_run(seeded, "sums_read_before_the_wait", False, order)
        assert y[:WARPGROUP].isfinite().all()
        _, y = seeded_run(seeded, "sums_read_before_the_wait", True, order)
        assert y[:WARPGROUP].isnan().all()


def test_a_swapped_fragment_index_gives_another_product(seeded: Kernels) -> None:
    for order in ORDERS:
        x, y = seeded_run(seeded, "swapped_fragment_index", False, order)
        product = x[:128].view(16, 8) @ x[128:192].view(8, 8)
        torch.testing.assert_close(y[:128].view(16, 8), product, rtol=0, atol=0.02)
        x, y = seeded_run(seeded, "swapped_fragment_index", True, order)
        assert (y[:128].view(16, 8) - x[:128].view(16, 8) @ x[128:192].view(8, 8)).abs().max() > 0.5


def test_a_fault_names_kernel_block_thread_and_line(seeded: Kernels) -> None:
    source = (HERE / "seeded_faults.cu").read_text().splitlines()
    line = 1 + source.index("  if (!faulty || t != 20) s[t] = x[t];") + 2
    with pytest.raises(Fault) as fault:
        seeded_run(seeded, "shared_memory_never_written", True, "forward")
    assert str(fault.value) == (
        "kernel shared_memory_never_written, block (0,0,0), thread (20,0,0): reads dynamic shared memory at "
        f"byte 80 of 1024, which nothing has written [seeded_faults.cu:{line}]"
    )


def test_the_emulator_goes_on_after_a_fault(seeded: Kernels) -> None:
    for kernel in ("barrier_in_a_branch", "no_wait_group", "mma_in_a_branch"):
        with pytest.raises(Fault):
            seeded_run(seeded, kernel, True, "forward")
        seeded_run(seeded, kernel, False, "forward")


# An access of a random program: thread, first byte, end, whether it writes, barriers and warp barriers before.
Access = tuple[int, int, int, bool, int, int]


def random_program(
    rng: np.random.Generator, blocks: int, density: float
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[Access]]:
    """Steps of 64 threads a block in which few of them access a few bytes, and some join others."""
    steps, threads = 6, 64 * blocks
    program = np.zeros((steps, threads), np.int32)
    joins = rng.choice([0, 0, 1, 2, 3, 4], steps).astype(np.int32)
    accesses: list[Access] = []
    barriers, warp_barriers = 0, [0, 0]
    for step in range(steps):
        for thread in np.flatnonzero(rng.random(threads) < density):
            size_log2 = int(rng.integers(3))
            address = int(rng.integers(32 >> size_log2)) << size_log2
            writes = bool(rng.random() < 0.3)
            program[step, thread] = (2 if writes else 1) | size_log2 << 2 | address << 4
            meetings = warp_barriers[thread // 32 % 2]
            accesses.append((int(thread), address, address + (1 << size_log2), writes, barriers, meetings))
        barriers += int(joins[step]) >> 2
        warp_barriers = [count + (int(joins[step]) >> warp & 1) for warp, count in enumerate(warp_barriers)]
    return program, joins, accesses


def has_race(accesses: list[Access]) -> bool:
    """Two threads' accesses to a byte, one a write, with no barrier of the block or of their warp between."""
    for i, (thread, begin, end, writes, barriers, meetings) in enumerate(accesses):
        for other, other_begin, other_end, other_writes, other_barriers, other_meetings in accesses[:i]:
            if thread == other or not (writes or other_writes) or begin >= other_end or other_begin >= end:
                continue
            if thread // 64 != other // 64:
                return True
            joined = thread // 32 == other // 32 and meetings != other_meetings
            if barriers == other_barriers and not joined:
                return True
    return False


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("memory", ["shared", "global"])
def test_a_random_program_is_stopped_if_and_only_if_it_has_a_race(
    instructions: Kernels, memory: str, order: Order
) -> None:
    rng = np.random.default_rng(0)
    racy = 0
    for i in range(400):
        blocks = 1 if memory == "shared" else int(rng.integers(1, 3))
        program, joins, accesses = random_program(rng, blocks, rng.choice([0.01, 0.02, 0.04]))
        y = np.zeros(32, np.uint8)
        argument = None if memory == "shared" else y
        arguments = (program, joins, len(program), blocks, argument)
        expected = has_race(accesses)
        racy += expected
        try:
            instructions.run("launch_program", *arguments, order=order, seed=i)
        except Fault as fault:
            assert expected, f"program {i}: {fault}"  # noqa: PT017 - most programs must not raise
            assert "race" in str(fault)  # noqa: PT017
        else:
            assert not expected, f"program {i} has a race"
    assert 100 < racy < 300


def test_arguments_must_fit(seeded: Kernels) -> None:
    x = torch.zeros(2, ELEMENTS)
    with pytest.raises(TypeError, match="0 launchers named launch_copy take 3 arguments"):
        seeded.run("launch_copy", x, x, False)
    with pytest.raises(ValueError, match="argument 0 of launch_no_commit is not contiguous"):
        seeded.run("launch_no_commit", x.T, x, False)
    with pytest.raises(ValueError, match=r"argument 1 of .* overlaps"):
        seeded.run("launch_no_commit", x, x[1], False)
    with pytest.raises(ValueError, match=re.escape("has 'no such text' 0 times, not 1")):
        cuda_emulator.build("max_pool_cuda.cu", replacements=[Replacement("launch.cuh", "no such text", "")])
