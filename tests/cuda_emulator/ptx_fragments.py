"""The PTX ISA's figures of matrix fragments, as its section "Matrix Fragments for mma" draws them, and of wgmma's.

Each entry stands where the element stands in its matrix and reads ``lane:element`` of that lane's fragment.
Written down from the document, not from the emulator: the tests hold the one against the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Figure: TypeAlias = "list[list[tuple[int, int]]]"


def parsed(figure: str) -> Figure:
    """``figure[row][column]`` is the lane and the element of its fragment."""
    rows = []
    for line in figure.strip().splitlines():
        entries = [entry.split(":") for entry in line.replace(": ", ":").split()]
        rows.append([(int(lane), int(element)) for lane, element in entries])
    return rows


# Matrix A, 16 x 8, of mma.m16n8k8 with .tf32 (figure 72): registers a0..a3.
MMA_M16N8K8_A = parsed(
    """
 0:0  1:0  2:0  3:0  0:2  1:2  2:2  3:2
 4:0  5:0  6:0  7:0  4:2  5:2  6:2  7:2
 8:0  9:0 10:0 11:0  8:2  9:2 10:2 11:2
12:0 13:0 14:0 15:0 12:2 13:2 14:2 15:2
16:0 17:0 18:0 19:0 16:2 17:2 18:2 19:2
20:0 21:0 22:0 23:0 20:2 21:2 22:2 23:2
24:0 25:0 26:0 27:0 24:2 25:2 26:2 27:2
28:0 29:0 30:0 31:0 28:2 29:2 30:2 31:2
 0:1  1:1  2:1  3:1  0:3  1:3  2:3  3:3
 4:1  5:1  6:1  7:1  4:3  5:3  6:3  7:3
 8:1  9:1 10:1 11:1  8:3  9:3 10:3 11:3
12:1 13:1 14:1 15:1 12:3 13:3 14:3 15:3
16:1 17:1 18:1 19:1 16:3 17:3 18:3 19:3
20:1 21:1 22:1 23:1 20:3 21:3 22:3 23:3
24:1 25:1 26:1 27:1 24:3 25:3 26:3 27:3
28:1 29:1 30:1 31:1 28:3 29:3 30:3 31:3
"""
)

# Matrix B, 8 x 8, of mma.m16n8k8 with .tf32: registers b0, b1.
MMA_M16N8K8_B = parsed(
    """
 0:0  4:0  8:0 12:0 16:0 20:0 24:0 28:0
 1:0  5:0  9:0 13:0 17:0 21:0 25:0 29:0
 2:0  6:0 10:0 14:0 18:0 22:0 26:0 30:0
 3:0  7:0 11:0 15:0 19:0 23:0 27:0 31:0
 0:1  4:1  8:1 12:1 16:1 20:1 24:1 28:1
 1:1  5:1  9:1 13:1 17:1 21:1 25:1 29:1
 2:1  6:1 10:1 14:1 18:1 22:1 26:1 30:1
 3:1  7:1 11:1 15:1 19:1 23:1 27:1 31:1
"""
)

# Matrix D, 16 x 8, of both: registers d0..d3.
MMA_M16N8_D = parsed(
    """
 0:0  0:1  1:0  1:1  2:0  2:1  3:0  3:1
 4:0  4:1  5:0  5:1  6:0  6:1  7:0  7:1
 8:0  8:1  9:0  9:1 10:0 10:1 11:0 11:1
12:0 12:1 13:0 13:1 14:0 14:1 15:0 15:1
16:0 16:1 17:0 17:1 18:0 18:1 19:0 19:1
20:0 20:1 21:0 21:1 22:0 22:1 23:0 23:1
24:0 24:1 25:0 25:1 26:0 26:1 27:0 27:1
28:0 28:1 29:0 29:1 30:0 30:1 31:0 31:1
 0:2  0:3  1:2  1:3  2:2  2:3  3:2  3:3
 4:2  4:3  5:2  5:3  6:2  6:3  7:2  7:3
 8:2  8:3  9:2  9:3 10:2 10:3 11:2 11:3
