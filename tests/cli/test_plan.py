from __future__ import annotations

import json
import subprocess
import sys

import pytest

from neox.cli import plan as cli
from neox.cli.main import main


def test_the_plan_is_printed(capsys):
    assert main(["plan", "pythia/70M.yml", "--device", "h100", "--set", "train.global_batch_size=null"]) == 0
    out = capsys.readouterr().out
    assert "70,426,624 parameters" in out and "FITS" in out and "tokens/s" in out


def test_json_states_whether_it_fits(capsys):
    assert main(["plan", "--conf", "pythia/12B.yml", "--world-size", "8", "--device", "a100-40gb", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False and plan["parameters"] == 11_846_072_320
    assert plan["change"]["estimate"]["peak"] <= plan["device"]["memory"] - plan["device"]["reserve"]


def test_the_cpu_is_this_machine(capsys):
    assert main(["plan", "pythia/14M.yml", "--world-size", "2", "--set", "precision.dtype=fp32"]) == 0
    assert "2 x cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config to plan"),
        (["pythia/70M.yml", "--device", "h1000"], "unknown device"),
        (["pythia/70M.yml", "--world-size", "-1"], "wrong number"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_options_and_values_reach_the_plan(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(cli, "make_plan", lambda config, size, device: told.append((config, size, device)) or "plan")
    monkeypatch.setattr(cli, "find_device", lambda name, processes: (name, processes))
    monkeypatch.setattr(cli, "lines", lambda plan: [plan, "two"])
    monkeypatch.setattr(cli, "as_json", lambda plan: {"is": plan})
    for name, seed in (("a", 3), ("b", 4)):
        (tmp_path / f"{name}.yml").write_text(f"model: {{vocab_size: 100}}\ntrain: {{seed: {seed}}}\n")
    a, b = str(tmp_path / "a.yml"), str(tmp_path / "b.yml")
    values = ["--set", "run.dir=x", "--set", "train.train_iters=7"]
    assert main(["plan", a, "--conf", b, *values, "--world-size", "4", "--device", "h100"]) == 0
    config, size, device = told[-1]
    assert (config.train.seed, config.train.train_iters, config.run.dir) == (4, 7, "x")
    assert (size, device) == (4, ("h100", 4)) and capsys.readouterr().out == "plan\ntwo\n"
    assert main(["plan", b, a, "--json", "--world-size", "0"]) == 0
    config, size, device = told[-1]
    assert (config.train.seed, size, device) == (3, 0, ("cpu", 1))
    assert json.loads(capsys.readouterr().out) == {"is": "plan"}
    assert main(["plan", "--set", "model.vocab_size=9"]) == 0 and told[-1][1] == 1


LARGE = (
    ["pythia/12B.yml", "--world-size", "8", "--device", "a100-40gb"],
    ["gpt3/175B.yml", "--world-size", "1024", "--device", "h100"],
)
PROGRAM = """
import resource, sys
from neox.cli.main import main
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", LARGE)
def test_large_plans_take_less_than_two_seconds_of_computing(arguments):
    """By CPU time, so that a busy machine does not decide."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "plan", *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.splitlines()[-1]) < 2.0
