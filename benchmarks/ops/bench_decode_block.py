"""decode_block against the same block run operator by operator: one block of the demo's model and of Pythia-160M, for 1
and 8 sequences with 256 tokens in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, dtype_name, run

from neox.config.schema import ModelConfig
from neox.model.attention import Context
from neox.model.gpt import GPT
from neox.model.kv_cache import KVCache
from neox.parallel.mesh import Mesh

TOKENS = 256
SHAPES = {"demo": (256, 4), "Pythia-160M": (768, 12)}


def block_step(model: GPT, batch: int, fused: bool):
    """One block's step on a new token of each sequence: by decode_block if `fused`, else operator by operator."""
    block, dtype = model.layers["0"], next(model.parameters()).dtype
    cache = KVCache(TOKENS + 1)
    cos, sin = model.rotary.rows(TOKENS, 1, None, TOKENS + 1, torch.device("cpu"))
    size = model.config.hidden_size
    with torch.no_grad():
        model(torch.randint(64, (batch, TOKENS)), cache=cache)
    if not fused:
        cache.decoders[0] = None
    stream, delta, context = (
        torch.randn(batch, 1, size, dtype=dtype),
        torch.randn(batch, 1, size, dtype=dtype),
        Context(cos, sin, None, cache),
    )

    @torch.no_grad()
    def step() -> object:
        return block(stream, delta, context)

    return step


def rows(options: Options) -> Iterator[Row]:
    """Microseconds of one step of the block."""
    for name, (size, heads) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            config = ModelConfig(
                num_layers=1,
                hidden_size=size,
                num_attention_heads=heads,
                vocab_size=64,
                max_position_embeddings=512,
                rotary_pct=0.25,
            )
            model = GPT(config, Mesh.single(), dtype=dtype).eval()
            for batch in (1, 8):
                setting = f"{name} batch {batch} {dtype_name(dtype)}"
                yield from compare(
                    "decode_block",
                    setting,
                    block_step(model, batch, True),
                    {"one by one": block_step(model, batch, False)},
                    options,
                )


if __name__ == "__main__":
    run(__doc__, rows)
