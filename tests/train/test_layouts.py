"""Layouts through the public commands: train in one, resume in others, evaluate and generate over several processes."""

from __future__ import annotations

import json

import pytest

from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from tests.distributed import run_command
from tests.train.corpus import config_text, make_corpus, records


def last_line(processes: int, folder, *arguments: object) -> dict:
    """The JSON that a neox command prints last."""
    return json.loads(run_command(processes, folder, arguments).output.splitlines()[-1])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A corpus, a tokenizer, a config file, and the run of one process."""
    folder = tmp_path_factory.mktemp("layouts")
    make_corpus(folder / "data")
    train_tokenizer(["a b c d e f g h " * 30], 300, folder / "tokenizer.json")
    values = json.loads(config_text(folder / "data", folder / "one"))
    values["model"] |= {"num_layers": 4, "tie_embeddings": True, "vocab_size": 300}
    values["tokenizer"] = {"file": str(folder / "tokenizer.json")}
    assert Tokenizer(folder / "tokenizer.json").vocab_size <= values["model"]["vocab_size"]
    values["evaluate"] = {"interval": 5, "iters": 2}
    (folder / "conf.yml").write_text(json.dumps(values))
    run_command(1, folder, ["train", "--conf", folder / "conf.yml"])
    return folder


def figures(run, key: str) -> dict[int, float]:
    """A number of every step that has it."""
    return {record["step"]: record[key] for record in records(run) if key in record}


@pytest.mark.distributed
@pytest.mark.parallel
def test_train_in_one_layout_resume_in_others(given, tmp_path):
    common = ["train", "--conf", given / "conf.yml", "--set", f"run.dir={tmp_path / 'run'}"]
    grid = [
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.sequence=true",
        "zero.stage=1",
        "checkpoint.save_interval=7",
    ]
    first = run_command(4, tmp_path, [*common, *grid, "train.train_iters=7", "schedule.decay_iters=20"])
    assert "(tensor 2, pipeline 2, data 1, sequence parallel)" in first.output
    second = run_command(
        2, tmp_path, [*common, "parallel.tensor=2", "zero.stage=3", "train.train_iters=13", "schedule.decay_iters=20"]
    )
    assert "at step 7" in second.output
    run_command(4, tmp_path, [*common, "parallel.pipeline=2", "parallel.context=2", "zero.stage=1"])
    for key in ("loss", "grad_norm"):
        assert figures(tmp_path / "run", key) == pytest.approx(figures(given / "one", key), rel=1e-5)
    got, want = figures(tmp_path / "run", "validation_loss"), figures(given / "one", "validation_loss")
    assert {step: got[step] for step in want} == pytest.approx(want, rel=1e-5)
    assert list(want) == [5, 10, 15, 20]


@pytest.mark.distributed
def test_generation_and_evaluation_over_processes_agree(given, tmp_path):
    prompt = [
        "--checkpoint",
        given / "one",
        "--prompt",
        "a b c",
        "--prompt",
        "d",
        "--max-new-tokens",
        6,
        "--temperature",
        0.7,
        "--json",
    ]
    assert last_line(1, tmp_path, "generate", *prompt) == last_line(
        4, tmp_path, "generate", *prompt, "--tensor", 2, "--pipeline", 2
    )
    data = ["--checkpoint", given / "one", "--data", given / "data" / "valid", "--max-documents", 7, "--json"]
    one, two = (last_line(n, tmp_path, "evaluate", *data, *layout) for n, layout in ((1, ()), (2, ("--pipeline", 2))))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert (one["tokens"], one["documents"]) == (two["tokens"], two["documents"])
