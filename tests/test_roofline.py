"""The roofline's arithmetic, and that the page in docs/ is its output."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import cuda_emulator
import pytest
from cuda_resources import ADDRESS, TYPES, ConvCall, ConvSize

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("roofline", BENCHMARKS / "roofline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module  # where dataclasses looks
    spec.loader.exec_module(module)
    return module


def test_products_are_those_of_the_layer_table(roofline: ModuleType) -> None:
    """4.425 G products an image forward, by a count made by hand."""
    convs = roofline.convolutions(1)
    assert len(convs) == 13
    assert sum(conv.operations(conv.C, conv.K, 1) / 2 for conv in convs) == pytest.approx(4.425e9, rel=1e-3)
    assert roofline.parameters() == 13_304_355


def test_a_kernel_is_bound_by_what_takes_longer(roofline: ModuleType) -> None:
    a100, bf16 = roofline.GPUS[0], roofline.PRECISIONS[0]
    assert roofline.Kernel("", "", 2.04e9, 1.0).seconds(a100, bf16) == pytest.approx(1e-3)
    assert roofline.Kernel("", "", 1.0, 312e9).seconds(a100, bf16) == pytest.approx(1e-3)


def test_a_step_moves_at_most_55_percent_of_the_eager_step(roofline: ModuleType) -> None:
    for precision in roofline.PRECISIONS:
        for batch in roofline.BATCHES:
            ours, theirs = roofline.training(batch, precision), roofline.eager_training(batch, precision)
            assert roofline.moved(ours) <= 0.55 * roofline.moved(theirs)
            assert all(math.isfinite(kernel.bytes) and kernel.bytes > 0 for kernel in (*ours, *theirs))


def test_a_head_as_one_operator_saves_at_least_5_percent_of_a_step(roofline: ModuleType) -> None:
    """Less would not pay for its kernels."""
    for precision in roofline.PRECISIONS:
        for batch in roofline.BATCHES:
            apart = roofline.training_apart(batch, precision)
            heads = roofline.training(batch, precision)
            for gpu in roofline.GPUS:
                saved = 1 - roofline.total(heads, gpu, precision) / roofline.total(apart, gpu, precision)
                assert saved >= 0.05, f"{gpu.name}, {precision.name}, batch {batch}: {saved:.1%}"


def test_wgmma_saves_at_least_5_percent_of_a_step(roofline: ModuleType) -> None:
    """Less would not pay for its kernels."""
    rows = [line for line in roofline.hopper() if line.startswith("| a training step")]
    assert len(rows) == len(roofline.PRECISIONS) * len(roofline.BATCHES)
    for line in rows:
        assert float(line.split("|")[-2].strip().removesuffix("%")) / 100 >= 0.05


@pytest.mark.skipif(
    not cuda_emulator.has_compiler(), reason="launches are recorded with g++, addr2line and nm"
)
def test_tiles_are_those_of_the_launchers(roofline: ModuleType, forward: cuda_emulator.Kernels) -> None:
    """In bf16, on 100 KB, where no layer behind the first two keeps its filter: a block a tile and 128 channels, or,
    without wgmma, 64 where that is done sooner."""
    narrower = set()
    for conv in roofline.convolutions(32)[2:]:
        P, Q = conv.H - 2, conv.W - 2
        size = ConvSize(conv.N, conv.H, conv.W, conv.C, conv.K, 0, P, Q)
        for name, pointers, pooled in (
            ("launch_conv_relu", 5, False),
            ("launch_conv_relu_max_pool", 6, True),
        ):
            tiles, _ = roofline.tiling(conv.N, P, Q, pooled)
            *_, launch = forward.record(
                name, ConvCall(size, *TYPES["bfloat16"], 108, 100 * 1024, False), *[ADDRESS] * pointers
            )
            wide, narrow = tiles * -(-conv.K // 128), tiles * -(-conv.K // 64)
            rounds = -(-wide // 108), -(-narrow // 108)
            if conv.K > 64 and 10 * 64 * rounds[1] <= 9 * 128 * rounds[0]:
                narrower.add(conv.name)
                assert launch.grid[0] == narrow, f"{conv.name}, {name}"
            else:
                assert launch.grid[0] == wide, f"{conv.name}, {name}"
            if conv.K > 64:
                by_wgmma = ConvCall(size, *TYPES["bfloat16"], 132, 228 * 1024, True)
                *_, launch = forward.record(name, by_wgmma, *[ADDRESS] * pointers)
                assert launch.grid[0] == wide, f"{conv.name}, {name}"
    assert {"block4_conv2", "block4_conv3"} <= narrower


def test_the_kernels_that_the_page_names_are_compiled(roofline: ModuleType) -> None:
    if not roofline.TABLE.exists():
        pytest.skip("docs/ is not in this copy of the sources")
    for precision in roofline.PRECISIONS:
        for work, kernel in roofline.passes(32, precision):
            for gpu in roofline.GPUS:
                share, bound = roofline.share_of_roof(work, kernel, gpu)
                assert 0.0 < share <= 1.0, f"{work.conv.name}, {work.name}, {gpu.name}: {share:.2f} {bound}"


def test_the_page_is_what_the_script_writes(roofline: ModuleType) -> None:
    if not roofline.TABLE.exists():
        pytest.skip("docs/ is not in this copy of the sources")
    assert roofline.TABLE.read_text() == roofline.page()
