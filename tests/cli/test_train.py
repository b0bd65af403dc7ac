"""`neox train`: what a launcher says, and the errors that come before any process group."""

import subprocess
import sys

import pytest

from neox.cli.train import read_place
from neox.errors import EnvironmentProblem
from neox.train.place import Place
from tests.distributed import ROOT, environment

GOOD = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}


def test_alone_without_a_launcher():
    assert read_place({}) == Place(0, 0, 1, "127.0.0.1", 29500)
    assert read_place({"LOCAL_RANK": "3"}) == Place()


def test_from_a_launcher():
    assert read_place(GOOD) == Place(1, 1, 2, "host", 1234)
    assert read_place({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == Place()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", None),
        ("RANK", "2"),
        ("RANK", "-1"),
        ("RANK", None),
        ("LOCAL_RANK", "1.0"),
        ("LOCAL_RANK", None),
        ("MASTER_ADDR", ""),
        ("MASTER_ADDR", None),
        ("MASTER_PORT", "99999"),
        ("MASTER_PORT", None),
        ("OMP_NUM_THREADS", "0"),
        ("RANK", "\u0661"),
    ],
)
def test_a_wrong_variable_is_named(name, value):
    broken = {key: text for key, text in {**GOOD, name: value}.items() if text is not None}
    with pytest.raises(EnvironmentProblem, match=rf"error\[14\].*where={name}") as problem:
        read_place(broken)
    assert problem.value.exit_code == 14


def run(*arguments, **variables):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_wrong_variable_ends_the_run_with_code_14(tmp_path):
    conf = tmp_path / "a.yml"
    conf.write_text("model: {vocab_size: 10}\n")
    result = run("--conf", str(conf), WORLD_SIZE="two", RANK="0", LOCAL_RANK="0")
    assert result.returncode == 14
    assert result.stderr.splitlines()[0].startswith("error[14] ")
    assert "where=WORLD_SIZE; got=two" in result.stderr


def test_a_wrong_config_ends_the_run_before_torch_is_imported(tmp_path):
    conf = tmp_path / "a.yml"
    conf.write_text("model: {vocab_size: 10, hiden_size: 8}\n")
    result = run("--conf", str(conf))
    assert result.returncode == 2
    assert "hiden_size" in result.stderr
    assert "Traceback" not in result.stderr
    result = run("--conf", str(tmp_path / "none.yml"))
    assert result.returncode == 2


def test_help_has_an_example():
    result = run("--help")
    assert result.returncode == 0
    assert "example:" in result.stdout
    assert "local_rank" not in result.stdout
