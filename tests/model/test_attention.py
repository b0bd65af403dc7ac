from __future__ import annotations

import dataclasses

import pytest
import torch

from neox import ops
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.attention import Attention, Context
from neox.model.gpt import GPT
from neox.model.kv_cache import KVCache
from neox.model.positional import RotaryTable, alibi_slopes
from neox.ops.attention import MaskCache, MaskSpec
from neox.parallel.mesh import Mesh


def build(**options) -> Attention:
    config = ModelConfig(
        **(
            {
                "num_layers": 1,
                "hidden_size": 24,
                "num_attention_heads": 6,
                "vocab_size": 5,
                "position_embedding": "none",
            }
            | options
        )
    )
    attention = Attention(config)
    for i, parameter in enumerate(attention.parameters()):
        with torch.no_grad():
            parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(i))
    return attention


def reference(attention: Attention, x: torch.Tensor, groups: int) -> torch.Tensor:
    """Softmax attention in fp64 from the documented row layout [g, m + 2, d]."""
    qkv = (x.double() @ attention.qkv.weight.double().T + attention.qkv.bias.double()).unflatten(-1, (groups, -1, 4))
    queries = 6 // groups
    heads = []
    s = x.shape[1]
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    for head in range(6):
        group = head // queries
        q, k, v = qkv[:, :, group, head % queries], qkv[:, :, group, queries], qkv[:, :, group, queries + 1]
        heads.append((q @ k.transpose(1, 2) / 2).masked_fill(hidden, float("-inf")).softmax(-1) @ v)
    return torch.cat(heads, -1) @ attention.out.weight.double().T + attention.out.bias.double()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_rows_are_queries_then_key_then_value_of_each_group(groups):
    attention, x = build(num_kv_heads=groups), torch.randn(2, 9, 24)
    assert attention.qkv.weight.shape == (groups * (6 // groups + 2) * 4, 24)
    assert torch.allclose(attention(x, Context()).double(), reference(attention, x, groups), atol=5e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 4},
        {"sliding_window": 9},
        {"attention_softcap": 0.7},
        {"position_embedding": "alibi"},
        {"sliding_window": 3, "attention_softcap": 0.7, "position_embedding": "alibi"},
        {"qk_norm": True},
    ],
)
@pytest.mark.parametrize("documents", [False, True])
def test_window_cap_slopes_and_documents(options, documents):
    attention, x = build(num_kv_heads=2, **options), torch.randn(2, 9, 24)
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [2] * 2], dtype=torch.int32) if documents else None
    qkv = (x.double() @ attention.qkv.weight.double().T + attention.qkv.bias.double()).unflatten(-1, (2, 5, 4))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    hidden = (distance < 0) | (distance >= options.get("sliding_window", 9))
    hidden = hidden[None] if segments is None else hidden | (segments[:, :, None] != segments[:, None])
    slopes = alibi_slopes(6) if "position_embedding" in options else [0.0] * 6
    heads = []
    for head in range(6):
        q, k, v = qkv[:, :, head // 3, head % 3], qkv[:, :, head // 3, 3], qkv[:, :, head // 3, 4]
        if attention.query_norm is not None:
            q = torch.nn.functional.rms_norm(q, (4,), attention.query_norm.weight.double(), 1e-5)
            k = torch.nn.functional.rms_norm(k, (4,), attention.key_norm.weight.double(), 1e-5)
        scores = q @ k.transpose(1, 2) / 2
        if cap := options.get("attention_softcap"):
            scores = cap * (scores / cap).tanh()
        heads.append((scores - slopes[head] * distance).masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    want = torch.cat(heads, -1) @ attention.out.weight.double().T + attention.out.bias.double()
    assert torch.allclose(attention(x, Context(segment_ids=segments)).double(), want, atol=5e-5)


NTK = {"rope_scaling": {"type": "ntk", "factor": 4.0, "original_max_position_embeddings": 8}}


def test_rows_of_dynamic_scaling_are_those_of_each_sequence_alone():
    config = ModelConfig(num_layers=1, hidden_size=24, num_attention_heads=3, vocab_size=5, **NTK)
    table, cpu = RotaryTable(config), torch.device("cpu")
    ids = torch.tensor([[*range(12)], [0] * 6 + [*range(6)], [*range(3, 15)]])
    rows = Context().rotated(table, 0, 12, ids, 15, cpu)
    for which in ("cos", "sin"):
        for row, length in enumerate((12, 6, 15)):
            alone = RotaryTable(config).rows(0, length, None, length, cpu)[which == "sin"]
            assert torch.equal(getattr(rows, which)[row], alone[ids[row]])
    assert not torch.equal(rows.cos[0, 5], rows.cos[1, 11])  # the same position in texts of different lengths


@pytest.mark.parametrize("case", ["cached", "no ids", "short", "just short"])
def test_rows_of_dynamic_scaling_are_those_of_the_longest_otherwise(case):
    config = ModelConfig(num_layers=1, hidden_size=24, num_attention_heads=3, vocab_size=5, **NTK)
    length = {"short": 7, "just short": 8}.get(case, 12)
    ids = None if case == "no ids" else torch.tensor([[*range(length)], [0] * (length - 3) + [0, 1, 2]])
    context = Context(cache=KVCache(20) if case == "cached" else None, segment_ids=torch.ones(1))
    rows = context.rotated(RotaryTable(config), 0, length, ids, length, torch.device("cpu"))
    want = RotaryTable(config).rows(0, length, ids, length, torch.device("cpu"))
    assert torch.equal(rows.cos, want[0]) and torch.equal(rows.sin, want[1])
    assert rows.cache is context.cache and rows.segment_ids is context.segment_ids
    assert rows.mask_cache is context.mask_cache


def test_a_context_by_itself_rotates_from_position_zero_on():
    config = ModelConfig(num_layers=1, hidden_size=24, num_attention_heads=3, vocab_size=5)
    want = RotaryTable(config).rows(0, 7, None, 7, torch.device("cpu"))
    assert torch.equal(Context.of(config, 7).cos, want[0]) and torch.equal(Context.of(config, 7).sin, want[1])
    assert Context.of(config.model_copy(update={"position_embedding": "alibi"}), 7).cos is None


def test_the_gradients_of_normed_heads_are_joined_in_one_pass():
    """The gradient of a slice is a tensor of zeros around it, and three of them are added."""
    attention, x = build(num_kv_heads=2, qk_norm=True), torch.randn(2, 9, 24)
    out = attention(x, Context())
    nodes, names = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert "SplitWithSizesBackward0" in names
    assert not names & {"SliceBackward0", "SelectBackward0"}


def test_partial_leaves_the_bias_out():
    attention, x = build(), torch.randn(2, 9, 24)
    assert torch.allclose(
        attention(x, Context(), partial=True) + attention.out.bias, attention(x, Context()), atol=1e-5
    )


def test_query_and_key_norms_act_per_head():
    attention, x = build(qk_norm=True, num_kv_heads=2), torch.randn(1, 5, 24)
    before = attention(x, Context())
    with torch.no_grad():
        rows = attention.qkv.weight.view(2, 5, 4, 24)
        rows[1, 0] *= 7.0  # one head's query: its norm takes the factor out again
        rows[0, 3] *= 0.5  # one group's key
        bias = attention.qkv.bias.view(2, 5, 4)
        bias[1, 0] *= 7.0
        bias[0, 3] *= 0.5
    assert torch.allclose(attention(x, Context()), before, atol=1e-3)


def test_alibi_prefers_near_keys():
    near, far = build(position_embedding="alibi"), build()
    x = torch.randn(1, 9, 24)
    assert torch.allclose(near.alibi, torch.tensor([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]))
    assert (near(x, Context()) - far(x, Context())).abs().max() > 1e-3


def test_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"query heads; where=model\.num_kv_heads; got=4; want=a divisor of 6 heads"):
        build(num_kv_heads=4)


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "cp"), [(8, 8, 1, 2), (8, 4, 2, 2), (12, 12, 1, 3), (8, 4, 1, 4), (8, 8, 4, 1)]
)
def test_alibi_slopes_of_the_ranks_are_those_of_their_heads(heads, groups, tp, cp):
    """A tensor rank has consecutive heads; context ranks exchange sequence for consecutive shares of those."""
    config = ModelConfig(
        num_layers=1,
        hidden_size=96,
        num_attention_heads=heads,
        num_kv_heads=groups,
        head_dim=12,
        vocab_size=8,
        position_embedding="alibi",
    )
    slopes = []
    for tp_rank in range(tp):
        for cp_rank in range(cp):
            mesh = dataclasses.replace(Mesh.single("meta"), tp=tp, cp=cp, rank=cp_rank * tp + tp_rank)
            slopes += Attention(config, mesh, 0, dtype=torch.float32).alibi.tolist()
    assert slopes == torch.tensor(alibi_slopes(heads)).tolist()


