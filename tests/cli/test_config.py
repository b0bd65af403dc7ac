"""`neox config` from its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import neox
from neox.cli.main import main
from neox.config.load import load
from tests.config.gpt_neox.sample_files import BASE, flow_text


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two configs a.yml and b.yml in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yml").write_text("model: {vocab_size: 100}\ntrain:\n  seed: 3\n")
    (tmp_path / "b.yml").write_text("model: {vocab_size: 200}\n")


def output(capsys, *argv: str) -> str:
    assert main(["config", *argv]) == 0
    return capsys.readouterr().out


def test_show(files, capsys):
    text = output(capsys, "show", "a.yml", "--set", "train.train_iters=5")
    assert "seed: 3" in text and "# a.yml:3" in text and "train_iters: 5" in text
    content = json.loads(output(capsys, "show", "a.yml", "b.yml", "--json"))
    assert content["config"]["model"]["vocab_size"] == 200
    assert content["origins"]["model.vocab_size"] == "b.yml:1" and content["origins"]["optimizer.lr"] == "default"


def test_explain(files, capsys):
    assert output(capsys, "explain", "model.rotary_pct").splitlines()[1:] == [
        "  type: number > 0, <= 1",
        "  default: 1.0",
    ]
    assert "  value: 9, from --set\n  overridden: 3, from a.yml:3\n" in output(
        capsys, "explain", "train.seed", "a.yml", "--set", "train.seed=9"
    )
    content = json.loads(output(capsys, "explain", "train.seed", "--conf", "a.yml", "--json"))
    assert (content["value"], content["origin"], content["overridden"]) == (3, "a.yml:3", [])
    assert "optimizer.lr: peak learning rate" in output(capsys, "explain", "optimizer")
    assert "model: The architecture." in output(capsys, "explain")
    assert json.loads(output(capsys, "explain", "--json"))["run"] == "Output folder of a run."


def test_diff(files, capsys):
    assert output(capsys, "diff", "a.yml", "a.yml") == "no difference\n"
    lines = output(capsys, "diff", "a.yml", "b.yml").splitlines()
    assert lines == [
        "model.vocab_size  100 (a.yml:1)  ->  200 (b.yml:1)",
        "train.seed        3 (a.yml:3)  ->  1234 (default)",
    ]
    assert [row["key"] for row in json.loads(output(capsys, "diff", "a.yml", "b.yml", "--json"))] == [
        "model.vocab_size",
        "train.seed",
    ]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["show", "gone.yml"], "no such config file"),
        (["show"], "no config to show"),
        (["explain", "model.layers"], "did you mean model.num_layers?"),
        (["diff", "a.yml"], "the following arguments are required: B"),
        (["frobnicate"], "invalid choice"),
        (["show", "a.yml", "--set", "train.seed=x"], "--set train.seed"),
    ],
)
def test_wrong_use_is_one_line_with_code_2(files, capsys, argv, part):
    assert main(["config", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[2] ") and part in err and err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_failure(files):
    command = [sys.executable, "-m", "neox.cli.main", "config", "show", "a.yml"]
    environment = {"PYTHONPATH": str(Path(neox.__file__).parent.parent), "PATH": os.environ["PATH"]}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["config", "--help"])
    assert stopped.value.code == 0
    assert "example: neox config show" in capsys.readouterr().out


def test_reference(files, capsys):
    assert output(capsys, "reference").startswith("# Config reference")
    assert "| `gpt_j_residual` | `model.parallel_residual` | `False` |" in output(capsys, "reference", "--gpt-neox")


def test_convert_writes_gpt_neox_files_in_our_form(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yml").write_text(flow_text(BASE | {"bias_gelu_fusion": True}))
    text = output(capsys, "convert", "old.yml", "-o", "new.yml")
    assert "gelu_tanh" in text
    assert load(["new.yml"]).config == load(["old.yml"]).config
    assert "# old.yml:" in (tmp_path / "new.yml").read_text()
    assert main(["config", "convert", "old.yml", "-o", "new.yml"]) == 2
    assert "file already exists" in capsys.readouterr().err
    assert "activation: gelu_tanh" in output(capsys, "convert", "old.yml", "--set", "train.seed=5")
    assert "50277 ids" in output(capsys, "show", "old.yml")
    assert len(json.loads(output(capsys, "show", "old.yml", "--json"))["notes"]) == 3


def test_later_files_and_values_win(files, capsys):
    content = json.loads(output(capsys, "show", "b.yml", "--conf", "a.yml", "--json"))
    assert content["config"]["model"]["vocab_size"] == 100 and content["notes"] == []
    assert content["origins"]["model.vocab_size"] == "a.yml:1"
    words = ["--set", "train.seed=1", "--set", "train.seed=2", "train.train_iters=8"]
    content = json.loads(output(capsys, "show", "a.yml", *words, "--json"))
    assert (content["config"]["train"]["seed"], content["config"]["train"]["train_iters"]) == (2, 8)
    assert content["origins"]["train.seed"] == "--set"
    assert "vocab_size: 9" in output(capsys, "show", "--set", "model.vocab_size=9")


def test_everything_about_a_key(files, capsys):
    words = ["explain", "train.seed", "a.yml", "b.yml", "--set", "train.seed=9"]
    content = json.loads(output(capsys, *words, "--json"))
    assert set(content) == {"key", "meaning", "type", "default", "keys", "value", "origin", "overridden"}
    assert (content["key"], content["value"], content["origin"]) == ("train.seed", 9, "--set")
    assert content["overridden"] == [{"origin": "a.yml:3", "value": 3}] and content["keys"] == []
    content = json.loads(output(capsys, "explain", "train.seed", "--json"))
    assert set(content) == {"key", "meaning", "type", "default", "keys"} and content["default"] == "1234"
    lines = output(capsys, "explain", "train.seed", "b.yml").splitlines()
    assert lines[-2:] == ["  default: 1234", "  value: 1234, from default"]
    section = json.loads(output(capsys, "explain", "optimizer", "--json"))
    assert "optimizer.lr" in section["keys"]
    listed = [line.strip().partition(":")[0] for line in output(capsys, "explain", "optimizer").splitlines()]
    assert [name for name in listed if name in section["keys"]] == section["keys"]
    names = output(capsys, "explain").splitlines()
    assert [line.partition(": ")[0] for line in names] == list(json.loads(output(capsys, "explain", "--json")))


def test_values_are_set_in_both_configs(files, capsys):
    assert output(capsys, "diff", "a.yml", "b.yml", "--set", "train.seed=5", "model.vocab_size=7") == "no difference\n"
    (row,) = json.loads(output(capsys, "diff", "b.yml", "a.yml", "--set", "train.seed=5", "--json"))
    assert row == {
        "key": "model.vocab_size",
        "left": 200,
        "right": 100,
        "left_origin": "b.yml:1",
        "right_origin": "a.yml:1",
    }
    assert json.loads(output(capsys, "diff", "a.yml", "a.yml", "--json")) == []


def test_a_converted_config_with_its_notes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yml").write_text(flow_text(BASE))
    (tmp_path / "more.yml").write_text("train_iters: 7\n")
    words = ["convert", "old.yml", "more.yml", "--set", "train.seed=5"]
    text = output(capsys, *words)
    notes = list(load(["old.yml", "more.yml"]).notes)
    assert json.loads(output(capsys, *words, "--json")) == {"config": text, "notes": notes} and notes
    assert "train_iters: 7" in text and "seed: 5" in text and text.endswith("\n") and not text.endswith("\n\n")
    assert json.loads(output(capsys, *words, "--out", "a.yml", "--json")) == {"out": "a.yml", "notes": notes}
    assert output(capsys, *words, "--out", "b.yml").splitlines() == ["wrote b.yml", *notes]
    assert (tmp_path / "a.yml").read_text() == (tmp_path / "b.yml").read_text() == text
    (tmp_path / "link.yml").symlink_to("nowhere.yml")
    assert main(["config", "convert", "old.yml", "-o", "link.yml"]) == 2
    assert "file already exists; where=link.yml" in capsys.readouterr().err
