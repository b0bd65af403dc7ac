"""neox data which and seen, on a real run, as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial

import pytest

from neox.cli.main import main
from neox.config.load import load_config
from neox.data.samples.builder import build_datasets
from neox.data.samples.loader import Loader
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.train.corpus import make_config, make_corpus

os.environ.setdefault("LOCAL_RANK", "0")


def start_mixture(corpus, folder, steps: int, weight: int, *more: str) -> None:
    """Train to `steps` on both datasets, the first one with this weight."""
    sources = (
        f'data.train=[{{"path": "{corpus}/train", "weight": {weight}}}, {{"path": "{corpus}/valid", "weight": 1}}]'
    )
    options = ("checkpoint.save_interval=3", "evaluate.interval=0", "data.validation=[]", *more)
    train(make_config(corpus, folder, sources, f"train.train_iters={steps}", *options), Mesh.single(), StopSignals())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps of 8 samples from two sources, a checkpoint after three."""
    folder = tmp_path_factory.mktemp("run")
    make_corpus(folder)
    start_mixture(folder, folder / "run", 6, 3)
    return folder


def said(capsys, *arguments: object) -> object:
    assert main(["data", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_which_step(run, capsys):
    config = load_config(run / "run" / "config.lock.yml")
    loader = Loader(
        build_datasets(config, {"train": 48})["train"],
        micro_batch_size=2,
        gradient_accumulation=4,
        start=32,
        prefetch=0,
    )
    wanted = [sample for batch in next(loader) for sample in batch.sample_ids.tolist()]
    found = said(capsys, "which", "--run", run / "run", "--step", 5, "--rank", 0)
    assert [row["sample"] for row in found["rows"]] == wanted == list(range(32, 40))
    assert all(sum(piece["tokens"] for piece in row["pieces"]) == 33 for row in found["rows"])
    halves = [
        said(capsys, "which", "--run", run / "run", "--step", 5, "--rank", rank, "--world-size", 2)["rows"]
        for rank in (0, 1)
    ]
    assert [[row["sample"] for row in half] for half in halves] == [[32, 33, 36, 37], [34, 35, 38, 39]]
    assert main(["data", "which", "--run", str(run / "run"), "--step", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith("step 1: samples 0 to 7\nsample 0: data-parallel rank 0, micro-batch 0, row 0\n  ")
        and f"{run}/train document " in printed
    )


def test_which_document(run, capsys):
    piece = said(capsys, "which", "--run", run / "run", "--step", 4)["rows"][0]["pieces"][0]
    found = said(capsys, "which", "--run", run / "run", "--document", piece["document"], "--source", piece["source"])
    assert 4 in [row["step"] for row in found["steps"]] and 24 in [
        sample for row in found["steps"] for sample in row["samples"]
    ]
    assert main(["data", "which", "--run", str(run / "run"), "--document", "3"]) == 2
    assert "the dataset of the document is unknown; where=--source" in capsys.readouterr().err
    beyond = ("--document", "9999999", "--source", piece["source"])
    assert main(["data", "which", "--run", str(run / "run"), *beyond]) == 2
    assert "no such document; where=--document; got=9999999; want=0 to " in capsys.readouterr().err
    assert main(["data", "which", "--run", str(run / "run"), "--document", "3", "--source", f"{run}/valid"]) == 0
    assert f"{run}/valid document 3: " in capsys.readouterr().out


def test_seen_at_every_checkpoint(run, capsys):
    found = said(capsys, "seen", "--run", run / "run")
    assert [(row["step"], row["samples"]) for row in found] == [(3, 24), (6, 48)]
    for row in found:
        shares = {source["source"]: (source["samples"], source["tokens"]) for source in row["sources"]}
        assert shares == {
            f"{run}/{name}": (row["samples"] * share // 4, row["samples"] * share // 4 * 32)
            for name, share in (("train", 3), ("valid", 1))
        }
    assert said(capsys, "seen", "--run", run / "run", "--step", 5)[0]["samples"] == 40
    assert main(["data", "seen", "--run", str(run / "run")]) == 0
    assert f"step 6: 48 samples\n  {run}/train: 36 samples, 1,152 tokens, " in capsys.readouterr().out


def test_steps_keep_the_data_that_they_read(run, tmp_path, capsys):
    """Another mixture, batch and length after a resume: the steps before it are answered by the checkpoints of their
    time.
    """
    start = partial(start_mixture, run, tmp_path)
    start(6, 3)
    asked = [("which", "--step", step) for step in (2, 6)] + [
        ("seen", "--step", 6),
        ("which", "--document", 5, "--source", f"{run}/train"),
    ]
    capsys.readouterr()
    before = [said(capsys, question[0], "--run", tmp_path, *question[1:]) for question in asked]
    start(9, 1, "train.global_batch_size=4")
    start(10, 1, "train.seed=99", "checkpoint.accept_data_change=true", "train.global_batch_size=4")
    capsys.readouterr()
    after = [said(capsys, question[0], "--run", tmp_path, *question[1:]) for question in asked]
    assert after[:3] == before[:3]
    assert [row for row in after[3]["steps"] if row["step"] <= 6] == before[3]["steps"]
    samples = {
        row["step"]: {source["source"]: source["samples"] for source in row["sources"]}
        for row in said(capsys, "seen", "--run", tmp_path)
    }
    assert samples[9] == {f"{run}/train": 36 + 6, f"{run}/valid": 12 + 6}
    assert samples[10] == {f"{run}/train": 2, f"{run}/valid": 2}  # the new order started from its first sample
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000003")  # as retention does
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    assert said(capsys, *asked[0][:1], "--run", tmp_path, *asked[0][1:]) == before[0]
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000009")
    assert main(["data", "which", "--run", str(tmp_path), "--step", "2"]) == 3
    assert "it is unknown how the sample was read, because the data of the run changed later" in capsys.readouterr().err


def test_checkpoints_of_a_branch_that_was_left_do_not_count(run, tmp_path, capsys):
    """A run that goes back to step 3 and reads another mixture: what the steps after it had read before is
    forgotten.
    """
    start = partial(start_mixture, run, tmp_path)
    start(6, 3)
    back = tmp_path / "checkpoints" / "step_00000003"
    start(5, 1, f"checkpoint.resume={back}", "checkpoint.accept_data_change=true")
    assert (tmp_path / "checkpoints" / "step_00000006").is_dir()
    capsys.readouterr()
    found = {
        row["step"]: {one["source"]: one["samples"] for one in row["sources"]}
        for row in said(capsys, "seen", "--run", tmp_path)
    }
    assert found.keys() == {3, 5} and found[5][f"{run}/train"] - found[3][f"{run}/train"] == 8


def test_wrong_questions(run, tmp_path, capsys):
    for arguments, what in (
        (["which", "--run", run / "run", "--step", 1, "--rank", 9], "no such rank; where=--rank; got=9"),
        (
            ["which", "--run", run / "run", "--step", 1, "--world-size", 3],
            "the processes cannot share the batch equally",
        ),
        (["seen", "--run", tmp_path], "not the folder of a run"),
    ):
        assert main(["data", *map(str, arguments)]) == 2
        assert what in capsys.readouterr().err
