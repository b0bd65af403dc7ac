"""Import and export in every layout: random models of odd shapes, read by tp 1, 2 and pp 1, 2, written by them, and
given back.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neox.cli.main import main
from neox.convert.huggingface import from_huggingface, to_huggingface
from tests.convert.layouts import LAYOUTS
from tests.convert.models import gpt2, llama, mistral, neox, qwen2, qwen3
from tests.distributed import run_ranks

TOLERANCE = 2e-5  # fp32, absolute, on logits of order 1
MODELS = {  # heads and widths that two processes can share, else as odd as they may be
    "neox": lambda: neox(0.5, num_attention_heads=4, hidden_size=80, intermediate_size=142),
    "gpt2": lambda: gpt2(n_head=6, n_embd=60, n_inner=86),
    "llama": lambda: llama(num_key_value_heads=2, intermediate_size=94),
    "mistral": lambda: mistral(num_key_value_heads=2),
    "qwen2": lambda: qwen2(num_attention_heads=6, num_key_value_heads=2),
    "qwen3": lambda: qwen3(num_key_value_heads=2),
}


@pytest.mark.distributed
@pytest.mark.parallel
def test_every_architecture_in_every_layout(tmp_path, capsys):
    (tmp_path / "models").mkdir()
    theirs = {}
    for name, make in MODELS.items():
        place = tmp_path / "models" / name
        theirs[name] = make()
        to_huggingface(*from_huggingface(theirs[name]), place / "theirs")
        assert main(["import", "--from", str(place / "theirs"), "--out", str(place / "ours")]) == 0
        np.save(place / "tokens.npy", np.random.default_rng(5).integers(0, 101, (2, 23)))
    run_ranks("tests.convert.layouts:read_and_write", 4, tmp_path / "out", [tmp_path / "models"], timeout=400)
    for name, model in theirs.items():
        place = tmp_path / "models" / name
        tokens = torch.from_numpy(np.load(place / "tokens.npy"))
        with torch.no_grad():
            want = model(tokens).logits
        assert want.abs().max() > 0.5
        config, weights = from_huggingface(place / "theirs")
        for tensor, pipeline in LAYOUTS:
            cell = f"{name} tp {tensor} pp {pipeline}"
            got = torch.from_numpy(np.load(place / f"logits-{tensor}-{pipeline}.npy"))
            assert (got - want).abs().max() <= TOLERANCE, cell
            back = place / f"back-{tensor}-{pipeline}"
            assert (
                main(
                    [
                        "export",
                        "--checkpoint",
                        str(place / f"{tensor}-{pipeline}"),
                        "--out",
                        str(back),
                        "--no-tokenizer",
                        "--no-check",
                    ]
                )
                == 0
            )
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32).eval()(tokens).logits
            assert (logits - want).abs().max() <= TOLERANCE, cell
            config2, weights2 = from_huggingface(back)
            assert config2 == config and weights2.keys() == weights.keys(), cell
            assert all(torch.equal(weights2[key], weights[key]) for key in weights), cell
    capsys.readouterr()
