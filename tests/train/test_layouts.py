"""Layouts through the public commands: train in one, resume in others, evaluate and generate over several processes."""

from __future__ import annotations

import json
import sys

import pytest

from neox.data.tokenizer import Tokenizer, train_tokenizer
from tests.distributed import Processes, environment, free_port, train
from tests.train.corpus import config_text, make_corpus, records

CLI = ("-m", "neox.cli.main")


def neox(processes: int, folder, *arguments: object) -> str:
    """What a neox command prints, under torchrun where there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())] if processes > 1 else []
    command = [sys.executable, *launcher, *CLI, *map(str, arguments)]
    return Processes([command], [environment()], folder).wait(120.0)[0].check().output


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
    train("python", 1, folder, ["--conf", folder / "conf.yml"]).check()
    return folder


def figures(run, key: str) -> dict[int, float]:
    """A number of every step that has it."""
    return {record["step"]: record[key] for record in records(run) if key in record}


@pytest.mark.distributed
def test_train_in_one_layout_resume_in_others(given, tmp_path):
    common = ["--conf", given / "conf.yml", "--set", f"run.dir={tmp_path / 'run'}"]
    grid = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "zero.stage=1", "checkpoint.save_interval=7"]
    first = train("torchrun", 4, tmp_path, [*common, *grid, "train.train_iters=7", "schedule.decay_iters=20"]).check()
    assert "(tensor 2, pipeline 2, data 1, sequence parallel)" in first.output
    second = train("deepspeed", 2, tmp_path, [*common, "parallel.tensor=2", "zero.stage=3", "train.train_iters=13", "schedule.decay_iters=20"]).check()
    assert "at step 7" in second.output
    train("torchrun", 4, tmp_path, [*common, "parallel.pipeline=2", "parallel.context=2", "zero.stage=1"]).check()
    for key in ("loss", "grad_norm"):
        assert figures(tmp_path / "run", key) == pytest.approx(figures(given / "one", key), rel=1e-5)
    got, want = figures(tmp_path / "run", "validation_loss"), figures(given / "one", "validation_loss")
    assert {step: got[step] for step in want} == pytest.approx(want, rel=1e-5)
    assert list(want) == [5, 10, 15, 20]


@pytest.mark.distributed
def test_generation_and_evaluation_over_processes_say_the_same(given, tmp_path):
    prompt = ["--checkpoint", given / "one", "--prompt", "a b c", "--prompt", "d", "--max-new-tokens", 6, "--temperature", 0.7, "--json"]
    alone, cut = neox(1, tmp_path, "generate", *prompt), neox(4, tmp_path, "generate", *prompt, "--tensor", 2, "--pipeline", 2)
    assert json.loads(alone.splitlines()[-1]) == json.loads(cut.splitlines()[-1])
    data = ["--checkpoint", given / "one", "--data", given / "data" / "valid", "--max-documents", 7, "--json"]
    one, two = (json.loads(neox(n, tmp_path, "evaluate", *data, *layout).splitlines()[-1]) for n, layout in ((1, ()), (2, ("--pipeline", 2))))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert (one["tokens"], one["documents"]) == (two["tokens"], two["documents"])
