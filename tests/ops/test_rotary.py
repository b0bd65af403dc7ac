"""Rotary tables against transformers, rotation against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neox.errors import ConfigError
from neox.ops.rotary import rotary, rotary_frequencies, rotary_qkv, rotary_tables
from tests import reference

RopeScaling = pytest.importorskip("neox.config.schema").RopeScaling  # needs pydantic, which a GPU machine may lack

DTYPES = reference.dtypes("rotary")
HEAD_DIM, LENGTH, TRAINED = 64, 1000, 256


def transformers_frequencies(rope_type: str, seq_len: int | None = None, **parameters) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": rope_type, "rope_theta": 10000.0, **parameters},
    )
    return ROPE_INIT_FUNCTIONS[rope_type](config, reference.DEVICE, seq_len=seq_len)


@pytest.mark.parametrize(
    ("scaling", "theirs"),
    [
        ({"type": "linear", "factor": 4.0}, ("linear", None, {"factor": 4.0})),
        (
            {"type": "ntk", "factor": 2.0, "original_max_position_embeddings": TRAINED},
            ("dynamic", LENGTH, {"factor": 2.0}),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
            ("yarn", None, {"factor": 4.0, "original_max_position_embeddings": TRAINED}),
        ),
        (
            {
                "type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": TRAINED,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.5,
            },
            (
                "yarn",
                None,
                {
                    "factor": 8.0,
                    "original_max_position_embeddings": TRAINED,
                    "beta_fast": 16.0,
                    "beta_slow": 2.0,
                    "attention_factor": 1.5,
                },
            ),
        ),
        (
            {"type": "llama3", "factor": 8.0, "original_max_position_embeddings": TRAINED},
            (
                "llama3",
                None,
                {
                    "factor": 8.0,
                    "original_max_position_embeddings": TRAINED,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
            ),
        ),
    ],
    ids=["linear", "ntk", "yarn", "yarn_explicit", "llama3"],
)
def test_scaled_frequencies_equal_transformers(scaling, theirs):
    rope_type, seq_len, parameters = theirs
    expected, expected_factor = transformers_frequencies(rope_type, seq_len, **parameters)
    frequencies, factor = rotary_frequencies(HEAD_DIM, LENGTH, 10000.0, RopeScaling(**scaling))
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    plain, _ = rotary_frequencies(HEAD_DIM, LENGTH, 10000.0)
    assert not torch.equal(frequencies, plain)


def test_tables_are_cos_and_sin_of_position_times_frequency():
    cos, sin = rotary_tables(16, 50, theta=500.0)
    angle = torch.arange(50, dtype=torch.float64)[:, None] * 500.0 ** (
        -torch.arange(0, 16, 2, dtype=torch.float64) / 16
    )
    angle = torch.cat((angle, angle), dim=1)
    assert cos.shape == sin.shape == (50, 16)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=5e-6)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=5e-6)


def test_yarn_attention_factor_scales_both_tables():
    scaling = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=2.0)
    cos, sin = rotary_tables(16, 50, scaling=scaling)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, 4.0))


def test_ntk_without_trained_length_stretches_by_factor():
    stretched, _ = rotary_frequencies(8, 100, 10000.0, RopeScaling(type="ntk", factor=3.0))
    expected, _ = rotary_frequencies(8, 100, 10000.0 * 3.0 ** (8 / 6))
    torch.testing.assert_close(stretched, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("length", "stretch"), [(1, 1.0), (32, 1.0), (48, 2.0), (64, 3.0)])
def test_ntk_with_a_trained_length_stretches_longer_texts_only(length, stretch):
    """base (factor length / trained - (factor - 1))^(r / (r - 2)), as in transformers' dynamic scaling."""
    scaling = RopeScaling(type="ntk", factor=2.0, original_max_position_embeddings=32)
    found, _ = rotary_frequencies(8, length, 10000.0, scaling)
    expected, _ = rotary_frequencies(8, length, 10000.0 * stretch ** (8 / 6))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rotary_dim", [0, -2, 7])
def test_odd_rotary_dim_is_refused(rotary_dim):
    with pytest.raises(ConfigError, match="rotary_dim must be even and positive"):
        rotary_tables(rotary_dim, 4)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_missing_trained_length_is_refused(kind):
    with pytest.raises(ConfigError, match=r"needs the trained length.*original_max_position_embeddings"):
        rotary_tables(8, 4, scaling=RopeScaling(type=kind, factor=2.0))


def test_ntk_with_one_pair_is_refused():
    with pytest.raises(ConfigError, match="more than one channel pair"):
        rotary_tables(2, 4, scaling=RopeScaling(type="ntk", factor=2.0))


