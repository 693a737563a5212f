"""Faults seeded into the convolution kernels' own sources: the tests that run them on the host find each one.

A fault is one change of one line of csrc. The unchanged kernels pass the same calls (and those of
test_cuda_conv.py); the changed ones must be stopped by a detector of the emulator or give another result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cuda_emulator
import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import ORDERS, Fault, Kernels, Order, Output, Replacement
from test_cuda_conv import (
    KINDS,
    MULTIPROCESSORS,
    SMALL,
    Kind,
    Size,
    close,
    conv_call,
    equal,
    nchw,
    nhwc,
    whole,
    workspace,
)
from torch.nn.grad import conv2d_weight

pytestmark = pytest.mark.skipif(not cuda_emulator.has_compiler(), reason="there is no C++ compiler")

WRONG_RESULT = "differ, first at"


def only(types: str) -> tuple[Replacement, ...]:
    """Kernels of one type and precision alone, which compile in a quarter of the time."""
    head = "cudaError_t dispatch(const ConvCall& call, F f) {\n"
    path = cuda_emulator.CSRC / "conv_dispatch.cuh"
    body = path.read_text().partition(head)[2].partition("\n}\n")[0]
    return (Replacement(path.name, body, f"  (void)call;\n  return f.template operator()<{types}>();"),)


TF32 = only("float, Tf32")
BF16 = only("bf16, Bf16")
# And no kernels but those with wgmma, and what they share with the others.
WGMMA_ALONE = (
    *TF32,
    Replacement(
        "conv_dispatch.cuh",
        "  return convolve_halo_tile<Math>(call, s, weight, turned, conv, stream);\n",
        "  return cudaErrorInvalidValue;\n",
    ),
    Replacement(
        "conv_dispatch.cuh",
        "    return convolve_first_layer<Math>(call, call.size, source, epilogue, weight, stream);\n",
        "    return cudaErrorInvalidValue;\n",
    ),
)

# The same of the filter's gradient.
WGMMA_GRADIENT_ALONE = (
    *BF16,
    WGMMA_ALONE[-2],
    Replacement(
        "conv_dispatch.cuh",
        "      return first_layer_gradient<Math>(call, x, gradient, dweight, dbias, sums, stream);\n",
        "      return cudaErrorInvalidValue;\n",
    ),
    Replacement(
        "conv_dispatch.cuh",
        "  return weight_gradient<Math>(call, x, gradient, dweight, dbias, sums, stream);\n",
        "  return cudaErrorInvalidValue;\n",
    ),
)

# Blocks of the wide tile with two slabs, and of the narrow one that go through several tiles each; tails in
# every dimension, borders inside and outside of the last image.
WIDE = Size(2, 9, 18, 20, 65, 1)
NARROW = Size(3, 20, 21, 16, 30, 1)
# One tile alone: the first buffer is the last in use.
ALONE = Size(1, 6, 7, 20, 30, 1)
PICTURES = Size(2, 24, 32, 3, 30, 1)
# The middle tile, on a small multiprocessor in two stages.
MIDDLE = Size(1, 9, 15, 20, 34, 1)


# In TF32: three wide tiles of two slabs, filters of 36, 108 and 180 KB. Of the first of these a block has three tiles
# or more, one after the other; of the second two blocks' worth and an odd one.
WGMMA_SIZES = (
    Size(1, 13, 21, 20, 65, 1),
    Size(1, 20, 30, 12, 34, 1),
    Size(1, 13, 21, 34, 34, 1),
    Size(1, 7, 9, 66, 34, 0),
)


# Three tiles of one image, side by side; nine of four images, of which some have pixels of three, in two splits.
WGMMA_GRADIENT_SIZES = (Size(1, 13, 21, 40, 40, 1), Size(4, 19, 17, 34, 40, 0))


def run_forward(kernels: Kernels, s: Size, order: Order, kind: Kind = KINDS["tf32"]) -> None:
    x, weight, bias = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3), whole(s.K)
    y = torch.empty(s.N, s.P, s.Q, s.K)
    call = conv_call(s, kind, SMALL)
    room = workspace(kernels, "conv_relu_workspace_bytes", call)
    arguments = (call, x.float(), weight.float(), bias.float(), Output(y), room)
    kernels.run("launch_conv_relu", *arguments, order=order)
    equal(y, nhwc(F.relu(F.conv2d(nchw(x), weight, bias, padding=s.padding))), "y")


def run_wgmma(kernels: Kernels, s: Size, order: Order) -> None:
    run_forward(kernels, s, order, KINDS["tf32-wgmma"])


def run_statistics(kernels: Kernels, s: Size, order: Order) -> None:
    """Of a batch norm, from the sums of the convolution's tiles."""
    x, weight = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3)
    y, z, mean, var = torch.empty(2, s.N, s.P, s.Q, s.K).unbind() + torch.empty(2, s.K).unbind()
    call = conv_call(s, KINDS["tf32-wgmma"])
    room = workspace(kernels, "conv_bn_relu_train_workspace_bytes", call)
    vectors = (torch.zeros(s.K), torch.ones(s.K), torch.zeros(s.K), 1e-3)
    outputs = (Output(y), Output(z), Output(mean), Output(var))
    kernels.run(
        "launch_conv_bn_relu_train", call, x.float(), weight.float(), *vectors, *outputs, room, order=order
    )
    exact = nhwc(F.conv2d(nchw(x), weight, padding=s.padding))
    equal(z, exact, "z")
    variance, average = torch.var_mean(exact, (0, 1, 2), correction=0)
    close(mean, average, 9 * s.C, "mean")
    close(var, variance, 9 * s.C, "var", magnitude=float(exact.abs().max()) ** 2)


