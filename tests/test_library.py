"""Which kernels are loaded, on whose word, and that every instruction set passes the operators' tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import maskcore
from maskcore import _library
from maskcore.errors import UserError
from maskcore.machine import choose_device

HERE = Path(__file__).parent  # and not the source folder, whose package comes before the installed one
AVAILABLE = _library.available()


def run(*arguments: str, isa: str | None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MASKCORE_ISA"} | variables
    if isa is not None:
        environment["MASKCORE_ISA"] = isa
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=HERE, capture_output=True, text=True, timeout=600
    )


def test_some_instruction_set_is_available() -> None:
    assert AVAILABLE
    assert "baseline" in AVAILABLE
    assert set(AVAILABLE) <= set(_library.INSTRUCTION_SETS)
    assert _library.load() in AVAILABLE


def test_the_best_is_loaded_unless_told_otherwise() -> None:
    assert sorted(AVAILABLE, key=_library.INSTRUCTION_SETS.index) == AVAILABLE
    for isa in (None, ""):
        found = run("-c", "from maskcore import _library; print(_library.load())", isa=isa)
        assert found.stdout.strip() == AVAILABLE[0], found.stderr


def test_show_config_prints_what_config_holds(capsys: pytest.CaptureFixture[str]) -> None:
    maskcore.show_config()
    printed = capsys.readouterr().out
    found = maskcore.config()
    assert {"maskcore", "instruction set", "threads", "caches", "torch", "python", "CUDA"} <= found.keys()
    assert found["instruction set"] == _library.load()
    assert len(printed.splitlines()) == len(found)
    for line, (name, value) in zip(printed.splitlines(), found.items(), strict=True):
        assert line.startswith(name)
        assert line.endswith(str(value))


@pytest.mark.parametrize("isa", _library.INSTRUCTION_SETS)
def test_override(isa: str) -> None:
    if isa not in AVAILABLE:
        pytest.skip(f"{isa} was not built or this processor does not have it")
    found = run("-c", "import maskcore; maskcore.show_config()", isa=isa)
    assert found.returncode == 0, found.stderr
    assert f"instruction set             {isa}\n" in found.stdout


@pytest.mark.parametrize("isa", ["sse9", *_library.INSTRUCTION_SETS])
def test_an_instruction_set_that_is_not_there_is_refused(isa: str) -> None:
    if isa in AVAILABLE:
        pytest.skip(f"{isa} is available here")
    found = run("-c", "import maskcore", isa=isa)
    assert found.returncode != 0
    expected = f"MASKCORE_ISA={isa} cannot be used: this machine and build have {', '.join(AVAILABLE)}"
    assert found.stderr.strip().splitlines()[-1] == f"ImportError: {expected}"


@pytest.mark.parametrize("module", ["maskcore", "maskcore.summary"])
def test_a_command_refuses_in_one_sentence(module: str) -> None:
    found = run("-m", module, "summary", isa="sse9")
    assert found.returncode == 2
    assert found.stderr.startswith("maskcore: error: MASKCORE_ISA=sse9 cannot be used")
    assert found.stderr.count("\n") == 1
    found = run("-m", module, "summary", isa=None, MASKCORE_CONV="fft")
    assert found.returncode == 2
    assert (
        found.stderr
        == "maskcore: error: MASKCORE_CONV must be direct, winograd, winograd4 or winograd6, is fft\n"
    )


@pytest.mark.parametrize("isa", _library.INSTRUCTION_SETS)
def test_operators_of_the_other_instruction_sets(isa: str) -> None:
    if isa == _library.load():
        pytest.skip(f"{isa} is the one that this session tests")
    if isa not in AVAILABLE:
        pytest.skip(f"{isa} was not built or this processor does not have it")
    chosen = ("-k", "not random and not full_size and not opcheck and not emulated")
    found = run("-m", "pytest", "test_ops.py", "-q", "-x", "--no-header", *chosen, isa=isa)
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout


@pytest.mark.skipif(not _library._cuda_objects(), reason="the CUDA kernels were not built: there was no nvcc")
@pytest.mark.skipif(shutil.which("g++") is None, reason="a stand-in for torch's CUDA part needs g++")
def test_the_cuda_kernels_load_and_register_every_operator(tmp_path: Path) -> None:
    """All but the dense layer's, which is PyTorch's product there. Also beside a torch without CUDA, which lacks but
    one of the functions that they call."""
    source, stand_in = tmp_path / "stand_in.cpp", tmp_path / "stand_in.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }')
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", stand_in], check=True)
    program = f"""
import ctypes, torch
from maskcore import _library, ops
if torch.version.cuda is None:
    ctypes.CDLL({str(stand_in)!r}, mode=ctypes.RTLD_GLOBAL)
if not torch.cuda.is_available():
    _library._load_cuda()
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("maskcore::")]
print(*sorted(n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")))
"""
    found = run("-c", program, isa=None)
    assert found.stdout.split() == [
        "maskcore::_dense_backward",
        "maskcore::_fma_loop",
        "maskcore::_phase_times",
        "maskcore::dense",
        "maskcore::empty_cache",
        "maskcore::transform_filter",
    ], found.stderr


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_head_stores_is_a_question_of_the_device(device: str) -> None:
    """Of pictures the CPU's kernels keep a gram matrix, the others z. Shape inference knows; meta
    stands for a GPU."""
    shapes = [(2, 8, 9, 3), (5, 3, 3, 3), (5,), (5,), (5,), (7, 5, 3, 3), (7,)]
    operands = [torch.randn(shape, device=device) for shape in shapes]
    *_, z, gram, _, _ = torch.ops.maskcore.conv_bn_relu_conv_relu_train(*operands, 1e-3, 1, 0, True)
    assert z.shape == ((0 if device == "cpu" else 2), 8, 9, 5)
    assert gram.shape == ((28, 28) if device == "cpu" else (0, 0))
    assert gram.dtype == torch.float64


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_gpu_that_is_too_old_is_named(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_cuda_objects", lambda: [Path("x.so")])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(_library, "load", lambda: "baseline")
    if capability >= (8, 0):
        assert choose_device("cuda") == torch.device("cuda")
        return
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(
        UserError, match=r"device cuda cannot be used: .* compute capability 7\.5 is below the 8\.0"
    ):
        choose_device("cuda")
