"""Runs on packed documents, on text that they tokenize themselves, and with fill in the middle: resume and ranks
change nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from neox.config.load import loads
from neox.config.schema import Config
from neox.data import IndexedDataset, IndexedWriter
from neox.data.text.tokenizer import train_tokenizer
from neox.errors import StoppedBySignal
from neox.parallel.mesh import Mesh
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.distributed import run_command
from tests.train.corpus import StopAfter, config_text, curve, make_config, records

SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


def test_best_fit_resumes_bit_for_bit_and_reports_its_fill_rate(corpus, tmp_path, capsys):
    options = ("data.packing=best_fit", "train.train_iters=6", "checkpoint.save_interval=0", "evaluate.interval=3")
    train(make_config(corpus, tmp_path / "whole", *options), Mesh.single(), StopSignals())
    said = capsys.readouterr().out
    assert (
        f"train: {corpus}/train: 300 documents in " in said
        and "best-fit packed into " in said
        and "fill rate 9" in said
        and "validation: " in said
    )
    with pytest.raises(StoppedBySignal):
        train(make_config(corpus, tmp_path / "cut", *options), Mesh.single(), StopAfter(2))
    train(make_config(corpus, tmp_path / "cut", *options), Mesh.single(), StopSignals())
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 6
    assert (corpus / "index_cache").is_dir()


def test_padding_is_masked_from_loss_and_attention(corpus, tmp_path):
    """Several documents in a sample with a mask, or each in its own sample: the same targets, so the same loss of a
    first step.
    """
    rng = np.random.default_rng(3)
    rows = [rng.integers(1, 120, size=size) for size in (20, 12, 25, 7, 30, 2, 17, 15)]
    with IndexedWriter(tmp_path / "few", "uint16", vocab_size=120) as writer:
        for row in rows:
            writer.add_document(row)
    losses = {}
    for packing, batch in (("best_fit", 4), ("document", 8)):
        sizes = (f"train.global_batch_size={batch}", f"train.micro_batch_size={batch}", "train.train_iters=1")
        ends = ("evaluate.interval=0", "checkpoint.save_interval=0")
        config = make_config(
            corpus,
            tmp_path / packing,
            f'data.train=["{tmp_path}/few"]',
            "data.validation=[]",
            f"data.packing={packing}",
            *sizes,
            *ends,
        )
        train(config, Mesh.single(), StopSignals())
        losses[packing] = records(tmp_path / packing)[0]["loss"]
    assert losses["best_fit"] == pytest.approx(losses["document"], rel=1e-6)


@pytest.mark.distributed
def test_a_run_on_text_is_the_same_on_two_ranks(tmp_path):
    """Two processes of `neox train`: the text is tokenized once, best-fit packed, its middles filled in; the losses
    are those of one process.
    """
    texts = [f"def f_{i}(x):\n    return {i * i} * x  # {'word ' * (i % 9)}\n" for i in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 300, tmp_path / "t.json", special_tokens=SENTINELS)
    values = json.loads(config_text(tmp_path, tmp_path / "two"))
    values["model"]["vocab_size"] = None
    values["tokenizer"] = {"file": tokenizer.file}
    values["data"] = {
        "text": str(tmp_path / "text.jsonl"),
        "split": "9,1",
        "seq_length": 32,
        "document_mask": True,
        "packing": "best_fit",
        "fim": {"rate": 0.8},
    }
    values["train"] |= {"train_iters": 3}
    values["evaluate"] = {"interval": 3, "iters": 2}
    (tmp_path / "run.yml").write_text(json.dumps(values))
    result = run_command(2, tmp_path, ["train", "--conf", tmp_path / "run.yml"])
    (made,) = (tmp_path / "two" / "text").glob("*.idx")
    assert IndexedDataset(made.with_suffix("")).num_documents == 400 and "fill rate" in result.output
    train(make_config_of(values, tmp_path / "one"), Mesh.single(), StopSignals())
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    for name in ("loss", "validation_loss"):
        assert [row[name] for row in two if name in row] == pytest.approx(
            [row[name] for row in one if name in row], rel=1e-5
        )
    assert len(one) == len(two) == 3 and "validation_loss" in one[-1]


def make_config_of(values: dict, run: Path) -> Config:
    """A config from its values, with another folder."""
    return loads(json.dumps({**values, "run": {"dir": str(run)}}))
