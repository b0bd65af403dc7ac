"""`neox verify-resume` on real runs: equal where nothing is wrong, and a difference is found."""

import argparse
import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from neox.cli import verify_resume
from neox.cli.main import main, parse
from neox.cli.verify_resume import table
from neox.errors import CheckpointError, ConfigError
from tests.checkpoint.builders import make_state, save_one
from tests.fork_server import fork_server
from tests.train.corpus import DROPOUT, config_text, make_corpus


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    make_corpus(folder / "data")
    path = folder / "my.yml"
    path.write_text(config_text(folder / "data", folder / "unused"))
    return path


def forked(folder):
    """Runs the trainings as forks of a warm process instead of new ones."""

    def start(arguments, processes, variables):
        (result,) = (
            fork_server().command(arguments, folder, ranks=processes, fault=variables.get("FAULT", "")).results()
        )
        return result.returncode, result.output

    return start


def arguments_of(conf, folder):
    settings = [*DROPOUT, "evaluate.interval=2"]
    return [
        "verify-resume",
        str(conf),
        "--steps",
        "5",
        "--kill-at",
        "3",
        "--json",
        "--dir",
        str(folder),
        "--set",
        *settings,
    ]


def check(code, text, folder):
    rows = json.loads(text)
    assert code == 0, rows
    names = [row["name"] for row in rows]
    assert names[:3] == ["loss", "grad_norm", "lr"]
    assert {"final weight", "final exp_avg", "final exp_avg_sq", "random streams", "counters and data cursor"} <= set(
        names
    )
    log = (folder / "resumed" / "log.txt").read_text()
    assert "at step 3" in log and log.count("resumed from") == 1
    metrics = folder / "resumed" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"grad_norm": ', '"grad_norm": 1'))
    assert [row.name for row in table(folder / "straight", folder / "resumed", 5) if not row.equal] == ["grad_norm"]


@pytest.mark.distributed
def test_a_killed_and_resumed_run_is_the_same(conf, tmp_path, capsys):
    _, parser, rest = parse(arguments_of(conf, tmp_path / "runs"))
    code = verify_resume.compare(parser.parse_args(rest), tmp_path / "runs", forked(tmp_path))
    check(code, capsys.readouterr().out, tmp_path / "runs")
    assert main(arguments_of(conf, tmp_path / "runs")) == 2
    assert "run already exists" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.distributed
def test_the_command_with_processes_of_its_own(conf, tmp_path, capsys):
    code = main(arguments_of(conf, tmp_path / "runs"))
    check(code, capsys.readouterr().out, tmp_path / "runs")


def test_a_run_that_fails_is_an_error_with_its_line(conf, tmp_path, capsys):
    code = main(["verify-resume", str(conf), "--steps", "3", "--kill-at", "1", "--set", "train.micro_batch_size=3"])
    assert code == 4
    assert "training run failed" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_asked_for_algorithms_that_repeat(gpu, conf, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    told = []

    def start(arguments, processes, variables):
        told.extend(arguments)
        return 2, "error[2] enough"

    _, parser, rest = parse(arguments_of(conf, tmp_path / "runs"))
    with pytest.raises(CheckpointError, match="enough"):
        verify_resume.compare(parser.parse_args(rest), tmp_path / "runs", start)
    assert ("train.deterministic=true" in told) is gpu


@pytest.mark.parametrize(("steps", "kill", "processes"), [(5, 5, 1), (5, 0, 1), (0, 0, 1), (5, 3, 0)])
def test_impossible_steps(steps, kill, processes):
    with pytest.raises(ConfigError, match="invalid --steps, --kill-at or --processes"):
        verify_resume.run(argparse.Namespace(steps=steps, kill_at=kill, processes=processes, dir=None))


def fake_run(folder, step=5, state=None, content=None, losses=(3.0, 2.0), rng=7):
    """The folder of a run, as a training would leave it."""
    generators = {"cpu": torch.full((16,), rng, dtype=torch.uint8)}
    save_one(folder / "checkpoints", step, state or make_state(), content or {"step": step}, rng=generators)
    rows = [{"step": i + 1, "loss": loss, "lr": 0.5, "mfu": torch.rand(1).item()} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_differs_is_named(tmp_path):
    """Every quantity by itself; what depends on the time is not compared."""
    base = fake_run(tmp_path / "base")
    names = [*verify_resume.CURVE, "final weight", "final exp_avg_sq", "final exp_avg", "final count"]
    names += ["random streams", "counters and data cursor"]
    same = table(base, fake_run(tmp_path / "same"), 5)
    assert [row.name for row in same] == names and all(row.equal for row in same)
    assert all(len(row.straight) == 16 == len(row.resumed) for row in same)
    state = make_state()
    state["scale", "exp_avg"] = state["scale", "exp_avg"] + 1
    others = {
        "loss": {"losses": (3.0, 2.5)},
        "final exp_avg": {"state": state},
        "random streams": {"rng": 8},
        "counters and data cursor": {"content": {"step": 5, "consumed": 1}},
    }
    for name, change in others.items():
        rows = table(base, fake_run(tmp_path / name.replace(" ", "_"), **change), 5)
        assert [row.name for row in rows if not row.equal] == [name]
    longer = table(base, fake_run(tmp_path / "longer", losses=(3.0, 2.0, 1.0)), 5)
    assert [row.name for row in longer if not row.equal] == list(verify_resume.CURVE)  # each has the steps too


def trainings(folder, told, codes=(0, -9, 0), killed_at=3, last=None):
    """Runs of which nothing is trained; records the arguments of each."""

    def start(arguments, processes, variables):
        told.append((arguments, processes, variables))
        code = codes[len(told) - 1]
        run = folder / ("straight" if len(told) == 1 else "resumed")
        if len(told) == 2:
            save_one(run / "checkpoints", killed_at)
        else:
            fake_run(run, **(last or {}) if len(told) == 3 else {})
        return code, "a\nb\nc\nd\n" if code not in (0, -9) else ""

    return start


def parsed(*more):
    _, parser, rest = parse(["verify-resume", "a.yml", "b.yml", "--steps", "5", "--kill-at", "3", *more])
    return parser.parse_args(rest)


@pytest.mark.parametrize(
    ("processes", "codes"), [(1, (0, -9, 0)), (2, (0, 1, 0)), (2, (0, -9, 0))], ids=["alone", "torchrun", "killed"]
)
def test_the_three_trainings_get_the_same_arguments_but_for_the_kill(tmp_path, capsys, monkeypatch, processes, codes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = []
    args = parsed("--set", "x=1", "y=2", "--processes", str(processes))
    assert verify_resume.compare(args, tmp_path, trainings(tmp_path, told, codes)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "5 steps without interruption ...",
        "5 steps, killed after step 3 was saved ...",
        "resumed ...",
    ]
    assert lines[-1] == "PASS: resuming is bitwise" and all(line.startswith("PASS  ") for line in lines[3:-1])
    assert [variables for _, _, variables in told] == [{}, {"FAULT": "kill@*:step:4"}, {}]
    assert [count for _, count, _ in told] == [processes] * 3 and told[1][0] == told[2][0]
    for (arguments, _, _), name in zip(told, ("straight", "resumed", "resumed"), strict=True):
        assert arguments[:7] == ["train", "--conf", "a.yml", "b.yml", "--set", "x=1", "y=2"]
        assert set(arguments[7:]) == {
            f'run.dir="{tmp_path / name}"',
            "train.train_iters=5",
            "checkpoint.save_interval=0",
            "checkpoint.resume=auto",
            "checkpoint.save_iters=[3]",
            "checkpoint.async=false",
            "checkpoint.keep=0",
            "logging.tensorboard=false",
        }


def test_a_difference_exits_with_4_and_is_marked(tmp_path, capsys):
    change = {"losses": (3.0, 2.5)}
    assert verify_resume.compare(parsed(), tmp_path / "a", trainings(tmp_path / "a", [], last=change)) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("FAIL")] == [["FAIL", "loss"], ["FAIL:", "the"]]
    assert verify_resume.compare(parsed("--json"), tmp_path / "b", trainings(tmp_path / "b", [], last=change)) == 4
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["equal"]) for row in rows][:2] == [("loss", False), ("grad_norm", True)]
    assert rows[0]["straight"] != rows[0]["resumed"] and rows[1]["straight"] == rows[1]["resumed"]


