"""Starts that resume: what they report, what they refuse, and that a refused one changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from neox.checkpoint.reader import Checkpoint
from neox.config.values import to_builtins
from neox.data.samples.cursor import Cursor, SavedCursor
from neox.errors import CheckpointError, ConfigError, ModelMismatch, NeoxError, StoppedBySignal
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train import loop
from neox.train.loop import train
from neox.train.resume import Resumed, derived, describe_changes, model_changes, naming_changes
from neox.train.run_dir import WITNESS
from tests.train.corpus import make_config, records

os.environ.setdefault("LOCAL_RANK", "0")

SHORT = (
    "train.train_iters=6",
    "train.micro_batch_size=4",
    "checkpoint.save_interval=3",
    "evaluate.interval=0",
    "logging.tensorboard=true",
)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of six steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(make_config(corpus, run, *SHORT), Mesh.single(), StopSignals())
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def start(corpus: Path, run: Path, *overrides: str) -> str:
    """Train; returns what log.txt got."""
    log = run / "log.txt"
    before = len(log.read_text()) if log.exists() else 0
    train(make_config(corpus, run, *SHORT, *overrides), Mesh.single(), StopSignals())
    return log.read_text()[before:]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the lock of the job aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


REFUSED = {
    "another model": (("model.hidden_size=64", "optimizer.lr=0.009"), CheckpointError),
    "another optimizer": (("optimizer.type=lion",), CheckpointError),
    "another seed": (("train.seed=99",), CheckpointError),
    "another packing": (("data.packing=best_fit",), CheckpointError),
    "no validation data": (("evaluate.interval=2", "data.validation=[]"), NeoxError),
    "an end before the checkpoint": (("train.train_iters=4",), ConfigError),
    "checkpoints although never": (("checkpoint.resume=never",), CheckpointError),
    "a missing checkpoint": (("checkpoint.resume=/nowhere/at/all",), CheckpointError),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_start_leaves_every_byte(run, corpus, why):
    (run / "checkpoints" / "step_00000003" / f"shard_{'0' * 16}_00000_0000.safetensors").write_text("left by a crash")
    overrides, kind = REFUSED[why]
    before = contents(run)
    with pytest.raises(kind):
        start(corpus, run, "train.train_iters=20", *overrides)
    assert contents(run) == before


def test_a_refused_first_start_leaves_no_records(corpus, tmp_path):
    with pytest.raises(NeoxError):
        start(corpus, tmp_path / "run", "checkpoint.init_from=/nowhere/at/all")
    assert contents(tmp_path / "run") == {}


def test_an_end_before_the_checkpoint_is_named(run, corpus):
    with pytest.raises(
        ConfigError,
        match=r"error\[2\] the run would end before .*where=train.train_iters; got=4, resuming .*step_00000006 at "
        r"step 6; want=6",
    ):
        start(corpus, run, "train.train_iters=4")


def test_values_that_follow_from_others_are_named(run, corpus):
    said = start(corpus, run, "train.train_iters=8", "train.global_batch_size=4")
    assert "schedule.decay_iters: 6 -> 8 (follows from train.train_iters)\n" in said
    assert (
        "train.gradient_accumulation: 2 -> 1 (follows from the other batch sizes and the number of processes)\n" in said
    )
    assert "learning rate of step 7: 0.0001 -> " in said
    config = make_config(corpus, run, *SHORT)
    assert (
        derived(config, 2)["data-parallel size"][0] == 2 and derived(config, 2)["train.gradient_accumulation"][0] == 1
    )


def test_unchanged_keys_are_not_reported(run, corpus):
    said = start(corpus, run)
    assert said.splitlines()[0].startswith("resumed from ") and "->" not in said
    assert said.splitlines()[-1] == "done: step 6 of 6; nothing was left to do, raise train.train_iters to continue"


def test_a_change_is_accepted_once(run, corpus):
    said = start(corpus, run, "train.train_iters=8", "train.seed=99", "checkpoint.accept_data_change=true")
    assert "accepted by checkpoint.accept_data_change: train.seed: 1234 -> 99\n" in said
    said = start(corpus, run, "train.train_iters=9", "train.seed=99")  # the checkpoint now knows the new order
    assert "accepted by" not in said and records(run)[-1]["samples"] == 72


@pytest.mark.parametrize("gone", ["folder", "content"])
def test_checkpoints_that_were_removed(run, corpus, gone):
    shutil.rmtree(run / "checkpoints")
    if gone == "content":
        (run / "checkpoints").mkdir()
    before = contents(run)
    for policy in ("auto", "must"):
        with pytest.raises(
            CheckpointError, match=r"error\[4\] the run's checkpoints are missing.*metrics.jsonl has steps to 6"
        ):
            start(corpus, run, f"checkpoint.resume={policy}")
    assert contents(run) == before
    start(corpus, run, "checkpoint.resume=never")  # asked for
    assert len(records(run)) == 6 and (run / "metrics.dropped.jsonl").exists()


def test_a_run_of_an_earlier_version_whose_folder_was_removed(run, corpus):
    (run / WITNESS).unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="the run's checkpoints are missing"):
        start(corpus, run)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(corpus, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    said = start(corpus, tmp_path / "run")
    assert (
        "1 records of steps after 0, which no checkpoint holds, moved to " in said
        and len(records(tmp_path / "run")) == 6
    )


def rewritten(checkpoint: Path, change) -> None:
    """Change the body of a manifest, with the right checksum."""
    raw = (checkpoint / "manifest.json").read_bytes()
    frame, _, body = raw.partition(b',"body":')
    value = json.loads(body[:-2])
    change(value)
    text = json.dumps(value, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (checkpoint / "manifest.json").write_bytes(
        frame[: frame.rindex(b'"sha256":"')] + b'"sha256":"' + digest + b'","body":' + text + b"}\n"
    )


def test_a_checkpoint_of_an_earlier_version_resumes(run, corpus):
    rewritten(run / "checkpoints" / "step_00000006", lambda body: body["state"].pop("data"))
    said = start(corpus, run, "train.train_iters=7")
    assert said.count("does not record its data: whether the content of the datasets changed cannot be checked") == 1
    with Checkpoint(run / "checkpoints" / "step_00000007") as checkpoint:
        assert checkpoint.state["data"]["sources"][0]["files"]["tokens"][2] == 300
    rewritten(run / "checkpoints" / "step_00000007", lambda body: body.update(config="model: {no_such_key: 1}\n"))
    said = start(corpus, run, "train.train_iters=8")
    assert "the checkpoint's config cannot be read by this version" in said


class StopAtStepTwo(StopSignals):
    """A signal that arrives during the second step, whose evaluation is then left for the next start."""

    steps = 0

    @property
    def requested(self) -> bool:
        self.steps += 1
        return self.steps == 2


@pytest.mark.parametrize(
    "now", ["evaluate.interval=0", "evaluate.iters=1", "evaluate.interval=5", 'data.validation=["{corpus}/train"]']
)
def test_an_evaluation_that_was_cut_short_and_is_now_another(corpus, tmp_path, now):
    evaluated = ("train.train_iters=4", "evaluate.interval=2", "evaluate.iters=4", "checkpoint.save_interval=0")
    with pytest.raises(StoppedBySignal):
        train(make_config(corpus, tmp_path / "run", *evaluated), Mesh.single(), StopAtStepTwo())
    assert [row["step"] for row in records(tmp_path / "run")] == [1]
    off = () if now != "evaluate.interval=0" else ("data.validation=[]",)
    train(
        make_config(corpus, tmp_path / "run", *evaluated, now.format(corpus=corpus), *off), Mesh.single(), StopSignals()
    )
    rows = records(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ("validation_loss" in rows[1]) == (not off)
    if off:
        assert (
            "step 2: skipped its interrupted evaluation, because evaluate.interval is 0"
            in (tmp_path / "run" / "log.txt").read_text()
        )


def test_the_record_of_an_evaluation_that_was_cut_short_is_written_once(corpus, tmp_path):
    """The start that wrote it ended before its first checkpoint."""
    evaluated = ("train.train_iters=4", "evaluate.interval=2", "checkpoint.save_interval=0")
    with pytest.raises(StoppedBySignal):
        train(make_config(corpus, tmp_path / "run", *evaluated), Mesh.single(), StopAtStepTwo())
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**records(tmp_path / "run")[0], "step": 2}) + "\n")
    train(make_config(corpus, tmp_path / "run", *evaluated), Mesh.single(), StopSignals())
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_lock_is_written_by_accepted_starts_alone(run, corpus, monkeypatch):
    before = (run / "config.lock.yml").read_text()
    seen = []
    monkeypatch.setattr(loop, "run", lambda training: seen.append((run / "config.lock.yml").read_text()))
    start(corpus, run, "train.train_iters=9")
    assert "train_iters: 6" in before and "train_iters: 9" in seen[0]


def resumed_of(config, updates: int = 6, **changes) -> Resumed:
    """The checkpoint of step 6 of a run of two processes."""
    state = {"data": {}, "updates": updates, "consumed": 48}
    return Resumed(
        **{
            "path": Path("/c/step_6"),
            "step": 6,
            "state": state,
            "config": config,
            "problem": None,
            "world_size": 2,
            **changes,
        }
    )


BEGINNING = "resumed from /c/step_6 at step 6"
BATCH = "(follows from the other batch sizes and the number of processes)"


@pytest.mark.parametrize(
    ("changes", "world_size", "lines"),
    [
        ((), 2, []),
        (("run.dir=/elsewhere", "checkpoint.resume=must", "checkpoint.accept_data_change=true"), 2, []),
        (
            ("model.rotary_pct=0.5", "data.document_mask=false"),
            2,
            ["model.rotary_pct: 0.25 -> 0.5", "data.document_mask: true -> false"],
        ),
        (
            ("train.global_batch_size=null",),
            2,
            ["train.global_batch_size: 8 -> null", f"train.gradient_accumulation: 2 -> 1 {BATCH}"],
        ),
        (
            (),
            4,
            [
                f"train.gradient_accumulation: 2 -> 1 {BATCH}",
                "data-parallel size: 2 -> 4 (follows from the number of processes)",
            ],
        ),
        (("optimizer.lr=0.006",), 2, ["optimizer.lr: 0.003 -> 0.006", "learning rate of step 7: 0.003 -> 0.006"]),
        (("schedule.decay_iters=20",), 2, ["schedule.decay_iters: null -> 20"]),
        (
            ("train.train_iters=30",),
            2,
            ["train.train_iters: 20 -> 30", "schedule.decay_iters: 20 -> 30 (follows from train.train_iters)"],
        ),
        (
            ("train.train_iters=30", "schedule.decay_iters=20"),
            2,
            ["train.train_iters: 20 -> 30", "schedule.decay_iters: null -> 20"],
        ),
    ],
)
def test_which_changes_a_resume_reports(corpus, tmp_path, changes, world_size, lines):
    """Where a rate is constant, its schedule may change and the next step has the same one."""
    constant = ("schedule.type=constant", "schedule.min_lr=0.0")
    before, after = (make_config(corpus, tmp_path, *constant, *each) for each in ((), changes))
    found = describe_changes(resumed_of(before), after, world_size)
    assert found[0] == BEGINNING and sorted(found[1:]) == sorted(lines)


def test_the_rate_of_the_next_step_is_compared_after_the_updates_that_were_made(corpus, tmp_path):
    """A skipped update does not advance GPT-NeoX's schedule, of 10 steps of warm-up here."""
    neox = ("schedule.rule=gpt_neox", "schedule.type=linear")
    before = make_config(corpus, tmp_path, *neox, "schedule.warmup_iters=10")
    after = make_config(corpus, tmp_path, *neox, "schedule.warmup_iters=5")
    *_, line = describe_changes(resumed_of(before, updates=4), after, 2)
    assert line == f"learning rate of step 7: {0.003 * 4 / 10:.6g} -> {0.003 * 4 / 5:.6g}"
    native = [make_config(corpus, tmp_path, f"schedule.warmup_iters={warmup}") for warmup in (10, 8)]
    *_, line = describe_changes(resumed_of(native[0], updates=4), native[1], 2)
    assert line == f"learning rate of step 7: {0.003 * 7 / 10:.6g} -> {0.003 * 7 / 8:.6g}"


