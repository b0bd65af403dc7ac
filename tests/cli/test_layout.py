"""Layouts of commands that read a model: what fits neither the processes nor the model is refused before any process group."""

from __future__ import annotations

import argparse

import pytest

from neox.cli.layout import add_layout_arguments, join_layout
from neox.config.schema import ModelConfig
from neox.errors import ConfigError

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_kv_heads=2, vocab_size=10)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    add_layout_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def processes(monkeypatch):
    """Set a launcher's variables for so many processes."""

    def pretend(count: int) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if count > 1:
            for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", count), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", 1)):
                monkeypatch.setenv(name, str(value))

    return pretend


def test_alone(processes):
    processes(1)
    assert join_layout(options(), MODEL).world_size == 1


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (1, ("--tensor", "2"), r"--tensor, --pipeline; got=2 x 1 with 1 processes.*torchrun --nproc-per-node 2"),
        (4, ("--tensor", "2"), r"2 x 1 with 4 processes"),
        (2, ("--tensor", "0", "--pipeline", "2"), r"0 x 2"),
        (4, ("--tensor", "4"), r"--tensor, model\.num_kv_heads; got=4, 2"),
        (3, ("--pipeline", "3"), r"--pipeline, model\.num_layers; got=3, 2"),
    ],
)
def test_what_does_not_fit(processes, count, arguments, message):
    processes(count)
    with pytest.raises(ConfigError, match=message):
        join_layout(options(*arguments), MODEL)
