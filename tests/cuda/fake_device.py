"""Gives torch a CUDA device on which nothing runs, so that fake CUDA tensors have gradients on every build of torch.

Import this module before torch, in a process of its own. With a torch that was built with CUDA it does nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_device.cpp")
CACHE = Path(__file__).resolve().parents[2] / "build" / "fake_device"


def torch_folder() -> Path:
    """Where torch is installed; does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    return Path(spec.origin).parent


def build(torch: Path) -> Path:
    """Compile the library for a torch, unless an earlier process did.

    Raises:
        RuntimeError: the compiler failed.
    """
    version = (torch / "version.py").read_bytes()
    library = CACHE / f"{hashlib.sha256(SOURCE.read_bytes() + version + str(torch).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch}/include", str(SOURCE)]
    command += ["-o", str(unfinished), f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the fake device does not compile: {done.stderr}")
    unfinished.replace(library)
    return library


def load() -> None:
    """Load the library into this process.

    Raises:
        RuntimeError: torch is imported already, or the compiler failed.
    """
    torch = torch_folder()
    if (torch / "lib" / "libtorch_cuda.so").exists():
        return
    if "torch" in sys.modules:
        raise RuntimeError("the fake device must be loaded before torch")
    ctypes.CDLL(str(build(torch)), mode=ctypes.RTLD_GLOBAL)


load()
