"""Builds the kernels: one shared object an instruction set, one for CUDA where nvcc is found, and _native.

Environment:
    MASKCORE_CUDA=0|1     leave CUDA out, or insist on it (default: built where nvcc is found)
    MASKCORE_BUILD_ISA    instruction sets to build, such as "avx2,baseline" (default: all four)
    CUDA_HOME             where the CUDA toolkit lies (default: that of the nvcc on the PATH)
    TORCH_CUDA_ARCH_LIST  GPU generations to build for, such as "8.0;9.0+PTX"
    MAX_JOBS              compilers that run at once
    CFLAGS                further flags for the compiler, such as -g for debug information
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

# The kernels use the stable ABI of LibTorch 2.11, so any torch from 2.11 on will do to build with. The one
# that is installed is taken, although pip hides it from an isolated build; only without any is one downloaded.
TORCH_ABI = 0x020B000000000000
TORCH_TO_BUILD_WITH = "torch==2.13.0"

# Best first; the flags are for GCC and Clang. Zen 4, Sapphire Rapids | Skylake-X | Haswell, Zen | any x86-64.
INSTRUCTION_SETS = {
    "avx512bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma",
    "avx2": "-mavx2 -mfma",
    "baseline": "",
}
# Ampere | GA10x | Ada | Hopper | Blackwell | consumer Blackwell, and later ones by their drivers' compiler.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"

WARNINGS = ["-Wall", "-Wextra"]
# Errno and floating-point traps are not observed, which lets loops with selects and square roots vectorise;
# NaN, infinities and the order of sums keep their meaning. A multiply and an add may fuse.
OPTIMIZE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# Python passes on the -g that it was built with: objects seven times as large, and a third more of time.
DEBUG_IS_WANTED = any(flag.startswith("-g") for flag in os.environ.get("CFLAGS", "").split())
DEBUG_INFORMATION = [] if DEBUG_IS_WANTED else ["-g0"]
STABLE_ABI = f"-DTORCH_TARGET_VERSION={TORCH_ABI:#x}"


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
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


def instruction_sets() -> dict[str, str]:
    """Names and flags of the instruction sets to build for."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    known = INSTRUCTION_SETS if x86 else {"baseline": ""}
    wanted = os.environ.get("MASKCORE_BUILD_ISA", ",".join(known)).split(",")
    for name in wanted:
        if name not in known:
            sys.exit(f"maskcore: MASKCORE_BUILD_ISA has {name!r}: choose from {', '.join(known)}")
    return {name: known[name] for name in wanted}


