"""What the convolution kernels' accesses cost: bank conflicts in shared memory, sectors of global memory.

The emulator counts wavefronts and 32-byte sectors (traffic.cpp) on layers of the network, cut to a few tiles. Each
kind of access is held to a limit: times the least that the same bytes could have cost.
"""

from __future__ import annotations

from typing import NamedTuple

import cuda_emulator
import pytest
import torch
from cuda_emulator import CSRC, Kernels, Output, Traffic
from test_cuda_conv import KINDS, Kind, Size, conv_call, whole, workspace

pytestmark = pytest.mark.skipif(not cuda_emulator.has_compiler(), reason="there is no C++ compiler")

LAYERS = [Size(1, 54, 54, 32, 32, 0), Size(1, 62, 62, 64, 64, 0), Size(1, 28, 28, 128, 128, 0)]


#: Of layers with 52 and 26 pixels in a row, where tiles of 8 would leave out 4 of 56 and 6 of 32: rows of 13 pixels are
#: cheaper than they, although eight pixels that reach over a row's end meet in a bank (conv_tiling.cuh).
CONFLICTS = {LAYERS[0]: 1.8, LAYERS[2]: 1.8}


class Limit(NamedTuple):
    file: str
    text: str  # of the line
    space: str
    verb: str
    limit: float


FORWARD = [
    # The filter's fragments, its way into shared memory, and the results' way out: nothing is wasted.
    Limit("conv_math.cuh", "ldmatrix_x4(b_fragment[nt]", "shared", "reads", 1.0),
    Limit("conv_halo_tile.cuh", "cp_async_16(to + swizzled(", "global", "reads", 1.0),
    Limit("conv_halo_tile.cuh", "cp_async_16(to + swizzled(", "shared", "writes", 1.0),
    Limit("conv_halo_tile.cuh", "*reinterpret_cast<float2*>(to) =", "shared", "writes", 1.0),
    Limit("conv_halo_tile.cuh", "const float4 four = *reinterpret_cast<const float4*>(stage", "shared", "reads", 1.0),
    # The patch: its rows begin anywhere in a line of banks.
    Limit("conv_sources.cuh", "cp_async_16(", "global", "reads", 1.0),
    Limit("conv_sources.cuh", "cp_async_16(", "shared", "writes", 1.1),
    # Where rows are multiples of 8 pixels (CONFLICTS) but for the pixels past the image, which are its first one.
    Limit("conv_math.cuh", "ldmatrix_x4(a_fragment,", "shared", "reads", 1.1),
]  # fmt: skip


def forward_traffic(kernels: Kernels, s: Size, kind: Kind) -> list[Traffic]:
    call = conv_call(s, kind)
    x, weight, bias = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3), whole(s.K)
    y = Output(torch.empty(s.N, s.P, s.Q, s.K, dtype=kind.dtype))
    room = workspace(kernels, "conv_relu_workspace_bytes", call)
    arguments = (call, x.to(kind.dtype), weight.float(), bias.float(), y, room)
    return kernels.run("launch_conv_relu", *arguments, count_traffic=True)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("kind", ["tf32", "bf16"])
def test_forward(layer: Size, kind: str) -> None:
    traffic = forward_traffic(cuda_emulator.build("conv_relu_cuda.cu"), layer, KINDS[kind])
    for file, text, space, verb, limit in FORWARD:
        lines = (CSRC / file).read_text().splitlines()
        places = {f"{file}:{i}" for i, line in enumerate(lines, 1) if text in line}
        found = [entry for entry in traffic if entry[:3] in {(place, space, verb) for place in places}]
        assert found, f"nothing {verb} {space} memory at {text!r} of {file}"
        if text.startswith("ldmatrix_x4(a_"):
            limit = CONFLICTS.get(layer, limit)
        units, least = sum(entry.units for entry in found), sum(entry.least for entry in found)
        assert units <= limit * least, f"{file} {text!r} {verb} {space}: {units / least:.2f} times the least"
