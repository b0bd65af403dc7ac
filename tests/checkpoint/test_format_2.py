"""A checkpoint that the code of version 0.1 wrote in format 2 is found, verified, resumed and exported.

format_2/ holds step 2 of a four-step run of that code, and in expected.json its tensors' digests and the losses of
steps 3 and 4.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from neox.checkpoint.find import find
from neox.checkpoint.verify import digest, verify
from neox.cli.main import main
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.train.corpus import make_config, make_corpus, records

os.environ.setdefault("LOCAL_RANK", "0")

FORMAT_2 = Path(__file__).parent / "format_2"
EXPECTED = json.loads((FORMAT_2 / "expected.json").read_text())
MODEL = ("model.hidden_size=16", "model.num_layers=1", "model.num_attention_heads=2")


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that was stopped after step 2."""
    shutil.copytree(FORMAT_2 / "step_00000002", tmp_path / "run" / "checkpoints" / "step_00000002")
    return tmp_path / "run"


def test_it_is_found_and_every_tensor_is_as_it_was_saved(run):
    path = find(run / "checkpoints", "must")
    assert path == run / "checkpoints" / "step_00000002"
    assert verify(path).step == 2
    assert digest(path) == EXPECTED["digests"]


def test_it_resumes_with_the_losses_of_the_code_that_wrote_it(run, monkeypatch):
    monkeypatch.chdir(run.parent)  # that run read the same files under the same relative names
    make_corpus(Path("corpus"))
    config = make_config(Path("corpus"), Path("run"), *MODEL, "train.train_iters=4", "evaluate.interval=0")
    train(config, Mesh.single(), StopSignals())
    losses = {str(row["step"]): row["loss"] for row in records(run)}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-5)


def test_it_is_exported(run, capsys):
    out = run.parent / "exported"
    assert main(["export", "--checkpoint", str(run), "--out", str(out), "--no-tokenizer", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_logit_difference"] <= 1e-4
