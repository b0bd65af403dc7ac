from __future__ import annotations

import itertools

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.gpt import GPT
from neox.model.kv_cache import KVCache
from neox.parallel.mesh import Mesh
from tests.model.models import FORMS, SIZES, build, draw


def gradients(model: GPT, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, tokens.roll(-1, 1)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_the_cross_entropy_of_the_logits(form):
    model, tokens = build(form), draw(2, 19)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    loss = model(tokens, targets)
    want = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten(), reduction="none")
    assert (loss.shape, loss.dtype) == ((38,), torch.float32)
    assert torch.allclose(loss.double(), want, atol=1e-5)
    assert loss.view(2, 19)[:, -1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_gradient(form):
    for name, gradient in gradients(build(form), draw(2, 19)).items():
        assert gradient is not None and gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("form", FORMS)
def test_a_later_token_changes_no_earlier_logits(form):
    model, tokens = build(form).eval(), draw(1, 19)
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 97
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:11].max() == 0
    assert difference[11:16].min() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_give_the_logits_of_separate_ones(form):
    model = build(form).eval()
    first, second = draw(1, 8), draw(1, 11, seed=1)
    segments = torch.tensor([[0] * 8 + [1] * 11], dtype=torch.int32)
    positions = torch.tensor([[*range(8), *range(11)]])
    with torch.no_grad():
        packed = model(torch.cat((first, second), 1), segment_ids=segments, position_ids=positions)
        apart = torch.cat((model(first), model(second)), 1)
    assert torch.allclose(packed, apart, atol=2e-5)


@pytest.mark.parametrize("form", ["neox", "gpt2", "llama"])
def test_position_ids_move_positions(form):
    model, tokens = build(form).eval(), draw(1, 9)
    with torch.no_grad():
        plain = model(tokens)
        assert torch.allclose(model(tokens, position_ids=torch.arange(9)[None]), plain, atol=2e-6)
        assert (model(tokens, position_ids=2 * torch.arange(9)[None]) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_cached_decoding_gives_the_logits_of_the_full_sequence(form):
    model, tokens = build(form).eval(), draw(2, 17)
    cache = KVCache(17)
    with torch.no_grad():
        want = model(tokens)
        parts = [model(tokens[:, start:stop], cache=cache) for start, stop in itertools.pairwise([0, 7, 8, 12, 17])]
    assert cache.length == 17
    assert torch.allclose(torch.cat(parts, 1), want, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_left_padded_batch_decodes_like_single_prompts(form):
    model = build(form).eval()
    prompts, total = [draw(1, 4, seed=4), draw(1, 9, seed=5)], 12
    rest = draw(2, 3, seed=6)
    padding = torch.tensor([5, 0])
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, 9 - prompt.shape[1] :] = prompt
    columns = torch.arange(total)
    segments = (columns >= padding[:, None]).to(torch.int32)
    positions = (columns - padding[:, None]).clamp(min=0)
    cache = KVCache(total)
    with torch.no_grad():
        parts = [model(tokens, cache=cache, segment_ids=segments[:, :9], position_ids=positions[:, :9])]
        for i in range(3):
            stop = 10 + i
            parts.append(
                model(
                    rest[:, i : i + 1],
                    cache=cache,
                    segment_ids=segments[:, :stop],
                    position_ids=positions[:, stop - 1 : stop],
                )
            )
        got = torch.cat(parts, 1)
        for row, prompt in enumerate(prompts):
            want = model(torch.cat((prompt, rest[row : row + 1]), 1))[0]
            assert torch.allclose(got[row, -want.shape[0] :], want, atol=2e-5), row


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("form", ["neox", "neox-sequential", "gpt2", "qwen3-window"])
def test_activation_checkpointing_changes_no_gradient(form, mode, dropout):
    config = ModelConfig(**(SIZES | FORMS[form] | {"hidden_dropout": dropout, "attention_dropout": dropout}))
    results = []
    for choice in ("none", mode):
        torch.manual_seed(11)
        results.append(gradients(GPT(config, Mesh.single(), activation_checkpointing=choice), draw(2, 19)))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout"])
@pytest.mark.parametrize("form", ["neox", "gpt2"])
def test_dropout_acts_in_training_only_and_follows_the_seed(form, key):
    tokens = draw(2, 19)
    plain, model = build(form), build(form, **{key: 0.5})

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(tokens, tokens)

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2), atol=1e-2)
    model.eval()
    assert torch.allclose(run(1), plain(tokens, tokens), atol=1e-5)


@pytest.mark.parametrize("form", ["neox", "gpt2"])
def test_padding_rows_stay_zero(form):
    model = build(form, vocab_multiple=64)
    table = model.embedding.word.weight
    assert table.shape[0] == 128
    gradient = gradients(model, draw(2, 19))["embedding.word.weight"]
    assert torch.equal(table[97:], torch.zeros(31, 48))
    assert torch.equal(gradient[97:], torch.zeros(31, 48))
    assert model(draw(1, 3)).shape == (1, 3, 97)
    assert dict(model.logical_weights())["embedding.word.weight"].shape == (97, 48)


