"""decode_block: its values, contract and errors. tests/model/test_decode.py compares it with the model's own path."""

from __future__ import annotations

import pytest
import torch

from neox.ops.decode_block import AVAILABLE, PARAMETERS, decode_block
from tests import reference
from tests.ops.test_rotary import turned

native = torch.ops.neox
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="an operator of the CPU library alone")

H, WIDTH, GROUPS, HEADS, DIM, LENGTH, CAPACITY = 12, 20, 2, 3, 8, 5, 9
SHAPES = {
    "norm1.weight": (H,),
    "norm1.bias": (H,),
    "norm2.weight": (H,),
    "attention.query_norm.weight": (DIM,),
    "attention.key_norm.weight": (DIM,),
    "attention.qkv.weight": (GROUPS * (HEADS + 2) * DIM, H),
    "attention.out.weight": (H, GROUPS * HEADS * DIM),
    "attention.out.bias": (H,),
    "mlp.gate.weight": (WIDTH, H),
    "mlp.up.weight": (WIDTH, H),
    "mlp.up.bias": (WIDTH,),
    "mlp.down.weight": (H, WIDTH),
}
OPTIONS = {"rms": False, "parallel": True, "eps": 1e-5, "activation": "swiglu", "scale": 0.3}


def operands(
    batch: int = 2, seq: int = 1, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...] | None
) -> dict:
    """Arguments of decode_block; a shape given for a parameter replaces the right one, None omits the parameter."""
    shapes = SHAPES | {name.replace("__", "."): shape for name, shape in shapes.items()}
    parameters = [
        None if shapes.get(name) is None else reference.random(*shapes[name], dtype=dtype, seed=seed, scale=0.3)
        for seed, name in enumerate(PARAMETERS)
    ]
    return {
        "stream": reference.random(batch, seq, H, dtype=dtype, seed=91),
        "delta": reference.random(batch, seq, H, dtype=dtype, seed=92),
        "keys": reference.random(batch, CAPACITY, GROUPS, DIM, dtype=dtype, seed=93),
        "values": reference.random(batch, CAPACITY, GROUPS, DIM, dtype=dtype, seed=94),
        "length": LENGTH,
        "parameters": parameters,
        **OPTIONS,
        "cos": reference.random(batch, seq, 4, seed=95),
        "sin": reference.random(batch, seq, 4, seed=96),
        "segment_ids": torch.zeros(batch, LENGTH + seq, dtype=torch.int32),
        "alibi_slopes": torch.full((GROUPS * HEADS,), 0.1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_is_the_same_alone_and_in_a_batch(dtype, threads):
    whole = operands(batch=3, dtype=dtype)
    threads(2)
    stream, delta = decode_block(**whole)
    threads(1)
    for row in range(3):
        alone = operands(3, dtype=dtype)
        alone |= {
            name: value[row : row + 1].clone()
            for name, value in alone.items()
            if torch.is_tensor(value) and name != "alibi_slopes"
        }
        alone_stream, alone_delta = decode_block(**alone)
        assert torch.equal(alone_stream, stream[row : row + 1])
        assert torch.equal(alone_delta, delta[row : row + 1])
        assert torch.equal(alone["keys"], whole["keys"][row : row + 1])


def by_definition(inputs: dict, window: int | None = None, softcap: float | None = None):
    """The block in float64, written out of its parts: the stream, and what the MLP adds to it."""
    of = {
        name: None if value is None else value.double()
        for name, value in zip(PARAMETERS, inputs["parameters"], strict=True)
    }
    length, eps = inputs["length"], inputs["eps"]
    batch, seq, _ = inputs["stream"].shape

    def norm(x, name):
        if inputs["rms"]:
            return reference.rms_norm(x, of[f"{name}.weight"], eps)
        return reference.layer_norm(x, of[f"{name}.weight"], of[f"{name}.bias"], eps)

    def linear(x, name):
        y, bias = x @ of[f"{name}.weight"].T, of[f"{name}.bias"]
        return y if bias is None else y + bias

    stream = inputs["stream"].double() + inputs["delta"].double()
    first = norm(stream, "norm1")
    qkv = linear(first, "attention.qkv").view(batch, seq, GROUPS, HEADS + 2, DIM)
    q, k, v = qkv[..., :HEADS, :].flatten(2, 3), qkv[..., HEADS, :], qkv[..., HEADS + 1, :]
    if of["attention.query_norm.weight"] is not None:
        q, k = (
            reference.rms_norm(x, of[f"attention.{name}_norm.weight"], eps) for x, name in ((q, "query"), (k, "key"))
        )
    if inputs["cos"] is not None:
        q, k = (turned(x, inputs["cos"], inputs["sin"]) for x in (q, k))
    keys, values = (
        torch.cat((inputs[name][:, :length].double(), new), 1) for name, new in (("keys", k), ("values", v))
    )
    attended = reference.attention(
        q,
        keys,
        values,
        scale=inputs["scale"],
        window=window,
        softcap=softcap,
        segment_ids=inputs["segment_ids"],
        alibi_slopes=inputs["alibi_slopes"],
    )
    branch = linear(attended.flatten(2), "attention.out")
    if not inputs["parallel"]:
        stream = stream + branch
    second = "norm2" if of["norm2.weight"] is not None else "norm1"
    x = norm(stream, second)
    up, activation = linear(x, "mlp.up"), inputs["activation"]
    if activation in ("gelu", "gelu_tanh"):
        inner = reference.gelu(up, "tanh" if activation == "gelu_tanh" else "none")
    else:
        gate = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}[activation]
        inner = reference.gated(linear(x, "mlp.gate"), up, gate)
    delta = linear(inner, "mlp.down")
    return stream, delta + branch if inputs["parallel"] else delta, keys, values


BIASES = {"attention__qkv__bias": (80,), "mlp__gate__bias": (WIDTH,), "mlp__down__bias": (H,), "norm2__bias": (H,)}
NO_GATE = {"mlp__gate__weight": None}
NO_HEAD_NORMS = {"attention__query_norm__weight": None, "attention__key_norm__weight": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changes", "shapes", "masks"),
    [
        ({}, {}, {}),
        ({"parallel": False}, BIASES, {}),
        ({"rms": True}, {"norm1__bias": None, "norm2__weight": None}, {"window": 3}),
        ({"parallel": False, "activation": "gelu"}, NO_GATE | NO_HEAD_NORMS, {"softcap": 0.5}),
        ({"activation": "gelu_tanh", "eps": 0.5}, NO_GATE | {"attention__out__bias": None}, {}),
        ({"activation": "geglu", "cos": None, "sin": None}, BIASES | NO_HEAD_NORMS, {"window": 4, "softcap": 0.5}),
        (
            {"activation": "reglu", "rms": True, "alibi_slopes": None, "parallel": False},
            {"norm1__bias": None, "mlp__up__bias": None},
            {},
        ),
        ({"segment_ids": None}, {"norm1__bias": None, "norm2__weight": None}, {}),
    ],
)
def test_a_block_is_the_sum_of_its_parts(changes, shapes, masks, dtype):
    inputs = operands(seq=3, dtype=dtype, **shapes)
    inputs["segment_ids"] = (torch.arange(LENGTH + 3) >= torch.tensor([[2], [0]])).int()  # one sequence is padded
    inputs["alibi_slopes"] = torch.linspace(0.1, 0.6, GROUPS * HEADS)
    inputs |= changes
    want = by_definition(inputs, **masks)
    got = decode_block(**inputs, **masks)
    cached = (inputs[name][:, : LENGTH + 3] for name in ("keys", "values"))
    for what, mine, other in zip(("stream", "delta", "keys", "values"), (*got, *cached), want, strict=True):
        limit = 2e-5 if dtype == torch.float32 else 5e-2
        assert (mine.double() - other).abs().max() <= limit * other.abs().max(), what


def test_only_the_new_tokens_are_written():
    inputs, before = operands(seq=2), operands(seq=2)
    decode_block(**inputs)
    for name in ("keys", "values"):
        written = (inputs[name] != before[name]).flatten(2).any(2).any(0)
        assert written.tolist() == [LENGTH <= i < LENGTH + 2 for i in range(CAPACITY)]
    assert torch.equal(inputs["stream"], before["stream"])
    assert torch.equal(inputs["delta"], before["delta"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_first_block_adds_nothing_to_the_stream(parallel, dtype):
    """No delta is a delta of zeros; the stream comes out as it went in, plus the attention where the branches follow
    each other.
    """
    inputs, zeros = (
        operands(seq=2, dtype=dtype) | {"parallel": parallel},
        operands(seq=2, dtype=dtype) | {"parallel": parallel},
    )
    inputs["delta"] = None
    zeros["delta"] = torch.zeros_like(zeros["delta"])
    stream, delta = decode_block(**inputs)
    wanted_stream, wanted_delta = decode_block(**zeros)
    assert torch.equal(stream, wanted_stream) and torch.equal(delta, wanted_delta)
    assert torch.equal(stream, inputs["stream"]) == parallel


def test_tables_and_masks_in_any_layout():
    want = decode_block(**operands())
    inputs = operands()
    for name in ("cos", "sin", "segment_ids", "alibi_slopes", "stream", "delta"):
        inputs[name] = torch.stack([inputs[name], torch.zeros_like(inputs[name])], -1)[..., 0]
    assert all(torch.equal(got, one) for got, one in zip(decode_block(**inputs), want, strict=True))


def test_opcheck():
    inputs = operands()
    order = (
        "stream",
        "delta",
        "keys",
        "values",
        "length",
        "cos",
        "sin",
        "segment_ids",
        "alibi_slopes",
        "parameters",
        *OPTIONS,
    )
    torch.library.opcheck(native.decode_block.default, (*(inputs[name] for name in order), 0, 0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": torch.ones(2, H)}, "stream must have 3 dimensions; got 2"),
        ({"stream": torch.ones(2, 1, H).double()}, "stream must be float32 or bfloat16; got Double"),
        ({"delta": torch.ones(2, 1, H + 1)}, r"delta must have the shape of stream, \[2, 1, 12\]; got \[2, 1, 13\]"),
        ({"length": CAPACITY}, r"keys must have room for 10 tokens; got \[2, 9, 2, 8\]"),
        ({"length": -1}, "length must not be negative; got -1"),
        (
            {"keys": torch.ones(1, CAPACITY, GROUPS, DIM)},
            r"keys must have the batch size of stream, 2; got \[1, 9, 2, 8\]",
        ),
        ({"values": torch.ones(2, CAPACITY + 1, GROUPS, DIM)}, r"values must have the shape of keys"),
        ({"keys": torch.ones(2, GROUPS, CAPACITY, DIM).transpose(1, 2)}, "keys must be contiguous"),
        ({"parameters": [None]}, "parameters must be 16 tensors or None; got 1"),
        ({"activation": "relu"}, "activation must be gelu, gelu_tanh, swiglu, geglu or reglu; got relu"),
        ({"activation": "gelu"}, "gate.weight must be given if and only if the activation is gated; got one"),
        ({"sin": None}, "cos, sin must be given together; got one of them"),
        (
            {"cos": torch.ones(2, 1, 3), "sin": torch.ones(2, 1, 3)},
            r"cos, sin must be fp32 \[1, r\] or \[2, 1, r\], r even, <= 8; got \[2, 1, 3\]",
        ),
        (
            {"segment_ids": torch.zeros(2, LENGTH, dtype=torch.int32)},
            r"segment_ids must be int32 \[2, 6\]; got \[2, 5\]",
        ),
        ({"alibi_slopes": torch.ones(4)}, r"alibi_slopes must be fp32 \[6\]; got \[4\]"),
        ({"window": -1}, "window must be at least 1; got -1"),
        ({"scale": float("nan")}, "scale must be finite; got nan"),
        ({"softcap": -1.0}, "softcap must be positive and finite; got -1"),
        ({"eps": -1.0}, "eps must not be negative; got -1"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=f"decode_block: {message}"):
        decode_block(**(operands() | changes))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"norm1__weight": None}, "norm1.weight is needed; got none"),
        ({"norm1__weight": (H + 1,)}, r"norm1.weight must have shape \[12\]; got \[13\]"),
        ({"attention__key_norm__weight": None}, "key_norm is needed; got none"),
        ({"attention__qkv__weight": (81, H)}, "qkv.weight must have a multiple of 16 rows, at least 48; got 81"),
        ({"attention__qkv__weight": None}, "qkv.weight is needed; got none"),
        ({"attention__out__weight": (H, 7)}, r"out.weight must have shape \[12, 48\]; got \[12, 7\]"),
        ({"mlp__up__bias": (3,)}, r"up.bias must have shape \[20\]; got \[3\]"),
        ({"mlp__gate__weight": None}, "gate.weight must be given if and only if the activation is gated; got none"),
    ],
)
def test_parameter_errors(shapes, message):
    with pytest.raises(ValueError, match=f"decode_block: {message}"):
        decode_block(**operands(**shapes))