# ---- rotation ----


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotation of x [b, s, n, d] in float64, by the definition with a swapped half."""
    x, cos, sin = x.double(), cos.double().unsqueeze(-2), sin.double().unsqueeze(-2)
    r = cos.shape[-1]
    low, high = x[..., : r // 2], x[..., r // 2 : r]
    swapped = torch.cat((-high, low), dim=-1)
    return torch.cat((x[..., :r] * cos + swapped * sin, x[..., r:]), dim=-1)


def tables(shape: tuple[int, ...], rotary_dim: int) -> dict[str, torch.Tensor]:
    """Tables whose halves differ, so that a mixed-up half shows."""
    return {"cos": reference.random(*shape, rotary_dim, seed=11), "sin": reference.random(*shape, rotary_dim, seed=12)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (17, 2), (64, 16), (80, 80), (819, 818)])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_rotation_forward_and_backward(head_dim, rotary_dim, per_sequence, dtype):
    table = tables((2, 17) if per_sequence else (17,), rotary_dim)
    inputs = {
        "q": reference.random(2, 17, 4, head_dim, dtype=dtype),
        "k": reference.random(2, 17, 1, head_dim, dtype=dtype, seed=3),
    }
    reference.check_against(
        lambda q, k: rotary(q, k, **table), lambda q, k: (turned(q, **table), turned(k, **table)), inputs
    )


@pytest.mark.parametrize("length", [1, 17, 819])
def test_rotation_by_real_tables_at_every_length(length):
    cos, sin = rotary_tables(16, length)
    inputs = {"q": reference.random(1, length, 2, 64), "k": reference.random(1, length, 2, 64, seed=3)}
    reference.check_against(
        lambda q, k: rotary(q, k, cos, sin), lambda q, k: (turned(q, cos, sin), turned(k, cos, sin)), inputs
    )


def test_scores_depend_on_distance_alone():
    cos, sin = rotary_tables(32, 100)
    q, k = reference.random(1, 100, 1, 32), reference.random(1, 100, 1, 32, seed=3)
    q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    q, k = rotary(q, k, cos, sin)
    scores = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(scores[10, 3], scores[97, 90], rtol=0, atol=2e-5)
    assert (scores[10, 3] - scores[3, 10]).abs() > 1e-3


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed", "heads_first"])
def test_layouts_give_the_same_bits(layout):
    q, k, table = reference.random(2, 5, 3, 20), reference.random(2, 5, 1, 20, seed=3), tables((5,), 8)

    def moved(x):
        return (
            x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "heads_first" else reference.layouts(x)[layout]
        )

    for got, want in zip(
        rotary(moved(q), moved(k), **{name: reference.misaligned(t) for name, t in table.items()}),
        rotary(q, k, **table),
        strict=True,
    ):
        assert torch.equal(got, want)
        assert got.is_contiguous()


def packed_inputs(dtype=torch.float32, groups=2, queries=3, head_dim=20, rotary_dim=8):
    """[b, s, g, m + 2, d] and tables."""
    return reference.random(2, 17, groups, queries + 2, head_dim, dtype=dtype), tables((17,), rotary_dim)


def turned_packed(qkv, cos, sin):
    """Queries and keys of qkv rotated in float64."""
    b, s, g, m2, d = qkv.shape
    heads = turned(qkv[:, :, :, :-1].reshape(b, s, g * (m2 - 1), d), cos, sin).view(b, s, g, m2 - 1, d)
    return torch.cat((heads, qkv[:, :, :, -1:].double()), dim=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["packed", "projection"])
def test_packed_rotation_forward_and_backward(form, dtype):
    qkv, table = packed_inputs(dtype)

    def ours(qkv):
        produced = qkv * 1
        if form == "packed":
            return rotary_qkv(produced, **table)
        return rotary_qkv(produced.flatten(2), **table, num_kv_heads=2, head_dim=20)

    reference.check_against(ours, lambda qkv: turned_packed(qkv, **table), {"qkv": qkv})


def test_packed_rotation_works_in_place_on_views():
    qkv, table = packed_inputs()
    leaf = qkv.flatten(2).requires_grad_()
    produced = leaf * 1
    out = rotary_qkv(produced.unflatten(2, (2, 5, 20)), **table)
    assert out.data_ptr() == produced.data_ptr()
    dout = reference.random(*out.shape, seed=9)
    (got,) = torch.autograd.grad(out, leaf, dout)
    leaf64 = qkv.double().requires_grad_()
    (want,) = torch.autograd.grad(turned_packed(leaf64, **table), leaf64, dout.double())
    reference.assert_near(got, want.flatten(2))


class Copies(TorchDispatchMode):
    """Counts the copies of tensors that are as large as `like`."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.like, self.count = like, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        copies = function.overloadpacket.__name__ in ("clone", "copy_", "new_zeros", "zeros", "new_empty_strided")
        out = function(*args, **(kwargs or {}))
        self.count += copies and out.numel() == self.like.numel()
        return out


