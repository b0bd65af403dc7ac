"""neox data which and seen, on a real run, as a user calls them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import pytest

from neox.checkpoint.manifest import Lineage
from neox.cli.data_of_run import layout_of, provenance_of, show_document
from neox.cli.main import main
from neox.config.load import load_config
from neox.data.samples.batch_layout import BatchLayout
from neox.data.samples.builder import build_datasets
from neox.data.samples.loader import Loader
from neox.data.store.indexed import IndexedWriter
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.checkpoint.builders import LINEAGE, save_one
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


def provenance(batch: int, recorded: int | None, micro: int | None, accumulation: int | None, sizes=(1, 1, 1)):
    """What is known of a run whose step 2 has `batch` samples."""
    tensor, pipeline, context = sizes
    parallel = SimpleNamespace(tensor=tensor, pipeline=pipeline, context=context)
    train = SimpleNamespace(micro_batch_size=micro, gradient_accumulation=accumulation)
    span = SimpleNamespace(config=SimpleNamespace(parallel=parallel, train=train), world_size=recorded)
    return SimpleNamespace(run="r", config_span={2: span}.__getitem__, span={2: (batch, 2 * batch)}.__getitem__)


@pytest.mark.parametrize(
    ("known", "asked", "wanted"),
    [
        ((8, 2, 2, None), None, BatchLayout(2, 2)),
        ((8, 2, 2, None), 4, BatchLayout(2, 4)),  # the one that is asked for
        ((8, None, 2, 2), None, BatchLayout(2, 2)),  # from the batch
        ((8, 1, None, 2), None, BatchLayout(4, 1)),
        ((8, 2, None, None), None, BatchLayout(4, 2)),
        ((8, 2, None, 4), None, BatchLayout(1, 2)),
        ((8, 24, 2, None, (2, 3, 2)), None, BatchLayout(2, 2, 2, 2)),
    ],
)
def test_the_layout_of_a_batch(known, asked, wanted):
    assert layout_of(provenance(*known), 2, asked) == wanted


@pytest.mark.parametrize(
    ("known", "asked", "message"),
    [
        (
            (8, None, 2, None),
            None,
            "the number of processes is unknown; where=r; got=no checkpoint; do=give --world-size",
        ),
        ((8, None, None, 2), None, "the number of processes is unknown"),
        ((8, 3, 2, None), None, "got=batch 8, micro-batch 2, 3 data-parallel processes"),
        ((9, 1, 2, None), None, "got=batch 9, micro-batch 2, 1 data-parallel processes"),
        ((2, None, 2, 2), None, "got=batch 2, micro-batch 2, 0 data-parallel processes"),
        ((2, 4, None, None), None, "got=batch 2, micro-batch 0, 4 data-parallel processes"),
    ],
)
def test_processes_that_cannot_share_a_batch(known, asked, message):
    with pytest.raises(ConfigError, match=message):
        layout_of(provenance(*known), 2, asked)


def test_a_step_in_every_detail(run, capsys):
    """Each row as the layout distributes it, each slice from its first token to its last."""
    found = said(capsys, "which", "--run", run / "run", "--step", 6, "--world-size", 2)
    assert (
        found["step"] == 6
        and [set(row) for row in found["rows"]] == [{"sample", "micro_batch", "dp_rank", "row", "pieces"}] * 8
    )
    places = [(row["sample"], row["micro_batch"], row["dp_rank"], row["row"]) for row in found["rows"]]
    assert places == [(40 + i, i // 4, i // 2 % 2, i % 2) for i in range(8)]
    assert main(["data", "which", "--run", str(run / "run"), "--step", "6", "--world-size", "2", "--rank", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = ["step 6: samples 40 to 47"]
    for row in found["rows"]:
        if row["dp_rank"] == 1:
            where = f"data-parallel rank 1, micro-batch {row['micro_batch']}, row {row['row']}"
            wanted.append(f"sample {row['sample']}: {where}")
            wanted += [
                f"  {part['source']} document {part['document']:,} tokens {part['offset']:,} to "
                f"{part['offset'] + part['tokens'] - 1:,}"
                for part in row["pieces"]
            ]
    assert lines == wanted
    for rank, code in ((1, 0), (2, 2)):
        words = ["data", "which", "--run", str(run / "run"), "--step", "1", "--world-size", "2", "--rank", str(rank)]
        assert main(words) == code
    assert "no such rank; where=--rank; got=2; want=0 to 1" in capsys.readouterr().err


def test_a_document_in_words(run, capsys):
    words = ["which", "--run", run / "run", "--document", 0, "--source", f"{run}/train"]
    found = said(capsys, *words)
    assert (found["source"], found["document"]) == (f"{run}/train", 0)
    steps = [row["step"] for row in found["steps"]]
    assert main(["data", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = "no step" if not steps else "1 step" if len(steps) == 1 else f"{len(steps)} steps"
    assert lines[0] == f"{run}/train document 0: {count} of 6 read it"
    assert lines[1:] == [
        f"  step {row['step']}: samples {', '.join(map(str, row['samples']))}" for row in found["steps"]
    ]
    assert main(["data", "which", "--run", str(run / "run"), "--document", "0", "--source", "x"]) == 2
    assert f"got=x; want=one of {run}/train, {run}/valid" in capsys.readouterr().err


def test_the_only_dataset_of_a_run_needs_no_name(tmp_path, capsys):
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        for _ in range(3):
            writer.add_document([1])
    prefix, asked = str(tmp_path / "d"), []
    steps = {0: [], 1: [(4, [9])], 2: [(2, [5, 6]), (1234, [7])]}
    data = SimpleNamespace(
        sources=lambda: [prefix],
        steps_of=lambda source, document: asked.append(source) or steps[document],
        last_step=2000,
    )
    for document in range(3):
        show_document(argparse.Namespace(source=None, document=document, json=False), data)
    assert asked == [prefix] * 3 and capsys.readouterr().out.splitlines() == [
        f"{prefix} document 0: no step of 2,000 read it",
        f"{prefix} document 1: 1 step of 2,000 read it",
        "  step 4: samples 9",
        f"{prefix} document 2: 2 steps of 2,000 read it",
        "  step 2: samples 5, 6",
        "  step 1234: samples 7",
    ]
    with pytest.raises(ConfigError, match="no such document; where=--document; got=3; want=0 to 2 in "):
        show_document(argparse.Namespace(source=prefix, document=3, json=False), data)


def test_the_records_are_those_of_the_newest_branch_that_count_samples(tmp_path, monkeypatch):
    branch = Lineage("cd" * 16, 1, ((LINEAGE.id, 3),))
    saved = [(3, LINEAGE, {"consumed": 24}), (4, LINEAGE, {"consumed": 32})]
    saved += [(5, branch, {"weights_only": True}), (6, branch, {"consumed": 50})]
    paths = {
        step: save_one(tmp_path / "checkpoints", step, content={"step": step, **content}, lineage=lineage)
        for step, lineage, content in saved
    }
    monkeypatch.setattr("neox.cli.data_of_run.RunProvenance", lambda *arguments: arguments)
    run, batch, written = provenance_of(argparse.Namespace(run=str(tmp_path), batch=4))
    assert (run, batch) == (tmp_path, 4)
    assert [(one.step, one.consumed, one.where) for one in written] == [(3, 24, str(paths[3])), (6, 50, str(paths[6]))]
    assert [(one.config_lock, one.data, one.world_size) for one in written] == [("train: {seed: 1}\n", None, 1)] * 2
    assert provenance_of(argparse.Namespace(run=str(tmp_path / "none"), batch=None)) == (tmp_path / "none", None, [])