@pytest.mark.parametrize(
    ("codes", "processes", "got"),
    [
        ((1,), 1, "exit code 1: b | c | d; want=exit code 0"),
        ((0, 0), 1, "exit code 0: ; want=exit code -9"),
        ((0, 1), 1, "exit code 1: b | c | d; want=exit code -9"),
        ((0, -9, 4), 1, "exit code 4: b | c | d; want=exit code 0"),
        ((0, 0), 2, "exit code 0: ; want=exit code -9"),
    ],
)
def test_a_training_that_ends_otherwise_is_an_error(tmp_path, codes, processes, got):
    start = trainings(tmp_path, [], codes)
    with pytest.raises(CheckpointError) as caught:
        verify_resume.compare(parsed("--processes", str(processes), "--json"), tmp_path, start)
    assert f"got={got}".replace(": ;", ":;") in caught.value.line()
    assert caught.value.where == tmp_path / ("straight" if len(codes) == 1 else "resumed")


def test_a_kill_without_its_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="the killed run left no checkpoint; where=.*; want=step_00000003"):
        verify_resume.compare(parsed(), tmp_path, trainings(tmp_path, [], killed_at=2))
    for name in ("straight", "resumed"):
        (tmp_path / name / "x" / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match="run already exists"):
            verify_resume.compare(parsed(), tmp_path / name / "x", None)


def test_trainings_are_processes_without_an_inherited_fault(monkeypatch):
    told = []

    def run(command, env, **options):
        told.append((command, env, options))
        return SimpleNamespace(returncode=7, stdout="said")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("FAULT", "hang@0:step:1")
    monkeypatch.setenv("KEPT", "1")
    assert verify_resume.started(["train", "x"], 1, {}) == (7, "said")
    command, environment, options = told[0]
    assert command == [sys.executable, "-m", "neox.cli.main", "train", "x"] and options["stderr"] == subprocess.STDOUT
    assert "FAULT" not in environment and environment["KEPT"] == "1"
    verify_resume.started(["train", "x"], 3, {"FAULT": "mine"})
    command, environment, _ = told[1]
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "3"]
    assert command[5] == "--master-port" and int(command[6]) > 0 and command[7:] == told[0][0][1:]
    assert environment["FAULT"] == "mine"


def test_a_folder_of_its_own_is_removed(monkeypatch):
    used = []
    monkeypatch.setattr(verify_resume, "compare", lambda args, folder: used.append((folder, folder.is_dir())) or 4)
    assert verify_resume.run(parsed("--kill-at", "4")) == 4
    ((folder, existed),) = used
    assert existed and not folder.exists() and folder.name.startswith("neox-verify-resume-")
    assert verify_resume.run(parsed("--dir", "mine")) == 4 and str(used[1][0]) == "mine"


def test_the_order_of_keys_is_no_difference():
    assert verify_resume.short({"a": 1, "b": [1, 2]}) == verify_resume.short({"b": [1, 2], "a": 1})
    assert verify_resume.short([1, 2]) != verify_resume.short([2, 1])
    assert verify_resume.short(None) == hashlib.sha256(b"null").hexdigest()[:16]
