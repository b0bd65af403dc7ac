"""What tests/conftest.py adds: the line that counts tests without their data, and no group that is left open."""

from __future__ import annotations

import subprocess
import sys

import pytest

TESTS = """
import pathlib
import pytest
from tests import conftest

conftest.SHARED_DATA = pathlib.Path("missing")

def test_a(shared_data): pass
def test_b(shared_data): pass
def test_c(): pytest.skip("another reason")
def test_d(): pass
"""


@pytest.mark.parametrize(
    ("chosen", "line", "totals"),
    [
        ("a or b or c or d", "2 tests skipped: data outside of the repository (see CONTRIBUTING.md)", "3 skipped"),
        ("a or d", "1 test skipped: data outside of the repository (see CONTRIBUTING.md)", "1 skipped"),
        ("c or d", None, "1 skipped"),
    ],
)
def test_a_run_counts_the_tests_that_lack_their_data_in_one_line(tmp_path, repository, chosen, line, totals):
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "tests.conftest", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)], capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 0, done.stdout
    lines = [text for text in done.stdout.splitlines() if "data outside" in text]
    assert lines == ([line] if line else [])
    assert ("SKIPPED [1] " in done.stdout) == ("c" in chosen.split())
    assert f"1 passed, {totals}" in done.stdout.splitlines()[-1]


OPENS = """
import pytest
import torch.distributed as dist

@pytest.fixture(scope="session")
def run():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def test_a(run): assert dist.is_initialized()
def test_b(run): assert dist.is_initialized()
"""
EXPECTS_NONE = """
import torch.distributed as dist

def test_c(): assert not dist.is_initialized()
"""


def test_the_group_of_a_fixture_is_closed_before_the_tests_of_another_file(tmp_path, repository):
    (tmp_path / "test_1.py").write_text(OPENS)
    (tmp_path / "test_2.py").write_text(EXPECTS_NONE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)], capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout.splitlines()[-1]