def test_what_a_resume_knows_of_its_data(corpus, tmp_path):
    config = make_config(corpus, tmp_path)
    known = Cursor.of_config(config)
    saved = resumed_of(None, state={"data": known.to_json(), "consumed": 48}).saved_data(True)
    assert saved == SavedCursor("/c/step_6", 48, known, True)
    old = resumed_of(config, state={"consumed": 40})
    assert old.saved_data(False) == SavedCursor("/c/step_6", 40, known, False) and old.consumed == 40
    unreadable = resumed_of(None, state={"consumed": 40}, problem="unknown key, model.x")
    assert unreadable.saved_data(False) is None
    lines = describe_changes(unreadable, config, 2)
    assert len(lines) == 3 and lines[0] == BEGINNING and "does not record its data" in lines[1]
    assert "cannot be read by this version (unknown key, model.x)" in lines[2]


def test_a_model_that_does_not_fit_is_explained_by_its_changed_keys(corpus, tmp_path):
    config = make_config(corpus, tmp_path)
    before = {**to_builtins(config.model), "num_layers": 3, "tie_embeddings": None, "gone": 1}
    del before["hidden_size"]
    changes = model_changes(SimpleNamespace(model_config=before), config)
    assert "model.num_layers: 3 -> 2" in changes and len(changes) == 1 + ("tie_embeddings" in to_builtins(config.model))
    for named, got in ((["a: 1 -> 2", "b: 3 -> 4"], "a: 1 -> 2, b: 3 -> 4; x"), ([], "x")):
        with pytest.raises(ModelMismatch) as problem, naming_changes(named):
            raise ModelMismatch("shapes differ", where="w", got="x", do="y")
        assert (problem.value.what, problem.value.where, problem.value.got, problem.value.do) == (
            "shapes differ",
            "w",
            got,
            "y",
        )
    with pytest.raises(CheckpointError) as other, naming_changes(["a: 1 -> 2"]):
        raise CheckpointError("damaged", got="x")
    assert other.value.got == "x"
