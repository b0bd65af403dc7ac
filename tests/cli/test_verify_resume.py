"""`neox verify-resume` on real runs: equal where nothing is wrong, and a difference is found."""

import argparse
import json

import pytest

from neox.cli import verify_resume
from neox.cli.main import main, parse
from neox.cli.verify_resume import table
from neox.errors import CheckpointError, ConfigError
from tests.fork_server import fork_server
from tests.train.corpus import DROPOUT, config_text, make_corpus


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    make_corpus(folder / "data")
    path = folder / "my.yml"
    path.write_text(config_text(folder / "data", folder / "unused"))
    return path


def forked(folder):
    """Runs the trainings as forks of a warm process instead of new ones."""

    def start(arguments, processes, variables):
        (result,) = (
            fork_server().command(arguments, folder, ranks=processes, fault=variables.get("FAULT", "")).results()
        )
        return result.returncode, result.output

    return start


def arguments_of(conf, folder):
    settings = [*DROPOUT, "evaluate.interval=2"]
    return [
        "verify-resume",
        str(conf),
        "--steps",
        "5",
        "--kill-at",
        "3",
        "--json",
        "--dir",
        str(folder),
        "--set",
        *settings,
    ]


def check(code, text, folder):
    rows = json.loads(text)
    assert code == 0, rows
    names = [row["name"] for row in rows]
    assert names[:3] == ["loss", "grad_norm", "lr"]
    assert {"final weight", "final exp_avg", "final exp_avg_sq", "random streams", "counters and data cursor"} <= set(
        names
    )
    log = (folder / "resumed" / "log.txt").read_text()
    assert "at step 3" in log and log.count("resumed from") == 1
    metrics = folder / "resumed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"grad_norm": ', '"grad_norm": 1'))
    assert [row.name for row in table(folder / "straight", folder / "resumed", 5) if not row.equal] == ["grad_norm"]


@pytest.mark.distributed
def test_a_killed_and_resumed_run_is_the_same(conf, tmp_path, capsys):
    _, parser, rest = parse(arguments_of(conf, tmp_path / "runs"))
    code = verify_resume.compare(parser.parse_args(rest), tmp_path / "runs", forked(tmp_path))
    check(code, capsys.readouterr().out, tmp_path / "runs")
    assert main(arguments_of(conf, tmp_path / "runs")) == 2
    assert "run already exists" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.distributed
def test_the_command_with_processes_of_its_own(conf, tmp_path, capsys):
    code = main(arguments_of(conf, tmp_path / "runs"))
    check(code, capsys.readouterr().out, tmp_path / "runs")


def test_a_run_that_fails_is_an_error_with_its_line(conf, tmp_path, capsys):
    code = main(["verify-resume", str(conf), "--steps", "3", "--kill-at", "1", "--set", "train.micro_batch_size=3"])
    assert code == 4
    assert "training run failed" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_asked_for_algorithms_that_repeat(gpu, conf, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    told = []

    def start(arguments, processes, variables):
        told.extend(arguments)
        return 2, "error[2] enough"

    _, parser, rest = parse(arguments_of(conf, tmp_path / "runs"))
    with pytest.raises(CheckpointError, match="enough"):
        verify_resume.compare(parser.parse_args(rest), tmp_path / "runs", start)
    assert ("train.deterministic=true" in told) is gpu


@pytest.mark.parametrize(("steps", "kill", "processes"), [(5, 5, 1), (5, 0, 1), (0, 0, 1), (5, 3, 0)])
def test_impossible_steps(steps, kill, processes):
    with pytest.raises(ConfigError, match="invalid --steps, --kill-at or --processes"):
        verify_resume.run(argparse.Namespace(steps=steps, kill_at=kill, processes=processes, dir=None))