@pytest.mark.parametrize("packed", [True, False])
def test_packed_rotation_of_a_projection_copies_its_gradient_once(packed):
    """The product of [b, s, h] with a weight is a view, and autograd copies four times for a change of a view."""
    qkv, table = packed_inputs()
    x, weight = (reference.random(*shape, seed=7).requires_grad_() for shape in ((2, 17, 6), (200, 6)))
    projected = torch.nn.functional.linear(x, weight, reference.random(200, seed=8).requires_grad_())
    assert projected._is_view()
    if packed:
        out = rotary_qkv(projected.view(2, 17, 2, 5, 20), **table)
    else:
        out = rotary_qkv(projected, **table, num_kv_heads=2, head_dim=20)
    assert out.data_ptr() == projected.data_ptr()
    dout = reference.random(*qkv.shape, seed=9)
    with Copies(qkv) as copies:
        (got,) = torch.autograd.grad(out, weight, dout)
    assert copies.count == 1
    leaf = qkv.double().requires_grad_()
    (dqkv,) = torch.autograd.grad(turned_packed(leaf, **table), leaf, dout.double())
    reference.assert_near(got, dqkv.flatten(2).flatten(0, 1).t() @ x.detach().double().flatten(0, 1))


def test_packed_rotation_does_not_modify_the_incoming_gradient():
    qkv, table = packed_inputs()
    dout = reference.random(*qkv.shape, seed=9)
    before = dout.clone()
    rotary_qkv(qkv.requires_grad_() * 1, **table).backward(dout)
    assert torch.equal(dout, before)


def test_packed_rotation_does_not_modify_a_shared_gradient():
    """A sum gives both of its terms the very same gradient, and hooks may keep what they see: the backward must not
    turn it in place.
    """
    qkv, table = packed_inputs()
    other, weights = (reference.random(*qkv.shape, seed=seed) for seed in (8, 9))
    other.requires_grad_()
    rotated = rotary_qkv(qkv.requires_grad_() * 1, **table)
    kept = []
    rotated.register_hook(kept.append)
    ((rotated + other * 1) * weights).sum().backward()
    assert torch.equal(other.grad, weights)
    assert torch.equal(kept[0], weights)
    assert not torch.equal(qkv.grad, weights)


def test_packed_rotation_is_seen_by_autograd():
    """Whoever saved the values before the rotation must not get the rotated ones."""
    qkv, table = packed_inputs()
    produced = qkv.requires_grad_() * 1
    square = produced * produced
    rotary_qkv(produced, **table)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        rotary_qkv(qkv, **table)


def test_empty():
    table = tables((0,), 4)
    q, k = rotary(torch.empty(2, 0, 3, 8), torch.empty(2, 0, 1, 8), **table)
    assert q.shape == (2, 0, 3, 8)
    assert k.shape == (2, 0, 1, 8)
    # what torch makes of an empty batch may have strides of 0
    nothing = torch.empty_strided((2, 0, 1, 3, 8), (0, 24, 24, 8, 1))
    assert rotary_qkv(nothing, **table).shape == (2, 0, 1, 3, 8)


def test_opcheck():
    table = tables((5,), 8)
    q, k = (
        reference.random(2, 5, 3, 20, dtype=torch.bfloat16).requires_grad_(),
        reference.random(2, 5, 1, 20, dtype=torch.bfloat16).requires_grad_(),
    )
    torch.library.opcheck(torch.ops.neox.rotary.default, (q, k, table["cos"], table["sin"], False))
    qkv, table = packed_inputs(torch.bfloat16)
    torch.library.opcheck(torch.ops.neox.rotary_qkv_.default, (qkv, table["cos"], table["sin"], False))


def test_compile():
    qkv, table = packed_inputs()

    def block(qkv):
        out = rotary_qkv((qkv * 2).flatten(2), **table, num_kv_heads=2, head_dim=20)
        q, k = rotary(out[:, :, 0, :3], out[:, :, 0, 3:4], **table)
        return out.sum() + (q * q).sum() + k.sum()

    leaf = qkv.requires_grad_()
    (got,) = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(leaf), leaf)
    (want,) = torch.autograd.grad(block(leaf), leaf)
    torch.testing.assert_close(got, want)


