"""Builds the native parts: neox._ops.<isa> (torch operators on the libtorch stable ABI) and neox._data (no torch).

One operator library is built per CPU instruction set and one is loaded at run time, so that a build travels between
machines of a cluster. NEOX_BUILD_ISA="avx2" (a comma-separated list) builds fewer, for development. Where there are
nvcc and a torch with CUDA, neox._ops.cuda holds the CUDA kernels, for the architectures of TORCH_CUDA_ARCH_LIST, or
else those of sm_80, sm_90a and sm_100 that nvcc supports, and PTX. *_hopper_cuda.cu are always compiled for sm_90a.
NEOX_BUILD_CUDA=0 leaves the library out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
INSTALL = "pip install torch==2.13.0 && pip install -e ."
# -g0 overrides the -g of Python's flags, which takes a third of the compiler's time or more. Symbols of functions stay.
HOST_FLAGS = ["-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
STABLE_ABI = "0x020b000000000000"  # libtorch stable ABI of torch 2.11: a binary runs with it and every later torch

CPU_ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "avx512_bf16": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bf16",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
    "portable": [],
}

# `pip install -e .` builds in an isolated environment without torch. The extensions must be compiled against the torch
# that they will run with, so the packages of the environment that pip installs into are appended. Those of the isolated
# environment come first.
sys.path += [path for path in dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))) if path not in sys.path]

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError as missing:
    sys.exit(f"error[14] building neox needs {missing.name}; where=setup.py; do={INSTALL}")


def sources(pattern: str) -> list[str]:
    """Files below the repository root that match, sorted, relative as setuptools wants them."""
    return sorted(str(Path(found).relative_to(ROOT)) for found in glob(str(ROOT / pattern), recursive=True))


HOPPER = "_hopper_cuda.cu"  # suffix of sources for sm_90a only

SHARED_FILES = [*sources("configs/**/*.yml"), "train.py", "launch/slurm.sh"]


def cpu_isas() -> list[str]:
    """Instruction sets to build for."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    default = "avx2,avx512,avx512_bf16" if x86 else "portable"
    chosen = os.environ.get("NEOX_BUILD_ISA", default).split(",")
    unknown = [isa for isa in chosen if isa not in CPU_ISA_FLAGS]
    if unknown:
        sys.exit(
            f"error[14] unknown instruction set; where=NEOX_BUILD_ISA; got={unknown[0]}; want=one of "
            f"{', '.join(CPU_ISA_FLAGS)}"
        )
    return chosen