def run_backward(kernels: Kernels, s: Size, order: Order, kind: Kind = KINDS["bf16"]) -> None:
    x, weight = whole(s.N, s.H, s.W, s.C), whole(s.K, s.C, 3, 3)
    dy, y = whole(s.N, s.P, s.Q, s.K), whole(s.N, s.P, s.Q, s.K)
    dx = None if kind.wgmma else Output(torch.empty_like(x).bfloat16())
    dweight, dbias = torch.empty(s.K, s.C, 3, 3), torch.empty(s.K)
    call = conv_call(s, kind, multiprocessors=2 if kind.wgmma else MULTIPROCESSORS)
    room = workspace(kernels, "conv_relu_backward_workspace_bytes", call)
    inputs = (dy.bfloat16(), x.bfloat16(), weight.float(), y.bfloat16())
    outputs = (dx, Output(dweight), Output(dbias))
    kernels.run("launch_conv_relu_backward", call, *inputs, *outputs, room, order=order)
    gradient = nchw(dy * (y > 0))
    exact = conv2d_weight(nchw(x), list(weight.shape), gradient, padding=s.padding)
    equal(dweight, exact, "dweight")
    equal(dbias, gradient.sum((0, 2, 3)), "dbias")


def run_wgmma_gradient(kernels: Kernels, s: Size, order: Order) -> None:
    run_backward(kernels, s, order, KINDS["bf16-wgmma"])


