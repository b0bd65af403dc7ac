"""Greedy decoding of the demo's model on a CPU, neox against transformers.generate: batch 1 and 8, a prompt of
32 tokens, 96 new tokens.

Both models have the same weights, and their tokens are compared before they are timed. Figures are new tokens per
second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, run
from transformers_peer import build_peer, neox_copy

from neox.config.load import load_config
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

VOCAB, PROMPT, NEW = 4096, 32, 96
INITIALIZER_RANGE = 0.2  # weights so large that the logits of two tokens are seldom close


def models() -> tuple[GPT, PreTrainedModel]:
    """The demo's model with the same random weights in neox and in transformers."""
    shape = load_config("demo.yml", overrides=[f"model.vocab_size={VOCAB}", "tokenizer.file=null"]).model
    peer = build_peer(shape, initializer_range=INITIALIZER_RANGE).eval()
    peer.generation_config.eos_token_id = None  # otherwise min_new_tokens hides this token, which neox may choose
    peer.generation_config.pad_token_id = 0
    return neox_copy(peer, Mesh.single(), torch.float32).eval(), peer


def check_tokens(ours: list[list[int]], peer: list[list[int]]) -> None:
    """Ends the program if the models differ in more than one token of a hundred."""
    pairs = [(a, b) for rows in zip(ours, peer, strict=True) for a, b in zip(*rows, strict=True)]
    equal = sum(a == b for a, b in pairs)
    if equal < 0.99 * len(pairs):
        raise SystemExit(f"generated tokens differ; got={equal} equal tokens of {len(pairs)}")


def rows(options: Options) -> Iterator[Row]:
    """Batch 1 and 8."""
    model, peer = models()
    count = 24 if options.quick else NEW
    params = SamplingParams(count, 0.0)
    for batch in (1, 8):
        prompts = torch.randint(VOCAB, (batch, PROMPT))

        def ours(prompts=prompts) -> list[list[int]]:
            return generate(model, prompts.tolist(), params)

        def transformers(prompts=prompts) -> torch.Tensor:
            return peer.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )

        check_tokens(ours(), transformers()[:, PROMPT:].tolist())
        yield from compare(
            "generate greedy fp32",
            f"batch {batch}, {PROMPT} + {count} tokens",
            ours,
            {"transformers.generate": transformers},
            options,
            work=batch * count,
            unit="tokens/s",
        )


if __name__ == "__main__":
    run(__doc__, rows)
