"""Greedy decoding on a CPU, ours against transformers.generate: the demo's model, batch 1 and 8, a prompt of 32 tokens
and 96 new ones.

Both models have the same weights, and their tokens are compared before anything is timed. Figures are new tokens per
second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, parse, show

from neox.convert.huggingface import from_huggingface
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

VOCAB, PROMPT, NEW = 4096, 32, 96


def models() -> tuple[GPT, GPTNeoXForCausalLM]:
    """The demo's model with random weights, ours and theirs."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        initializer_range=0.2,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = GPTNeoXForCausalLM(config).eval()
    our_config, weights = from_huggingface(theirs)
    ours = GPT(our_config, Mesh.single())
    ours.load_weights(weights)
    return ours.eval(), theirs


def rows(options: Options) -> Iterator[Row]:
    """Batch 1 and 8."""
    ours, theirs = models()
    count = 24 if options.quick else NEW
    for batch in (1, 8):
        prompts = torch.randint(VOCAB, (batch, PROMPT))
        params = SamplingParams(count, 0.0)

        def run(prompts=prompts, params=params) -> list[list[int]]:
            return generate(ours, prompts.tolist(), params)

        def peer(prompts=prompts, count=count) -> torch.Tensor:
            return theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )

        agreed = sum(
            a == b
            for ours_row, theirs_row in zip(run(), peer()[:, PROMPT:].tolist(), strict=True)
            for a, b in zip(ours_row, theirs_row, strict=True)
        )
        if agreed < 0.99 * batch * count:
            raise SystemExit(f"tokens differ: {agreed} of {batch * count} agree")
        setting = f"batch {batch}, {PROMPT} + {count} tokens"
        yield from compare(
            "generate greedy fp32",
            setting,
            run,
            {"transformers.generate": peer},
            options,
            work=batch * count * 1e9,
            unit="tokens/s",
        )


if __name__ == "__main__":
    options = parse(__doc__.splitlines()[0])
    show(rows(options), options)
