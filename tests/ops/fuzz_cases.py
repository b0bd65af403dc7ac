"""Random cases of every operator: a case is a pure function of the operator and a seed.

Shapes lean to the small and to the borders of packs, warps and blocks; layouts, dtypes, options, masks and scales are
drawn too. References are those of tests/reference.py, in fp64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from neox import ops
from tests import reference

EPS = 1e-3
BORDERS = (4, 8, 16, 31, 32, 33, 64, 128, 255, 256, 257, 512)


@dataclass
class Case:
    """One comparison: op and reference take the inputs by name."""

    op: Callable
    reference: Callable
    inputs: dict[str, torch.Tensor]
    floor: float  # least scale that errors of gradients are held to: what is left of them may be rounding alone
    text: str  # what was drawn, for a failure's line


class Draw:
    """Everything random of a case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.drawn: list[str] = []

    def choice(self, *options):
        """One of the options."""
        return self.random.choice(options)

    def size(self, most: int, least: int = 1) -> int:
        """Mostly small, often at or next to a border, sometimes large."""
        kind = self.random.random()
        if kind < 0.4:
            size = self.random.randint(1, 24)
        elif kind < 0.8:
            size = self.choice(*BORDERS) + self.choice(-1, 0, 0, 0, 1)
        else:
            size = self.random.randint(1, most)
        return max(least, min(size, most))

    def rows(self, cols: int, most: int = 6000) -> tuple[int, ...]:
        """Leading dimensions, one to three, empty now and then; about `most` elements with cols."""
        if self.random.random() < 0.02:
            return (0,) if self.random.random() < 0.5 else (2, 0)
        left = max(1, most // max(cols, 1))
        shape = []
        for _ in range(self.choice(1, 1, 2, 3)):
            shape.append(self.random.randint(1, max(1, min(left, 40))))
            left //= shape[-1]
        return tuple(shape)

    def dtype(self, op: str) -> torch.dtype:
        """One that the kernels under test take."""
        return self.choice(*reference.dtypes(op))

    def tensor(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        shift: float = 0.0,
        keep_last: bool = False,
    ) -> torch.Tensor:
        """Normal values in a random layout; keep_last: one that is contiguous in the last dimension."""
        x = reference.random(*shape, seed=self.random.randrange(2**31), scale=scale) + shift
        return self.layout(x.to(dtype), keep_last)

    def layout(self, x: torch.Tensor, keep_last: bool = False) -> torch.Tensor:
        """The same values in contiguous memory, off a vector boundary, as a slice of a wider or longer buffer of
        NaN, or with turned dimensions.
        """
        kind = self.choice("plain", "plain", "misaligned", "wide", "wide by packs", "turned", "long")
        if kind == "misaligned":
            return reference.misaligned(x)
        if kind.startswith("wide") and x.dim() > 0:
            gap, before = (8, 8) if kind == "wide by packs" else (3, self.choice(0, 1))
            buffer = x.new_full((*x.shape[:-1], x.shape[-1] + gap + before), torch.nan)
            buffer[..., before : before + x.shape[-1]] = x
            return buffer[..., before : before + x.shape[-1]]
        if kind == "turned" and x.dim() > 1 + keep_last:
            first, second = self.random.sample(range(x.dim() - keep_last), 2)
            return x.transpose(first, second).contiguous().transpose(first, second)
        if kind == "long" and x.dim() > 1:
            buffer = x.new_full((2 * x.shape[0], *x.shape[1:]), torch.nan)
            buffer[::2] = x
            return buffer[::2]
        return x


def _case(draw: Draw, op, theirs, inputs: dict[str, torch.Tensor], floor: float = 0.0, **drawn) -> Case:
    shapes = ", ".join(
        f"{name} {list(t.shape)} strides {list(t.stride())} {str(t.dtype).removeprefix('torch.')}"
        for name, t in inputs.items()
    )
    return Case(op, theirs, inputs, floor, f"{shapes}; {drawn}")


def _bias_gelu(draw: Draw) -> Case:
    cols, dtype, approximate = draw.size(1200), draw.dtype("bias_gelu"), draw.choice("none", "tanh")
    inputs = {"x": draw.tensor(*draw.rows(cols), cols, dtype=dtype, scale=draw.choice(0.1, 2.0, 10.0))}
    if draw.choice(True, False):
        inputs["bias"] = draw.tensor(cols, dtype=dtype)
    return _case(
        draw,
        partial(ops.bias_gelu, bias=None, approximate=approximate)
        if len(inputs) == 1
        else partial(ops.bias_gelu, approximate=approximate),
        partial(reference.bias_gelu, approximate=approximate),
        inputs,
        approximate=approximate,
    )


def _gated(draw: Draw) -> Case:
    cols, dtype, activation = draw.size(1200), draw.dtype("gated"), draw.choice("silu", "gelu", "relu")
    rows, scale = draw.rows(cols), draw.choice(0.1, 2.0, 10.0)
    if draw.choice(True, False):
        inputs = {name: draw.tensor(*rows, cols, dtype=dtype, scale=scale) for name in ("x", "gate")}
    else:
        x, gate = draw.tensor(*rows, 2 * cols, dtype=dtype, scale=scale).chunk(2, -1)
        inputs = {"x": x, "gate": gate}
    return _case(
        draw,
        partial(ops.gated, activation=activation),
        partial(reference.gated, activation=activation),
        inputs,
        activation=activation,
    )


def _bias_dropout_add(draw: Draw) -> Case:
    cols, dtype, p = draw.size(1200), draw.dtype("bias_dropout_add"), draw.choice(0.0, 0.1, 0.5, 0.9, 1.0)
    rows, with_bias = draw.rows(cols), draw.choice(True, False)
    seed = torch.tensor([draw.random.randrange(2**63), draw.random.randrange(2**63)], device="cpu")
    inputs = {"x": draw.tensor(*rows, cols, dtype=dtype), "residual": draw.tensor(*rows, cols, dtype=dtype)}
    if with_bias:
        inputs["bias"] = draw.tensor(cols, dtype=dtype)

    def ours(x, residual, bias=None):
        return torch.ops.neox.bias_dropout_add(x, bias, residual, seed if p else None, p)

    def theirs(x, residual, bias=None):
        count = x.numel() // cols
        kept = (
            reference.dropout_mask(count, cols, seed, p).view(x.shape) / max(1 - p, 1e-9) if p else torch.ones_like(x)
        )
        return residual + (x if bias is None else x + bias) * kept

    return _case(draw, ours, theirs, inputs, p=p, seed=seed.tolist())


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x, cos, sin = x.double(), cos.double().unsqueeze(-2), sin.double().unsqueeze(-2)
    r = cos.shape[-1]
    low, high = x[..., : r // 2], x[..., r // 2 : r]
    return torch.cat((x[..., :r] * cos + torch.cat((-high, low), dim=-1) * sin, x[..., r:]), dim=-1)


def _rotary(draw: Draw) -> Case:
    b, s, dtype = draw.choice(1, 1, 2, 3), draw.choice(0, 1, 2, 5, 17), draw.dtype("rotary")
    rotary_dim = 2 * draw.choice(1, 3, 4, 8, 10, 12, 16, 32)
    d = rotary_dim + draw.choice(0, 0, 1, 8, 16, rotary_dim, 3 * rotary_dim)
    per_sequence = draw.choice(True, False)
    shape = (b, s, rotary_dim) if per_sequence else (s, rotary_dim)
    cos, sin = draw.tensor(*shape), draw.tensor(*shape)
    if draw.choice(True, False):
        g, m = draw.size(5), draw.choice(1, 2, 4)
        inputs = {"qkv": draw.tensor(b, s, g, m + 2, d, dtype=dtype, keep_last=True)}

        def packed(qkv):
            return ops.rotary_qkv(qkv * 1, cos, sin)

        def theirs(qkv):
            heads = _turned(qkv[:, :, :, :-1].reshape(b, s, g * (m + 1), d), cos, sin).view(b, s, g, m + 1, d)
            return torch.cat((heads, qkv[:, :, :, -1:].double()), dim=3)

        return _case(draw, packed, theirs, inputs, rotary_dim=rotary_dim, per_sequence=per_sequence)
    inputs = {
        "q": draw.tensor(b, s, draw.size(9), d, dtype=dtype),
        "k": draw.tensor(b, s, draw.choice(1, 2, 3), d, dtype=dtype),
    }
    return _case(
        draw,
        partial(ops.rotary, cos=cos, sin=sin),
        lambda q, k: (_turned(q, cos, sin), _turned(k, cos, sin)),
        inputs,
        rotary_dim=rotary_dim,
        per_sequence=per_sequence,
    )


def _softmax_reference(x, mask, scale):
    y = torch.softmax((x.double() * scale).masked_fill(mask, -torch.inf), dim=-1)
    return torch.where(mask.all(dim=-1, keepdim=True), 0.0, y.nan_to_num())


def _scaled_masked_softmax(draw: Draw) -> Case:
    t, dtype, scale = draw.size(1200), draw.dtype("scaled_masked_softmax"), draw.choice(0.1, 0.7, 2.0)
    b, n = draw.choice(1, 2, 3), draw.choice(1, 1, 2)
    s = draw.random.randint(1, max(1, min(40, 6000 // (b * n * t))))
    inputs = {"x": draw.tensor(b, n, s, t, dtype=dtype, scale=draw.choice(0.5, 3.0))}
    if draw.choice(True, False):
        mask = torch.arange(t)[None, :] > torch.arange(s)[:, None] + t - s
        return _case(
            draw,
            partial(ops.scaled_causal_softmax, scale=scale),
            partial(_softmax_reference, mask=mask[None, None], scale=scale),
            inputs,
            scale,
            causal=True,
        )
    hidden = draw.choice(0.1, 0.5, 0.99)
    mask = (
        draw.layout(
            (reference.random(draw.choice(1, b), 1, s, t, seed=draw.random.randrange(2**31)).abs() < hidden).float()
        )
        .nan_to_num()
        .bool()
    )
    return _case(
        draw,
        partial(ops.scaled_masked_softmax, mask=mask, scale=scale),
        partial(_softmax_reference, mask=mask, scale=scale),
        inputs,
        scale,
        hidden=hidden,
    )


def _rounded(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 values as `dtype` holds them, with the gradient of s.

    Norms round x + residual before they normalise it, as documented. Of two bf16 columns that differ by little,
    rounding changes the difference by as much as it is: held to the unrounded sum, no tolerance would fit.
    """
    return s + (s.detach().float().to(dtype).double() - s.detach())


def _norm(draw: Draw) -> Case:
    kind, dual, with_bias, with_residual = (
        draw.choice("layer", "rms"),
        draw.choice(True, False),
        draw.choice(True, False),
        draw.choice(True, False),
    )
    dtype = draw.dtype("norm")
    cols = draw.size(1200)
    rows = draw.rows(cols)
    inputs = {"x": draw.tensor(*rows, cols, dtype=dtype, scale=2.0, shift=draw.choice(0.0, 1.0))}
    if with_residual:
        inputs["residual"] = draw.tensor(*rows, cols, dtype=dtype)
    for index in range(1 + dual):
        inputs[f"w{index}"] = draw.tensor(cols, dtype=dtype, shift=1.0)
        if kind == "layer" and (with_bias or dual):
            inputs[f"b{index}"] = draw.tensor(cols, dtype=dtype)

    def ours(x, w0, b0=None, w1=None, b1=None, residual=None):
        if dual:
            return (
                ops.dual_rms_norm(x, w0, w1, EPS, residual)
                if kind == "rms"
                else ops.dual_layer_norm(x, w0, b0, w1, b1, EPS, residual)
            )
        return ops.rms_norm(x, w0, EPS, residual) if kind == "rms" else ops.layer_norm(x, w0, b0, EPS, residual)

    def theirs(x, w0, b0=None, w1=None, b1=None, residual=None):
        s = x if residual is None else _rounded(x + residual, dtype)
        pairs = [(w0, b0), (w1, b1)] if dual else [(w0, b0)]
        ys = tuple(
            reference.rms_norm(s, w, EPS) if kind == "rms" else reference.layer_norm(s, w, b, EPS) for w, b in pairs
        )
        ys = ys if residual is None else (*ys, s)
        return ys if len(ys) > 1 else ys[0]

    # Few columns: gradients are what cancellation leaves of terms as large as 1 / sqrt(eps), times the weights and
    # gradients of up to 4.
    return _case(draw, ours, theirs, inputs, 16 * EPS**-0.5 if cols < 8 else 1.0, kind=kind, dual=dual)


def _cross_entropy(draw: Draw) -> Case:
    columns, dtype = draw.size(1200), draw.dtype("cross_entropy")
    tokens = draw.choice(0, 1, 2, 7, 19)
    vocab_size = draw.choice(columns, columns, max(1, columns - draw.random.randint(0, 9)))
    options = {
        "z_loss": draw.choice(0.0, 0.0, 0.05),
        "label_smoothing": draw.choice(0.0, 0.0, 0.1),
        "ignore_index": -100,
    }
    inplace = draw.choice(True, False)
    logits = draw.tensor(tokens, columns, dtype=dtype, scale=draw.choice(1.0, 4.0), keep_last=inplace)
    targets = reference.integers(vocab_size, tokens, seed=draw.random.randrange(2**31))
    targets[reference.random(tokens, seed=draw.random.randrange(2**31)) > 1] = -100

    def theirs(logits):
        log_sum = logits.double()[:, :vocab_size].logsumexp(dim=1)
        log_p = logits.double()[:, :vocab_size] - log_sum[:, None]
        nll = -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        smoothing = options["label_smoothing"]
        loss = (1 - smoothing) * nll - smoothing * log_p.mean(dim=1) + options["z_loss"] * log_sum**2
        return torch.where(targets != -100, loss, 0.0)

    # In place a copy of the leaf is overwritten, in the leaf's layout where it has no gaps.
    expected = draw.choice(None, 1.0, 0.01, -2.0) if inplace else None
    ours = partial(
        ops.cross_entropy, targets=targets, vocab_size=vocab_size, inplace=inplace, expected_dloss=expected, **options
    )
    op = (lambda logits: ours(logits * 1)) if inplace else (lambda logits: ours(logits))
    # A single column: the loss and its gradient are zero but for rounding.
    return _case(
        draw, op, theirs, {"logits": logits}, 1.0, vocab_size=vocab_size, inplace=inplace, expected=expected, **options
    )


def _attention(draw: Draw) -> Case:
    s, dtype = draw.choice(1, 2, 5, 16, 17, 33, 63, 65, 80), draw.dtype("attention")
    causal = draw.choice(True, True, False)
    t = s + draw.choice(0, 0, 1, 15, 64)
    g, m, d, b = draw.choice(1, 2), draw.choice(1, 1, 2, 3), draw.choice(8, 16, 32, 40, 64, 80, 128), draw.choice(1, 2)
    if s * t * d > 40_000:  # one head of many scores costs what many small ones do
        g = m = b = 1
    # Scores of a few units at most: of larger ones fp32 has fewer digits after the point, and any kernel's error grows
    # with them.
    scale = draw.choice(None, 0.5 * d**-0.5, 1.5 * d**-0.5)
    options = {
        "causal": causal,
        "window": draw.choice(None, None, 1, 7, 64),
        "softcap": draw.choice(None, None, 2.0),
        "scale": scale,
    }
    if not causal:
        options["window"] = None
    if draw.choice(True, False, False):
        lengths = reference.integers(3, b, t, seed=draw.random.randrange(2**31)) == 0
        options["segment_ids"] = lengths.cumsum(1).div(draw.choice(1, 4, 16), rounding_mode="floor").int()
    if draw.choice(True, False, False):
        options["alibi_slopes"] = torch.rand(
            g * m, generator=torch.Generator("cpu").manual_seed(draw.seed), device="cpu"
        ).to(reference.DEVICE)
    inputs = {
        "q": draw.tensor(b, s, g * m, d, dtype=dtype, keep_last=True),
        "k": draw.tensor(b, t, g, d, dtype=dtype, keep_last=True),
        "v": draw.tensor(b, t, g, d, dtype=dtype, keep_last=True),
    }
    plain = {name: value for name, value in options.items() if not isinstance(value, torch.Tensor)}
    ours, theirs = partial(ops.attention, backend="native", **options), partial(reference.attention, **options)
    return _case(draw, ours, theirs, inputs, 1.0, **plain, tensors=sorted(options.keys() - plain.keys()))


def _linear(draw: Draw) -> Case:
    size, out, dtype = draw.size(300), draw.size(100), draw.choice(torch.float32, torch.bfloat16)
    inputs = {
        "x": draw.tensor(*draw.rows(size), size, dtype=dtype),
        "weight": draw.tensor(out, size, dtype=dtype, scale=size**-0.5),
    }
    if draw.choice(True, False):
        inputs["bias"] = draw.tensor(out, dtype=dtype)

    def theirs(x, weight, bias=None):
        y = x.double() @ weight.double().T
        return y if bias is None else y + bias.double()

    return _case(draw, ops.linear, theirs, inputs, 1.0)


MAKERS = {
    "attention": _attention,
    "bias_dropout_add": _bias_dropout_add,
    "bias_gelu": _bias_gelu,
    "cross_entropy": _cross_entropy,
    "gated": _gated,
    "linear": _linear,
    "norm": _norm,
    "rotary": _rotary,
    "scaled_masked_softmax": _scaled_masked_softmax,
}


def run(op: str, seed: int) -> None:
    """Draws a case and compares it, forward and backward; inputs and incoming gradients keep their layouts.

    Raises:
        AssertionError: a mismatch, with what was drawn.
        Exception: what the operator raised, with what was drawn as a note.
    """
    draw = Draw(seed)
    case = MAKERS[op](draw)
    try:
        _compare(case, draw)
    except Exception as problem:
        raise AssertionError(f"{type(problem).__name__}: {problem}; drawn: {case.text}") from problem


def _compare(case: Case, draw: Draw) -> None:
    ours = {name: value.detach().requires_grad_() for name, value in case.inputs.items()}
    theirs = {name: value.detach().double().requires_grad_() for name, value in case.inputs.items()}
    got, want = case.op(**ours), case.reference(**theirs)
    got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
    assert len(got) == len(want)
    for index, (mine, other) in enumerate(zip(got, want, strict=True)):
        reference.assert_near(mine.detach(), other.detach(), what=f"output {index}", floor=min(case.floor, 1.0))
    douts = [draw.tensor(*mine.shape, dtype=mine.dtype) for mine in got]
    dgot = torch.autograd.grad(got, list(ours.values()), douts, allow_unused=True, materialize_grads=True)
    dwant = torch.autograd.grad(
        want, list(theirs.values()), [dout.double() for dout in douts], allow_unused=True, materialize_grads=True
    )
    for name, mine, other in zip(ours, dgot, dwant, strict=True):
        reference.assert_near(mine, other, what=f"d{name}", floor=case.floor)
