"""lm-evaluation-harness on full sets, LAMBADA and three of BLiMP: every question with our models and with its `hf`
model. Run by `make harness-test`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from neox.config.schema import ModelConfig
from neox.convert.huggingface import from_huggingface, to_huggingface
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.evaluate.harness import harness_model, run_tasks
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.evaluate.test_harness import FORMS, train, write_tasks

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra eval)")
pytestmark = [pytest.mark.harness, pytest.mark.usefixtures("without_launcher")]

SETS = ("blimp_adjunct_island", "blimp_determiner_noun_agreement_1", "blimp_regular_plural_subject_verb_agreement_1")


def questions(folder: Path, name: str) -> list[dict]:
    """All lines of a set."""
    return [json.loads(line) for line in (folder / "eval" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def neox_model(folder: Path, data: Path) -> tuple[GPT, Tokenizer]:
    """A small NeoX-form model, trained a little on LAMBADA's first texts, with GPT-2's tokenizer."""
    tokenizer = Tokenizer(data / "tokenizers" / "gpt2.json")
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=256,
        vocab_size=50257,
        **FORMS["neox"],
    )
    return train(config, tokenizer, [row["text"] for row in questions(data, "lambada_test")[:60]], 60), tokenizer


def llama_model(folder: Path, data: Path) -> tuple[GPT, Tokenizer]:
    """The trained Llama of 260,032 parameters, with a byte-level tokenizer of its 512 ids."""
    tokenizer = train_tokenizer(
        [row["text"] for row in questions(data, "lambada_test")[:800]], 512, folder / "tokenizer.json"
    )
    config, weights = from_huggingface(data / "llama-260k")
    model = GPT(config, Mesh.single())
    model.load_weights(weights)
    return model.eval(), tokenizer


@pytest.mark.parametrize("make", [neox_model, llama_model])
def test_every_question_of_the_full_sets(make, shared_data, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(2)
    model, tokenizer = make(tmp_path, shared_data)
    to_huggingface(model.config, model.logical_weights(), tmp_path / "theirs", tokenizer_file=tokenizer.file)
    hf = HFLM(pretrained=str(tmp_path / "theirs"), dtype="float32", device="cpu", batch_size=16)
    lambada = questions(shared_data, "lambada_test")
    for name in SETS:
        folder = tmp_path / name
        folder.mkdir()
        write_tasks(folder, lambada, questions(shared_data, name))
        tasks = ["local_blimp"] if name != SETS[0] else ["local_blimp", "local_lambada"]
        ours = run_tasks(model, tokenizer, tasks, task_files=str(folder), batch_size=16)["results"]
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        theirs = lm_eval.simple_evaluate(hf, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]
        for task in tasks:
            assert ours[task]["acc,none"] == theirs[task]["acc,none"], (name, task)
            print(
                make.__name__,
                name,
                task,
                ours[task]["acc,none"],
                theirs[task]["acc,none"],
                ours[task].get("perplexity,none"),
            )
        if "local_lambada" in tasks:
            assert ours["local_lambada"]["perplexity,none"] == pytest.approx(
                theirs["local_lambada"]["perplexity,none"], rel=1e-4
            )
    sentences = [
        row[key] for name in SETS for row in questions(shared_data, name) for key in ("sentence_good", "sentence_bad")
    ]
    words = [row["text"].rpartition(" ") for row in lambada[:500]]
    pairs = [("", sentence) for sentence in sentences[::4]] + [(before, f" {last}") for before, _, last in words]
    ask = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    worst = 0.0
    for (a, greedy), (b, greedy_hf) in zip(
        harness_model(model, tokenizer, 16).loglikelihood(ask), hf.loglikelihood(ask), strict=True
    ):
        worst = max(worst, abs(a - b))
        assert greedy == greedy_hf
        # theirs is summed in fp32: beyond 1,024 nats its last digit is 1.2e-4
        assert abs(a - b) <= max(1e-4, float(numpy.spacing(numpy.float32(abs(b)))))
    print(make.__name__, "largest difference of a log-likelihood", worst, "over", len(pairs))