@pytest.mark.parametrize("form", FORMS)
def test_counts(form):
    model = build(form)
    logical = sum(weight.numel() for _, weight in model.logical_weights())
    assert model.num_parameters() == logical
    matrices = sum(
        w.numel() for name, w in model.logical_weights() if w.dim() == 2 and not name.startswith("embedding")
    ) + (97 * 48 if model.head is None else 0)
    keys = 5 if form == "qwen3-window" else 19
    assert model.flops_per_token(19) == 6 * matrices + 12 * 2 * 4 * 12 * keys


def test_flops_equal_the_published_formula():
    layers, hidden, sequence, vocab = 3, 64, 40, 100
    model = GPT(
        ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=4, vocab_size=vocab), Mesh.single("meta")
    )
    assert model.flops_per_token(sequence) == 72 * layers * hidden**2 * (
        1 + sequence / (6 * hidden) + vocab / (12 * layers * hidden)
    )


@pytest.mark.parametrize("form", FORMS)
def test_bf16_follows_fp32(form):
    model, tokens = build(form).eval(), draw(2, 19)
    with torch.no_grad():
        want = model(tokens)
        got = model.to(torch.bfloat16)(tokens)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() <= 0.03 * want.norm()


def test_unknown_activation_checkpointing():
    with pytest.raises(ConfigError, match="activation checkpointing"):
        GPT(ModelConfig(**SIZES), Mesh.single("meta"), activation_checkpointing="some")


@pytest.mark.parametrize(("mode", "runs"), [("none", 1), ("selective", 1), ("full", 2)])
def test_blocks_run_again_in_the_backward_in_full_checkpointing_only(mode, runs):
    model, calls = GPT(ModelConfig(**SIZES), activation_checkpointing=mode), []
    for name, block in model.layers.items():
        block.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    assert [block.mlp.recompute for block in model.layers.values()] == [mode == "selective"] * 2
    model(draw(1, 5), draw(1, 5)).sum().backward()
    assert sorted(calls) == sorted(["0", "1"] * runs)
    calls.clear()
    with torch.no_grad():
        model(draw(1, 5))
    assert calls == ["0", "1"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_has_its_own_part_of_the_model(tied):
    config = ModelConfig(**SIZES | {"num_layers": 6, "tie_embeddings": tied})
    stages = [GPT(config, Mesh(pp=3, rank=rank), partition=[1, 2, 3]) for rank in range(3)]
    assert [list(stage.layers) for stage in stages] == [["0"], ["1", "2"], ["3", "4", "5"]]
    assert [block.attention.index for block in stages[1].layers.values()] == [1, 2]
    assert [stage.embedding is not None for stage in stages] == [True, False, False]
    assert [stage.norm is not None for stage in stages] == [False, False, True]
    assert [stage.head is not None for stage in stages] == [False, False, not tied]
    assert [stage.tied is not None for stage in stages] == [False, False, tied]
    tokens, whole = draw(2, 9), GPT(config)
    received = None
    with torch.no_grad():
        for stage in stages:
            assert stage.boundary_shape(tokens) == (2, 9, 48)
            received = stage(tokens, received=received)
        assert torch.allclose(received, whole(tokens), atol=1e-5)
    assert GPT(config, Mesh(pp=3, tp=2, sequence=True, device=torch.device("meta"))).boundary_shape(draw(3, 8)) == (
        3,
        4,
        48,
    )


def test_positions_follow_those_of_the_cache_and_of_earlier_context_ranks():
    model, tokens = build("gpt2").eval(), draw(1, 6)
    seen = []
    model.embedding.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    cache = KVCache(9)
    cache.length = 3
    model.mesh = Mesh(cp=4, rank=2)
    with torch.no_grad():
        model(tokens)
        with pytest.raises(KeyError):  # decoders read what no layer has stored
            model(tokens[:, :1], cache=cache)
    assert seen == [12, 3]


def test_a_reward_model_in_bf16_scores_in_fp32():
    model, tokens = GPT(ModelConfig(**SIZES, output="score")).bfloat16(), draw(2, 5)
    assert (model(tokens).shape, model(tokens).dtype) == ((2, 5, 1), torch.float32)
    assert torch.equal(model(tokens, tokens), model(tokens).view(10)) and model.head is None
    tied = GPT(ModelConfig(**SIZES, output="score", tie_embeddings=True), Mesh(pp=2, rank=1))
    assert tied.score is not None and tied.tied is None


def test_ids_on_a_gpu_are_read_in_evaluation_unless_they_were_checked(monkeypatch):
    read = []
    monkeypatch.setattr("neox.model.gpt.check_inputs", lambda *_, read_on_gpu: read.append(read_on_gpu))
    model = build("neox")
    for training, checked in ((True, False), (True, True), (False, False), (False, True)):
        model.train(training)(draw(1, 3), checked=checked)
    assert read == [False, False, True, False]


def test_the_gradient_that_is_expected_changes_no_result():
    results = []
    for expected in (None, 0.25, 0.5):
        model = build("neox")
        loss = model(draw(2, 5), draw(2, 5), expected_dloss=expected)
        (loss.sum() * 0.25).backward()
        results.append((loss.detach(), model.head.weight.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.allclose(gradient, results[0][1], atol=1e-6)