def test_generators_are_forked_for_dropout_only(monkeypatch):
    """Each fork saves and restores the states of the generators, on a GPU with a copy from it: per layer and step."""
    forks = []
    state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: forks.append(1) or state())
    config = ModelConfig(num_layers=1, hidden_size=24, num_attention_heads=6, vocab_size=8, attention_dropout=0.5)
    for dropout, training, want in ((0.0, True, 0), (0.5, False, 0), (0.5, True, 1)):
        attention = Attention(config, dataclasses.replace(Mesh.single(), tp=2), 0, dtype=torch.float32).train(training)
        attention.dropout = dropout
        attention(torch.ones(1, 3, 24), Context())
        assert len(forks) == want


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_masks_of_the_tensor_group_differ(dropout):
    """Each process has other heads."""
    config = ModelConfig(num_layers=1, hidden_size=24, num_attention_heads=6, vocab_size=8, attention_dropout=dropout)
    results = []
    for rank in range(2):
        attention = Attention(config, Mesh(tp=2, rank=rank)).train()
        for i, parameter in enumerate(attention.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
        torch.manual_seed(0)
        with torch.no_grad():
            results.append((attention(torch.ones(1, 7, 24), Context()), torch.rand(())))
    assert torch.equal(results[0][0], results[1][0]) == (dropout == 0.0)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_share_the_full_mask_of_a_forward_pass(recompute, monkeypatch):
    """ALiBi, a window and documents through sdpa: one mask [b, n, s, t] for three layers, forward and backward, and
    a new one for other documents.
    """
    made = []
    mask = MaskSpec.mask
    monkeypatch.setattr(MaskSpec, "mask", lambda self, q, t: made.append(self.window) or mask(self, q, t))
    sizes = {
        "num_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "vocab_size": 8,
        "position_embedding": "alibi",
        "sliding_window": 4,
    }
    models = [
        GPT(ModelConfig(**sizes, attention_backend=backend), activation_checkpointing=recompute)
        for backend in ("sdpa", "native")
    ]
    tokens = torch.arange(18).reshape(2, 9) % 8
    for borders in (3, 5):
        made.clear()
        segments = (torch.arange(9) >= borders).int().expand(2, 9)
        losses = [model(tokens, tokens, segment_ids=segments) for model in models]
        for model, loss in zip(models, losses, strict=True):
            model.zero_grad()
            loss.sum().backward()
        assert torch.allclose(*losses, atol=1e-5)
        for mine, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.allclose(mine.grad, other.grad, atol=1e-4)
        assert made == [4]
    made.clear()
    models[0].layers["1"].attention.window = 2
    models[0](tokens, tokens)
    assert made == [4, 2]


def test_a_mask_cache_distinguishes_lengths_and_dtypes():
    cache = MaskCache()
    slopes = torch.tensor([0.5, 0.25])
    for s, t in ((3, 7), (2, 7), (7, 7), (3, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (
                torch.rand(1, s, 2, 8, dtype=dtype),
                torch.rand(1, t, 2, 8, dtype=dtype),
                torch.rand(1, t, 2, 8, dtype=dtype),
            )
            shared, alone = (
                ops.attention(q, k, v, alibi_slopes=slopes, backend="sdpa", mask_cache=each) for each in (cache, None)
            )
            assert torch.equal(shared, alone)
