"""cross_entropy against fp64: padding columns, ignored tokens, z-loss, smoothing, in-place gradients, and a
vocabulary distributed over processes.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from neox.ops import cross_entropy
from tests import reference
from tests.distributed import run_ranks

DTYPES = reference.dtypes("cross_entropy")
native = torch.ops.neox
OPTIONS = ({}, {"z_loss": 0.1}, {"label_smoothing": 0.2}, {"z_loss": 0.05, "label_smoothing": 0.1})


def loss_by_definition(logits, targets, *, ignore_index=-100, z_loss=0.0, label_smoothing=0.0, vocab_size=None):
    """The formula in float64."""
    log_sum = logits.double()[:, :vocab_size].logsumexp(dim=1)
    log_p = logits.double()[:, :vocab_size] - log_sum[:, None]
    kept = targets != ignore_index
    nll = -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    loss = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(dim=1) + z_loss * log_sum**2
    return torch.where(kept, loss, 0.0)


def targets_of(tokens: int, vocab_size: int, seed: int = 5) -> torch.Tensor:
    """Random ids with the first and the last among them, and an ignored one where there is room."""
    targets = reference.integers(vocab_size, tokens, seed=seed)
    targets[0], targets[-1] = 0, vocab_size - 1
    if tokens > 3:
        targets[2] = -100
    return targets


def both(targets, **options):
    """The operator and its reference, as functions of the logits."""
    return partial(cross_entropy, targets=targets, **options), partial(loss_by_definition, targets=targets, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", reference.SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_backward(options, size, dtype):
    logits = reference.random(19, size, dtype=dtype, scale=4)
    reference.check_against(*both(targets_of(19, size), **options), {"logits": logits})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "vocab_size"), [(819, 800), (64, 1), (50304, 50277)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_columns_are_excluded(options, columns, vocab_size, dtype):
    logits = reference.random(5, columns, dtype=dtype, scale=3)
    logits[:, vocab_size:] = 1e4  # would dominate the softmax
    reference.check_against(*both(targets_of(5, vocab_size), vocab_size=vocab_size, **options), {"logits": logits})
    logits.requires_grad_()
    cross_entropy(logits, targets_of(5, vocab_size), vocab_size=vocab_size, **options).sum().backward()
    assert not logits.grad[:, vocab_size:].any()


def test_ignored_tokens_have_neither_loss_nor_gradient():
    logits = reference.random(4, 17)
    logits[1] = float("nan")
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([3, 7, 7, 0]), ignore_index=7, z_loss=0.1)
    assert loss[1:3].tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert not logits.grad[1:3].any()
    assert logits.grad[0].any()
    assert logits.grad[3].any()


@pytest.mark.parametrize("shift", [-3e4, 88.0, 3e4])
def test_far_from_zero(shift):
    logits = reference.random(7, 33) + shift
    reference.check_against(*both(targets_of(7, 33)), {"logits": logits})


def test_certain_and_hopeless_predictions():
    logits = torch.tensor([[500.0, 0.0, -500.0], [500.0, 0.0, -500.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 2]))
    assert loss.tolist() == [0.0, 1000.0]
    loss.sum().backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]


@pytest.mark.parametrize("column", [0, 5, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_are_not_hidden(value, column):
    logits = reference.random(3, 33)
    logits[1, column] = value
    loss = cross_entropy(logits, torch.tensor([0, 1, 2]))
    assert loss[1].isnan()
    assert loss[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gradient_is_the_same_and_reuses_the_logits(dtype):
    logits, targets, dloss = reference.random(19, 40, dtype=dtype), targets_of(19, 33), reference.random(19)
    options = {"vocab_size": 33, "z_loss": 0.1, "label_smoothing": 0.1}
    plain, leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(cross_entropy(plain, targets, **options), plain, dloss)
    produced = leaf * 1
    gradients = []
    produced.register_hook(gradients.append)
    cross_entropy(produced, targets, inplace=True, **options).backward(dloss)
    assert torch.equal(leaf.grad, want)
    assert gradients[0].data_ptr() == produced.data_ptr()


def test_in_place_gradient_cannot_be_taken_twice():
    leaf = reference.random(5, 17).requires_grad_()
    loss = cross_entropy(leaf * 1, targets_of(5, 17), inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_gradient_invalidates_other_saved_logits():
    leaf = reference.random(5, 17).requires_grad_()
    logits = leaf.tanh()  # its backward reads its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(logits, targets_of(5, 17), inplace=True).sum().backward()


EXPECTED = 0.25  # a gradient of every loss that is known before the forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "vocab_size"), [(40, 33), (1, 1), (819, 819), (50304, 50277)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_expected_gradient_is_left_in_the_logits(options, columns, vocab_size, dtype):
    targets = targets_of(5, vocab_size)
    leaf = reference.random(5, columns, dtype=dtype, scale=3).requires_grad_()
    logits = leaf * 1
    loss = cross_entropy(logits, targets, inplace=True, expected_dloss=EXPECTED, vocab_size=vocab_size, **options)
    before = logits.detach().clone()
    whole = leaf.detach().double().requires_grad_()
    want = loss_by_definition(whole, targets, vocab_size=vocab_size, **options)
    want.backward(torch.full((5,), EXPECTED).double())
    reference.assert_near(loss.detach(), want.detach(), what="loss", floor=1.0)
    reference.assert_near(before, whole.grad, what="gradient left in the logits", floor=EXPECTED)
    gradients = []
    logits.register_hook(gradients.append)
    loss.backward(torch.full((5,), EXPECTED))
    assert torch.equal(leaf.grad, before)
    assert gradients[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [17, 40, 819])
def test_wrongly_expected_gradient_is_rescaled(columns, dtype):
    targets, dloss = targets_of(6, columns), torch.tensor([EXPECTED, -3.0, 0.0, 2.0, EXPECTED, 0.125])
    leaf = reference.random(6, columns, dtype=dtype, scale=3).requires_grad_()
    cross_entropy(leaf * 1, targets, inplace=True, expected_dloss=EXPECTED).backward(dloss)
    whole = leaf.detach().double().requires_grad_()
    loss_by_definition(whole, targets).backward(dloss.double())
    reference.assert_near(leaf.grad, whole.grad, what="dlogits")


class Buffers(TorchDispatchMode):
    """Takes note of the memory of every large result of an operator."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= self.least:
            self.seen.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("expected", [None, EXPECTED])