12:2 12:3 13:2 13:3 14:2 14:3 15:2 15:3
16:2 16:3 17:2 17:3 18:2 18:3 19:2 19:3
20:2 20:3 21:2 21:3 22:2 22:3 23:2 23:3
24:2 24:3 25:2 25:3 26:2 26:3 27:2 27:3
28:2 28:3 29:2 29:3 30:2 30:3 31:2 31:3
"""
)

# Matrix A, 16 x 16, of mma.m16n8k16 with .bf16 (figure 79): elements a0..a7, two a register, the lower first.
MMA_M16N8K16_A = parsed(
    """
 0:0  0:1  1:0  1:1  2:0  2:1  3:0  3:1    0:4  0:5  1:4  1:5  2:4  2:5  3:4  3:5
 4:0  4:1  5:0  5:1  6:0  6:1  7:0  7:1    4:4  4:5  5:4  5:5  6:4  6:5  7:4  7:5
 8:0  8:1  9:0  9:1 10:0 10:1 11:0 11:1    8:4  8:5  9:4  9:5 10:4 10:5 11:4 11:5
12:0 12:1 13:0 13:1 14:0 14:1 15:0 15:1   12:4 12:5 13:4 13:5 14:4 14:5 15:4 15:5
16:0 16:1 17:0 17:1 18:0 18:1 19:0 19:1   16:4 16:5 17:4 17:5 18:4 18:5 19:4 19:5
20:0 20:1 21:0 21:1 22:0 22:1 23:0 23:1   20:4 20:5 21:4 21:5 22:4 22:5 23:4 23:5
24:0 24:1 25:0 25:1 26:0 26:1 27:0 27:1   24:4 24:5 25:4 25:5 26:4 26:5 27:4 27:5
28:0 28:1 29:0 29:1 30:0 30:1 31:0 31:1   28:4 28:5 29:4 29:5 30:4 30:5 31:4 31:5
 0:2  0:3  1:2  1:3  2:2  2:3  3:2  3:3    0:6  0:7  1:6  1:7  2:6  2:7  3:6  3:7
 4:2  4:3  5:2  5:3  6:2  6:3  7:2  7:3    4:6  4:7  5:6  5:7  6:6  6:7  7:6  7:7
 8:2  8:3  9:2  9:3 10:2 10:3 11:2 11:3    8:6  8:7  9:6  9:7 10:6 10:7 11:6 11:7
12:2 12:3 13:2 13:3 14:2 14:3 15:2 15:3   12:6 12:7 13:6 13:7 14:6 14:7 15:6 15:7
16:2 16:3 17:2 17:3 18:2 18:3 19:2 19:3   16:6 16:7 17:6 17:7 18:6 18:7 19:6 19:7
20:2 20:3 21:2 21:3 22:2 22:3 23:2 23:3   20:6 20:7 21:6 21:7 22:6 22:7 23:6 23:7
24:2 24:3 25:2 25:3 26:2 26:3 27:2 27:3   24:6 24:7 25:6 25:7 26:6 26:7 27:6 27:7
28:2 28:3 29:2 29:3 30:2 30:3 31:2 31:3   28:6 28:7 29:6 29:7 30:6 30:7 31:6 31:7
"""
)

# Matrix B, 16 x 8, of mma.m16n8k16 with .bf16: elements b0..b3, two a register, the lower first.
MMA_M16N8K16_B = parsed(
    """
 0:0  4:0  8:0 12:0 16:0 20:0 24:0 28:0
 0:1  4:1  8:1 12:1 16:1 20:1 24:1 28:1
 1:0  5:0  9:0 13:0 17:0 21:0 25:0 29:0
 1:1  5:1  9:1 13:1 17:1 21:1 25:1 29:1
 2:0  6:0 10:0 14:0 18:0 22:0 26:0 30:0
 2:1  6:1 10:1 14:1 18:1 22:1 26:1 30:1
 3:0  7:0 11:0 15:0 19:0 23:0 27:0 31:0
 3:1  7:1 11:1 15:1 19:1 23:1 27:1 31:1
 0:2  4:2  8:2 12:2 16:2 20:2 24:2 28:2
 0:3  4:3  8:3 12:3 16:3 20:3 24:3 28:3
 1:2  5:2  9:2 13:2 17:2 21:2 25:2 29:2
 1:3  5:3  9:3 13:3 17:3 21:3 25:3 29:3
 2:2  6:2 10:2 14:2 18:2 22:2 26:2 30:2
 2:3  6:3 10:3 14:3 18:3 22:3 26:3 30:3
 3:2  7:2 11:2 15:2 19:2 23:2 27:2 31:2
 3:3  7:3 11:3 15:3 19:3 23:3 27:3 31:3
"""
)

# One 8 x 8 matrix of ldmatrix: halves of the lane's register, the lower first.
LDMATRIX = parsed(
    """
 0:0  0:1  1:0  1:1  2:0  2:1  3:0  3:1
 4:0  4:1  5:0  5:1  6:0  6:1  7:0  7:1
 8:0  8:1  9:0  9:1 10:0 10:1 11:0 11:1