def find_nvcc() -> Path | None:
    """The compiler to build the CUDA kernels with, or None to leave them out."""
    wanted = os.environ.get("MASKCORE_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"maskcore: MASKCORE_CUDA must be 0 or 1, is {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc")
    nvcc = Path(found).resolve() if found else None
    if nvcc is None or not nvcc.exists():
        if wanted == "1":
            sys.exit(
                "maskcore: MASKCORE_CUDA=1, but there is no nvcc: install CUDA's compiler or set CUDA_HOME"
            )
        return None
    return nvcc


def cuda_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.partition("release ")[2].partition(",")[0]


def gencode_flags() -> list[str]:
    flags = []
    for architecture in (
        os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).replace(" ", ";").split(";")
    ):
        number = architecture.removesuffix("+PTX").replace(".", "")
        # Machine code for Hopper may use all that is its own: wgmma.
        machine = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{machine},code=sm_{machine}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def torch_includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [flag for path in include_paths() for flag in ("-isystem", path)]


def torch_libraries() -> dict[str, list[str]]:
    from torch.utils.cpp_extension import library_paths

    return {"libraries": ["torch_cpu"], "library_dirs": library_paths()}


def compile_cuda(nvcc: Path, source: Path, folder: Path) -> str:
    """Compiles one file, of kernels or of host code, and returns its object.

    torch's own nvcc rules refuse a torch without CUDA. Kernels (.cu) see no header of torch's.
    """
    built = folder / f"{source.stem}.o"
    headers = (path for pattern in ("*.h", "*.cuh") for path in Path("csrc").glob(pattern))
    newest = max(path.stat().st_mtime for path in (source, *headers))
    if built.exists() and built.stat().st_mtime > newest:
        return str(built)
    flags = ["-std=c++20", "-O3", "--Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    if source.suffix == ".cu":
        flags += ["--threads", "2", *gencode_flags()]
    else:
        flags += ["-DUSE_CUDA", STABLE_ABI, *torch_includes()]
        if any("sm_90a" in flag for flag in gencode_flags()):
            flags.append("-DMASKCORE_BUILT_FOR_SM90A")
    subprocess.run([nvcc, *flags, "-c", source, "-o", built], check=True)
    return str(built)


def cuda_jobs() -> int:
    """nvcc compiles for two generations at a time, so half as many of it as processors."""
    return max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) // 2)


def link_cuda(nvcc: Path, objects: list[str], library: Path) -> None:
    """The runtime is linked in; torch's CUDA symbols are found at load time, beside a torch that has them."""
    torch = torch_libraries()
    # The compiler of PyPI's nvidia-cuda-nvcc has its runtime in lib, where it does not look itself.
    folders = [f"-L{folder}" for folder in (*torch["library_dirs"], nvcc.parents[1] / "lib")]
    names = [f"-l{name}" for name in torch["libraries"]]
    subprocess.run(
        [nvcc, "-shared", "-cudart", "static", *objects, *folders, *names, "-o", library], check=True
    )


def cpu_kernels(isa: str, flags: str) -> Extension:
    return Extension(
        f"maskcore._kernels_{isa}",
        ["csrc/ops.cpp", *sorted(map(str, Path("csrc").glob("*_cpu.cpp")))],
        depends=sorted(map(str, Path("csrc").glob("*.h"))),
        language="c++",
        extra_compile_args=[
            "-std=c++20",
            *OPTIMIZE,
            *WARNINGS,
            *DEBUG_INFORMATION,
            *flags.split(),
            "-fvisibility=hidden",
            STABLE_ABI,
            *torch_includes(),
        ],
        **torch_libraries(),
    )


def cuda_kernels() -> Extension:
    """Compiled and linked by Build.build_cuda: torch's build commands must not see the .cu files."""
    sources = ["csrc/ops_cuda.cpp", *sorted(map(str, Path("csrc").glob("*_cuda.cu")))]
    return Extension("maskcore._kernels_cuda", [], depends=sources)


def native() -> Extension:
    import pybind11

    return Extension(
        "maskcore._native",
        ["csrc/native.cpp"],
        include_dirs=[pybind11.get_include()],
        language="c++",
        extra_compile_args=["-std=c++20", *OPTIMIZE, *WARNINGS, *DEBUG_INFORMATION, "-fvisibility=hidden"],
    )


def build() -> None:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    isas = instruction_sets()
    nvcc = find_nvcc()
    extensions = [native(), *(cpu_kernels(isa, flags) for isa, flags in isas.items())]
    if nvcc is not None:
        extensions.append(cuda_kernels())

    class Build(BuildExtension):
        build_temp: str

        def run(self) -> None:
            cuda = f"CUDA {cuda_version(nvcc)}" if nvcc else "no CUDA"
            built_for = f"{', '.join(isas)}; {cuda}; against torch {torch.__version__}"
            print(f"maskcore: building for {built_for}", file=sys.stderr, flush=True)
            super().run()
            # `python -m maskcore.train` in the source folder finds the package there before the installed one.
            if not self.inplace:
                self.copy_extensions_to_source()

        def build_extension(self, ext: Extension) -> None:
            # The extensions share their sources: each gets a folder of objects of its own.
            shared, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            if nvcc is not None and ext.name == "maskcore._kernels_cuda":
                self.build_cuda(nvcc, ext)
            else:
                super().build_extension(ext)
            self.build_temp = shared

        def build_cuda(self, nvcc: Path, ext: Extension) -> None:
            # The largest first, so that none is left alone at the end.
            sources = sorted(map(Path, ext.depends), key=lambda path: -path.stat().st_size)
            with ThreadPoolExecutor(cuda_jobs()) as pool:
                objects = list(
                    pool.map(lambda source: compile_cuda(nvcc, source, Path(self.build_temp)), sources)
                )
            library = Path(self.get_ext_fullpath(ext.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            link_cuda(nvcc, objects, library)

    setup(ext_modules=extensions, cmdclass={"build_ext": Build})


if torch_is_found():
    build()
else:
    # pip asks a first time what a build needs, and runs this file again when that is installed.
    setup(setup_requires=[TORCH_TO_BUILD_WITH])