def test_no_second_buffer_of_the_logits_size(expected):
    """Logits of [b, s, v] as a linear layer gives them: of its product, their views and their gradient, all is one
    buffer.
    """
    hidden, weight = reference.random(2, 9, 4).requires_grad_(), reference.random(819, 4).requires_grad_()
    with Buffers(least=18 * 819 * 4) as buffers:
        logits = torch.nn.functional.linear(hidden, weight)  # [2, 9, 819]
        loss = cross_entropy(logits.reshape(-1, 819), targets_of(18, 819), inplace=True, expected_dloss=expected)
        loss.backward(torch.full((18,), EXPECTED))
    assert buffers.seen == {logits.untyped_storage().data_ptr()}
    whole = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    loss_by_definition(torch.nn.functional.linear(*whole).view(-1, 819), targets_of(18, 819)).backward(
        torch.full((18,), EXPECTED).double()
    )
    for leaf, want in zip((hidden, weight), whole, strict=True):
        reference.assert_near(leaf.grad, want.grad)


@pytest.mark.parametrize("layout", ["misaligned", "slice"])
def test_expected_gradient_of_layouts(layout):
    logits, targets, dloss = reference.random(9, 37), targets_of(9, 37), reference.random(9)
    results = []
    for tensor in (logits.clone(), reference.layouts(logits)[layout]):
        leaf = tensor.detach().requires_grad_()
        loss = cross_entropy(leaf, targets, inplace=True, expected_dloss=2.0)
        results.append((loss, *torch.autograd.grad(loss, leaf, dloss)))
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_expected_gradient_leaves_logits_without_gradient_unchanged():
    logits, targets = reference.random(5, 17), targets_of(5, 17)
    before = logits.clone()
    cross_entropy(logits, targets, inplace=True, expected_dloss=EXPECTED)
    with torch.no_grad():
        cross_entropy(logits.requires_grad_(), targets, inplace=True, expected_dloss=EXPECTED)
    assert torch.equal(logits, before)


