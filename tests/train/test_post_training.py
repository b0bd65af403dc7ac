"""Fine-tuning on the loop that pre-trains: each kind of run lowers its loss on a small task, resumes bitwise, and
leaves what it should.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from neox.checkpoint.lora_merge import open_weights
from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.verify import digest
from neox.config.validate import validate
from neox.errors import CheckpointError, StoppedBySignal
from neox.generate.generate import load_model
from neox.model.adapters import is_adapter
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.train.corpus import make_config, make_corpus, records
from tests.train.preferences import PAIRS, chat_config, make_answers, pair_config
from tests.train.test_loop import StopAfter, newest

os.environ.setdefault("LOCAL_RANK", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    make_answers(folder)
    make_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    """The newest checkpoint of 60 steps of pre-training."""
    run = tmp_path_factory.mktemp("base")
    train(
        make_config(
            data, run, "train.train_iters=60", "train.micro_batch_size=8", "optimizer.lr=0.01", "evaluate.interval=0"
        ),
        Mesh.single(),
        StopSignals(),
    )
    return newest(run)


def run_to_end(config) -> list[dict]:
    validate(config, 1, "cpu")
    train(config, Mesh.single(), StopSignals())
    return records(Path(config.run.dir))


def weights(path: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names()}


@pytest.mark.parametrize("packing", ["document", "concatenate"])
def test_supervised_fine_tuning_learns_the_answers(data, base, tmp_path, packing):
    rows = run_to_end(chat_config(data, tmp_path, f"checkpoint.init_from={base}", f"data.packing={packing}"))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert rows[-1]["validation_loss"] < rows[9]["validation_loss"]


def test_a_masked_token_has_no_weight(data, base, tmp_path):
    """With labels that leave everything in: the loss is another one, for the questions are noise."""
    losses = []
    for name, labels in (("masked", "chat_labels"), ("all", "chat")):
        source = f'[{{"path": "{data}/chat", "labels": "{data}/{labels}"}}]'
        config = chat_config(
            data,
            tmp_path / name,
            f"data.train={source}",
            f"checkpoint.init_from={base}",
            "train.train_iters=1",
            "schedule.warmup_iters=0",
            "evaluate.interval=0",
        )
        losses.append(run_to_end(config)[0]["loss"])
    assert losses[1] > losses[0] + 0.1


def test_preferences_start_at_ln_2_and_fall(data, base, tmp_path):
    rows = run_to_end(pair_config(data, tmp_path, "dpo", f"checkpoint.init_from={base}"))
    assert rows[0]["loss"] == pytest.approx(np.log(2.0), abs=1e-6)  # the model is its own reference
    assert rows[-1]["loss"] < 0.5 and rows[-1]["validation_loss"] < rows[9]["validation_loss"] < 0.69
    assert rows[0]["tokens"] == 8 * 2 * 32
    (stored,) = (tmp_path / "reference").glob("*.npy")
    values = np.load(stored)
    assert values.shape == (PAIRS, 2) and values.dtype == np.float32 and (values < 0).all()


def test_preferences_without_labels_train_in_the_same_way_on_a_shared_prompt(data, base, tmp_path):
    """The log-probability of the prompt is the same in both answers, and cancels in loss and gradient."""
    bare = f'[{{"path": "{data}/chosen", "rejected": "{data}/rejected"}}]'
    options = (f"checkpoint.init_from={base}", "train.train_iters=6", "evaluate.interval=0")
    curves = []
    for name, sources in (("labels", ()), ("none", (f"data.train={bare}", f"data.validation={bare}"))):
        rows = run_to_end(pair_config(data, tmp_path / name, "dpo", *options, *sources))
        curves.append([row["loss"] for row in rows])
    assert curves[0][-1] < np.log(2.0) - 0.02
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    first, second = (np.load(*(tmp_path / name / "reference").glob("*.npy")) for name in ("labels", "none"))
    assert (second < first - 1).all()  # of the prompt, too


def test_a_resumed_preference_run_reads_its_reference_and_is_bitwise_the_same(data, base, tmp_path):
    straight, cut = (
        pair_config(data, tmp_path / name, "dpo", f"checkpoint.init_from={base}") for name in ("straight", "cut")
    )
    run_to_end(straight)
    with pytest.raises(StoppedBySignal):
        train(cut, Mesh.single(), StopAfter(7))
    run_to_end(cut)
    assert digest(newest(tmp_path / "cut")) == digest(newest(tmp_path / "straight"))
    (stored,) = (tmp_path / "cut" / "reference").glob("*.npy")
    stored.write_bytes(stored.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="reference log-probabilities"):
        train(cut, Mesh.single(), StopSignals())


def test_a_reward_model_ranks_the_chosen_answers_first(data, base, tmp_path):
    rows = run_to_end(pair_config(data, tmp_path, "reward", f"checkpoint.init_from={base}", "model.output=score"))
    assert rows[0]["loss"] == pytest.approx(np.log(2.0), abs=0.2)
    assert rows[-1]["loss"] < 0.6 and rows[-1]["validation_loss"] < rows[9]["validation_loss"]
    assert "score.weight" in weights(newest(tmp_path)) and "head.weight" not in weights(newest(tmp_path))


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "bf16")])
def test_adapters_alone_are_trained_and_merge_exactly(data, base, tmp_path, stage, dtype):
    lora = (
        "model.lora.rank=4",
        "model.lora.alpha=8.0",
        f"zero.stage={stage}",
        f"precision.dtype={dtype}",
        "optimizer.lr=0.02",
    )
    rows = run_to_end(chat_config(data, tmp_path, f"checkpoint.init_from={base}", *lora))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    before, after = weights(base), weights(newest(tmp_path))
    for name, weight in before.items():
        assert torch.equal(after[name], weight.bfloat16().float() if dtype == "bf16" else weight), name
    added = set(after) - set(before)
    assert added and all(is_adapter(name) for name in added)
    assert all(after[name].abs().max() > 0 for name in added)
    with Checkpoint(newest(tmp_path)) as checkpoint:
        assert {name for name in checkpoint.names() if "exp_avg" in checkpoint.kinds(name)} == added
    if dtype == "fp32":
        merged = load_model(newest(tmp_path))
        assert merged.config.lora is None
        with open_weights(newest(tmp_path)) as checkpoint:
            assert all(
                torch.equal(checkpoint.tensor(name), parameter)
                for name, parameter in merged.named_parameters()
                if parameter.shape[0] != 128
            )


def test_a_run_with_adapters_resumes_bitwise(data, base, tmp_path):
    straight, cut = (
        chat_config(data, tmp_path / name, f"checkpoint.init_from={base}", "model.lora.rank=2")
        for name in ("straight", "cut")
    )
    run_to_end(straight)
    with pytest.raises(StoppedBySignal):
        train(cut, Mesh.single(), StopAfter(6))
    run_to_end(cut)
    assert digest(newest(tmp_path / "cut")) == digest(newest(tmp_path / "straight"))


def test_a_full_run_may_start_from_merged_adapters(data, base, tmp_path):
    run_to_end(chat_config(data, tmp_path / "lora", f"checkpoint.init_from={base}", "model.lora.rank=2"))
    start = f"checkpoint.init_from={newest(tmp_path / 'lora')}"
    rows = run_to_end(
        pair_config(
            data,
            tmp_path / "dpo",
            "dpo",
            start,
            "train.train_iters=2",
            "schedule.warmup_iters=0",
            "evaluate.interval=0",
        )
    )
    assert rows[0]["loss"] == pytest.approx(np.log(2.0), abs=1e-6)
