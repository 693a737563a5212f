"""Every CUDA kernel keeps the budget in its source, on every target; and the arithmetic that says so."""

from __future__ import annotations

import shutil

import cuda_emulator
import pytest
from cuda_resources import (
    ADDRESS,
    TARGETS,
    Counted,
    Operation,
    Resources,
    compiled,
    counted,
    find_disassembler,
    plain,
    problems,
)


def resources(registers: int, static_shared_bytes: int = 0) -> Resources:
    return Resources(registers, 0, 0, static_shared_bytes, 256, 2, Counted(0, 0, 0))


@pytest.mark.parametrize(
    ("target", "registers", "threads", "shared_bytes", "warps"),
    [
        ("sm_80", 32, 256, 0, 64),  # 8 blocks: all of them
        ("sm_80", 33, 256, 0, 48),  # 40 registers a thread are taken: 6 blocks
        ("sm_86", 48, 256, 0, 40),  # 5 blocks
        ("sm_80", 255, 256, 0, 8),  # 1 block
        ("sm_80", 32, 32, 0, 32),  # 32 blocks are the most
        ("sm_86", 32, 32, 0, 16),  # or 16
        ("sm_90a", 64, 128, 227 * 1024, 4),  # all of the shared memory
        ("sm_86", 64, 128, 49 * 1024, 8),  # 2 * (49 + 1) KB are 100
        ("sm_86", 64, 128, 49 * 1024 + 1, 4),
    ],
)
def test_occupancy(target: str, registers: int, threads: int, shared_bytes: int, warps: int) -> None:
    limits = TARGETS[target]
    found = resources(registers).occupancy(limits, threads, shared_bytes)
    assert found == warps / (limits.threads // 32)


def test_static_and_dynamic_shared_memory_count_together() -> None:
    limits = TARGETS["sm_86"]
    assert resources(32, 1024).occupancy(limits, 64, 1024) == resources(32).occupancy(limits, 64, 2048)


def test_instructions_are_counted_with_and_without_an_item() -> None:
    """And around what loads a tensor element by element, where that is code of its own."""
    listing = """.L_step LDS|@P0 BRA .L_item|LDGSTS
        .L_item @P1 BRA .L_product|IMAD|@P2 BRA .L_elements|LDGSTS or zeros|BRA .L_product
        .L_elements @P1 LDG.E.U16|@P2 LDG.E.U16|@P3 LDG.E.U16|PRMT|PRMT|PRMT
        .L_product LDSM.16.M88.4|HMMA.16816.F32.BF16|HMMA.16816.F32.BF16|@P0 BRA .L_step|EXIT"""
    operations, labels = [], {}
    for line in map(str.strip, listing.splitlines()):
        label, _, rest = line.partition(" ")
        labels[label] = len(operations)
        for text in rest.split("|"):
            to = text.partition("BRA ")[2]
            operations.append(Operation(text.removesuffix(f" {to}"), to, text[:3] not in ("BRA", "EXI")))
    assert counted(operations, labels) == Counted(tensor=2, longest=12, other=8)
    assert counted(operations[: labels[".L_product"]], labels) == Counted(0, 0, 0)


def test_both_compilers_names_become_one() -> None:
    nvcc = "void maskcore::_GLOBAL__N__19f9_16_x_cuda_cu_b4::k<float, 4>(float const*, maskcore::S<maskcore::T<3> >)"
    host = "void maskcore::(anonymous namespace)::k<float, 4>(float const*, maskcore::S<maskcore::T<3> >)"
    assert plain(nvcc) == plain(host) == "k<float, 4>"
    assert plain("maskcore::(anonymous namespace)::k(long*)") == "k"


@pytest.mark.skipif(
    not cuda_emulator.has_compiler(), reason="launches are recorded with g++, addr2line and nm"
)
def test_launches_are_recorded() -> None:
    library = cuda_emulator.build("softmax_cross_entropy_cuda.cu")
    (launch,) = library.record("launch_softmax_cross_entropy", ADDRESS, ADDRESS, 2048, 3, ADDRESS, ADDRESS)
    assert plain(launch.kernel) == "softmax_cross_entropy_kernel"
    assert launch[1:] == ((1, 1, 1), 1024, 256)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on this machine")
@pytest.mark.skipif(
    not cuda_emulator.has_compiler(), reason="launches are recorded with g++, addr2line and nm"
)
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_keep_their_budgets(target: str) -> None:
    assert compiled(target)
    assert not problems(target), "\n".join(problems(target))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on this machine")
@pytest.mark.skipif(
    find_disassembler() is None, reason="there is no nvdisasm: pip install nvidia-cuda-nvdisasm"
)
@pytest.mark.parametrize("target", TARGETS)
def test_products_are_the_tensor_cores(target: str) -> None:
    """What multiplies in TF32 or bfloat16 has tensor-core instructions, nothing else has."""
    for kernel, r in compiled(target).items():
        multiplies = kernel.startswith(("conv_halo_", "conv_weight_gradient", "conv_first_layer"))
        assert (r.counted.tensor > 0) == (multiplies and "<Ieee" not in kernel), kernel
