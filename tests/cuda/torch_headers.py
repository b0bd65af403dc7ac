"""Extracts the stable-ABI headers of the oldest torch that pyproject.toml supports from its wheel, without downloading
the wheel.

usage: python tests/cuda/torch_headers.py FOLDER

pip locates the wheel in its configured index. A wheel is a zip file, so its directory and the headers can be read by
HTTP range requests: a few megabytes of half a gigabyte. The headers are written to FOLDER/include; a second call reuses
them. Exit code 3: the headers are not available on this machine, for the reason printed to stdout.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "torch/include/"
NEEDED = tuple(
    INSIDE + folder for folder in ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/")
)
BLOCK = 1 << 20  # bytes per request
UNAVAILABLE = 3


class Unavailable(Exception):
    """The headers are not available on this machine."""


class RemoteFile(io.RawIOBase):
    """A remote file, read by HTTP range requests."""

    def __init__(self, url: str):
        self.url, self.position, self.size = url, 0, 0
        self.context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
        self.fetch(0, 1)

    def fetch(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end). Sets the file's size.

        Raises:
            Unavailable: the server answers with anything but these bytes.
        """
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={begin}-{end - 1}"})
        with urllib.request.urlopen(request, timeout=60, context=self.context) as answer:
            total = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if answer.status != 206 or not total:
                raise Unavailable(f"{urllib.parse.urlsplit(self.url).hostname} does not answer range requests")
            self.size = int(total[1])
            return answer.read()

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position in bytes and returns it."""
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        """Fills the buffer with one request."""
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        found = self.fetch(self.position, end)
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)


def oldest_supported() -> str:
    """The lower bound of the torch dependency in pyproject.toml."""
    return re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]


def wheel_url(version: str) -> str:
    """The URL from which pip would download torch.

    Raises:
        Unavailable: pip's index has no such wheel for this interpreter and machine, or is not reachable.
    """
    options = ("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--report", "-")
    command = [sys.executable, "-m", "pip", "install", *options, f"torch=={version}"]
    # The configuration of a machine may constrain the torch that is installed; nothing is installed here.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise Unavailable(f"pip finds no torch {version}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)["install"][0]["download_info"]["url"]


def extract(url: str, folder: Path) -> None:
    """Writes the headers of the wheel at a URL (http, https or file) to FOLDER/include."""
    parts = urllib.parse.urlsplit(url)
    source = (
        urllib.request.url2pathname(parts.path) if parts.scheme == "file" else io.BufferedReader(RemoteFile(url), BLOCK)
    )
    with zipfile.ZipFile(source) as wheel:
        members = [name for name in wheel.namelist() if name.startswith(NEEDED) and name.endswith(".h")]
        if not members:
            raise Unavailable(f"{parts.path.rpartition('/')[2]} has no stable-ABI headers")
        for name in members:
            target = folder / "include" / name.removeprefix(INSIDE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))


def provide(folder: Path) -> str:
    """Puts the headers of the oldest supported torch into a folder and returns its version.

    Raises:
        Unavailable: the headers are not available on this machine.
    """
    version, stamp = oldest_supported(), folder / "version"
    if not stamp.exists() or stamp.read_text() != version:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            extract(wheel_url(version), folder)
        except (OSError, zipfile.BadZipFile, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"torch {version} could not be read: {error}") from error
        stamp.write_text(version)
    return version


def main() -> int:
    """Returns the exit code: 0, or 3 if the headers are not available."""
    try:
        version = provide(Path(sys.argv[1]))
    except Unavailable as reason:
        print(f"oldest-torch: skipped, {reason}")
        return UNAVAILABLE
    print(f"oldest-torch: compiling the bindings against the headers of torch {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
