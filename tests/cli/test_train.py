"""`neox train`: variables of launchers, and errors before any process group exists."""

import json
import os
import subprocess
import sys

import pytest
import torch

from neox.cli.main import parse
from neox.cli.train import check_recorder_sizes, conf_files, disable_flight_recorder, flush_or_discard, prepare
from neox.errors import EnvironmentProblem
from neox.runtime.launch import LaunchInfo
from tests.config.gpt_neox.sample_files import flow_text
from tests.distributed import ROOT, environment, run_command
from tests.train.corpus import VOCAB, make_corpus


def run(*arguments, **variables):
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_a_wrong_variable_ends_the_run_with_code_14(tmp_path):
    conf = tmp_path / "a.yml"
    conf.write_text("model: {vocab_size: 10}\n")
    result = run("--conf", str(conf), WORLD_SIZE="two", RANK="0", LOCAL_RANK="0")
    assert result.returncode == 14
    assert result.stderr.splitlines()[0].startswith("error[14] ")
    assert "where=WORLD_SIZE; got=two" in result.stderr


def test_a_wrong_config_ends_the_run_before_torch_is_imported(tmp_path):
    conf = tmp_path / "a.yml"
    conf.write_text("model: {vocab_size: 10, hiden_size: 8}\n")
    result = run("--conf", str(conf))
    assert result.returncode == 2
    assert "hiden_size" in result.stderr
    assert "Traceback" not in result.stderr
    result = run("--conf", str(tmp_path / "none.yml"))
    assert result.returncode == 2


def test_help_has_an_example():
    result = run("--help")
    assert result.returncode == 0
    assert "example:" in result.stdout
    assert "local_rank" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["a.yml", "b.yml"], ["a.yml", "b.yml"]),
        (["--conf", "a.yml", "b.yml"], ["a.yml", "b.yml"]),
        (["--local_rank=1", "-d", "configs", "a", "b.yml"], ["configs/a", "configs/b.yml"]),
        (["--conf_dir", "x", "--conf", "a.yml", "--set", "train.seed=1"], ["x/a.yml"]),
        (["a.yml", "--conf", "b.yml"], ["a.yml", "b.yml"]),
    ],
)
def test_config_files_are_named_as_for_deepy_too(arguments, files):
    _, parser, rest = parse(["train", *arguments])
    assert conf_files(parser.parse_args(rest)) == files


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, "0"), ({"TORCH_FR_BUFFER_SIZE": "50"}, "50"), ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "50"}, None)],
    ids=["unset", "set", "old name"],
)
def test_collectives_are_recorded_where_the_user_asks_for_it(given, size):
    variables = dict(given)
    disable_flight_recorder(variables)
    assert variables.get("TORCH_FR_BUFFER_SIZE") == size


@pytest.mark.parametrize(
    ("deterministic", "given", "workspace"),
    [("true", None, ":4096:8"), ("true", ":16:8", ":16:8"), ("false", None, None)],
    ids=["deterministic", "of the user", "default"],
)
def test_cublas_repeats_its_sums_where_a_run_is_deterministic(
    deterministic, given, workspace, tmp_path, monkeypatch, request
):
    """cuBLAS reads the variable once, after CUDA has started: its sums would differ between runs from then on."""
    request.addfinalizer(lambda before=dict(os.environ): (os.environ.clear(), os.environ.update(before)))
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if given is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = given
    seen = []

    def is_available() -> bool:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    conf = {"model": {"vocab_size": 10}, "data": {"train": ["none"]}, "train": {"micro_batch_size": 1}}
    (tmp_path / "a.yml").write_text(json.dumps(conf))
    _, parser, rest = parse(["train", str(tmp_path / "a.yml"), "--set", f"train.deterministic={deterministic}"])
    config, device = prepare(parser.parse_args(rest), LaunchInfo())
    assert (config.train.deterministic, device) == (deterministic == "true", "cpu")
    assert seen[0] == workspace


@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "9" * 10])
def test_a_wrong_size_of_the_flight_recorder_is_named(value):
    """Torch calls std::terminate for it."""
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        with pytest.raises(EnvironmentProblem, match=f"variable is not a number; where={name}; got="):
            check_recorder_sizes({name: value})
        check_recorder_sizes({name: "0"})
        check_recorder_sizes({name: "2000"})


def test_a_full_disk_under_standard_output_is_no_failure_of_a_run(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("step 8")
        flush_or_discard()
        print("done")
        full.flush()


def test_positional_files_reach_the_run(tmp_path):
    (tmp_path / "a.yml").write_text("model: {vocab_size: 10, hiden_size: 8}\n")
    assert "hiden_size" in run("-d", str(tmp_path), "a").stderr
    result = run("--set", "train.seed=1")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error[2] no config file; where=argv; want=--conf FILE [FILE ...]; do=neox train --conf 1-3B.yml"
    )


GPT_NEOX_MODEL = {
    "pipe-parallel-size": 1,
    "model-parallel-size": 1,
    "num-layers": 2,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "pos-emb": "rotary",
    "rotary-pct": 0.25,
    "no-weight-tying": True,
    "gpt-j-residual": True,
    "attention-config": [[["flash"], 2]],
    "bias-gelu-fusion": True,
    "optimizer": {"type": "Adam", "params": {"lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-8}},
    "zero_optimization": {
        "stage": 1,
        "allgather_bucket_size": 500000000,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "checkpoint-activations": True,
    "precision": "fp32",
    "train-iters": 6,
    "lr-decay-iters": 6,
    "lr-decay-style": "cosine",
    "checkpoint-factor": 3,
    "extra-save-iters": [0, 1],
    "eval-interval": 3,
    "eval-iters": 2,
    "wall_clock_breakdown": True,
    "launcher": "slurm",
}


def test_files_of_gpt_neox_train_as_they_are(tmp_path):
    """Two of its flat files, merged: a model in hyphens and flow style, and paths; refused by train.py, trained, then
    started again with nothing left to do.
    """
    make_corpus(tmp_path)
    paths = {
        f"{part}-data-paths": [str(tmp_path / ("train" if part == "train" else "valid"))]
        for part in ("train", "valid", "test")
    }
    paths |= {
        "tokenizer-type": "HFTokenizer",
        "vocab-file": "missing.json",
        "save": str(tmp_path / "run"),
        "load": str(tmp_path / "run"),
    }
    (tmp_path / "model.yml").write_text(flow_text(GPT_NEOX_MODEL))
    (tmp_path / "paths.yml").write_text(flow_text(paths))
    command = [sys.executable, str(ROOT / "train.py"), "--conf", "model.yml", "paths.yml"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=300)
    assert "where=paths.yml:7 vocab_file; got='missing.json'" in refused.stderr
    files = [tmp_path / name for name in ("model.yml", "paths.yml")]
    training = ["train", "--conf", *files, "--set", f"model.vocab_size={VOCAB}"]
    assert "gelu_tanh" in run_command(1, tmp_path, training).output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7)) and rows[-1]["loss"] < rows[0]["loss"]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        f"step_{n:08}" for n in (0, 1, 3, 6)
    ]
    assert "resumed from" in run_command(1, tmp_path, training).output
