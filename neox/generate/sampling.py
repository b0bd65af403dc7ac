"""Sampling of the next token from the model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from neox.errors import ConfigError

LOWEST_TEMPERATURE = 1e-5  # logits divided by less overflow in fp32
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd 64-bit constant: neighbouring prompts get seeds far apart


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled.

    Args:
        max_new_tokens: at most this many tokens are generated per prompt.
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: sample from the k most likely tokens; None: from all.
        top_p: sample from the smallest set of most likely tokens whose probability reaches p (nucleus sampling,
            arXiv:1904.09751); None: from all. Applied after top_k.
        seed: every prompt has its own random stream, a function of (seed, number of the prompt), so that its text does
            not depend on how prompts are batched.

    Raises:
        ConfigError: a value out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234

    def __post_init__(self):
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "> 0")
        _require(
            self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature < math.inf,
            "temperature",
            self.temperature,
            f"0 (greedy), or finite and >= {LOWEST_TEMPERATURE}",
        )
        _require(self.top_k is None or self.top_k > 0, "top_k", self.top_k, "> 0")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "0 < top_p <= 1")
        _require(self.seed >= 0, "seed", self.seed, ">= 0")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without sampling."""
        return self.temperature == 0


def _require(holds: bool, key: str, got: object, want: str) -> None:
    if not holds:
        raise ConfigError("sampling parameter out of range", where=key, got=got, want=want)


def prompt_generator(seed: int, prompt: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random stream of one prompt."""
    generator = torch.Generator(device=device)
    generator.manual_seed((seed + (prompt + 1) * _SEED_STRIDE) % 2**63)
    return generator


def filter_logits(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Set the logits of excluded tokens to -inf; the most likely token is never excluded.

    Args:
        logits: [b, v] fp32, divided by the temperature.
        top_k: see SamplingParams.
        top_p: see SamplingParams.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]  # [b, 1]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        preceding = probability.cumsum(dim=-1) - probability  # mass of the tokens that are more likely
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, preceding >= top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def choose(logits: torch.Tensor, params: SamplingParams, generators: list[torch.Generator]) -> torch.Tensor:
    """The next token of every row.

    Args:
        logits: [b, v], any floating dtype.
        params: how to sample.
        generators: one per row (`prompt_generator`); greedy decoding does not use them.

    Returns:
        [b] int64.
    """
    logits = logits.float()
    if params.greedy:
        return logits.argmax(dim=-1)
    filtered = filter_logits(logits / params.temperature, params.top_k, params.top_p)
    probability = filtered.softmax(dim=-1)
    drawn = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probability, generators, strict=True)
    ]
    return torch.cat(drawn)
