"""Stored log-probabilities are those of the model, whatever the order, batch and process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neox.data.samples.builder import build_datasets
from neox.engine.engine import Engine
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh, create_mesh
from neox.train.dpo_reference import compute, file_of, pair_datasets, read, set_references
from tests.distributed import run_ranks
from tests.train.preferences import PAIRS, make_answers, pair_config

os.environ.setdefault("LOCAL_RANK", "0")


def by_hand(pairs, model: GPT) -> np.ndarray:
    """Log-probabilities by log_softmax, one answer at a time."""
    out = np.zeros((len(pairs), 2))
    with torch.no_grad():
        for i in range(len(pairs)):
            for column, sample in enumerate((pairs.chosen[i], pairs.rejected[i])):
                tokens, labels = torch.from_numpy(sample.tokens)[None], torch.from_numpy(sample.labels)
                logs = F.log_softmax(model(tokens[:, :-1])[0].double(), dim=-1)
                out[i, column] = sum(float(logs[at, label]) for at, label in enumerate(labels[1:]) if label != -100)
    return out


def test_every_answer_by_hand_and_from_the_file(tmp_path):
    make_answers(tmp_path)
    config = pair_config(tmp_path, tmp_path / "run", "dpo", "model.hidden_dropout=0.2")
    datasets = build_datasets(config, {"train": 10})
    engine = Engine(config, Mesh.single(), GPT(config.model, Mesh.single()))
    assert set_references(datasets, tmp_path / "reference", engine, micro_batch_size=5, fresh=True) == PAIRS
    (pairs,) = pair_datasets(datasets)
    engine.model.eval()
    np.testing.assert_allclose(pairs.reference, by_hand(pairs, engine.model), rtol=2e-5)
    stored = read(file_of(tmp_path / "reference", pairs, 32), PAIRS)
    assert np.array_equal(stored, pairs.reference)
    with pytest.raises(CheckpointError, match=r"missing or damaged; where=.*npy.*init_from"):
        read(file_of(tmp_path / "nowhere", pairs, 32), PAIRS)
    with pytest.raises(CheckpointError, match=r"want=float32 \[97, 2\]"):
        read(file_of(tmp_path / "reference", pairs, 32), PAIRS + 1)


def compute_with(folder: str, tensor: str, pipeline: str) -> None:
    """In each of two processes: the numbers of a layout, written by the first."""
    torch.distributed.init_process_group("gloo")
    config = pair_config(Path(folder), Path(folder) / "run", "dpo")
    mesh = create_mesh(int(tensor), int(pipeline))
    (pairs,) = pair_datasets(build_datasets(config, {"train": 10}))
    model = GPT(config.model, mesh)
    engine = Engine(config, mesh, model)
    values = compute(pairs, engine, mesh, 5, config.model.vocab_size)
    if mesh.rank == 0:
        np.save(f"{folder}/found.npy", values)


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_the_same_in_every_layout(tmp_path, tensor, pipeline):
    make_answers(tmp_path)
    run_ranks("tests.train.test_dpo_reference:compute_with", 2, tmp_path / "out", [tmp_path, tensor, pipeline])
    config = pair_config(tmp_path, tmp_path / "run", "dpo")
    (pairs,) = pair_datasets(build_datasets(config, {"train": 10}))
    np.testing.assert_allclose(
        np.load(tmp_path / "found.npy"), by_hand(pairs, GPT(config.model, Mesh.single()).eval()), rtol=2e-5
    )
