"""All stages as one model: what every process computes is what one process computes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model import pipeline
from neox.model.gpt import GPT
from neox.model.kv_cache import KVCache
from neox.parallel.mesh import create_mesh
from tests.distributed import run_ranks
from tests.model.models import FORMS, SIZES, build, draw


def test_one_stage_is_the_model():
    model, tokens = build("gpt2").eval(), draw(2, 9)
    assert torch.equal(pipeline.logits(model, tokens), model(tokens))
    assert torch.equal(pipeline.token_losses(model, tokens, tokens), model(tokens, tokens))


def test_a_reward_model_has_no_token_losses():
    model = GPT(ModelConfig(**SIZES, output="score"))
    assert torch.equal(pipeline.logits(model, draw(1, 5)), model(draw(1, 5)))
    with pytest.raises(ConfigError, match="predicts no tokens"):
        pipeline.token_losses(model, draw(1, 5), draw(1, 5))


@pytest.mark.distributed
def test_two_stages_give_every_process_the_results_of_one(tmp_path):
    run_ranks("tests.model.test_pipeline:compare_stages", 2, tmp_path)


def compare_stages() -> None:
    """Logits, losses, scores and cached decoding of two stages against the model on one process."""
    dist.init_process_group("gloo")
    mesh, tokens = create_mesh(pipeline=2), draw(2, 9)
    for options in (FORMS["gpt2"], FORMS["llama"], {"output": "score"}):
        config = ModelConfig(**(SIZES | options))
        stage, model = GPT(config, mesh).eval(), GPT(config).eval()
        with torch.inference_mode():
            results = [(pipeline.logits(stage, tokens), model(tokens))]
            caches = KVCache(9), KVCache(9)
            for part in (tokens[:, :6], tokens[:, 6:]):
                results.append((pipeline.logits(stage, part, cache=caches[0]), model(part, cache=caches[1])))
            if config.output == "tokens":
                results.append((pipeline.token_losses(stage, tokens, tokens), model(tokens, tokens)))
        for got, want in results:
            if got.shape != want.shape or not torch.allclose(got, want, atol=1e-5):
                raise AssertionError(f"{options}: a pipeline of two stages differs by {(got - want).abs().max()}")
    dist.destroy_process_group()
