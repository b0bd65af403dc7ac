"""Tiny cases that launch every CUDA kernel of every operator: all element types, vector and scalar accesses, and a row
of each length that has a separate kernel. gpu/kernels.py reports kernels that no case launches.

Set the default device before the import, because tests/reference.py reads it when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from measure import dtype_name

from neox import ops
from tests import reference
from tests.ops.attention_cases import FLOOR, documents

EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """An operator and its reference in fp64 on the same inputs. Forward and backward are compared."""

    text: str
    op: Callable
    reference: Callable
    inputs: dict[str, torch.Tensor]
    floor: float = 1.0
    deterministic: bool = False

    def check(self) -> None:
        """Compare them.

        Raises:
            AssertionError: they differ.
        """
        with algorithms(self.deterministic):
            reference.check_against(self.op, self.reference, self.inputs, floor=self.floor)


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Set torch to deterministic algorithms, or to the fastest."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def bias_gelu() -> Iterator[Case]:
    """Exact and tanh gelu."""
    for dtype, cols, approximate in product(reference.dtypes("bias_gelu"), (64, 17), ("none", "tanh")):
        x, bias = reference.random(5, cols, dtype=dtype), reference.random(cols, dtype=dtype, seed=1)
        run, expected = (partial(f, approximate=approximate) for f in (ops.bias_gelu, reference.bias_gelu))
        yield Case(f"{approximate} {cols} {dtype_name(dtype)}", run, expected, {"x": x, "bias": bias})


def gated() -> Iterator[Case]:
    """Every activation."""
    for dtype, cols, activation in product(reference.dtypes("gated"), (64, 17), ("silu", "gelu", "relu")):
        inputs = {name: reference.random(5, cols, dtype=dtype, seed=i) for i, name in enumerate(("x", "gate"))}
        run, expected = (partial(f, activation=activation) for f in (ops.gated, reference.gated))
        yield Case(f"{activation} {cols} {dtype_name(dtype)}", run, expected, inputs)


def bias_dropout_add() -> Iterator[Case]:
    """Dropout, whose mask the reference recomputes."""
    seed, p = torch.tensor([11, 22], device="cpu"), 0.25
    for dtype, cols in product(reference.dtypes("bias_dropout_add"), (64, 17)):
        inputs = {name: reference.random(5, cols, dtype=dtype, seed=i) for i, name in enumerate(("x", "residual"))}
        inputs["bias"] = reference.random(cols, dtype=dtype, seed=2)
        retained = reference.dropout_mask(5, cols, seed, p) / (1 - p)

        def run(x, residual, bias):
            return torch.ops.neox.bias_dropout_add(x, bias, residual, seed, p)

        def expected(x, residual, bias, retained=retained):
            return residual + (x + bias) * retained

        yield Case(f"{cols} {dtype_name(dtype)}", run, expected, inputs)


def rotary() -> Iterator[Case]:
    """Numbers of channels that take accesses of 8, 4, 2 and 1 elements."""
    for dtype, channels in product(reference.dtypes("rotary"), (32, 16, 8, 4, 2)):
        cos, sin = reference.random(3, channels), reference.random(3, channels, seed=1)
        inputs = {name: reference.random(2, 3, 2, 2 * channels, dtype=dtype, seed=i) for i, name in enumerate("qk")}

        def rotated(x, cos=cos, sin=sin):
            cos, sin, half = cos.double()[:, None], sin.double()[:, None], cos.shape[-1] // 2
            low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            return torch.cat((x[..., : 2 * half] * cos + torch.cat((-high, low), -1) * sin, rest), -1)

        def expected(q, k, rotated=rotated):
            return rotated(q), rotated(k)

        yield Case(f"{channels} {dtype_name(dtype)}", partial(ops.rotary, cos=cos, sin=sin), expected, inputs)


def scaled_masked_softmax() -> Iterator[Case]:
    """Rows that a warp holds, rows that a block holds, and longer ones."""
    lengths = (64, 512, 1024, 2048, 4096, 16384, 24576)
    for dtype, t in product(reference.dtypes("scaled_masked_softmax"), (*lengths, *(length + 1 for length in lengths))):
        x = reference.random(1, 1, 2, t, dtype=dtype)
        mask = torch.arange(t)[None, :] > torch.arange(2)[:, None] + t - 2

        def expected(x, mask=mask):
            return torch.softmax((x * 0.5).masked_fill(mask, -torch.inf), -1)

        yield Case(f"{t} {dtype_name(dtype)}", partial(ops.scaled_causal_softmax, scale=0.5), expected, {"x": x}, 0.01)


def norm() -> Iterator[Case]:
    """One norm, and two of the same input, at every number of vectors per thread and at lengths that need a loop."""
    for dtype in reference.dtypes("norm"):
        width = 16 // dtype.itemsize  # elements of a vector
        lengths = [width * vectors for vectors in (4, 40, 100, 200, 1000, 1500, 2000, 3100)]
        for cols, dual in product((*lengths, *(length + 1 for length in lengths)), (False, True)):
            inputs = {"x": reference.random(3, cols, dtype=dtype)}
            names = ("w0", "b0", "w1", "b1") if dual else ("w0", "b0")
            inputs |= {name: reference.random(cols, dtype=dtype, seed=i + 1) for i, name in enumerate(names)}
            run, expected = (dual_norm, dual_norm_reference) if dual else (one_norm, one_norm_reference)
            yield Case(f"{'two' if dual else 'one'} {cols} {dtype_name(dtype)}", run, expected, inputs)


def one_norm(x, w0, b0):
    """A layer norm."""
    return ops.layer_norm(x, w0, b0, EPS)


def one_norm_reference(x, w0, b0):
    """Its reference."""
    return reference.layer_norm(x, w0, b0, EPS)


def dual_norm(x, w0, b0, w1, b1):
    """Two layer norms of one input."""
    return ops.dual_layer_norm(x, w0, b0, w1, b1, EPS)


def dual_norm_reference(x, w0, b0, w1, b1):
    """Its reference."""
    return reference.layer_norm(x, w0, b0, EPS), reference.layer_norm(x, w1, b1, EPS)


def cross_entropy() -> Iterator[Case]:
    """Two passes; one pass with a right and a wrong prediction of the loss's gradient; rows beyond shared memory."""
    for dtype, columns in product(reference.dtypes("cross_entropy"), (64, 17, 131072)):
        targets = reference.integers(columns, 3)
        logits = reference.random(3, columns, dtype=dtype, scale=2.0)

        def expected(logits, targets=targets):
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

        for predicted in (None, 1.0, 0.5):
            run = partial(cross_entropy_of_a_copy, targets=targets, predicted=predicted)
            yield Case(f"{columns} predicted {predicted} {dtype_name(dtype)}", run, expected, {"logits": logits})