def cpu_ops(isa: str) -> CppExtension:
    """The operator library for one CPU instruction set."""
    return CppExtension(
        f"neox._ops.{isa}",
        sources("csrc/ops/**/*.cpp") + sources("csrc/common/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("NEOX_OP_DEVICE", "CPU"), ("NEOX_ISA", f'"{isa}"'), ("TORCH_TARGET_VERSION", STABLE_ABI)],
        extra_compile_args=[*HOST_FLAGS, "-O3", "-fno-math-errno", "-fno-trapping-math", *CPU_ISA_FLAGS[isa]],
    )


def cuda_architectures(nvcc: Path) -> list[str]:
    """nvcc's -gencode flags; none if TORCH_CUDA_ARCH_LIST is set, which torch's build reads itself."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    flags, newest = [], ""
    # sm_100 is assembled from the code for compute_90: the kernels need no later instructions, it takes fewer registers
    # than code for compute_100, and nvcc optimizes once for both
    for source, chips in {"compute_80": ("sm_80",), "compute_90": ("sm_90a", "sm_100")}.items():
        for chip in chips:
            if chip.rstrip("a") in known:  # nvcc does not list variants such as sm_90a
                flags.append(f"-gencode=arch={source},code={chip}")
                newest = source
    return [*flags, f"-gencode=arch={newest},code={newest}"]


def cuda_ops() -> list[CppExtension]:
    """The library of CUDA kernels and the bindings of their operators; empty if it cannot be built."""
    nvcc = Path(CUDA_HOME or "/nonexistent") / "bin" / "nvcc"
    if torch.version.cuda is None or not nvcc.exists() or os.environ.get("NEOX_BUILD_CUDA") == "0":
        return []
    kernels = [source for source in sources("csrc/ops/**/*_cuda.cu") if not source.endswith(HOPPER)]
    operators = sorted({Path(kernel).parts[2] for kernel in kernels})  # csrc/ops/<operator>/...
    bindings = [f"csrc/ops/{op}/{op}.cpp" for op in operators]
    libraries = next(
        (folder for folder in ("lib64", "lib", "targets/x86_64-linux/lib") if glob(f"{CUDA_HOME}/{folder}/libcudart*")),
        "lib64",
    )
    static = bool(glob(f"{CUDA_HOME}/{libraries}/libcudart_static.a"))
    host = [*HOST_FLAGS, "-O2"]
    return [
        CppExtension(
            "neox._ops.cuda",
            bindings + kernels,
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[
                ("NEOX_OP_DEVICE", "CUDA"),
                ("NEOX_CUDA_KERNELS", None),
                ("TORCH_TARGET_VERSION", STABLE_ABI),
            ],
            library_dirs=[f"{CUDA_HOME}/{libraries}"],
            libraries=["cudart_static", "dl", "rt", "pthread"] if static else ["cudart"],
            extra_compile_args={
                "cxx": host,
                "nvcc": [
                    "-std=c++17",
                    "-O3",
                    "-Xcompiler=-fvisibility=hidden",
                    "--threads=2",
                    *cuda_architectures(nvcc),
                ],
            },
            # nothing refers to libtorch itself, but through it the loader finds the symbols of libtorch_cuda
            extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        )
    ]


def hopper_objects(folder: Path) -> list[str]:
    """Compiles the kernels for sm_90a into a folder, and returns the objects.

    No other architecture has their instructions, and setuptools passes the same flags to all sources of a library.
    """
    folder.mkdir(parents=True, exist_ok=True)
    read = ["setup.py", *sources("csrc/common/*.*"), *sources("csrc/ops/**/*.h"), *sources("csrc/ops/**/*.cu*")]
    newest = max((ROOT / source).stat().st_mtime for source in read)
    targets = {source: folder / f"{Path(source).stem}.o" for source in sources(f"csrc/ops/**/*{HOPPER}")}
    flags = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += ["-gencode=arch=compute_90a,code=sm_90a"]

    def compile_source(source: str) -> None:
        partial = targets[source].with_suffix(".partial.o")  # an interrupted build must not leave a target
        subprocess.run([f"{CUDA_HOME}/bin/nvcc", *flags, "-c", source, "-o", str(partial)], check=True, cwd=ROOT)
        partial.replace(targets[source])

    stale = [source for source, target in targets.items() if not target.exists() or target.stat().st_mtime < newest]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(compile_source, stale))  # raises the error of a compiler
    return [str(target) for target in targets.values()]


def data_core() -> CppExtension:
    """The dataset core; links no torch."""
    return Extension(
        "neox._data",
        sources("csrc/data/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=[*HOST_FLAGS, "-O3", "-ffp-contract=off"],  # blend.cpp: no fused multiply-add
        language="c++",
    )


class BuildNative(BuildExtension):
    """Keeps the objects of each library in its own folder, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Build one library."""
        temporary, self.build_temp = self.build_temp, str(ROOT / "build" / "objects" / ext.name)
        if ext.name == "neox._ops.cuda":
            ext.extra_objects = hopper_objects(Path(self.build_temp))
        super().build_extension(ext)
        self.build_temp = temporary


class BuildPackage(build_py):
    """Adds files next to the package to the wheel, as neox/share/: presets, train.py and launch scripts."""

    def run(self) -> None:
        """Copy the modules, then these files. An editable install finds them in the checkout."""
        if not self.editable_mode:  # a module that was renamed since the last build must not reach the wheel
            shutil.rmtree(Path(self.build_lib) / "neox", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for name in SHARED_FILES:
                target = Path(self.build_lib) / "neox" / "share" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)


(ROOT / "neox" / "_ops").mkdir(exist_ok=True)  # an in-place build copies into it and does not create it
setup(
    ext_modules=[*(cpu_ops(isa) for isa in cpu_isas()), *cuda_ops(), data_core()],
    cmdclass={
        "build_py": BuildPackage,
        "build_ext": BuildNative.with_options(use_ninja=True, no_python_abi_suffix=True),
    },
)
