"""`neox verify-resume` on real runs: equal where nothing is wrong, and a difference is found."""

import argparse
import json

import pytest

from neox.cli import verify_resume
from neox.cli.main import main
from neox.cli.verify_resume import table
from neox.errors import ConfigError
from tests.train.corpus import DROPOUT, config_text, make_corpus


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    make_corpus(folder / "data")
    path = folder / "my.yml"
    path.write_text(config_text(folder / "data", folder / "unused"))
    return path


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_and_resumed_run_is_the_same(conf, tmp_path, capsys):
    settings = [*DROPOUT, "evaluate.interval=2"]
    code = main(["verify-resume", str(conf), "--steps", "5", "--kill-at", "3", "--json", "--dir", str(tmp_path / "runs"), "--set", *settings])
    rows = json.loads(capsys.readouterr().out)
    assert code == 0, rows
    names = [row["name"] for row in rows]
    assert names[:3] == ["loss", "grad_norm", "lr"]
    assert {"final weight", "final exp_avg", "final exp_avg_sq", "random streams", "counters and data cursor"} <= set(names)
    log = (tmp_path / "runs" / "resumed" / "log.txt").read_text()
    assert "at step 3" in log and log.count("resumed from") == 1
    metrics = tmp_path / "runs" / "resumed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"grad_norm": ', '"grad_norm": 1'))
    assert [row.name for row in table(tmp_path / "runs" / "straight", tmp_path / "runs" / "resumed", 5) if not row.equal] == ["grad_norm"]
    again = ["verify-resume", str(conf), "--steps", "5", "--kill-at", "3", "--dir", str(tmp_path / "runs")]
    assert main(again) == 2
    assert "there is a run already" in capsys.readouterr().err


def test_a_run_that_fails_is_an_error_with_its_line(conf, tmp_path, capsys):
    code = main(["verify-resume", str(conf), "--steps", "3", "--kill-at", "1", "--set", "train.micro_batch_size=3"])
    assert code == 4
    assert "a run of the comparison failed" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "kill", "processes"), [(5, 5, 1), (5, 0, 1), (0, 0, 1), (5, 3, 0)])
def test_impossible_steps(steps, kill, processes):
    with pytest.raises(ConfigError, match="the run cannot be killed there"):
        verify_resume.run(argparse.Namespace(steps=steps, kill_at=kill, processes=processes, dir=None))