def cross_entropy_of_a_copy(logits: torch.Tensor, targets: torch.Tensor, predicted: float | None) -> torch.Tensor:
    """cross_entropy in one pass, which overwrites a copy of the logits, if there is a prediction; otherwise in two."""
    if predicted is None:
        return ops.cross_entropy(logits, targets)
    return ops.cross_entropy(logits * 1, targets, inplace=True, expected_dloss=predicted)


def attention() -> Iterator[Case]:
    """Every kernel of head_dim, causal, with softcap and with documents, by both backwards; and decoding, which splits
    the keys.
    """
    forms = {"causal": {}, "softcap": {"softcap": 2.0}, "documents": {"segment_ids": documents(1, 40, 13, 20)}}
    dtypes, both = reference.dtypes("attention"), (False, True)
    for dtype, d, form, deterministic in product(dtypes, (64, 96, 128, 256), forms, both):
        yield attention_case(form, dtype, (40, 40, 2, d), forms[form], deterministic)
    for dtype in dtypes:
        yield attention_case("decoding", dtype, (1, 1100, 2, 64), {}, True)
    if runs_hopper():
        for dtype, d, deterministic in product(dtypes, (64, 128), both):
            yield attention_case("hopper causal", dtype, (40, 40, 2, d), {}, deterministic, backend="hopper")


def runs_hopper() -> bool:
    """Whether the kernels for sm_90a run here, which a Hopper GPU and the emulator do."""
    return torch.cuda.get_device_capability()[0] == 9 if reference.DEVICE.type == "cuda" else reference.CUDA_KERNELS


def attention_case(
    form: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    options: dict,
    deterministic: bool,
    backend: str = "native",
) -> Case:
    """A case with one key/value head. `sizes` are (s, t, n, d)."""
    s, t, n, d = sizes
    shapes = {"q": (1, s, n, d), "k": (1, t, 1, d), "v": (1, t, 1, d)}
    inputs = {
        name: reference.random(*shape, dtype=dtype, seed=10_000 * i) for i, (name, shape) in enumerate(shapes.items())
    }
    run = partial(ops.attention, backend=backend, **options)
    text = f"{form}{' deterministic' * deterministic} s {s} t {t} d {d} {dtype_name(dtype)}"
    return Case(text, run, partial(reference.attention, **options), inputs, FLOOR, deterministic)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": attention,
    "bias_dropout_add": bias_dropout_add,
    "bias_gelu": bias_gelu,
    "cross_entropy": cross_entropy,
    "gated": gated,
    "norm": norm,
    "rotary": rotary,
    "scaled_masked_softmax": scaled_masked_softmax,
}