def test_expected_gradient_cannot_be_taken_twice():
    loss = cross_entropy(
        reference.random(5, 17).requires_grad_() * 1, targets_of(5, 17), inplace=True, expected_dloss=1.0
    ).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_expected_gradient_invalidates_other_saved_logits():
    logits = reference.random(5, 17).requires_grad_().tanh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(logits, targets_of(5, 17), inplace=True, expected_dloss=1.0).sum().backward()


@pytest.mark.parametrize("layout", ["misaligned", "slice", "transposed"])
def test_layouts_give_the_same_bits(layout):
    logits, targets, dloss = reference.random(9, 37), targets_of(9, 37), reference.random(9)
    results = []
    for tensor, ids, dout in (
        (logits, targets, dloss),
        (reference.layouts(logits)[layout], targets.repeat_interleave(2)[::2], dloss.repeat_interleave(2)[::2]),
    ):
        leaf = tensor.detach().requires_grad_()
        loss = cross_entropy(leaf, ids)
        results.append((loss, *torch.autograd.grad(loss, leaf, dout)))
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_empty():
    logits = torch.empty(0, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.empty(0, dtype=torch.int64))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert logits.grad.shape == (0, 5)


def test_opcheck():
    logits, targets, columns = reference.random(5, 20, dtype=torch.bfloat16), targets_of(5, 17), (0, 17, 17, -100)
    torch.library.opcheck(native.cross_entropy_statistics.default, (logits, targets, *columns, True))
    statistics = native.cross_entropy_statistics(logits, targets, *columns, True)
    tail = (targets, statistics, *columns, 0.1, 0.1)
    torch.library.opcheck(native.cross_entropy_backward.default, (torch.ones(5), logits, *tail))
    torch.library.opcheck(native.cross_entropy_backward_.default, (logits.clone(), torch.ones(5), *tail))
    for inplace, expected_dloss in ((False, None), (True, None), (True, 1.0)):
        torch.library.opcheck(
            native.cross_entropy.default, (logits.clone().requires_grad_(), *tail, inplace, expected_dloss)
        )
    torch.library.opcheck(native.cross_entropy_fused_.default, (logits.clone(), targets, *columns, 0.1, 0.1, 0.5))
    torch.library.opcheck(native.cross_entropy_rescale_.default, (logits.clone(), torch.ones(5), 0.5))


@pytest.mark.parametrize(
    "options",
    [{}, {"inplace": True}, {"inplace": True, "expected_dloss": 3.0}, {"inplace": True, "expected_dloss": 0.5}],
    ids=str,
)
def test_compile(options):
    targets = targets_of(5, 17)

    def block(x):
        return (cross_entropy(x * 2, targets, z_loss=0.1, **options) * 3).sum()

    leaf = reference.random(5, 17).requires_grad_()
    (got,) = torch.autograd.grad(torch.compile(block, backend="aot_eager", fullgraph=True)(leaf), leaf)
    (want,) = torch.autograd.grad(block(leaf), leaf)
    torch.testing.assert_close(got, want)


# ---- a vocabulary spread over processes ----


