"""Steps and evaluations without a target: recorded as null, reported, and left out of what later steps are compared
with.
"""

from __future__ import annotations

import json
import os

import numpy as np

from neox.data.store.indexed import IndexedWriter
from neox.parallel.mesh import Mesh
from neox.report.runs import read_run
from neox.runtime.signals import StopSignals
from neox.train.loop import train
from tests.train.corpus import make_config, records

os.environ.setdefault("LOCAL_RANK", "0")


def test_steps_without_targets(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 100, 20) for _ in range(40)]
    labels = [one if number % 10 == 0 else np.full(20, -100) for number, one in enumerate(documents)]
    for name, kind, rows in (("m", "uint16", documents), ("m_labels", "int32", labels)):
        with IndexedWriter(tmp_path / name, kind, vocab_size=120) as writer:
            for row in rows:
                writer.add_document(row)
    source = json.dumps([{"path": str(tmp_path / "m"), "labels": str(tmp_path / "m_labels")}])
    options = (
        "data.packing=document",
        "train.objective=sft",
        "train.global_batch_size=2",
        "train.train_iters=30",
        "evaluate.interval=15",
        "evaluate.iters=1",
    )
    config = make_config(
        tmp_path,
        tmp_path / "run",
        f"data.train={source}",
        f"data.validation={source}",
        *options,
        "guard.spike_window=8",
    )
    train(config, Mesh.single(), StopSignals())
    rows = records(tmp_path / "run")
    empty = [row for row in rows if row["targets"] == 0]
    assert 0 < len(empty) < 30 and all(row["loss"] is None and row["grad_norm"] is None for row in empty)
    assert all(row["loss"] > 0 for row in rows if row["targets"])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert (
        f"step {empty[0]['step']}: no token of the global batch is a target: there is no loss, the update is skipped\n"
        in log
    )
    assert log.splitlines()[-1] == "done: step 30 of 30" and "times the median" not in log
    assert all(row["validation_loss"] is None or row["validation_loss"] > 0 for row in rows if "validation_loss" in row)
    report = read_run(tmp_path / "run")
    assert len(report.series("loss")) == 30 - len(empty) and report.summary()["last loss"] and report.incidents()
