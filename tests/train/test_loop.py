"""The complete path: config, data, model, engine, checkpoints; in this process, and over real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.verify import digest
from neox.config.load import loads
from neox.engine.engine import Engine
from neox.errors import CheckpointError, NonFinite, StoppedBySignal
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh, create_mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.distributed import ROOT, Processes, environment, free_port, run_ranks, start_training
from tests.fork_server import fork_server
from tests.train.corpus import DROPOUT, StopAfter, config_text, curve, make_config, records

os.environ.setdefault("LOCAL_RANK", "0")

# Past the evaluation and the checkpoint of step 10. The last record has an evaluation that longer runs do not make.
TWELVE_STEPS = ("train.train_iters=12", "schedule.decay_iters=20")


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """20 uninterrupted steps of one process with dropout, stage 0."""
    run = tmp_path_factory.mktemp("straight")
    train(make_config(corpus, run, *DROPOUT), Mesh.single(), StopSignals())
    return run


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """20 steps of one process without dropout, stage 0: what every layout must give."""
    run = tmp_path_factory.mktemp("plain")
    train(make_config(corpus, run), Mesh.single(), StopSignals())
    return run


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def assert_same_curve(got: Path, want: Path, begin: int = 0, end: int | None = None):
    a, b = records(got)[:end], records(want)[begin:end]
    assert [r["step"] for r in a[-len(b) :]] == [r["step"] for r in b]
    for x, y in zip(a[-len(b) :], b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
        assert (x["lr"], x["tokens"], x["samples"]) == (y["lr"], y["tokens"], y["samples"])
        assert x.get("validation_loss", 0.0) == pytest.approx(y.get("validation_loss", 0.0), rel=1e-5)


def test_a_run_leaves_its_folder(straight, corpus):
    rows = records(straight)
    assert [row["step"] for row in rows] == list(range(1, 21))
    keys = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "samples",
        "tokens_per_s",
        "tflops",
        "mfu",
        "memory_gb",
        "step_time",
    }
    assert all(keys <= set(row) for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [10, 20]
    assert [row["samples"] for row in rows] == [8 * n for n in range(1, 21)]
    assert [row["tokens"] for row in rows] == [256 * n for n in range(1, 21)]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert loads((straight / "config.lock.yml").read_text()) == make_config(corpus, straight, *DROPOUT)
    assert [path.name for path in sorted((straight / "checkpoints").glob("step_*"))] == [
        "step_00000010",
        "step_00000020",
    ]
    assert "step 20/20" in (straight / "log.txt").read_text()


def test_the_checkpoint_knows_the_data_cursor_and_no_padding(straight):
    with Checkpoint(newest(straight)) as checkpoint:
        assert checkpoint.state["consumed"] == 160
        assert checkpoint.state["tokens"] == 5120
        assert checkpoint.state["step"] == checkpoint.step == 20
        assert checkpoint.info("embedding.word.weight").shape == (120, 32)
        assert set(checkpoint.kinds("norm.weight")) == {"weight", "exp_avg", "exp_avg_sq"}
        assert checkpoint.info("norm.weight").dtype == "F32"


@pytest.mark.parametrize("stops", [(7,), (3, 4, 9)])
def test_a_stopped_and_resumed_run_is_bitwise_the_same(straight, corpus, tmp_path, stops):
    config = make_config(corpus, tmp_path, *DROPOUT)
    for steps in stops:
        with pytest.raises(StoppedBySignal, match=r"error\[10\] stopped"):
            train(config, Mesh.single(), StopAfter(steps))
        torch.manual_seed(999)  # what ran in between must not matter
    train(config, Mesh.single(), StopSignals())
    assert curve(tmp_path) == curve(straight)
    assert digest(newest(tmp_path)) == digest(newest(straight))
    a, b = Checkpoint(newest(tmp_path)), Checkpoint(newest(straight))
    assert torch.equal(a.rng(0)["torch"], b.rng(0)["torch"])
    assert a.state == b.state


def test_records_of_steps_made_again_move_aside(straight, corpus, tmp_path):
    config = make_config(corpus, tmp_path, *DROPOUT)
    with pytest.raises(StoppedBySignal):
        train(config, Mesh.single(), StopAfter(4))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a crash after steps that no checkpoint holds
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train(config, Mesh.single(), StopSignals())
    assert curve(tmp_path) == curve(straight)
    assert (tmp_path / "metrics.dropped.jsonl").read_text().splitlines() == [
        '{"step": 5, "loss": 1.0}',
        '{"step": 6, "lo',
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_trains_and_resumes_bitwise(corpus, tmp_path, stage):
    settings = ("precision.dtype=bf16", f"zero.stage={stage}", "train.train_iters=6", *DROPOUT)
    train(make_config(corpus, tmp_path / "a", *settings), Mesh.single(), StopSignals())
    config = make_config(corpus, tmp_path / "b", *settings)
    with pytest.raises(StoppedBySignal):
        train(config, Mesh.single(), StopAfter(3))
    train(config, Mesh.single(), StopSignals())
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert digest(newest(tmp_path / "a")) == digest(newest(tmp_path / "b"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_in_one_process(plain, corpus, tmp_path, stage):
    threshold = "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"
    train(make_config(corpus, tmp_path, f"zero.stage={stage}", threshold, *TWELVE_STEPS), Mesh.single(), StopSignals())
    assert_same_curve(tmp_path, plain, end=11)


def test_accumulation_and_micro_batch_do_not_matter(plain, corpus, tmp_path):
    train(make_config(corpus, tmp_path, "train.micro_batch_size=8"), Mesh.single(), StopSignals())
    assert_same_curve(tmp_path, plain)


def test_tied_weights_under_stage_3(corpus, tmp_path):
    tied = (
        "model.tie_embeddings=true",
        "train.train_iters=6",
        "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    )
    train(make_config(corpus, tmp_path / "a", *tied), Mesh.single(), StopSignals())
    train(make_config(corpus, tmp_path / "b", *tied, "zero.stage=3"), Mesh.single(), StopSignals())
    assert_same_curve(tmp_path / "b", tmp_path / "a")


def train_ranks(corpus: str, folder: str, *overrides: str) -> None:
    """Entry of a process: trains under each ZeRO stage, one after the other; folders stage0, stage1, ..."""
    dist.init_process_group("gloo")
    mesh = create_mesh()
    for stage in (0, 1, 2, 3):
        threshold = "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"
        train(
            make_config(Path(corpus), Path(folder) / f"stage{stage}", f"zero.stage={stage}", threshold, *overrides),
            mesh,
            StopSignals(),
        )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_every_stage_over_two_processes_and_back_to_one(plain, corpus, tmp_path):
    run_ranks("tests.train.test_loop:train_ranks", 2, tmp_path, [corpus, tmp_path, *TWELVE_STEPS], timeout=240)
    for stage in (0, 1, 2, 3):
        assert_same_curve(tmp_path / f"stage{stage}", plain, end=11)
    # saved by two processes under stage 1, resumed by one under stage 3
    middle = tmp_path / "stage1" / "checkpoints" / "step_00000010"
    train(
        make_config(corpus, tmp_path / "one", "zero.stage=3", f"checkpoint.resume={middle}"),
        Mesh.single(),
        StopSignals(),
    )
    assert_same_curve(tmp_path / "one", plain, begin=10)
    # the digests of the checkpoints are over logical tensors, whatever wrote them: same names, nothing of the padding
    assert digest(newest(tmp_path / "stage3")).keys() == digest(newest(plain)).keys()


# A train.py whose rank 1 is killed in step 5 of the first attempt.
KILLED_ONCE = """#!/bin/sh
[ "$TORCHELASTIC_RESTART_COUNT" = 0 ] && export FAULT=kill@1:backward:10
exec "{python}" "{root}/train.py" "$@"
"""


@pytest.mark.distributed
@pytest.mark.parallel
def test_torchrun_restarts_a_run_that_resumes_and_gives_the_same_training(plain, corpus, tmp_path):
    """One launch for both. The agent keeps its store: the keys of the first attempt are there in the second."""
    conf, attempt = tmp_path / "tiny.yml", tmp_path / "attempt.sh"
    conf.write_text(config_text(corpus, tmp_path / "run"))
    attempt.write_text(KILLED_ONCE.format(python=sys.executable, root=ROOT))
    attempt.chmod(0o755)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    settings = ["--set", "zero.stage=1", "checkpoint.save_interval=2"]
    command = [*torchrun, "--master-port", str(free_port()), "--no-python", str(attempt), "--conf", str(conf)]
    result = Processes([[*command, *settings]], [environment()], tmp_path).wait(240)[0].check()
    assert "resumed from" in result.output, result.output  # step 4, or 2 if the kill came before 4 was saved
    assert "step 20/20" in result.output
    assert "bf16_optimizer" not in result.output
    assert_same_curve(tmp_path / "run", plain)


@pytest.mark.distributed
def test_a_launch_gives_the_same_training_and_a_signal_to_one_rank_ends_it_with_code_10(plain, corpus, tmp_path):
    """One launch for both: DeepSpeed's launcher and two ranks import torch and deepspeed four times."""
    conf = tmp_path / "tiny.yml"
    conf.write_text(config_text(corpus, tmp_path / "run"))
    endless = ["train.train_iters=100000", "schedule.decay_iters=20", "checkpoint.save_interval=0", "zero.stage=2"]
    running = start_training("deepspeed", 2, tmp_path, ["--conf", conf, "--set", *endless])
    metrics = tmp_path / "run" / "metrics.jsonl"
    running.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20, 400)
    launcher = running.processes[0].pid
    ranks = subprocess.run(
        ["pgrep", "-f", f"local_rank=1.*{conf}"], capture_output=True, text=True, check=True
    ).stdout.split()
    family = subprocess.run(
        ["ps", "-o", "pid=", "--sid", str(launcher)], capture_output=True, text=True, check=True
    ).stdout.split()
    (target,) = set(ranks) & set(family) - {str(launcher)} - set(children_that_launch(family))
    os.kill(int(target), signal.SIGUSR1)
    result = running.wait(200)[0]
    assert result.returncode == 10, result.output
    assert result.output.count("error[10]") == 1
    last = records(tmp_path / "run")[-1]["step"]
    with Checkpoint(newest(tmp_path / "run")) as checkpoint:
        # of a step whose evaluation the signal cut short: the resume writes its record
        pending = checkpoint.state.get("pending")
        assert checkpoint.step == (last if pending is None else last + 1)
    assert "Traceback" not in result.output and "bf16_optimizer" not in result.output
    assert_same_curve(tmp_path / "run", plain, end=20)


