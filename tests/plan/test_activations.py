"""Planned activations against the tensors that autograd saves in a real forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd.graph import saved_tensors_hooks

from neox.config.schema import Config
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.plan.activations import activations
from neox.plan.sizes import resolve

SEEDS = 256  # bytes of dropout's seeds and ALiBi's slopes, which the plan leaves out
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
}
FORMS = {
    "neox": {"parallel_residual": True, "rotary_pct": 0.5},
    "sequential": {"rotary_pct": 0.5, "tie_embeddings": True},
    "llama": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True, "tie_embeddings": True},
    "gpt2": {"position_embedding": "learned", "activation": "gelu_tanh"},
    "gptj": {"parallel_residual": True, "shared_residual_norm": True},
    "relu": {"activation": "relu", "position_embedding": "alibi"},
    "silu": {"activation": "silu", "mlp_bias": False},
    "dropout": {"hidden_dropout": 0.1},
}


def make_config(form: str, checkpointing: str = "none", dtype: str = "fp32") -> Config:
    return Config.model_validate(
        {
            "model": {
                "num_layers": 3,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "intermediate_size": 160,
                "vocab_size": 500,
                "max_position_embeddings": 64,
                **FORMS[form],
            },
            "data": {"seq_length": 48},
            "precision": {"dtype": dtype},
            "train": {"micro_batch_size": 3, "activation_checkpointing": checkpointing},
        }
    )


def held_by_autograd(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the distinct storages that the graph of a forward and its checkpoints hold, parameters and rotary
    tables aside.
    """
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    model = GPT(
        config.model, Mesh.single(), dtype=dtype, activation_checkpointing=config.train.activation_checkpointing
    ).train()
    tokens = torch.randint(0, 500, (3, 48))
    targets = torch.randint(0, 500, (3, 48))
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        # keeps it alive, so that an address is not used twice
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def keep_arguments(function, *arguments, **options):
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                pack(argument)
        return torch.utils.checkpoint.checkpoint(function, *arguments, **options)

    monkeypatch.setattr("neox.model.gpt.checkpoint", keep_arguments)
    monkeypatch.setattr("neox.model.mlp.checkpoint", keep_arguments)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, targets).sum()
    if model.rotary is not None:
        known |= {model.rotary.cos.untyped_storage().data_ptr(), model.rotary.sin.untyped_storage().data_ptr()}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_activations_match_autograd(form, dtype, monkeypatch):
    config = make_config(form, dtype=dtype)
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    assert plan.saved == plan.uncheckpointed and plan.in_flight == 1
    assert held_by_autograd(config, monkeypatch) == pytest.approx(plan.saved + plan.logits, rel=0, abs=SEEDS)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("form", ["neox", "llama", "sequential", "dropout"])
def test_saved_activations_with_checkpointing_match_autograd(form, checkpointing, monkeypatch):
    config = make_config(form, checkpointing)
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    assert plan.saved < plan.uncheckpointed
    assert held_by_autograd(config, monkeypatch) == pytest.approx(plan.saved + plan.logits, rel=0, abs=SEEDS)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_of_adapted_layers_are_planned_from_above(checkpointing, monkeypatch):
    """Adapted layers save their merged matrices. Inputs that only frozen weights would need are saved by the plan
    alone.
    """
    monkeypatch.setitem(FORMS, "adapters", {**LLAMA, "lora": {"rank": 4}})
    config = make_config("adapters", checkpointing)
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    held = held_by_autograd(config, monkeypatch)
    assert held <= plan.saved + plan.logits <= 1.1 * held


@pytest.mark.parametrize("form", ["neox", "sequential"])
def test_a_single_checkpointed_block_saves_its_input(form, monkeypatch):
    monkeypatch.setitem(FORMS, "single", {**FORMS[form], "num_layers": 1})
    config = make_config("single", "full")
    layout = resolve(config, 1)
    plan = activations(config, layout, layout.stages[0])
    assert held_by_autograd(config, monkeypatch) == pytest.approx(plan.saved + plan.logits, rel=0, abs=SEEDS)


TOKENS = 3 * 48
STREAM, QKV, INNER, STATISTICS = TOKENS * 64 * 4, TOKENS * 192 * 4, TOKENS * 160 * 4, TOKENS * 8
LSE = TOKENS * 4 * 4
BLOCK = {  # bytes of a block in fp32: norms, attention, MLP
    "sequential": 4 * STREAM + 2 * STATISTICS + QKV + STREAM + LSE + 2 * INNER,
    "neox": 3 * STREAM + STATISTICS + QKV + STREAM + LSE + 2 * INNER,
    "gptj": 2 * STREAM + STATISTICS + QKV + STREAM + LSE + 2 * INNER,
}


def planned(form: str, checkpointing: str = "none", world: int = 1, repeats: int = 1, **parallel):
    config = make_config(form, checkpointing)
    train = config.train.model_copy(update={"gradient_accumulation": repeats})
    over = {"parallel": config.parallel.model_copy(update=parallel), "train": train}
    config = config.model_copy(update=over)
    layout = resolve(config, world)
    return [activations(config, layout, stage) for stage in layout.stages]


