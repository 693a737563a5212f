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
from test_cuda_conv import KINDS, Size, conv_call, whole, workspace

pytestmark = pytest.mark.skipif(not cuda_emulator.has_compiler(), reason="there is no C++ compiler")

# Whole rows of 52, 60 and 26 pixels, and of 54, 62 and 28 in backward-data: multiples of 8 and others.
LAYERS = [Size(1, 54, 54, 32, 32, 0), Size(1, 62, 62, 64, 64, 0), Size(1, 28, 28, 128, 128, 0)]


class Limit(NamedTuple):
    file: str
    text: str  # of the line
    space: str
    verb: str
    limit: float


PATCH = Limit("conv_math.cuh", "ldmatrix_x4(a_fragment,", "shared", "reads", 1.01)
FILTER = Limit("conv_math.cuh", "ldmatrix_x4(b_fragment[nt]", "shared", "reads", 1.0)
FORWARD = [
    # The patch: its pixels are read in an order that spreads them over the banks (SpreadTiling). The filter's
    # fragments, its way into shared memory, and the results' way out: nothing is wasted.
    PATCH,
    FILTER,
    Limit("conv_halo_tile.cuh", "cp_async_16(to + i * Tile::kThreads", "global", "reads", 1.0),
    Limit("conv_halo_tile.cuh", "cp_async_16(to + i * Tile::kThreads", "shared", "writes", 1.0),
    Limit("conv_halo_tile.cuh", "*reinterpret_cast<float2*>(to) =", "shared", "writes", 1.0),
    Limit("conv_halo_tile.cuh", "const float4 four = *reinterpret_cast<const float4*>(stage", "shared", "reads", 1.0),
    # The patch's rows begin anywhere in a line of banks.
    Limit("conv_sources.cuh", "cp_async_16(", "global", "reads", 1.0),
    Limit("conv_sources.cuh", "cp_async_16(", "shared", "writes", 1.1),
]  # fmt: skip
OF_WGMMA = [
    Limit("conv_halo_wgmma.cuh", "ldmatrix_x4(a, patches + patch", "shared", "reads", 1.01),
    *(
        limit._replace(file="conv_halo_wgmma.cuh", text="cp_async_16(to + tap * Tile::kTapBytes")
        if limit.text.startswith("cp_async_16(to + i")
        else limit
        for limit in FORWARD
        if limit not in (PATCH, FILTER)
    ),
]
# 30 windows of a tile of 10 x 12 pixels are 18 of the one kind and 12 of the other, of which there is room for 16.
POOLED = [PATCH._replace(limit=1.13), FILTER]
POOLED_OF_WGMMA = [OF_WGMMA[0]._replace(limit=1.13)]
BACKWARD = [PATCH, FILTER]
BACKWARD_OF_WGMMA = OF_WGMMA[:1]
# Pixels that a tile lacks read the window of one that is read with them.
GRADIENT = {
    "bf16": [Limit("conv_weight_gradient.cuh", "ldmatrix_x4_trans(b, rows);", "shared", "reads", 1.09)],
    "tf32": [Limit("conv_weight_gradient.cuh", "b[i] = *reinterpret_cast<const uint32_t*>(shifted)",
                   "shared", "reads", 1.01)],
}  # fmt: skip
GRADIENT_OF_WGMMA = {
    "bf16": [
        Limit(
            "conv_weight_gradient_wgmma.cuh", "ldmatrix_x4_trans(fragments[step % 2]", "shared", "reads", 1.0
        ),
        Limit(
            "conv_weight_gradient_wgmma.cuh",
            "*reinterpret_cast<uint4*>(items_to + to)",
            "shared",
            "writes",
            1.0,
        ),
    ],
    "tf32": GRADIENT["tf32"],
}
# The network's last block in a batch of 32, whose tiles begin in one image and end in the next: behind the boundary
# windows lie two rows of the patch further, and may meet those in front of it. By input height: forward, backward-data,
# the filter's gradient in bf16 and in TF32.
BATCH = 32
BOUNDARIES = {
    25: (1.0, 1.0, 1.0, 1.0),
    23: (1.09, 1.0, 1.0, 1.0),
    21: (1.1, 1.1, 1.0, 1.0),
    19: (1.09, 1.11, 1.04, 1.2),
}


def check(traffic: list[Traffic], limits: list[Limit]) -> None:
    for file, text, space, verb, limit in limits:
        lines = (CSRC / file).read_text().splitlines()
        places = {f"{file}:{i}" for i, line in enumerate(lines, 1) if text in line}
        found = [entry for entry in traffic if entry[:3] in {(place, space, verb) for place in places}]
        assert found, f"nothing {verb} {space} memory at {text!r} of {file}"
        units, least = sum(entry.units for entry in found), sum(entry.least for entry in found)
        assert units <= limit * least, f"{file} {text!r} {verb} {space}: {units / least:.2f} times the least"


