"""Text generation: a checkpoint's model for inference, and the decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from neox.checkpoint.find import resolve
from neox.checkpoint.lora_merge import open_weights
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.generate.sampling import SamplingParams, choose, prompt_generator
from neox.model import pipeline
from neox.model.checks import with_supported_attention
from neox.model.gpt import GPT
from neox.model.kv_cache import KVCache
from neox.parallel.mesh import Mesh

OnToken = Callable[[int, int], None]
IsDone = Callable[[int, list[int]], bool]


def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", mesh: Mesh | None = None
) -> GPT:
    """The model of a checkpoint, in evaluation mode.

    Args:
        path: a run folder, whose newest complete checkpoint is loaded, or a checkpoint folder.
        dtype: dtype of the weights; checkpoints hold fp32.
        device: torch device, unless a mesh is given.
        mesh: layout of the processes that load the model together, on mesh.device. It need not be the layout that wrote
            the checkpoint. None: this process alone.

    Returns:
        GPT: `model(tokens [b, s]) -> logits [b, s, v]`; with several pipeline stages use `neox.model.pipeline`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its tensors do not fit its config.
        ConfigError: no attention kernels support the model in this dtype on this device.
    """
    checkpoint = open_weights(resolve(path))
    target = torch.device(device) if mesh is None else mesh.device
    mesh = Mesh.single("meta") if mesh is None else replace(mesh, device=torch.device("meta"))
    config = with_supported_attention(ModelConfig(**checkpoint.model_config), dtype, target.type)
    model = GPT(config, mesh, dtype=dtype).materialize(target, initialize=False)
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
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue every prompt.

    Prompts of different lengths are padded on the left. Padding is hidden from the attention (segment ids) and does not
    count in positions, so that a prompt gives the same text alone and in a batch. Under dynamic NTK each sequence is
    rotated by its own current length. Beyond the trained length every step recomputes all tokens, because cached keys
    were rotated for a shorter length.

    Args:
        model: the model, any device and dtype.
        prompts: token ids, at least one per prompt.
        params: how to sample, and the maximum number of tokens.
        eod_id: ends a prompt when this id, or one of these, is sampled; it is not returned. None: nothing ends it.
        use_cache: store keys and values. False recomputes every token at every step, which is slow and serves as a
            check.
        on_token: called with (number of the prompt, token) for each new token.
        is_done: called with (number of the prompt, its new tokens) after each token; true ends the prompt.
        streams: the number of each prompt's random stream, so that its text is the same in any batch. None: 0, 1, ...

    Returns:
        the new token ids of every prompt.

    Raises:
        ConfigError: an empty prompt, a token outside the vocabulary, or more tokens than the model has positions.
    """
    check_prompts(model.config, prompts, params)
    if not prompts:
        return []
    device = next(model.parameters()).device
    batch = _Batch(prompts, params.max_new_tokens, device)
    generators = [prompt_generator(params.seed, stream, device) for stream in streams or range(len(prompts))]
    cacheable = model.rotary.original_length if model.rotary is not None else None  # dynamic NTK
    cache = KVCache(min(batch.capacity, cacheable or batch.capacity)) if use_cache else None
    continuations = _Continuations(len(prompts), eod_id, on_token, is_done)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(params.max_new_tokens):
                if cacheable is not None and batch.length > cacheable:
                    cache = None  # every token changes the frequencies, and with them all keys
                chosen = choose(batch.next_logits(model, cache), params, generators)  # [b]
                if continuations.add(chosen.tolist()):
                    break
                batch.append(chosen)
    finally:
        model.train(was_training)
    return continuations.tokens


class _Continuations:
    """The new tokens of every prompt, and which of them have ended. Arguments as for `generate`."""

    def __init__(
        self, count: int, eod_id: int | Collection[int] | None, on_token: OnToken | None, is_done: IsDone | None
    ):
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._ends = frozenset(() if eod_id is None else (eod_id,) if isinstance(eod_id, int) else eod_id)
        self._done = [False] * count
        self._on_token = on_token
        self._is_done = is_done

    def add(self, chosen: list[int]) -> bool:
        """Add one token per prompt; returns whether all prompts have ended."""
        for row, token in enumerate(chosen):
            self._done[row] = self._done[row] or token in self._ends
            if not self._done[row]:
                self.tokens[row].append(token)
                if self._on_token is not None:
                    self._on_token(row, token)
                self._done[row] = self._is_done is not None and self._is_done(row, self.tokens[row])
        return all(self._done)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Raise ConfigError for prompts that a model of this config cannot continue."""
    if config.output == "score":
        raise ConfigError("a reward model generates no text", where="model.output", got="score", want="tokens")
    vocab_size = config.vocab_size
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(
                "empty prompt",
                where=f"prompt {number}",
                want="at least one token",
                do="give a text, or start from the end-of-document token (--unconditional)",
            )
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ConfigError(
                "token outside the vocabulary",
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
    """The tokens of a batch of prompts of different lengths, padded on the left, to which new ones are appended."""

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
        """Tokens that fit in a row."""
        return self._buffer.shape[1]

    def next_logits(self, model: GPT, cache: KVCache | None) -> torch.Tensor:
        """Logits of the next token, [b, v]; computes only tokens that the cache does not hold.

        The ids need no check: those of prompts were checked by `check_prompts`, the others are indices of logits [b,
        v].
        """
        start = cache.length if cache is not None else 0
        tokens = self._buffer[:, start : self._length]
        if not self._ragged:
            return pipeline.logits(model, tokens, cache=cache, checked=True)[:, -1]
        columns = torch.arange(self._length, device=tokens.device)[None]  # [1, t]
        positions = (columns[:, start:] - self._pads).clamp(min=0)  # [b, t - start]
        segments = (columns >= self._pads).to(torch.int32)  # [b, t]; 0 is padding
        return pipeline.logits(model, tokens, segment_ids=segments, position_ids=positions, cache=cache, checked=True)[
            :, -1
        ]

    def append(self, chosen: torch.Tensor) -> None:
        """Add one token to every row."""
        self._buffer[:, self._length] = chosen
        self._length += 1