def spread(folder: str) -> None:
    """Run by each process: its shard's losses and gradients, exact to rounding, against the reference over the
    complete vocabulary.
    """
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(range(ranks))
    for dtype in (torch.float32, torch.bfloat16):
        for columns, vocab_size in ((34, 34), (34, 20), (34, 17), (34, 3), (1638, 1600)):
            for options in OPTIONS:
                logits, targets, dloss = (
                    reference.random(19, columns, dtype=dtype, scale=3),
                    targets_of(19, vocab_size),
                    reference.random(19),
                )
                shard = logits.chunk(ranks, dim=1)[rank].clone().requires_grad_()
                loss = cross_entropy(shard, targets, group=group, vocab_size=vocab_size, **options)
                loss.backward(dloss)
                whole = logits.double().requires_grad_()
                want = loss_by_definition(whole, targets, vocab_size=vocab_size, **options)
                want.backward(dloss.double())
                reference.assert_near(
                    loss.detach(), want.detach(), what=f"loss {dtype} {columns} {vocab_size} {options}"
                )
                error = (shard.grad.double() - whole.grad.chunk(ranks, dim=1)[rank]).abs().max()
                assert error <= reference.TOLERANCE[dtype] * whole.grad.abs().max(), (
                    f"dlogits {dtype} {columns} {vocab_size} {options}: {error}"
                )
    bad = torch.full((19,), 1600)
    try:
        cross_entropy(reference.random(19, 819), bad, group=group, vocab_size=1600)
    except ValueError as error:
        assert "1600 in row 0" in str(error)  # on every rank, whichever shard it would fall into
    else:
        raise AssertionError("a target beyond the vocabulary passed")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_vocabulary_over_two_processes(tmp_path):
    run_ranks("tests.ops.test_cross_entropy:spread", 2, tmp_path, [tmp_path])


# ---- errors ----