LAYERS_AND_KINDS = [(layer, kind) for kind in ("tf32", "bf16") for layer in LAYERS]
LAYERS_AND_KINDS += [
    (layer, kind) for kind in ("tf32-wgmma", "bf16-wgmma") for layer in LAYERS if layer.K > 32
]
IDS = [f"{layer}-{kind}" for layer, kind in LAYERS_AND_KINDS]


@pytest.mark.parametrize(("layer", "kind"), LAYERS_AND_KINDS, ids=IDS)
def test_forward(forward: Kernels, layer: Size, kind: str) -> None:
    k, s, call = KINDS[kind], layer, conv_call(layer, KINDS[kind])
    x, weight, bias = whole(s.N, s.H, s.W, s.C).to(k.dtype), whole(s.K, s.C, 3, 3).float(), whole(s.K).float()
    room = workspace(forward, "conv_relu_workspace_bytes", call)
    y = Output(torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype))
    found = forward.run("launch_conv_relu", call, x, weight, bias, y, room, count_traffic=True)
    check(found, OF_WGMMA if k.wgmma else FORWARD)
    pooled = torch.empty(s.N, s.P // 2, s.Q // 2, s.K, dtype=k.dtype)
    outputs = (Output(pooled), Output(torch.empty(pooled.shape, dtype=torch.uint8)))
    arguments = (call, x, weight, bias, *outputs, room)
    found = forward.run("launch_conv_relu_max_pool", *arguments, count_traffic=True)
    check(found, POOLED_OF_WGMMA if k.wgmma else POOLED)


@pytest.mark.parametrize(("layer", "kind"), LAYERS_AND_KINDS, ids=IDS)
def test_backward(backward: Kernels, layer: Size, kind: str) -> None:
    k, s, call = KINDS[kind], layer, conv_call(layer, KINDS[kind])
    x, weight = whole(s.N, s.H, s.W, s.C).to(k.dtype), whole(s.K, s.C, 3, 3).float()
    dy, y = (whole(s.N, s.P, s.Q, s.K).to(k.dtype) for _ in range(2))
    room = workspace(backward, "conv_relu_backward_workspace_bytes", call)
    outputs = map(Output, (torch.empty_like(x), torch.empty_like(weight), torch.empty(s.K)))
    arguments = (call, dy, x, weight, y, *outputs, room)
    found = backward.run("launch_conv_relu_backward", *arguments, count_traffic=True)
    of_filter = (GRADIENT_OF_WGMMA if k.wgmma else GRADIENT)[k.precision]
    check(found, (BACKWARD_OF_WGMMA if k.wgmma else BACKWARD) + of_filter)


@pytest.mark.parametrize(
    "height",
    [pytest.param(height, marks=[] if height == 21 else [pytest.mark.slow]) for height in BOUNDARIES],
)
@pytest.mark.parametrize("kind", ["tf32", "bf16"])
def test_tiles_of_two_images(forward: Kernels, backward: Kernels, height: int, kind: str) -> None:
    """Of one slab of channels: the tiles are chosen by heights and widths. The first blocks alone."""
    k, slab = KINDS[kind], 32 if kind == "bf16" else 16
    s = Size(BATCH, height, height, slab, 128, 0)
    call, blocks = conv_call(s, k), range(40)  # as many as pack the filter
    x, weight, bias = torch.ones(s.N, s.H, s.W, s.C).to(k.dtype), torch.ones(s.K, s.C, 3, 3), torch.ones(s.K)
    y = torch.empty(s.N, s.P, s.Q, s.K, dtype=k.dtype)
    room = workspace(forward, "conv_relu_workspace_bytes", call)
    arguments = (call, x, weight, bias, y, room)
    found = forward.run("launch_conv_relu", *arguments, count_traffic=True, only_blocks=blocks)
    limit, of_data, *of_filter = BOUNDARIES[height]
    check(found, [PATCH._replace(limit=limit), FILTER])

    s = s._replace(K=32)
    call, y, weight = conv_call(s, k), y[..., :32].contiguous().fill_(1.0), weight[:32].contiguous()
    outputs = (torch.empty_like(x), torch.empty_like(weight), torch.empty(s.K))
    memory = workspace(backward, "conv_relu_backward_workspace_bytes", call).memory.zero_()
    arguments = (call, y, x, weight, y, *outputs, memory)
    found = backward.run("launch_conv_relu_backward", *arguments, count_traffic=True, only_blocks=range(18))
    of_gradient = [limit._replace(limit=of_filter[kind == "tf32"]) for limit in GRADIENT[kind]]
    check(found, [PATCH._replace(limit=of_data), FILTER, *of_gradient])
