"""Extraction of headers from a wheel by range requests, and the version of torch that they belong to."""

from __future__ import annotations

import os
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.cuda import torch_headers

HEADER = b"#pragma once\n"


@pytest.fixture
def wheel(tmp_path):
    """A wheel of 4 MiB, most of which is not headers."""
    path = tmp_path / "torch-0.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("torch/lib/libtorch_cpu.so", os.urandom(4 << 20))
        file.writestr("torch/include/torch/csrc/stable/tensor.h", HEADER * 1000)
        file.writestr("torch/include/torch/headeronly/util/Half.h", HEADER)
        file.writestr("torch/include/ATen/ATen.h", HEADER)
    return path


@pytest.fixture
def serve():
    """serve(bytes, ranges) -> (URL, sizes of the responses)."""
    servers = []

    def start(content: bytes, ranges: bool = True):
        sent = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                part = content[int(asked[1]) : int(asked[2]) + 1] if ranges else content
                self.send_response(206 if ranges else 200)
                if ranges:
                    self.send_header(
                        "Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}"
                    )
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                sent.append(len(part))
                self.wfile.write(part)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None  # a client that closes early is part of a test
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/torch-0.whl", sent

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def check_extracted(folder):
    """Asserts that exactly the headers of the stable ABI were extracted."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["include/torch/csrc/stable/tensor.h", "include/torch/headeronly/util/Half.h"]
    assert (folder / found[0]).read_bytes() == HEADER * 1000


def test_headers_are_read_without_the_rest_of_the_wheel(wheel, serve, tmp_path):
    url, sent = serve(wheel.read_bytes())
    torch_headers.extract(url, tmp_path / "out")
    check_extracted(tmp_path / "out")
    assert sum(sent) < 2.5 * torch_headers.BLOCK


def test_a_local_wheel_is_read(wheel, tmp_path):
    torch_headers.extract(wheel.as_uri(), tmp_path / "out")
    check_extracted(tmp_path / "out")


def test_a_server_without_range_requests_is_rejected(wheel, serve, tmp_path):
    url, _ = serve(wheel.read_bytes(), ranges=False)
    with pytest.raises(torch_headers.Unavailable, match=r"127\.0\.0\.1 does not answer range requests"):
        torch_headers.extract(url, tmp_path / "out")


def test_a_missing_index_is_reported_in_one_line_with_its_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr("sys.argv", ["torch_headers.py", str(tmp_path / "out")])
    assert torch_headers.main() == torch_headers.UNAVAILABLE
    out = capsys.readouterr().out
    assert out.startswith("oldest-torch: skipped, pip finds no torch ") and out.count("\n") == 1


def test_existing_headers_are_reused(tmp_path, monkeypatch):
    (tmp_path / "version").write_text(torch_headers.oldest_supported())
    monkeypatch.setattr(torch_headers, "wheel_url", lambda _: pytest.fail("requested the wheel again"))
    assert torch_headers.provide(tmp_path) == torch_headers.oldest_supported()


def test_the_stable_abi_is_that_of_the_oldest_torch(repository):
    major, minor, *_ = torch_headers.oldest_supported().split(".")
    want = f"0x{int(major):02x}{int(minor):02x}" + "0" * 12
    for file in ("setup.py", "tests/cuda/CMakeLists.txt", "tests/emu/CMakeLists.txt"):
        assert set(re.findall(r"0x02[0-9a-f]{14}", (repository / file).read_text())) == {want}, file
