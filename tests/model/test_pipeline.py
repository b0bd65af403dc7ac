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


def test_documents_positions_and_a_cache_reach_the_model():
    model, tokens = build("gpt2").eval(), draw(2, 9)
    options = {
        "segment_ids": (torch.arange(9) >= 4).int().expand(2, 9),
        "position_ids": torch.tensor([[*range(4), *range(5)]] * 2),
    }
    with torch.no_grad():
        plain, want = model(tokens), model(tokens, **options)
        for key, value in options.items():
            assert torch.equal(pipeline.logits(model, tokens, **{key: value}), model(tokens, **{key: value}))
        assert torch.equal(pipeline.logits(model, tokens, **options), want) and not torch.equal(plain, want)
        cache = KVCache(9)
        pipeline.logits(model, tokens[:, :5], cache=cache)
        assert cache.length == 5
        assert torch.allclose(pipeline.logits(model, tokens[:, 5:], cache=cache), plain[:, 5:], atol=2e-5)
    half = build("gpt2").bfloat16()
    assert pipeline.logits(half, tokens).dtype == torch.bfloat16
    assert pipeline.token_losses(half, tokens, tokens).dtype == torch.float32


def test_every_stage_makes_room_for_what_the_last_one_sends(monkeypatch):
    """The stages before it know shape and dtype without having the result."""
    received = []
    monkeypatch.setattr(
        pipeline, "broadcast_from_last_stage", lambda _, shape, dtype, mesh: received.append((shape, dtype))
    )
    tokens = draw(2, 9)
    for model in (build("gpt2").bfloat16(), GPT(ModelConfig(**SIZES, output="score")).bfloat16()):
        out = model(tokens)
        pipeline.logits(model, tokens)
        assert received.pop() == (tuple(out.shape), out.dtype)
    model = build("gpt2").bfloat16()
    pipeline.token_losses(model, tokens, tokens)
    assert received.pop() == ((18,), torch.float32) == (tuple(model(tokens, tokens).shape), model(tokens, tokens).dtype)


@pytest.mark.parametrize("run", [pipeline.logits, lambda *given, **o: pipeline.token_losses(*given, draw(1, 3), **o)])
def test_ids_are_checked_unless_the_caller_did(run, monkeypatch):
    read = []
    monkeypatch.setattr("neox.model.gpt.check_inputs", lambda *_, read_on_gpu: read.append(read_on_gpu))
    model = build("neox").eval()
    for checked in (False, True):
        run(model, draw(1, 3), checked=checked)
    assert read == [True, False]


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
