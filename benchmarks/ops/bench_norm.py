"""layer_norm, rms_norm and dual_layer_norm against torch, eager and compiled: forward, and backward alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare_op, dtype_name, liger, run, with_compiled

from neox.ops import dual_layer_norm, layer_norm, rms_norm

EPS = 1e-5


def torch_layer_norm(x, weight, bias):
    """torch's layer norm, one fused operator."""
    return functional.layer_norm(x, weight.shape, weight, bias, EPS)


def torch_residual(x, residual, weight, bias):
    """Two operators: the residual add, and a layer norm."""
    s = x + residual
    return functional.layer_norm(s, weight.shape, weight, bias, EPS), s


def torch_dual(x, w1, b1, w2, b2):
    """Two layer norms of the same input."""
    return functional.layer_norm(x, w1.shape, w1, b1, EPS), functional.layer_norm(x, w2.shape, w2, b2, EPS)


def torch_rms_norm(x, weight):
    """torch's RMS norm, one operator."""
    return functional.rms_norm(x, weight.shape, weight, EPS)


def rows(options: Options) -> Iterator[Row]:
    """Pythia-160M and Pythia-1.4B widths."""
    for tokens, hidden in options.shapes([(256, 768)], [(2048, 768), (2048, 2048)], [(32768, 768), (16384, 2048)]):
        for dtype in options.dtypes:
            x, residual = torch.randn(2, tokens, hidden).to(dtype)
            w1, b1, w2, b2 = torch.randn(4, hidden).to(dtype)
            setting = f"{tokens}x{hidden} {dtype_name(dtype)}"
            size = x.numel() * x.element_size()
            cases = (  # name, neox, torch, leaves, tensors that the forward and the backward read and write
                ("layer_norm", lambda x, w, b: layer_norm(x, w, b, EPS), torch_layer_norm, (x, w1, b1), 2, 3),
                (
                    "layer_norm+residual",
                    lambda x, r, w, b: layer_norm(x, w, b, EPS, r),
                    torch_residual,
                    (x, residual, w1, b1),
                    4,
                    4,
                ),
                (
                    "dual_layer_norm",
                    lambda x, w1, b1, w2, b2: dual_layer_norm(x, w1, b1, w2, b2, EPS),
                    torch_dual,
                    (x, w1, b1, w2, b2),
                    3,
                    4,
                ),
                ("rms_norm", lambda x, w: rms_norm(x, w, EPS), torch_rms_norm, (x, w1), 2, 3),
            )
            for name, ours, eager, leaves, forward, backward in cases:
                peers = with_compiled(eager, options)
                yield from compare_op(
                    name,
                    setting,
                    ours,
                    peers,
                    leaves,
                    options,
                    forward_bytes=forward * size,
                    backward_bytes=backward * size,
                )
            traffic = {"forward_bytes": 2 * size, "backward_bytes": 3 * size}
            for peer, op in liger("layer_norm", options).items():
                liger_norm = {peer: partial(op, eps=EPS)}
                yield from compare_op(
                    "layer_norm",
                    setting,
                    lambda X, W, B: layer_norm(X, W, B, EPS),
                    liger_norm,
                    (x, w1, b1),
                    options,
                    **traffic,
                )
            for peer, op in liger("rms_norm", options).items():
                liger_norm = {peer: partial(op, eps=EPS, in_place=False)}
                yield from compare_op(
                    "rms_norm", setting, lambda X, W: rms_norm(X, W, EPS), liger_norm, (x, w1), options, **traffic
                )


if __name__ == "__main__":
    run(__doc__, rows)
