"""Decoding: prompts in, continuations out; and the model of a checkpoint, ready for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from neox.checkpoint.find import resolve
from neox.checkpoint.lora_merge import open_weights
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.generate.cache import KVCache
from neox.generate.sampling import SamplingParams, choose, prompt_generator
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

OnToken = Callable[[int, int], None]
IsDone = Callable[[int, list[int]], bool]


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
    eod_id: int | Collection[int] | None = None,
    use_cache: bool = True,
    on_token: OnToken | None = None,
    is_done: IsDone | None = None,
    first_stream: int = 0,
) -> list[list[int]]:
    """Continue every prompt.

    Prompts of different lengths are padded on the left; padding is invisible to the attention (segment ids) and does not
    count in the positions, so that a prompt gives the same text alone and in a batch. Under dynamic NTK a sequence is rotated by its own
    current length; beyond the trained length every step computes all tokens, since what a cache holds belongs to an earlier length.

    Args:
        model: the model, any device and dtype.
        prompts: token ids, at least one per prompt.
        params: how to draw, and how many tokens at most.
        eod_id: a prompt stops when it, or one of them, is drawn (it is not returned); None: never.
        use_cache: keep keys and values; False recomputes every token at every step (a slow check).
        first_stream: number of the first prompt's random stream, so that a prompt draws the same in any batch.
        is_done: asked with (number of the prompt, its new tokens) after each; true ends it.
        on_token: called with (number of the prompt, token) as soon as a token is known.

    Returns:
        the new token ids of every prompt.

    Raises:
        ConfigError: an empty prompt, a token beyond the vocabulary, more tokens than the model has positions.
    """
    check_prompts(model.config, prompts, params)
    if not prompts:
        return []
    device = next(model.parameters()).device
    batch = _Batch(prompts, params.max_new_tokens, device)
    generators = [prompt_generator(params.seed, first_stream + row, device) for row in range(len(prompts))]
    steady = model.rotary.steady_length if model.rotary is not None else None
    cache = KVCache(model.config.num_layers, min(batch.capacity, steady or batch.capacity)) if use_cache else None
    rows = _Rows(len(prompts), eod_id, on_token, is_done)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(params.max_new_tokens):
                if steady is not None and batch.length > steady:
                    cache = None  # every token changes the frequencies, so all keys and values are computed again
                chosen = choose(batch.next_logits(model, cache), params, generators)  # [b]
                if rows.add(chosen.tolist()):
                    break
                batch.append(chosen)
    finally:
        model.train(was_training)
    return rows.generated


class _Rows:
    """The new tokens of every prompt, and which of them have ended. Arguments as for `generate`."""

    def __init__(self, count: int, eod_id: int | Collection[int] | None, on_token: OnToken | None, is_done: IsDone | None):
        self.generated: list[list[int]] = [[] for _ in range(count)]
        self._ends = frozenset(() if eod_id is None else (eod_id,) if isinstance(eod_id, int) else eod_id)
        self._done = [False] * count
        self._on_token = on_token
        self._is_done = is_done

    def add(self, chosen: list[int]) -> bool:
        """Take one token per prompt; true when all have ended."""
        for row, token in enumerate(chosen):
            self._done[row] = self._done[row] or token in self._ends
            if not self._done[row]:
                self.generated[row].append(token)
                if self._on_token is not None:
                    self._on_token(row, token)
                self._done[row] = self._is_done is not None and self._is_done(row, self.generated[row])
        return all(self._done)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Raise ConfigError for prompts that a model of this config cannot continue, and for one that continues none."""
    if config.output == "score":
        raise ConfigError("a reward model writes no text", where="model.output", got="score", want="tokens")
    vocab_size = config.vocab_size
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
        limit = config.max_position_embeddings
        if config.position_embedding in ("rotary", "learned") and total > limit:
            raise ConfigError(
                "more tokens than the model has positions",
                where=f"prompt {number}",
                got=f"{len(prompt)} of the prompt + {params.max_new_tokens} new",
                want=f"at most {limit} (model.max_position_embeddings)",
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
    def length(self) -> int:
        """Tokens of the longest row."""
        return self._length

    @property
    def capacity(self) -> int:
        """Columns that there is room for."""
        return self._buffer.shape[1]

    def next_logits(self, model: GPT, cache: KVCache | None) -> torch.Tensor:
        """Logits of the token after the last one, [b, v]; reads only what the cache does not hold.

        The ids are not checked again: those of the prompts were (`check_prompts`), and the others are places in logits [b, v].
        """
        start = cache.length if cache is not None else 0
        tokens = self._buffer[:, start : self._length]
        if not self._ragged:
            return model(tokens, cache=cache, checked=True)[:, -1]
        columns = torch.arange(self._length, device=tokens.device)[None]  # [1, t]
        positions = (columns[:, start:] - self._pads).clamp(min=0)  # [b, t - start]
        segments = (columns >= self._pads).to(torch.int32)  # [b, t]; 0 is padding
        return model(tokens, segment_ids=segments, position_ids=positions, cache=cache, checked=True)[:, -1]

    def append(self, chosen: torch.Tensor) -> None:
        """Add one token to every row."""
        self._buffer[:, self._length] = chosen
        self._length += 1
