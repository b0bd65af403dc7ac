"""Builds and installs what benchmarks/gpu.sh needs on a GPU machine without a network. `make gpu-bundle` builds it.

build/gpu-bundle holds the operator libraries, which depend neither on the version of Python nor on that of torch from
2.11 on, the dataset core for one version of Python, and wheels of the packages that an image with torch and
transformers lacks.

usage: bundle.py tools --python PYTHON3.12    check that this machine has what `make` needs
       bundle.py make --python PYTHON3.12     build the bundle
       bundle.py install --device cuda        install it on the GPU machine
       bundle.py build                        build the libraries there, if they do not load
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
from gpu.calls import ROOT

BUNDLE = ROOT / "build" / "gpu-bundle"
SITE = ROOT / "build" / "gpu-site"
STAMP = ROOT / "neox" / "_ops" / "bundle.txt"
CUDA_BUILD = ROOT / "build" / "native" / "tests" / "cuda" / "gpu"
LIMIT_MB = 40
ARCHITECTURE = "sm_90"

WHEELS = ("annotated-types", "einops", "hjson", "msgpack", "orjson", "py-cpuinfo", "pydantic", "pydantic-core")
WHEELS += ("typing-inspection", "zstandard")
SOURCES = ("deepspeed",)  # published as sources only
# pip matches platform tags exactly, so all common ones are listed.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# Requirements of these packages that an image with torch, transformers and pytest has.
PRESENT = {"ninja", "numpy", "packaging", "psutil", "torch", "tqdm", "typing-extensions"}


def sources_hash() -> str:
    """A hash of the sources of the libraries."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(*command: object) -> str:
    """Run a command and return its stdout; stderr is passed through. Ends the program if it fails."""
    words = [str(word) for word in command]
    if shutil.which(words[0]) is None:
        sys.exit(f"error[14] no such program; where={' '.join(words)[:200]}; got={words[0]}")
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"error[1] a command failed; where={' '.join(words)[:200]}; got=exit code {done.returncode}")
    return done.stdout.strip()


def normal(name: str) -> str:
    """A distribution's normalised name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def headers(python: str) -> tuple[str, str]:
    """An interpreter's folder of headers, and its version. Ends the program with an error if they are missing."""
    program = "import sysconfig, sys; print(sysconfig.get_paths()['include']); print('%d.%d' % sys.version_info[:2])"
    found, reason = [], "no such program"
    if shutil.which(python):
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
        found, reason = done.stdout.splitlines(), (done.stderr.strip().splitlines() or ["no output"])[0]
    if len(found) == 2 and (Path(found[0]) / "Python.h").exists():
        return found[0], found[1]
    reason = f"no {found[0]}/Python.h" if found else f"{python}: {reason}"
    sys.exit(
        f"error[14] no Python with its headers; where=GPU_PYTHON; got={reason}; want=the version of the GPU machine; "
        "do=make gpu-bundle GPU_PYTHON=/path/to/python3.12"
    )


def tools(python: str) -> None:
    """End the program with an error if this machine lacks a tool, before anything is compiled."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    for name in ("nvcc", compiler, "c++filt", "strip", "nm"):
        if shutil.which(name) is None:
            sys.exit(f"error[14] no {name}; where=PATH; want=CUDA 12.8 or later, g++ and binutils; do=install it")
    known = run("nvcc", "--list-gpu-code").split()
    if ARCHITECTURE not in known:
        sys.exit(f"error[14] nvcc is too old; where={shutil.which('nvcc')}; got=up to {known[-1]}; want={ARCHITECTURE}")
    headers(python)


def make(python: str) -> None:
    """Build the bundle. Ends the program with an error if it is incomplete or too large."""
    include, version = headers(python)
    shutil.rmtree(BUNDLE, ignore_errors=True)
    (BUNDLE / "neox" / "_ops").mkdir(parents=True)
    for library in sorted((ROOT / "neox" / "_ops").glob("*.so")):
        if library.stem != "cuda":
            shutil.copy(library, BUNDLE / "neox" / "_ops")
    shutil.copy(CUDA_BUILD / "neox_gpu.so", BUNDLE / "neox" / "_ops" / "cuda.so")
    compile_data_core(include)
    run("strip", "--strip-unneeded", *BUNDLE.rglob("*.so"))
    (BUNDLE / "kernels.json").write_text(json.dumps(kernels(), indent=1) + "\n")
    fetch_wheels(version)
    check()
    changed = run("git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no") != ""
    commit = run("git", "-C", ROOT, "rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    about = {"sources": sources_hash(), "python": version, "commit": commit}
    (BUNDLE / "bundle.json").write_text(json.dumps(about) + "\n")


def compile_data_core(include: str) -> None:
    """Compile neox._data for another Python, of which only the headers are needed, with the flags of setup.py."""
    pybind11 = run(sys.executable, "-c", "import pybind11; print(pybind11.get_include())")
    flags = ["-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-O3", "-ffp-contract=off", "-DNDEBUG"]
    sources = sorted((ROOT / "csrc" / "data").glob("*.cpp"))
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    folders = [f"-I{ROOT / 'csrc'}", "-isystem", pybind11, "-isystem", include]
    run(*compiler, *flags, "-shared", "-fPIC", "-pthread", *folders, *sources, "-o", BUNDLE / "neox" / "_data.so")


def kernels() -> dict[str, list[str]]:
    """Operator -> the demangled names of its kernels in the CUDA library, from ptxas's output."""
    found: dict[str, set[str]] = {}
    for log in sorted(CUDA_BUILD.glob("*_cuda.cu.o.log")):
        (source,) = (ROOT / "csrc" / "ops").rglob(log.name.removesuffix(".o.log"))
        operator = source.relative_to(ROOT / "csrc" / "ops").parts[0]
        mangled = sorted(set(re.findall(r"Compiling entry function '(\w+)'", log.read_text())))
        found.setdefault(operator, set()).update(run("c++filt", *mangled).splitlines() if mangled else [])
    return {operator: sorted(names) for operator, names in found.items()}