class Seeded(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    found_by: str  # what the emulator's sentence or the comparison says

    def __str__(self) -> str:
        return self.name


HALO = "conv_halo_tile.cuh"
PICTURE = "conv_first_layer.cuh"
IN_FLIGHT = "which a cp.async of .* still owns"

FORWARD = [
    Seeded("no_barrier_before_a_tap", HALO,
           "          wait();\n          __syncthreads();\n", "          wait();\n",
           f"race: |{IN_FLIGHT}|which nothing has written"),
    Seeded("no_barrier_before_a_slab", HALO,
           "            cp_async_wait<0>();\n            __syncthreads();\n", "            cp_async_wait<0>();\n",
           f"race: |{IN_FLIGHT}|which nothing has written"),
    Seeded("no_barrier_before_the_sums_are_staged", HALO,
           "    __syncthreads();                      // the others may still read", "    // the others may still read",
           "race: (reads|writes) dynamic shared memory"),
    Seeded("no_warp_barrier_before_staging", HALO,
           "    __syncwarp();\n#pragma unroll\n    for (int nt", "#pragma unroll\n    for (int nt",
           "race: writes dynamic shared memory .* read with no barrier"),
    Seeded("no_warp_barrier_after_staging", HALO,
           "    __syncwarp();\n    const auto staged", "    const auto staged",
           "race: reads dynamic shared memory|race: writes dynamic shared memory|which nothing has written"),
    Seeded("no_wait_group", HALO, "          wait();\n", "", IN_FLIGHT),
    Seeded("no_wait_group_before_a_slab", HALO, "            cp_async_wait<0>();\n", "", IN_FLIGHT),
    Seeded("wait_group_for_one_too_few", HALO,
           "cp_async_wait<kManyStages - 2>();", "cp_async_wait<kManyStages - 1>();", IN_FLIGHT),
    Seeded("wait_group_for_one_too_few_of_few", HALO,
           "cp_async_wait<kFewStages - 2>();", "cp_async_wait<kFewStages - 1>();", IN_FLIGHT),
    Seeded("no_commit", HALO,
           "shared + (kPatchBytes - patch));\n        cp_async_commit();",
           "shared + (kPatchBytes - patch));", IN_FLIGHT),
    Seeded("filter_into_the_slot_in_use", HALO,
           "slot == 0 ? conv.stages - 1 : slot - 1", "slot",
           f"race: |{IN_FLIGHT}"),
    Seeded("patch_without_its_last_pixel", HALO,
           "number < tiling.patch_pixels * kRowChunks", "number < (tiling.patch_pixels - 1) * kRowChunks",
           "which nothing has written"),
    Seeded("filter_not_swizzled", HALO,
           "slot * Tile::kTapBytes + swizzled(thread / kRowChunks, thread % kRowChunks);",
           "slot * Tile::kTapBytes + thread * 16;", WRONG_RESULT),
    Seeded("channels_past_the_last", "conv_epilogues.cuh",
           "(y + pixel.element(P, Q, K, k), v, K - k, aligned)", "(y + pixel.element(P, Q, K, k), v, 4, aligned)",
           "out of bounds: |race"),
    Seeded("more_places_of_pixels_than_room", "conv_tiling.cuh",
           "    if (max_pixels > kMaxPixels) return {};\n", "    max_pixels = 2 * kMaxPixels;\n",
           "out of bounds: an index beyond an array"),
    Seeded("swapped_fragments_of_the_filter", "conv_math.cuh",
           "{pair[nt % 2 * 2], pair[nt % 2 * 2 + 1]}", "{pair[nt % 2 * 2 + 1], pair[nt % 2 * 2]}", WRONG_RESULT),
    Seeded("rows_of_the_wrong_half", "conv_math.cuh",
           "2 * step + (lane >> 4)", "2 * step + (lane >> 3 & 1)", WRONG_RESULT),
    Seeded("border_one_row_low", "conv_tiling.cuh",
           "(h) < static_cast<unsigned>(H)", "(h) <= static_cast<unsigned>(H)",
           "out of bounds: reads 16 bytes, .* past the end"),
    Seeded("border_one_column_right", "conv_tiling.cuh",
           "(w) < static_cast<unsigned>(W)", "(w) <= static_cast<unsigned>(W)",
           f"out of bounds: reads 16 bytes, .* past the end|{WRONG_RESULT}"),
    Seeded("one_channel_too_many", "conv_epilogues.cuh",
           "      if (i < count) p[i] = v[i];", "      if (i <= count) p[i] = v[i];",
           "race|out of bounds"),
    Seeded("no_barrier_before_a_picture", PICTURE,
           "    __syncthreads();  // the patch is there, the other one is free\n"
           "    const Tiling::Position at = Tiling::load(positions + turn);\n    const bool more = tile + stride",
           "    const Tiling::Position at = Tiling::load(positions + turn);\n    const bool more = tile + stride",
           "race: |which nothing has written"),
    Seeded("no_warp_barrier_before_the_gathered_rows", PICTURE,
           "    __syncwarp();  // the warp's rows are there\n    float acc", "    float acc",
           "race: |which nothing has written"),
    Seeded("gathered_rows_too_far_apart", PICTURE, "+ i - r * 3 * C]", "+ i]", f"{WRONG_RESULT}|which nothing"),
]  # fmt: skip

GRADIENT = "conv_weight_gradient.cuh"

BACKWARD = [
    Seeded("no_barrier_before_a_tile", GRADIENT,
           "    cp_async_wait<0>();\n    __syncthreads();\n", "    cp_async_wait<0>();\n",
           f"race: |{IN_FLIGHT}|which nothing has written"),
    Seeded("no_wait_group", GRADIENT, "    cp_async_wait<0>();\n    __syncthreads();\n", "    __syncthreads();\n",
           IN_FLIGHT),
    Seeded("rows_that_are_not_aligned", GRADIENT,
           "kPad = 128 / Math::kLanes", "kPad = 64 / Math::kLanes", "misaligned: "),
    Seeded("return_before_a_barrier", GRADIENT,
           "    if (c0 > 0) return;\n", "    if (c0 > 0 || thread >= Tile::kTileK) return;\n",
           "barrier divergence: "),
    Seeded("all_splits_in_one_place", GRADIENT,
           "conv.dweight + (static_cast<int64_t>(split) * kTaps + tap)", "conv.dweight + static_cast<int64_t>(tap)",
           "race of blocks: writes"),
    Seeded("a_tile_between_two_splits", GRADIENT,
           "first_tile(split_of_block + 1));", "first_tile(split_of_block + 1) - 1);", WRONG_RESULT),
    Seeded("no_warp_barrier_after_the_gathered_rows", PICTURE,
           "      __syncwarp();  // and were read\n", "", "race: "),
    Seeded("no_barrier_before_the_warps_are_added", PICTURE,
           "  // The warps' sums, and the lanes' of the bias, are added in their order.\n  __syncthreads();\n",
           "", "race: |which nothing has written|differ, first at"),
    Seeded("last_warp_left_out", PICTURE,
           "for (int of = 0; of < Tile::kWarps; ++of) total", "for (int of = 0; of < Tile::kWarps - 1; ++of) total",
           WRONG_RESULT),
]  # fmt: skip


WGMMA = "conv_halo_wgmma.cuh"
READ_IN_FLIGHT = "which a wgmma in flight still reads"
UNFENCED = "wrote without a fence.proxy.async behind it"

OF_WGMMA = [
    Seeded("no_operand_fence", WGMMA, "          wgmma_operand_fence();\n", "", UNFENCED),
    Seeded("operand_fence_behind_the_barrier", WGMMA,
           "          wgmma_operand_fence();\n          __syncthreads();\n",
           "          __syncthreads();\n          wgmma_operand_fence();\n", UNFENCED),
    Seeded("no_barrier_before_a_step", WGMMA,
           "          wgmma_operand_fence();\n          __syncthreads();\n", "          wgmma_operand_fence();\n",
           f"race: |{IN_FLIGHT}|{READ_IN_FLIGHT}|{UNFENCED}|which nothing has written"),
    Seeded("no_barrier_before_the_sums_are_staged", WGMMA,
           "    __syncthreads();                      // the others may still read", "    // the others may still read",
           f"race: |{READ_IN_FLIGHT}"),
    Seeded("no_wait_group", WGMMA,
           "          cp_async_wait<0>();\n", "", IN_FLIGHT),
    Seeded("wait_group_for_one_too_few", WGMMA,
           "          cp_async_wait<0>();\n", "          cp_async_wait<1>();\n", IN_FLIGHT),
    Seeded("no_commit", WGMMA,
           "        if (tap % Tile::kRowTaps == Tile::kRowTaps - 1) cp_async_commit();\n", "", IN_FLIGHT),
    Seeded("no_wgmma_fence", WGMMA, "        wgmma_fence();\n", "", "without a wgmma.fence"),
    Seeded("no_wgmma_commit", WGMMA, "        wgmma_commit();\n", "", "in flight"),
    Seeded("no_wait_in_a_step", WGMMA, "          wgmma_wait<1>();  // the other", "          // the other",
           f"of a wgmma in flight were written|{READ_IN_FLIGHT}"),
    Seeded("wait_in_a_step_for_one_too_few", WGMMA, "wgmma_wait<1>();  // the other", "wgmma_wait<2>();  // the other",
           f"of a wgmma in flight were written|{READ_IN_FLIGHT}"),
    Seeded("one_set_of_fragments", WGMMA, "(&a)[4] = fragments[tap % 2][i]", "(&a)[4] = fragments[0][i]",
           "fragments of a wgmma in flight were written"),
    Seeded("no_wait_for_the_sums", WGMMA, "          wgmma_wait_for(acc);\n", "          wgmma_wait<1>();\n",
           f"of a wgmma in flight were written|{READ_IN_FLIGHT}|ends with . wgmmas in flight|{WRONG_RESULT}"),
    Seeded("filter_into_the_slot_in_use", WGMMA, "(tap + Tile::kRowTaps) % kTaps", "tap",
           f"race: |{READ_IN_FLIGHT}|{IN_FLIGHT}"),
    Seeded("filter_into_the_slot_in_flight", WGMMA,
           "(tap + Tile::kRowTaps) % kTaps", "(tap + 2 * Tile::kRowTaps) % kTaps",
           f"race: |{READ_IN_FLIGHT}|{IN_FLIGHT}"),
    Seeded("filter_of_the_row_behind_the_next", WGMMA,
           "load_filter(step + Tile::kRowTaps,", "load_filter(step + 2 * Tile::kRowTaps,",
           f"{WRONG_RESULT}|out of bounds"),
    Seeded("filter_not_swizzled", WGMMA,
           "slot * Tile::kTapBytes + swizzled(thread / kRowChunks, thread % kRowChunks);",
           "slot * Tile::kTapBytes + thread * 16;", WRONG_RESULT),
    Seeded("quarter_of_a_row_further", WGMMA, "(filter + 32 * i)", "(filter + 16 * i)", WRONG_RESULT),
    Seeded("rows_of_the_wrong_half", WGMMA, "2 * i + (lane >> 4)", "2 * i + (lane >> 3 & 1)", WRONG_RESULT),
    Seeded("row_of_windows_one_pixel_right", WGMMA, "tap / 3 * tiling.pitch", "tap / 3 * (tiling.pitch + 1)",
           f"which nothing has written|{WRONG_RESULT}"),
    Seeded("first_tap_left_out", WGMMA,
           "for (int tap = 0; tap < kTaps; ++tap) {", "for (int tap = 1; tap < kTaps; ++tap) {",
           f"{IN_FLIGHT}|{WRONG_RESULT}|{UNFENCED}|which nothing has written|race: "),
    Seeded("sums_staged_over_the_next_patch", WGMMA,
           "patches + (kPatchBytes - patch) + warp * kStageBytes", "patches + patch + warp * kStageBytes",
           f"race: |{IN_FLIGHT}|{WRONG_RESULT}"),
    Seeded("position_after_the_next_not_stored", WGMMA,
           "      tiling.store_position(tile + 2 * stride, positions + turn, k_now);\n", "",
           f"nothing wrote element|{WRONG_RESULT}"),
    Seeded("position_of_the_next_stored_again", WGMMA, "tile + 2 * stride", "tile + stride",
           f"nothing wrote element|{WRONG_RESULT}"),
    Seeded("next_patch_by_this_position", WGMMA,
           "load_turn = next_tile ? turn ^ 1 : turn;", "load_turn = turn;", WRONG_RESULT),
    Seeded("last_tile_of_the_other_half", WGMMA, "tile - of_block + stride >=", "tile + stride >=",
           f"barrier divergence|{WRONG_RESULT}"),
]  # fmt: skip

OF_STATISTICS = [
    Seeded("moments_of_a_tile_past_the_last", WGMMA, "      if (tile < tiling.tiles)\n", "",
           "race of blocks: |race: |out of bounds"),
    Seeded("no_barrier_before_the_moments", WGMMA,
           "    if constexpr (Epilogue::kStatistics) {\n      __syncthreads();\n",
           "    if constexpr (Epilogue::kStatistics) {\n", "race: |which nothing has written"),
    Seeded("records_over_another_warps", WGMMA,
           "records + warp * 3 * Tile::kTileN", "records + warp * 2 * Tile::kTileN", "race: "),
]  # fmt: skip

WGMMA_GRADIENT = "conv_weight_gradient_wgmma.cuh"

OF_WGMMA_GRADIENT = [
    Seeded("gradient_without_operand_fence", WGMMA_GRADIENT, "    wgmma_operand_fence();\n", "", UNFENCED),
    Seeded("gradient_operand_fence_behind_the_barrier", WGMMA_GRADIENT,
           "    wgmma_operand_fence();\n    __syncthreads();\n", "    __syncthreads();\n    wgmma_operand_fence();\n",
           UNFENCED),
    Seeded("gradient_without_barrier_before_a_tile", WGMMA_GRADIENT,
           "    wgmma_operand_fence();\n    __syncthreads();\n", "    wgmma_operand_fence();\n",
           f"race: |{IN_FLIGHT}|{READ_IN_FLIGHT}|{UNFENCED}|which nothing has written"),
    Seeded("gradient_without_wait_group", WGMMA_GRADIENT, "    cp_async_wait<0>();\n", "", IN_FLIGHT),
    Seeded("gradient_without_wgmma_fence", WGMMA_GRADIENT, "      wgmma_fence();\n", "", "without a wgmma.fence"),
    Seeded("gradient_without_wgmma_commit", WGMMA_GRADIENT, "      wgmma_commit();\n", "", "in flight"),
    Seeded("gradient_without_wait_in_a_step", WGMMA_GRADIENT,
           "        wgmma_wait<1>();  // the other", "        // the other", "of a wgmma in flight were written"),
    Seeded("gradient_with_one_set_of_fragments", WGMMA_GRADIENT,
           "ldmatrix_x4_trans(fragments[step % 2],", "ldmatrix_x4_trans(fragments[0],",
           "fragments of a wgmma in flight were written"),
    Seeded("gradient_without_wait_for_the_sums", WGMMA_GRADIENT, "wgmma_wait_for(acc[s]);", "wgmma_wait<1>();",
           f"of a wgmma in flight were written|{READ_IN_FLIGHT}|ends with . wgmmas in flight|race: |{WRONG_RESULT}"),
    Seeded("gradient_items_into_the_buffer_in_use", WGMMA_GRADIENT,
           "finish(items, step - 1, buffer ^ 1)", "finish(items, step - 1, buffer)",
           f"{READ_IN_FLIGHT}|race: |{WRONG_RESULT}"),
    Seeded("gradient_numbers_of_the_next_tile_overwritten", WGMMA_GRADIENT,
           "find_pixels(second, buffer, ", "find_pixels(second, buffer ^ 1, ", f"race: |{WRONG_RESULT}"),
    Seeded("gradient_past_an_image_boundary", WGMMA_GRADIENT,
           "        further += 2 * kPitch;\n", "", WRONG_RESULT),
    Seeded("gradient_of_the_first_boundary_alone", WGMMA_GRADIENT,
           "        boundary += tiling.stack;\n", "", WRONG_RESULT),
    Seeded("gradient_rows_of_eight_pixels", WGMMA_GRADIENT,
           "filter_row * kPitch * 16, kPitch * 16,", "filter_row * kPitch * 16, kCols * 16,", WRONG_RESULT),
    Seeded("gradient_rows_of_the_wrong_half", WGMMA_GRADIENT,
           "(2 * warp + (lane >> 3 & 1)) * Tile::kStride + ((lane & 7) + (lane >> 4) * 8) * 16",
           "(2 * warp + (lane >> 4)) * Tile::kStride + ((lane & 7) + (lane >> 3 & 1) * 8) * 16", WRONG_RESULT),
    Seeded("gradient_rows_of_an_odd_stack", "conv_tiling.cuh",
           "even = strip.P + strip.P % 2;", "even = strip.P;", f"{WRONG_RESULT}|which nothing has written"),
    Seeded("gradient_of_the_pixels_past_the_image", "conv_tiling.cuh",
           "return {place.x < tile_rows && p < P && q < Q &&", "return {place.x < tile_rows && p < P && q <= Q &&",
           f"{WRONG_RESULT}|out of bounds"),
    Seeded("gradient_bias_thrice", WGMMA_GRADIENT,
           "c0 == 0 && step % Tile::kGroups == filter_row", "c0 == 0", WRONG_RESULT),
    Seeded("gradient_without_barrier_before_the_bias", WGMMA_GRADIENT,
           "      to[8] = bias[2];\n    }\n    __syncthreads();\n", "      to[8] = bias[2];\n    }\n",
           "race: |which nothing has written"),
    Seeded("gradient_splits_in_one_place", WGMMA_GRADIENT,
           "conv.dweight + (static_cast<int64_t>(split) * kTaps + tap)", "conv.dweight + static_cast<int64_t>(tap)",
           f"race of blocks: writes|{WRONG_RESULT}"),
]  # fmt: skip


def seeded_kernels(seeded: Seeded) -> Kernels:
    change = Replacement(seeded.file, seeded.old, seeded.new)
    if seeded in OF_WGMMA:
        return cuda_emulator.build("conv_relu_cuda.cu", replacements=[*WGMMA_ALONE, change])
    if seeded in OF_WGMMA_GRADIENT:
        return cuda_emulator.build("conv_relu_backward_cuda.cu", replacements=[*WGMMA_GRADIENT_ALONE, change])
    if seeded in OF_STATISTICS:
        return cuda_emulator.build("conv_bn_relu_cuda.cu", replacements=[*WGMMA_ALONE, change])
    if seeded in FORWARD:
        return cuda_emulator.build("conv_relu_cuda.cu", replacements=[*TF32, change])
    return cuda_emulator.build("conv_relu_backward_cuda.cu", replacements=[*BF16, change])


@pytest.fixture(scope="module", autouse=True)
def _compiled_together(request: pytest.FixtureRequest) -> None:
    """All the kernels that the chosen tests need, with every processor at work."""
    tests = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [test.callspec.params.get("seeded") for test in tests if hasattr(test, "callspec")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(seeded_kernels, [seeded for seeded in chosen if isinstance(seeded, Seeded)]))


def finding(
    run: Callable[[Kernels, Size, Order], None],
    kernels: Kernels,
    order: Order,
    sizes: Sequence[Size] = (WIDE, NARROW, ALONE, PICTURES, MIDDLE),
) -> str:
    """What is found wrong at the first size that shows it."""
    for size in sizes:
        try:
            run(kernels, size, order)
        except (Fault, AssertionError) as fault:
            return str(fault)
    return "nothing"


#: At least one of each kind; each fault is compiled for itself.
SAMPLED = {
    "no_barrier_before_a_tap",
    "no_warp_barrier_before_staging",
    "no_wait_group",
    "wait_group_for_one_too_few",
    "no_commit",
    "patch_without_its_last_pixel",
    "channels_past_the_last",
    "more_places_of_pixels_than_room",
    "swapped_fragments_of_the_filter",
    "border_one_row_low",
    "one_channel_too_many",
    "no_barrier_before_a_picture",
    "gathered_rows_too_far_apart",
    "no_barrier_before_a_tile",
    "rows_that_are_not_aligned",
    "return_before_a_barrier",
    "all_splits_in_one_place",
    "a_tile_between_two_splits",
    "last_warp_left_out",
    "no_operand_fence",
    "no_barrier_before_a_step",
    "no_wgmma_fence",
    "no_wait_in_a_step",
    "one_set_of_fragments",
    "filter_into_the_slot_in_flight",
    "quarter_of_a_row_further",
    "rows_of_the_wrong_half",
    "sums_staged_over_the_next_patch",
    "next_patch_by_this_position",
    "moments_of_a_tile_past_the_last",
    "gradient_without_operand_fence",
    "gradient_without_wait_in_a_step",
    "gradient_items_into_the_buffer_in_use",
    "gradient_past_an_image_boundary",
    "gradient_rows_of_the_wrong_half",
    "gradient_bias_thrice",
}


def sampled(faults: Sequence[Seeded]) -> list[Any]:
    """A test's parameters; faults that are not sampled are for the slow run."""
    return [
        pytest.param(seeded, marks=() if seeded.name in SAMPLED else pytest.mark.slow) for seeded in faults
    ]


@pytest.mark.parametrize("seeded", sampled(FORWARD), ids=str)
def test_a_fault_in_the_forward_kernel_is_found(seeded: Seeded) -> None:
    kernels = seeded_kernels(seeded)
    for order in ORDERS:
        assert re.search(seeded.found_by, found := finding(run_forward, kernels, order)), f"{order}: {found}"


@pytest.mark.parametrize("seeded", sampled(OF_WGMMA + OF_STATISTICS), ids=str)
def test_a_fault_in_the_kernel_with_wgmma_is_found(seeded: Seeded) -> None:
    kernels = seeded_kernels(seeded)
    run = run_wgmma if seeded in OF_WGMMA else run_statistics
    for order in ORDERS:
        found = finding(run, kernels, order, WGMMA_SIZES)
        assert re.search(seeded.found_by, found), f"{order}: {found}"


@pytest.mark.parametrize("seeded", sampled(BACKWARD), ids=str)
def test_a_fault_in_the_weight_gradient_is_found(seeded: Seeded) -> None:
    kernels = seeded_kernels(seeded)
    for order in ORDERS:
        assert re.search(seeded.found_by, found := finding(run_backward, kernels, order)), f"{order}: {found}"


@pytest.mark.parametrize("seeded", sampled(OF_WGMMA_GRADIENT), ids=str)
def test_a_fault_in_the_weight_gradient_with_wgmma_is_found(seeded: Seeded) -> None:
    kernels = seeded_kernels(seeded)
    for order in ORDERS:
        found = finding(run_wgmma_gradient, kernels, order, WGMMA_GRADIENT_SIZES)
        assert re.search(seeded.found_by, found), f"{order}: {found}"


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_is_found_in_the_unchanged_kernels(order: Order) -> None:
    forward = cuda_emulator.build("conv_relu_cuda.cu", replacements=TF32)
    assert finding(run_forward, forward, order) == "nothing"
    backward = cuda_emulator.build("conv_relu_backward_cuda.cu", replacements=BF16)
    assert finding(run_backward, backward, order) == "nothing"
    forward = cuda_emulator.build("conv_relu_cuda.cu", replacements=WGMMA_ALONE)
    assert finding(run_wgmma, forward, order, WGMMA_SIZES) == "nothing"
    batch_norm = cuda_emulator.build("conv_bn_relu_cuda.cu", replacements=WGMMA_ALONE)
    assert finding(run_statistics, batch_norm, order, WGMMA_SIZES) == "nothing"
    backward = cuda_emulator.build("conv_relu_backward_cuda.cu", replacements=WGMMA_GRADIENT_ALONE)
    assert finding(run_wgmma_gradient, backward, order, WGMMA_GRADIENT_SIZES) == "nothing"
