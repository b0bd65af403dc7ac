"""Layouts of commands that read a model: what fits neither the processes nor the model is refused before any process
group.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from neox.cli import layout
from neox.cli.layout import add_layout_arguments, join_layout
from neox.cli.main import main
from neox.config.schema import ModelConfig, ParallelConfig
from neox.data.text.tokenizer import train_tokenizer
from neox.errors import ConfigError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.distributed import environment, free_port
from tests.generate.checkpoints import save_model

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_heads=2, vocab_size=10)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    add_layout_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def processes(monkeypatch):
    """Set the variables of a launcher for a number of processes."""

    def pretend(count: int) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if count > 1:
            for name, value in (
                ("RANK", 0),
                ("LOCAL_RANK", 0),
                ("WORLD_SIZE", count),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", 1),
            ):
                monkeypatch.setenv(name, str(value))

    return pretend


def test_alone(processes):
    processes(1)
    assert join_layout(options(), MODEL).world_size == 1


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (1, ("--tensor", "2"), r"--tensor, --pipeline; got=2 x 1 with 1 process.*torchrun --nproc-per-node 2"),
        (4, ("--tensor", "2"), r"2 x 1 with 4 processes"),
        (2, ("--tensor", "0", "--pipeline", "2"), r"0 x 2"),
        (1, ("--tensor", "-1", "--pipeline", "-1"), r"-1 x -1"),
        (4, ("--tensor", "4"), r"--tensor, model\.num_kv_heads; got=4, 2"),
        (3, ("--pipeline", "3"), r"--pipeline, model\.num_layers; got=3, 2"),
    ],
)
def test_what_does_not_fit(processes, count, arguments, message):
    processes(count)
    with pytest.raises(ConfigError, match=message):
        join_layout(options(*arguments), MODEL)


@pytest.mark.parametrize(
    ("count", "arguments", "sizes"),
    [
        (2, ("--tensor", "2"), (2, 1)),
        (2, ("--pipeline", "2"), (1, 2)),
        (4, ("--tensor", "2", "--pipeline", "2"), (2, 2)),
    ],
)
def test_processes_join_with_the_sizes_of_the_options(processes, monkeypatch, count, arguments, sizes):
    processes(count)
    joined = []
    monkeypatch.setattr(layout, "init_distributed", lambda *told: joined.append(told) or "mesh")
    assert join_layout(options(*arguments, "--device", "cuda:1"), MODEL) == "mesh"
    ((parallel, launch, device),) = joined
    assert parallel == ParallelConfig(tensor=sizes[0], pipeline=sizes[1])
    assert (launch.world_size, launch.rank, device) == (count, 0, "cuda")


def test_one_process_computes_on_its_device(processes):
    processes(1)
    assert join_layout(options("--device", "meta"), MODEL) == Mesh.single(torch.device("meta"))
    assert join_layout(options("--pipeline", "1"), MODEL).device == torch.device("cpu")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """run/ with a small random model, and its tokenizer."""
    root = tmp_path_factory.mktemp("layout")
    tokenizer = train_tokenizer(["the quick brown fox"] * 9, 300, root / "tokenizer.json")
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "init_std": 0.3,
    }
    model = GPT(ModelConfig(**sizes, vocab_size=tokenizer.vocab_size), Mesh.single())
    save_model(root / "run", model, tokenizer=tokenizer.file)
    return root


@pytest.mark.distributed
def test_the_output_of_a_launch_is_json_alone(run_folder, capfd):
    """Over two processes, and the same as in one. DeepSpeed's launcher writes lines of its own there, so it is
    torchrun. Evaluation over processes is compared in tests/train/test_layouts.py.
    """
    words = ["generate", "--checkpoint", str(run_folder / "run"), "--prompt", "the fox", "--max-new-tokens", "5"]
    words += ["--temperature", "0", "--json"]
    assert main(words) == 0
    alone = json.loads(capfd.readouterr().out)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    launch = [sys.executable, *torchrun, "-m", "neox.cli.main", *words, "--pipeline", "2"]
    done = subprocess.run(launch, env=environment(DS_ACCELERATOR="cpu"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == alone
