"""The package as it is imported: public names, types, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neox
from neox.config.load import load_config
from neox.config.schema import Config, ModelConfig
from neox.generate.generate import load_model
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT


def test_public_names_exist_and_are_listed():
    assert dir(neox) == sorted(neox.__all__)
    for name in neox.__all__:
        assert getattr(neox, name) is not None


def test_importing_loads_nothing_else():
    """`neox --help` and every tool pay for what is imported here."""
    code = (
        "import sys; before = set(sys.modules); import neox; dir(neox); print(sorted(set(sys.modules) - before - "
        "{'importlib', '__future__'}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(neox.__file__).parents[1]
    )
    assert [name for name in ast.literal_eval(run.stdout) if not name.startswith(("importlib", "_", "warnings"))] == [
        "neox"
    ]


def test_a_model_needs_no_mesh():
    model = neox.GPT(neox.ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=16))
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 16)
    assert model.mesh.world_size == 1


def test_the_package_declares_that_it_is_typed():
    folder = Path(neox.__file__).parent
    assert (folder / "py.typed").is_file()
    stub = ast.parse((folder / "__init__.pyi").read_text(encoding="utf-8"))
    named = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert named == set(neox.__all__) - {"__version__"}
    pyproject = folder.parent / "pyproject.toml"
    assert '"py.typed"' in pyproject.read_text(encoding="utf-8")


def test_public_names_are_the_objects_of_their_modules():
    assert (neox.GPT, neox.Config, neox.ModelConfig, neox.SamplingParams) == (GPT, Config, ModelConfig, SamplingParams)
    assert neox.load_config is load_config and neox.load_model is load_model
    for name in ("config", "data", "errors", "ops"):
        assert getattr(neox, name) is sys.modules[f"neox.{name}"]


def test_other_names_do_not_exist():
    with pytest.raises(AttributeError, match="module 'neox' has no attribute 'gpt'"):
        neox.gpt  # noqa: B018
    assert not hasattr(neox, "train_tokenizer")