12:0 12:1 13:0 13:1 14:0 14:1 15:0 15:1
16:0 16:1 17:0 17:1 18:0 18:1 19:0 19:1
20:0 20:1 21:0 21:1 22:0 22:1 23:0 23:1
24:0 24:1 25:0 25:1 26:0 26:1 27:0 27:1
28:0 28:1 29:0 29:1 30:0 30:1 31:0 31:1
"""
)

# The same with .trans, at the elements' places in memory.
LDMATRIX_TRANS = parsed(
    """
 0:0  4:0  8:0 12:0 16:0 20:0 24:0 28:0
 0:1  4:1  8:1 12:1 16:1 20:1 24:1 28:1
 1:0  5:0  9:0 13:0 17:0 21:0 25:0 29:0
 1:1  5:1  9:1 13:1 17:1 21:1 25:1 29:1
 2:0  6:0 10:0 14:0 18:0 22:0 26:0 30:0
 2:1  6:1 10:1 14:1 18:1 22:1 26:1 30:1
 3:0  7:0 11:0 15:0 19:0 23:0 27:0 31:0
 3:1  7:1 11:1 15:1 19:1 23:1 27:1 31:1
"""
)

# wgmma. Its figures have one warp's 16 rows under those of the warp before, and name threads of the warpgroup. Written
# here by the place of a thread's i-th element, as CUTLASS' layouts give it too (cute/atom/mma_traits_sm90_gmma.hpp).


def by_place(columns: int, elements: int, place: Callable[[int, int], tuple[int, int]]) -> Figure:
    """The figure of 64 rows from the row and column of each thread's i-th element."""
    figure: Figure = [[(-1, -1)] * columns for _ in range(64)]
    for thread in range(128):
        for i in range(elements):
            row, column = place(thread, i)
            figure[row][column] = (thread, i)
    return figure


# Matrix A, 64 x 16, of wgmma.mma_async.m64nNk16 with .bf16: elements a0..a7, two a register, the lower first.
WGMMA_M64K16_A = by_place(
    16,
    8,
    lambda thread, i: (
        thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8,
        thread % 4 * 2 + i % 2 + i // 4 * 8,
    ),
)

# Matrix A, 64 x 8, of wgmma.mma_async.m64nNk8 with .tf32: registers a0..a3.
WGMMA_M64K8_A = by_place(
    8, 4, lambda thread, i: (thread // 32 * 16 + thread % 32 // 4 + i % 2 * 8, thread % 4 + i // 2 * 4)
)


def wgmma_d(columns: int) -> Figure:
    """Matrix D, 64 x N, of both: registers d0 to dW, W = N / 2 - 1."""
    return by_place(
        columns,
        columns // 2,
        lambda thread, i: (
            thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8,
            i // 4 * 8 + thread % 4 * 2 + i % 2,
        ),
    )


# K-major, 64-byte swizzling mode (figure 159): of each of eight rows of 64 bytes, the 16 bytes where its chunks lie.
SWIZZLE_64 = [
    [0, 1, 2, 3],
    [0, 1, 2, 3],
    [1, 0, 3, 2],
    [1, 0, 3, 2],
    [2, 3, 0, 1],
    [2, 3, 0, 1],
    [3, 2, 1, 0],
    [3, 2, 1, 0],
]


def swizzle(offset: int, bits: int, base: int, shift: int) -> int:
    """CuTe's Swizzle<bits, base, shift>, in which the document gives the canonical layouts: <2, 4, 3> in bytes."""
    return offset ^ (offset >> shift & (1 << bits) - 1 << base)


def chunk_place(row: int, chunk: int, stride: int) -> int:
    """The byte where a row's 16-byte chunk lies, behind rows that begin at a multiple of 512."""
    return row // 8 * stride + row % 8 * 64 + SWIZZLE_64[row % 8][chunk] * 16


def columns_place(depth: int, column: int, leading: int, stride: int) -> int:
    """The byte where a bfloat16 of row ``depth`` of the reduction lies, MN-major without swizzling (figure 161): in
    units of 16 bytes ((1, n), (8, k)) : ((X, stride), (1, leading)), as CuTe writes the canonical layout."""
    return depth % 8 * 16 + depth // 8 * leading + column // 8 * stride + column % 8 * 2


def matrix_descriptor(address: int, leading: int, stride: int, base_offset: int, mode: int) -> int:
    """Its format: bits 0-13, 16-29, 32-45, 49-51 and 62-63."""
    encoded = [(x & 0x3FFFF) >> 4 for x in (address, leading, stride)]
    return encoded[0] | encoded[1] << 16 | encoded[2] << 32 | base_offset << 49 | mode << 62