@pytest.mark.parametrize("form", BLOCK)
def test_every_stage_of_a_pipeline_saves_its_own_ends(form):
    """The first has the ids, the last the final norm and, per token, its target and 16 bytes of the loss."""
    first, middle, last = planned(form, world=3, repeats=8, pipeline=3)
    assert middle.saved == middle.uncheckpointed == BLOCK[form]
    assert first.saved == BLOCK[form] + 8 * TOKENS
    assert last.saved == BLOCK[form] + 2 * STREAM + STATISTICS + 24 * TOKENS
    assert (first.logits, middle.logits, last.logits) == (0, 0, TOKENS * 512 * 4)
    assert {act.boundary for act in (first, middle, last)} == {STREAM}
    assert [act.in_flight for act in (first, middle, last)] == [3, 2, 1]
    assert [act.resident for act in (first, middle)] == [3 * first.saved, 2 * middle.saved]


def test_no_more_micro_batches_are_in_flight_than_a_step_has():
    assert [act.in_flight for act in planned("neox", world=3, repeats=2, pipeline=3)] == [2, 2, 1]
    assert [act.in_flight for act in planned("neox", world=3, repeats=1, pipeline=3)] == [1, 1, 1]


def test_dropout_of_the_embedding_is_saved_by_the_first_stage():
    first, middle, _ = planned("dropout", world=3, pipeline=3)
    assert first.saved - middle.saved == 8 * TOKENS + STREAM
    checkpointed = [act.saved for act in planned("dropout", "full", world=3, pipeline=3)]
    assert checkpointed == [2 * STREAM + 8 * TOKENS, STREAM, 3 * STREAM + STATISTICS + 24 * TOKENS]


@pytest.mark.parametrize(("form", "less"), [("sequential", 1), ("neox", 1), ("gptj", 1)])
def test_full_checkpointing_saves_two_streams_of_a_block(form, less):
    one = planned(form, "full", world=3, pipeline=3)
    assert one[1].saved == (2 - less) * STREAM and one[1].uncheckpointed == BLOCK[form]
    assert one[1].recomputed == BLOCK[form] - 2 * STREAM
    (whole,) = planned(form, "full")
    shared = 1 if form == "sequential" else 2  # with parallel residuals the second block reads the first one's input
    ends = 8 * TOKENS + 2 * STREAM + STATISTICS + 24 * TOKENS
    assert whole.saved == (2 * 3 - shared) * STREAM + ends
    assert whole.uncheckpointed == 3 * BLOCK[form] + ends


def test_selective_checkpointing_leaves_out_what_the_activation_gives():
    for form, inner in (("sequential", 1), ("llama", 1), ("relu", 0)):
        plain, selective = (planned(form, how)[0] for how in ("none", "selective"))
        assert plain.recomputed == 0
        assert plain.saved - selective.saved == 3 * inner * INNER
        assert selective.recomputed == inner * INNER and selective.uncheckpointed == plain.uncheckpointed


@pytest.mark.parametrize(
    ("form", "working"),
    [
        ("sequential", 2 * QKV + STREAM + 3 * STREAM),  # two rows of 192 and one of 64: more than two of 160
        ("llama", 3 * INNER + 3 * STREAM),  # two rows of 128 and one of 64 are less than three of 160
    ],
)
def test_temporary_memory_is_that_of_the_larger_half_of_a_block(form, working):
    assert planned(form)[0].working == working


def test_activations_under_every_kind_of_parallelism():
    (plain,) = planned("sequential")
    (tensor,) = planned("sequential", world=2, tensor=2)
    (sequence,) = planned("sequential", world=2, tensor=2, sequence=True)
    (context,) = planned("sequential", world=2, context=2)
    ends = 32 * TOKENS + 2 * STREAM + STATISTICS
    block = 4 * STREAM + 2 * STATISTICS + (QKV + STREAM + LSE) // 2 + INNER
    assert plain.saved == 3 * BLOCK["sequential"] + ends
    assert tensor.saved == 3 * block + ends
    halved = 4 * STREAM // 2 + STATISTICS + (QKV + STREAM + LSE) // 2 + INNER
    assert sequence.saved == 3 * halved + 32 * TOKENS + STREAM + STATISTICS // 2
    # every tensor has half of the tokens, and the outputs of the heads are saved before and after the exchange
    assert context.saved == plain.saved // 2 + 3 * STREAM // 2
    assert (tensor.boundary, sequence.boundary, context.boundary) == (STREAM, STREAM // 2, STREAM // 2)
    assert sequence.working == tensor.working == QKV + STREAM // 2 + 3 * STREAM
    assert (tensor.logits, context.logits) == (TOKENS * 512 * 2, TOKENS * 512 * 2)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_adapted_layers_save_their_merged_matrices(checkpointing, monkeypatch):
    """Those of a block: of the fused projection and of the second matrix of the MLP."""
    monkeypatch.setitem(FORMS, "plain", {})
    monkeypatch.setitem(FORMS, "adapted", {"lora": {"rank": 4, "targets": ["attention.qkv", "mlp.down"]}})
    plain, adapted = (planned(form, checkpointing)[0] for form in ("plain", "adapted"))
    merged = 4 * (192 * 64 + 64 * 160)
    full = checkpointing == "full"
    assert adapted.saved - plain.saved == (0 if full else 3 * merged)
    assert adapted.recomputed - plain.recomputed == (merged if full else 0)
    assert adapted.uncheckpointed - plain.uncheckpointed == 3 * merged