Q, K, TABLE = torch.ones(2, 5, 3, 8), torch.ones(2, 5, 1, 8), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((Q.double(), K, TABLE, TABLE), rf"rotary: q {reference.FLOAT_RULE}; got Double"),
        ((Q[0], K, TABLE, TABLE), r"q must have 4 dimensions; got 3 in shape \[5, 3, 8\]"),
        ((Q, K.bfloat16(), TABLE, TABLE), "k must have the dtype of q, Float; got BFloat16"),
        ((Q, K[0], TABLE, TABLE), r"k must have 4 dimensions; got 3"),
        ((Q, K[:1], TABLE, TABLE), r"k must have batch, seq and head_dim of q, \[2, 5, 3, 8\]; got \[1, 5, 1, 8\]"),
        ((Q, K[..., :6], TABLE, TABLE), r"k must have batch, seq and head_dim of q, .*; got \[2, 5, 1, 6\]"),
        ((Q, K[:, :4], TABLE, TABLE), r"k must have batch, seq and head_dim of q, \[2, 5, 3, 8\]; got \[2, 4, 1, 8\]"),
        ((Q, K, TABLE.bfloat16(), TABLE), "cos must be float32; got BFloat16"),
        ((Q, K, TABLE, TABLE.bfloat16()), "sin must be float32; got BFloat16"),
        ((Q, K, TABLE[:, :0], TABLE[:, :0]), r"cos must have an even number of columns, .*; got \[5, 0\]"),
        ((Q, K, TABLE.expand(1, 5, 4), TABLE), r"cos must have the batch size of the heads, 2; got \[1, 5, 4\]"),
        ((Q, K, TABLE.expand(2, 5, 4), TABLE), r"sin must have the shape of cos, \[2, 5, 4\]; got \[5, 4\]"),
        ((Q, K, TABLE[0], TABLE), "cos must have 2 to 3 dimensions; got 1"),
        ((Q, K, TABLE[:4], TABLE), r"cos must have a row for each of the 5 positions; got \[4, 4\]"),
        ((Q, K, TABLE.expand(3, 5, 4), TABLE), r"cos must have the batch size of the heads, 2; got \[3, 5, 4\]"),
        ((Q, K, torch.ones(5, 3), TABLE), r"cos must have an even number of columns, at most head_dim 8; got \[5, 3\]"),
        (
            (Q, K, torch.ones(5, 10), TABLE),
            r"cos must have an even number of columns, at most head_dim 8; got \[5, 10\]",
        ),
        ((Q, K, TABLE, torch.ones(5, 2)), r"sin must have the shape of cos, \[5, 4\]; got \[5, 2\]"),
    ],
)
def test_errors(inputs, message):
    with pytest.raises(ValueError, match=message):
        rotary(*inputs)


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (torch.ones(2, 5, 3, 8), "rotary_qkv: qkv must have 5 dimensions; got 4"),
        (torch.ones(2, 5, 1, 2, 8), "qkv must hold at least one query, one key and one value per group"),
        (torch.ones(2, 5, 1, 8, 3).transpose(3, 4), "qkv must be contiguous in its last dimension; got stride 3"),
        (
            torch.ones(1, 5, 1, 3, 8).expand(2, 5, 1, 3, 8),
            "qkv must not be expanded: it is written in place; got stride 0 in dimension 0",
        ),
    ],
)
def test_packed_errors(qkv, message):
    with pytest.raises(ValueError, match=message):
        rotary_qkv(qkv, TABLE, TABLE)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_expanded_heads_are_refused(dimension):
    shape = [2, 5, 2, 3, 8]
    narrow = torch.ones([1 if i == dimension else size for i, size in enumerate(shape)])
    with pytest.raises(ValueError, match=f"qkv must not be expanded.*; got stride 0 in dimension {dimension}"):
        rotary_qkv(narrow.expand(shape), TABLE, TABLE)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ((TABLE[:4], TABLE[:4]), r"rotary_qkv: cos must have a row for each of the 5 positions; got \[4, 4\]"),
        ((TABLE.expand(3, 5, 4), TABLE), r"rotary_qkv: cos must have the batch size of the heads, 2"),
        ((TABLE, TABLE[:, :2]), r"rotary_qkv: sin must have the shape of cos, \[5, 4\]; got \[5, 2\]"),
        ((torch.ones(5, 10), TABLE), r"rotary_qkv: cos must have an even number of columns, at most head_dim 8"),
    ],
)
def test_tables_that_do_not_fit_packed_heads_are_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        rotary_qkv(torch.ones(2, 5, 1, 3, 8), *tables)


def test_projection_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"qkv must be \[b, s, g \(m \+ 2\) d\] with g 2 and d 8.*got \[2, 5, 40\]"):
        rotary_qkv(torch.ones(2, 5, 40), TABLE, TABLE, num_kv_heads=2, head_dim=8)