X, T = torch.ones(2, 5), torch.tensor([1, 4])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((X[0], T), {}, r"cross_entropy: logits must have 2 dimensions; got 1 in shape \[5\]"),
        ((X.double(), T), {}, rf"logits {reference.FLOAT_RULE}; got Double"),
        ((X, T.int()), {}, "targets must be int64; got Int"),
        ((X, T[None]), {}, "targets must have 1 dimension; got 2"),
        ((X, T[:1]), {}, "targets must have an id for each of the 2 rows of logits; got 1"),
        ((X, T), {"vocab_size": 6}, "vocab_size must be positive and at most the 5 columns of all ranks; got 6"),
        ((X, T), {"z_loss": -1.0}, "z_loss must be finite and >= 0"),
        ((X, T), {"z_loss": float("nan")}, "z_loss must be finite and >= 0 .* got nan"),
        ((X, T), {"z_loss": float("inf")}, "z_loss must be finite and >= 0 .* got inf"),
        ((X, T), {"label_smoothing": float("nan")}, r"label_smoothing in \[0, 1\]; got 0.0 and nan"),
        ((X, T), {"expected_dloss": 1.0}, "expected_dloss needs inplace=True"),
        (
            (X.clone().requires_grad_(), T),
            {"inplace": True, "expected_dloss": 0.0},
            "dloss must be a finite number other than zero; got 0",
        ),
        (
            (X.clone().requires_grad_(), T),
            {"inplace": True, "expected_dloss": float("inf")},
            "dloss must be a finite number other than zero; got inf",
        ),
        ((X, T), {"label_smoothing": 1.5}, r"label_smoothing in \[0, 1\]; got 0.0 and 1.5"),
    ],
)
def test_errors(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(*inputs, **options)


INVALID_TARGETS = [  # id, row, options, the message of the CPU's kernels
    (5, 1, {}, "targets must be below vocab_size 5 and not negative, or ignore_index -100; got 5 in row 1"),
    (-1, 0, {}, "got -1 in row 0"),
    (4, 1, {"vocab_size": 4}, "targets must be below vocab_size 4 .* got 4 in row 1"),
]


@pytest.mark.parametrize(("target", "row", "options", "message"), INVALID_TARGETS)
def test_an_invalid_target(target, row, options, message):
    """On a GPU the check would make the host wait: the loss of the row is NaN there, and that of others is not."""
    targets = T.clone()
    targets[row] = target
    targets[1 - row] = 1
    if reference.CUDA_KERNELS:
        loss = cross_entropy(X, targets, **options)
        assert loss.isnan().tolist() == [row == 0, row == 1]
        return
    with pytest.raises(ValueError, match=message):
        cross_entropy(X, targets, **options)


COLUMNS = (0, 5, 5, -100)
STATISTICS = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: native.cross_entropy_statistics(X, T, 0, 6, 6, -100, False),
            "num_columns must lie within the 5 columns of logits and vocab_size 6; got 6",
        ),
        (
            lambda: native.cross_entropy_statistics(X, T, -1, 5, 5, -100, False),
            "num_columns must lie within the 5 columns of logits and vocab_size 5; got 5",
        ),
        (
            lambda: native.cross_entropy_statistics(X, T, 0, -1, 5, -100, False),
            "num_columns must lie within the 5 columns of logits and vocab_size 5; got -1",
        ),
        (
            lambda: native.cross_entropy_statistics(X, T, 6, 5, 10, -100, False),
            "num_columns must lie within the 5 columns of logits and vocab_size 10; got 5",
        ),
        *(
            (
                lambda statistics=statistics: native.cross_entropy(X, T, statistics, *COLUMNS, 0.0, 0.0, False, None),
                r"statistics must be float32 \[4, rows\], contiguous; got \[",
            )
            for statistics in (STATISTICS.double(), torch.ones(4, 3), torch.ones(4), torch.ones(2, 4).T)
        ),
        (
            lambda: native.cross_entropy_backward(torch.ones(2), X, T, torch.ones(4, 3), *COLUMNS, 0.0, 0.0),
            r"statistics must be float32 \[4, rows\], contiguous; got \[4, 3\]",
        ),
        (
            lambda: native.cross_entropy_fused_(X.clone(), T, 0, 4, 5, -100, 0.0, 0.0, 1.0),
            "num_columns must be the full vocab_size, 5; got 4",
        ),
        (
            lambda: native.cross_entropy_rescale_(X.clone(), torch.ones(2).double(), 1.0),
            r"dloss must be float32, one for each of the 2 rows of dlogits; got \[2\]",
        ),
        (
            lambda: native.cross_entropy(X, T, STATISTICS[:3], *COLUMNS, 0.0, 0.0, False, None),
            r"statistics must be float32 \[4, rows\], contiguous; got \[3, 2\]",
        ),
        (
            lambda: native.cross_entropy_backward(torch.ones(3), X, T, STATISTICS, *COLUMNS, 0.0, 0.0),
            r"dloss must have the shape of targets, \[2\]; got \[3\]",
        ),
        (
            lambda: native.cross_entropy_backward(torch.ones(2).double(), X, T, STATISTICS, *COLUMNS, 0.0, 0.0),
            "dloss must be float32; got Double",
        ),
        (
            lambda: native.cross_entropy_backward_(
                torch.ones(5, 2).T, torch.ones(2), T, STATISTICS, *COLUMNS, 0.0, 0.0
            ),
            "logits must be contiguous in its last dimension to be overwritten",
        ),
        (
            lambda: native.cross_entropy_fused_(torch.ones(5, 2).T, T, *COLUMNS, 0.0, 0.0, 1.0),
            "logits must be contiguous in its last dimension to be overwritten",
        ),
        (
            lambda: native.cross_entropy_fused_(X.clone(), T, 5, 5, 10, -100, 0.0, 0.0, 1.0),
            "num_columns must be the full vocab_size, 10; got 5",
        ),
        (
            lambda: native.cross_entropy_rescale_(X.clone(), torch.ones(3), 1.0),
            r"dloss must be float32, one for each of the 2 rows of dlogits; got \[3\]",
        ),
    ],
)
def test_native_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
