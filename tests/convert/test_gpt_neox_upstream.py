"""Checkpoints that the original GPT-NeoX trained and wrote, against the logits and losses that it computed itself
(see gpt_neox/README.md).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from neox.cli.main import main
from neox.config.load import load
from neox.convert.gpt_neox import config_files, embedding_rows, open_gpt_neox_checkpoint
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.distributed import run_command

WRITTEN = Path(__file__).parent / "gpt_neox"
FORMS = sorted(path.parent.name for path in WRITTEN.glob("*/logits.npy"))
TOKENS = torch.tensor([[(i * 7 + row * 13) % 119 + 1 for i in range(32)] for row in range(2)])


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_gpt_neox(form):
    folder = WRITTEN / form / "global_step20"
    config = load(config_files(folder), embedding_rows=embedding_rows(folder)).config.model
    model = GPT(config, Mesh.single("meta")).materialize("cpu", initialize=False)
    model.load_weights((name, source()) for name, source in open_gpt_neox_checkpoint(folder, config).items())
    model.eval()
    with torch.inference_mode():
        difference = model(TOKENS) - torch.from_numpy(numpy.load(WRITTEN / form / "logits.npy"))
    assert float(difference.abs().max()) <= 1e-5


@pytest.mark.distributed
def test_losses_of_a_run_from_step_0_are_those_of_gpt_neox(tmp_path):
    """At model parallel 2 there, on one process here: the sum of two biases learns twice as fast."""
    form = WRITTEN / "pythia-mp2-pp0"
    (conf,) = config_files(form / "global_step0")
    tokenizer = WRITTEN / "tokenizer.json"
    assert (
        main(
            [
                "import",
                "--from",
                str(form / "global_step0"),
                "--out",
                str(tmp_path / "start"),
                "--tokenizer",
                str(tokenizer),
                "--no-check",
            ]
        )
        == 0
    )
    for name in ("data.bin", "data.idx"):
        shutil.copyfile(WRITTEN / name, tmp_path / name)
    places = {"data.path": tmp_path / "data", "run.dir": tmp_path / "run", "checkpoint.init_from": tmp_path / "start"}
    settings = places | {"parallel.tensor": 1, "model.vocab_size": 128, "checkpoint.save_iters": "[]"}
    run_command(
        1, tmp_path / "out", ["train", "--conf", conf, "--set", *(f"{key}={value}" for key, value in settings.items())]
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(json.loads((form / "losses.json").read_text()), rel=0, abs=2e-6)