def children_that_launch(pids) -> list[str]:
    """Those of the processes that are a launcher, not a rank."""
    return [pid for pid in pids if b"deepspeed" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.distributed
def test_an_error_on_one_rank_ends_all_with_its_message_and_code(corpus, tmp_path):
    conf = tmp_path / "tiny.yml"
    conf.write_text(config_text(corpus, tmp_path / "run"))
    blocked = tmp_path / "run" / "checkpoints" / "step_00000006"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder of a checkpoint should be")
    settings = ["--conf", conf, "--set", "train.train_iters=100000", "checkpoint.save_interval=3"]
    results = fork_server().start(settings, tmp_path, ranks=2).results()
    output = "".join(result.output for result in results)
    assert [result.returncode for result in results] == [5, 5], output
    assert output.count("error[5]") == 1
    assert blocked.name in output
    assert "Traceback" not in output


def test_resume_policies(straight, corpus, tmp_path):
    quick = ("train.train_iters=2", "evaluate.interval=0")
    with pytest.raises(CheckpointError, match=r"error\[4\].*no checkpoint"):
        train(make_config(corpus, tmp_path / "a", *quick, "checkpoint.resume=must"), Mesh.single(), StopSignals())
    with pytest.raises(CheckpointError, match=r"error\[4\].*nowhere"):
        train(
            make_config(corpus, tmp_path / "a", *quick, "checkpoint.resume=/nowhere/at/all"),
            Mesh.single(),
            StopSignals(),
        )
    assert not (tmp_path / "a" / "metrics.jsonl").exists()
    train(make_config(corpus, tmp_path / "a", *quick, "checkpoint.resume=never"), Mesh.single(), StopSignals())
    with pytest.raises(CheckpointError, match="never"):
        train(make_config(corpus, tmp_path / "a", *quick, "checkpoint.resume=never"), Mesh.single(), StopSignals())
    train(
        make_config(
            corpus,
            tmp_path / "a",
            "train.train_iters=4",
            "evaluate.interval=0",
            "checkpoint.resume=must",
            "optimizer.lr=0.001",
        ),
        Mesh.single(),
        StopSignals(),
    )
    assert [row["step"] for row in records(tmp_path / "a")] == [1, 2, 3, 4]
    assert "optimizer.lr: 0.003 -> 0.001" in (tmp_path / "a" / "log.txt").read_text()


def test_not_finite_stops_before_the_update_and_names_the_samples(corpus, tmp_path, monkeypatch):
    loss = GPT.forward
    calls = []

    def poisoned(self, *args, **keys):
        calls.append(1)
        return loss(self, *args, **keys) * (float("nan") if len(calls) == 10 else 1.0)

    monkeypatch.setattr(GPT, "forward", poisoned)
    with pytest.raises(
        NonFinite, match=r"error\[11\] the loss is not finite.*step 3.*samples \[16, 17, 18, 19, 20, 21, 22, 23\]"
    ):
        train(make_config(corpus, tmp_path, "evaluate.interval=0"), Mesh.single(), StopSignals())
    assert [row["step"] for row in records(tmp_path)] == [1, 2]


def test_another_model_is_refused(straight, corpus, tmp_path):
    with pytest.raises(CheckpointError, match=r"error\[4\].*layers\.2"):
        train(
            make_config(corpus, tmp_path, "model.num_layers=3", f"checkpoint.resume={newest(straight)}"),
            Mesh.single(),
            StopSignals(),
        )


def test_sample_ids_continue_at_the_checkpoint(corpus, tmp_path, monkeypatch):
    seen = []
    step = Engine.train_step

    def watched(self, batches, **keys):
        seen.extend(int(i) for batch in batches for i in batch.sample_ids)
        return step(self, batches, **keys)

    monkeypatch.setattr(Engine, "train_step", watched)
    config = make_config(corpus, tmp_path, "train.train_iters=5", "evaluate.interval=0")
    with pytest.raises(StoppedBySignal):
        train(config, Mesh.single(), StopAfter(2))
    train(
        make_config(corpus, tmp_path, "train.train_iters=5", "evaluate.interval=0", "train.micro_batch_size=4"),
        Mesh.single(),
        StopSignals(),
    )
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_from_the_weights_of_another(straight, corpus, tmp_path, stage):
    """Loss of the first steps: that of the weights, from a fresh optimizer and schedule; stale masters would show at
    step 2.
    """
    begin = f"checkpoint.init_from={json.dumps(str(straight))}"
    train(
        make_config(corpus, tmp_path, begin, f"zero.stage={stage}", "train.train_iters=4", "evaluate.interval=1"),
        Mesh.single(),
        StopSignals(),
    )
    got = records(tmp_path)
    assert [row["step"] for row in got] == [1, 2, 3, 4]
    trained = records(straight)
    last = [row["validation_loss"] for row in trained if "validation_loss" in row][-1]
    assert all(row["validation_loss"] == pytest.approx(last, rel=0.05) for row in got)
    assert got[0]["lr"] == trained[0]["lr"]
    assert "weights of" in (tmp_path / "log.txt").read_text()


def test_weights_of_another_shape_are_refused(straight, corpus, tmp_path):
    match = "do not fit the model; .*got=model.hidden_size: 32 -> 64.*; [0-9]+ tensors: .*do=.*in another run.dir"
    with pytest.raises(CheckpointError, match=match):
        train(
            make_config(corpus, tmp_path, f"checkpoint.init_from={json.dumps(str(straight))}", "model.hidden_size=64"),
            Mesh.single(),
            StopSignals(),
        )