def fetch_wheels(version: str) -> None:
    """Download the wheels for a version of Python, and build those of packages that are published as sources only."""
    pip = (sys.executable, "-m", "pip")
    folder, pinned = BUNDLE / "wheels", ("--no-deps", "-c", ROOT / "constraints.txt")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ("--only-binary=:all:", "--implementation", "cp", "--python-version", version, *platforms)
    run(*pip, "download", "-q", *pinned, *target, "-d", folder, *WHEELS)
    run(*pip, "wheel", "-q", *pinned, "--no-build-isolation", "-w", folder, *SOURCES)


def requirements(wheel: Path) -> tuple[str, set[str]]:
    """The name of a wheel's distribution, and those that it requires."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    (title,) = (line.removeprefix("Name: ") for line in lines if line.startswith("Name: "))
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return normal(title), {
        normal(re.split(r"[^\w.-]", one)[0])
        for one in needed
        if "extra ==" not in one and "python_version <" not in one
    }


def check() -> None:
    """End the program with an error if the bundle is too large, or lacks a requirement that the image lacks too."""
    wheels = dict(map(requirements, sorted((BUNDLE / "wheels").glob("*.whl"))))
    missing = {f"{need} of {name}" for name, needs in wheels.items() for need in needs - wheels.keys() - PRESENT}
    if missing:
        sys.exit(f"error[1] the bundle lacks packages; where={BUNDLE}; got=no {', no '.join(sorted(missing))}")
    files = {path.relative_to(BUNDLE): path.stat().st_size / 1e6 for path in BUNDLE.rglob("*") if path.is_file()}
    for name, size in files.items():
        print(f"{size:6.2f} MB  {name}")
    total = sum(files.values())
    print(f"{total:6.2f} MB  in all, in {BUNDLE.relative_to(ROOT)}")
    if total > LIMIT_MB:
        sys.exit(f"error[1] the bundle is too large; where={BUNDLE}; got={total:.1f} MB; want={LIMIT_MB} MB")


def install(device: str) -> int:
    """Install what this machine lacks. Returns the exit code, which is 0 also without a bundle."""
    if not (BUNDLE / "bundle.json").exists():  # written last
        record.add({"bundle": "missing", "do": "make gpu-bundle elsewhere, and carry build/gpu-bundle"})
        return 0
    about = json.loads((BUNDLE / "bundle.json").read_text())
    libraries = install_libraries(about["sources"], device)
    record.add({"bundle of": about["commit"], "for Python": about["python"], "libraries": libraries})
    packages = install_packages()
    record.add({"packages": packages})
    print(f"libraries {libraries}; packages {packages or 'none'}")
    return 0


def install_libraries(bundled: str, device: str) -> str:
    """Copy the libraries of the bundle, unless the checkout has libraries of its sources that load. Returns what was
    done.

    Libraries without a stamp were built in the checkout. If the bundle was built from other sources, a call on a GPU
    requests a build, because its measurements would not be of the checkout.
    """
    sources, installed = sources_hash(), STAMP.read_text() if STAMP.exists() else ""
    if installed in ("", sources) and loads(device):
        return "not needed"
    if bundled != sources:
        if device == "cuda":
            record.add({"then": record.BUILD, "because": "the bundle was built from other sources; do=make gpu-bundle"})
        return "of other sources"
    for library in (BUNDLE / "neox").rglob("*.so"):
        target = ROOT / library.relative_to(BUNDLE)
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)  # a process may have it open
        shutil.copy(library, target)
    STAMP.write_text(sources)
    return "copied"


def build() -> int:
    """Build the libraries of this checkout. Returns the exit code of the build."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code == 0:
        STAMP.write_text(sources_hash())
    return code


def install_packages() -> str:
    """Install the wheels of packages that this Python lacks into a folder that gpu.sh adds to PYTHONPATH."""
    present = {normal(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    wheels = {requirements(wheel)[0]: wheel for wheel in sorted((BUNDLE / "wheels").glob("*.whl"))}
    lacking = {name: wheel for name, wheel in wheels.items() if name not in present}
    if lacking:
        options = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", SITE)
        run(sys.executable, "-m", "pip", "install", *options, *lacking.values())
    return " ".join(sorted(lacking))


def loads(device: str) -> bool:
    """Whether the libraries in the checkout load into this Python."""
    if not any((ROOT / "neox" / "_ops").glob("*.so")):  # as in a new checkout; importing torch takes seconds
        return False
    program = "import sys, neox._native, neox.ops; sys.exit(sys.argv[1] == 'cuda' and neox.ops.CUDA != 'loaded')"
    return subprocess.run([sys.executable, "-c", program, device], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tools", "make", "install", "build"))
    parser.add_argument("--python", default="python3.12", help="make: interpreter of the version that the machine has")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="install: what must load")
    args = parser.parse_args()
    if args.what == "install":
        return install(args.device)
    if args.what == "build":
        return build()
    if args.what == "tools":
        tools(args.python)
    else:
        make(args.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
