"""Builders of the checkpoint tests: a small model's state, partitioned in any layout, and a one-process save."""

from __future__ import annotations

from pathlib import Path

import torch

from neox.checkpoint.manifest import Lineage
from neox.checkpoint.reshard import Fragment, full_slices, slice_shape
from neox.checkpoint.save import Content, save

LINEAGE = Lineage("ab" * 16, 0)


def make_state(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    """(name, kind) -> logical tensor: odd sizes, a scalar, several dtypes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.word.weight": (19, 6),
        "layers.0.attention.qkv.weight": (12, 5),
        "layers.0.norm1.bias": (7,),
        "scale": (),
    }
    state = {}
    for name, shape in shapes.items():
        for kind in ("weight", "exp_avg"):
            state[name, kind] = torch.randn(shape, generator=generator)
    state["layers.0.norm1.bias", "exp_avg_sq"] = torch.randn(7, generator=generator).bfloat16()
    state["layers.0.norm1.bias", "count"] = torch.arange(7)
    return state


def full_fragments(state: dict[tuple[str, str], torch.Tensor]) -> list[Fragment]:
    """Each tensor as one fragment."""
    return [
        Fragment(name, kind, tuple(value.shape), full_slices(value.shape), 0, value.numel(), value.reshape(-1))
        for (name, kind), value in state.items()
    ]


def tp_slices(shape: tuple[int, ...], tp: int, rank: int, dim: int = 0):
    """Slices of a tensor cut `tp` ways along `dim`; vectors and scalars are replicated."""
    if len(shape) < 2:
        return full_slices(shape)
    bounds = [shape[dim] * part // tp for part in range(tp + 1)]
    return tuple((bounds[rank], bounds[rank + 1]) if axis == dim else (0, size) for axis, size in enumerate(shape))


def cut_fragments(
    state: dict[tuple[str, str], torch.Tensor], *, tp: int, tp_rank: int, dp: int, dp_rank: int, zero: bool
) -> list[Fragment]:
    """What rank (tp_rank, dp_rank) holds: a slice of the matrices (qkv by columns), of it a flat range under ZeRO."""
    held = []
    for (name, kind), value in state.items():
        slices = tp_slices(tuple(value.shape), tp, tp_rank, dim=1 if "qkv" in name else 0)
        local = value[tuple(slice(low, high) for low, high in slices)].contiguous().reshape(-1)
        size = local.numel()
        start, stop = (size * dp_rank // dp, size * (dp_rank + 1) // dp) if zero else (0, size)
        assert size == torch.Size(slice_shape(slices)).numel()
        held.append(Fragment(name, kind, tuple(value.shape), slices, start, stop, local[start:stop]))
    return held


def save_one(root: Path, step: int = 100, state=None, content=None, **changes) -> Path:
    """Saves tensors `state` and counters `content` from one process.

    `changes` are other arguments of save() and Content().
    """
    described = {
        "step": step,
        "state": {"step": step, "consumed": 8 * step} if content is None else content,
        "lineage": LINEAGE,
        "config_lock": "train: {seed: 1}\n",
        "model_config": {"num_layers": 1},
    }
    described |= {
        key: changes.pop(key) for key in ("lineage", "config_lock", "model_config", "layout") if key in changes
    }
    fragments = changes.pop("fragments", None)
    if fragments is None:
        fragments = full_fragments(make_state() if state is None else state)
    changes.setdefault("rng", {"cpu": torch.arange(33, dtype=torch.uint8)})
    return save(root, Content(**described), fragments, **changes)


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
