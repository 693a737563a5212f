"""Builds the kernels: one shared object an instruction set, the CUDA object where nvcc is found, and _native.

Environment:
    MASKCORE_CUDA=0|1   leave CUDA out, or insist on it (default: built where nvcc is found)
    TORCH_CUDA_ARCH_LIST, MAX_JOBS   as for any torch extension
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# The kernels use the stable ABI of LibTorch 2.10, so any torch from 2.10 on will do to build with. The one that
# is installed is taken, although pip hides it from an isolated build; only without any is one downloaded.
TORCH_ABI = 0x020A000000000000
TORCH_TO_BUILD_WITH = "torch==2.13.0"

# Best first; the flags are for GCC and Clang. Zen 4 and Sapphire Rapids | Skylake-X | Haswell and Zen | any.
INSTRUCTION_SETS = {
    "avx512bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma",
    "avx2": "-mavx2 -mfma",
    "baseline": "",
}
WARNINGS = ["-Wall", "-Wextra"]
# Errno and floating-point traps are not observed, which lets loops with selects and square roots vectorise;
# NaN, infinities and the order of sums keep their meaning. A multiply and an add may fuse.
OPTIMIZE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def torch_is_found() -> bool:
    site_packages = sysconfig.get_path("purelib")
    try:
        import torch
    except ImportError:
        sys.path.append(site_packages)
        try:
            import torch
        except ImportError:
            sys.path.remove(site_packages)
            return False
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def wants_cuda() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    asked = os.environ.get("MASKCORE_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"maskcore: MASKCORE_CUDA must be 0 or 1, is {asked!r}")
    has_nvcc = CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()
    if asked == "1" and not has_nvcc:
        sys.exit("maskcore: MASKCORE_CUDA=1, but no nvcc was found: install the CUDA toolkit or set CUDA_HOME")
    return has_nvcc and asked != "0"


def kernels(name: str, sources: list[Path], flags: str) -> Extension:
    from torch.utils import cpp_extension

    return cpp_extension.CppExtension(
        f"maskcore._kernels_{name}",
        sorted(map(str, sources)),
        depends=sorted(map(str, Path("csrc").glob("*.h"))),
        extra_compile_args=[
            *OPTIMIZE,
            *WARNINGS,
            *flags.split(),
            "-fvisibility=hidden",
            f"-DTORCH_TARGET_VERSION={TORCH_ABI:#x}",
        ],
        libraries=["torch_cpu"],
        no_python_abi_suffix=True,
    )


def extensions() -> list[Extension]:
    import pybind11

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = INSTRUCTION_SETS if x86 else {"baseline": ""}
    cpu_sources = [Path("csrc/ops.cpp"), *Path("csrc").glob("*_cpu.cpp")]
    native = Extension(
        "maskcore._native",
        ["csrc/native.cpp"],
        include_dirs=[pybind11.get_include()],
        language="c++",
        extra_compile_args=["-std=c++20", *OPTIMIZE, *WARNINGS, "-fvisibility=hidden"],
    )
    return [native, *(kernels(name, cpu_sources, flags) for name, flags in isas.items())]


def build_commands() -> dict[str, type]:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Keeps the objects of each extension apart: they come from the same sources."""

        def run(self) -> None:
            isas = ", ".join(e.name.split("_kernels_")[1] for e in self.extensions if "_kernels_" in e.name)
            print(f"maskcore: building for {isas}; CPU only; with torch {torch.__version__}", file=sys.stderr)
            super().run()

        def build_extension(self, ext: Extension) -> None:
            shared, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            super().build_extension(ext)
            self.build_temp = shared

    return {"build_ext": Build.with_options(use_ninja=True)}


if torch_is_found():
    setup(ext_modules=extensions(), cmdclass=build_commands())
else:
    # pip asks a first time what a build needs; it runs this file again when that is installed.
    setup(setup_requires=[TORCH_TO_BUILD_WITH])
