"""Decoding: prompts in, continuations out; and the model of a checkpoint, ready for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from neox.checkpoint.load import resolve
from neox.checkpoint.merged import open_weights
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.generate.cache import KVCache
from neox.generate.sampling import SamplingParams, choose, prompt_generator
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

OnToken = Callable[[int, int], None]


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", mesh: Mesh | None = None) -> GPT:
    """The model of a checkpoint, in evaluation mode.

    Args:
        path: a run folder (its newest complete checkpoint is taken), or one checkpoint folder.
        dtype: dtype of the weights; checkpoints hold fp32.
        device: torch device.
        mesh: layout over processes that load it together, whatever layout wrote it; its device is taken then. None: this process alone.

    Returns:
        GPT: `model(tokens [b, s]) -> logits [b, s, v]`.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or one whose tensors are not those of its own config.
    """
    checkpoint = open_weights(resolve(path))
    device = device if mesh is None else mesh.device
    mesh = Mesh.single("meta") if mesh is None else replace(mesh, device=torch.device("meta"))
    model = GPT(ModelConfig(**checkpoint.model_config), mesh, dtype=dtype).materialize(device, initialize=False)
    model.load_weights((name, checkpoint.tensor(name)) for name in checkpoint.names())
    return model.eval()


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    eod_id: int | None = None,
    use_cache: bool = True,
    on_token: OnToken | None = None,
    is_done: Callable[[list[int]], bool] | None = None,
    first_stream: int = 0,
) -> list[list[int]]:
    """Continue every prompt.

    Prompts of different lengths are padded on the left; padding is invisible to the attention (segment ids) and does not
    count in the positions, so that a prompt gives the same text alone and in a batch.

    Args:
        model: the model, any device and dtype.
        prompts: token ids, at least one per prompt.
        params: how to draw, and how many tokens at most.
        eod_id: a prompt stops when it is drawn (it is not returned); None: never.
        use_cache: keep keys and values; False recomputes every token at every step (a slow check).
        first_stream: number of the first prompt's random stream, so that a prompt draws the same in any batch.
        is_done: asked with a prompt's new tokens after each; true ends it.
        on_token: called with (number of the prompt, token) as soon as a token is known.

    Returns:
        the new token ids of every prompt.

    Raises:
        ConfigError: an empty prompt, a token beyond the vocabulary, more tokens than the model has positions.
    """
    check_prompts(model, prompts, params)
    if not prompts:
        return []
    device = next(model.parameters()).device
    batch = _Batch(prompts, params.max_new_tokens, device)
    generators = [prompt_generator(params.seed, first_stream + row, device) for row in range(len(prompts))]
    cache = KVCache(model.config.num_layers, batch.capacity) if use_cache else None
    generated: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(params.max_new_tokens):
                chosen = choose(batch.next_logits(model, cache), params, generators)  # [b]
                for row, token in enumerate(chosen.tolist()):
                    done[row] = done[row] or token == eod_id
                    if not done[row]:
                        generated[row].append(token)
                        if on_token is not None:
                            on_token(row, token)
                        done[row] = is_done is not None and is_done(generated[row])
                if all(done):
                    break
                batch.append(chosen)
    finally:
        model.train(was_training)
    return generated


def check_prompts(model: GPT, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Raise ConfigError for prompts that the model cannot continue, and for a model that continues none."""
    if model.config.output == "score":
        raise ConfigError("a reward model writes no text", where="model.output", got="score", want="tokens")
    vocab_size = model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError("empty prompt", where=f"prompt {number}", want="at least one token", do="start from the end-of-document token")
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ConfigError(
                "token beyond the vocabulary",
                where=f"prompt {number}",
                got=outside[0],
                want=f"0 <= id < {vocab_size}",
                do="use the tokenizer of the training data",
            )
        total = len(prompt) + params.max_new_tokens
        limit = model.config.max_position_embeddings
        if model.config.position_embedding == "learned" and total > limit:
            raise ConfigError(
                "more tokens than the model has positions",
                where=f"prompt {number}",
                got=total,
                want=f"<= {limit}",
                do="lower max_new_tokens or shorten the prompt",
            )


class _Batch:
    """The growing token matrix of a batch of ragged prompts, padded on the left."""

    def __init__(self, prompts: Sequence[Sequence[int]], room: int, device: torch.device):
        longest = max(len(prompt) for prompt in prompts)
        pads = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        self._buffer = torch.zeros(len(prompts), longest + room, dtype=torch.int64, device=device)
        self._buffer[:, :longest] = torch.tensor(rows, dtype=torch.int64, device=device)
        self._length = longest
        self._pads = torch.tensor(pads, dtype=torch.int64, device=device)[:, None]  # [b, 1]
        self._ragged = any(pads)

    @property
    def capacity(self) -> int:
        """Columns that there is room for."""
        return self._buffer.shape[1]

    def next_logits(self, model: GPT, cache: KVCache | None) -> torch.Tensor:
        """Logits of the token after the last one, [b, v]; reads only what the cache does not hold."""
        start = cache.length if cache is not None else 0
        tokens = self._buffer[:, start : self._length]
        if not self._ragged:
            return model(tokens, cache=cache)[:, -1]
        columns = torch.arange(self._length, device=tokens.device)[None]  # [1, t]
        positions = (columns[:, start:] - self._pads).clamp(min=0)  # [b, t - start]
        segments = (columns >= self._pads).to(torch.int32)  # [b, t]; 0 is padding
        return model(tokens, segment_ids=segments, position_ids=positions, cache=cache)[:, -1]

    def append(self, chosen: torch.Tensor) -> None:
        """Add one token to every row."""
        self._buffer[:, self._length] = chosen
        self._length += 1
