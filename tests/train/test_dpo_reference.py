"""Stored log-probabilities are those of the model, whatever the order, batch and process."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neox.data.samples.blend import MixedDataset
from neox.data.samples.builder import build_datasets
from neox.engine.engine import Engine
from neox.errors import CheckpointError
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh, create_mesh
from neox.train import dpo_reference as module
from neox.train.dpo_reference import InOrder, compute, file_of, pair_datasets, read, set_references
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


class Pairs:
    """Three pairs of a dataset."""

    chosen = SimpleNamespace(dataset=SimpleNamespace(bin_path="chosen.bin"))

    def __len__(self):
        return 3

    def pair(self, index):
        assert 0 <= index < 3
        return f"pair {index}"

    def checksums(self):
        return 0xAB, 0x1234567890ABCDEF


def test_pairs_in_order_end_with_copies_of_the_last(tmp_path):
    pairs = InOrder(Pairs())
    assert len(pairs) == 3
    assert [pairs[index] for index in range(5)] == ["pair 0", "pair 1", "pair 2", "pair 2", "pair 2"]
    assert [pairs.describe(index, 7) for index in (1, 4)] == [f"chosen.bin pair {n} token 7" for n in (1, 2)]
    assert file_of(tmp_path, Pairs(), 32) == tmp_path / "00000000000000ab-1234567890abcdef-32.npy"


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (np.zeros((3, 2), np.float64), "float64 (3, 2)"),
        (np.zeros((2, 3), np.float32), "float32 (2, 3)"),
        (np.zeros((6,), np.float32), "float32 (6,)"),
        (np.array([None] * 3), "Object arrays"),
        (b"", "No data left in file"),
        (b"not numpy", ""),
    ],
)
def test_a_file_of_other_numbers_is_damaged(tmp_path, content, got):
    path = tmp_path / "a.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(CheckpointError, match=r"missing or damaged") as problem:
        read(path, 3)
    assert (problem.value.where, problem.value.want) == (path, "float32 [3, 2]") and got in str(problem.value.got)


@pytest.mark.parametrize(("rank", "fresh"), [(0, True), (1, True), (0, False)])
def test_a_fresh_run_computes_all_datasets_and_its_first_process_stores_them(tmp_path, monkeypatch, rank, fresh):
    make_answers(tmp_path)
    config = pair_config(tmp_path, tmp_path / "run", "dpo", "evaluate.interval=10")
    datasets = build_datasets(config, {"train": 10, "validation": 10})
    assert len(list(pair_datasets(datasets))) == 2
    blend = {"train": MixedDataset([datasets["train"], datasets["validation"]], [1.0, 1.0]), "test": object()}
    assert list(pair_datasets(blend)) == list(pair_datasets(datasets))
    computed = []

    def compute_one(pairs, engine, mesh, micro_batch_size, vocab_size):
        computed.append((pairs, micro_batch_size, vocab_size))
        return np.full((len(pairs), 2), len(computed), np.float32)

    monkeypatch.setattr(module, "compute", compute_one)
    folder = tmp_path / "reference"
    engine = SimpleNamespace(config=config, mesh=Mesh(dp=2, rank=rank))
    first, second = pair_datasets(datasets)
    if not fresh:
        folder.mkdir()
        np.save(file_of(folder, first, 32), np.full((PAIRS, 2), 2, np.float32))
    count = set_references(datasets, folder, engine, micro_batch_size=5, fresh=fresh)
    assert count == 2 * PAIRS
    assert computed == ([(first, 5, 120), (second, 5, 120)] if fresh else [])
    assert (first.reference == (1 if fresh else 2)).all() and (second.reference == 2).all()
    assert folder.exists() == (rank == 0)
    if rank == 0:
        stored = read(file_of(folder, second, 32), PAIRS)
        assert (stored == 2).all()  # both have the same content, and so the same file
