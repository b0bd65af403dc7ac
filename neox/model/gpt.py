"""The language model: embedding, blocks, final norm, output projection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from neox.config.schema import ModelConfig
from neox.errors import CheckpointError, ConfigError, DataError
from neox.model.attention import Context
from neox.model.block import Block
from neox.model.init import fill, initial_value
from neox.model.norm import make_norm
from neox.model.positional import PositionEmbedding, RotaryTable
from neox.parallel.collectives import all_gather, gather_from
from neox.parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from neox.parallel.embedding import VocabParallelEmbedding, VocabParallelHead, project_to_vocabulary
from neox.parallel.mesh import Layout, Mesh


class Embedding(nn.Module):
    """Words, plus learned positions where the config has them, with dropout."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, dtype: torch.dtype):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.word = VocabParallelEmbedding(config.vocab_size, config.padded_vocab_size(mesh.tp), config.hidden_size, mesh, dtype=dtype)
        learned = config.position_embedding == "learned"
        self.position = PositionEmbedding(config.max_position_embeddings, config.hidden_size, mesh, dtype=dtype) if learned else None

    def forward(self, tokens: torch.Tensor, start: int, position_ids: torch.Tensor | None) -> torch.Tensor:
        """tokens int64 [b, s], positions from `start` on or position_ids [b, s] -> [b, s, h]."""
        x = self.word(tokens)
        if self.position is not None:
            x = x + self.position(start, tokens.shape[1], position_ids)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """A GPT-style language model. `forward` gives logits, `loss` the loss per token without keeping logits of all processes.

    Args:
        config: the architecture.
        mesh: layout over processes; parameters are made on mesh.device, which may be "meta" (see `materialize`).
        dtype: dtype of parameters and activations.
        seed: seed of the initial weights.
        activation_checkpointing: "none"; "selective": the MLP's activation is computed again in the backward; "full": every block is.

    Raises:
        ConfigError: sizes that contradict each other or cannot be cut over the mesh.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, *, dtype: torch.dtype = torch.float32, seed: int = 1234, activation_checkpointing: str = "none"):
        super().__init__()
        if activation_checkpointing not in ("none", "selective", "full"):
            raise ConfigError(
                "unknown activation checkpointing", where="train.activation_checkpointing", got=activation_checkpointing, want="none, selective or full"
            )
        self.config = config
        self.mesh = mesh
        self.seed = seed
        self.rotary = RotaryTable(config) if config.position_embedding == "rotary" else None
        self.embedding = Embedding(config, mesh, dtype=dtype)
        blocks = [Block(config, mesh, i, dtype=dtype, activation_checkpointing=activation_checkpointing) for i in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = make_norm(config, mesh, dtype)
        self.head = None
        if not config.tie_embeddings:
            self.head = VocabParallelHead(config.vocab_size, config.padded_vocab_size(mesh.tp), config.hidden_size, mesh, dtype=dtype)
        if mesh.device.type != "meta":
            self.initialize()

    def forward(self, tokens: torch.Tensor, *, segment_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None, cache=None) -> torch.Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 [b, s].
            segment_ids: int32 [b, s], attention only between equal ids; with a cache [b, t], t = cache.length + s.
            position_ids: int64 [b, s]; default cache.length + 0 .. s - 1.
            cache: keys and values of earlier tokens (neox.generate.cache); it takes in these tokens.

        Returns:
            [b, s, vocab_size] in the model's dtype.

        Raises:
            DataError: token ids outside the vocabulary, or positions outside max_position_embeddings.
        """
        logits = self._logits(self._hidden(tokens, segment_ids, position_ids, cache))
        return gather_from(logits, self.mesh.tp_group)[..., : self.config.vocab_size]

    def loss(
        self, tokens: torch.Tensor, targets: torch.Tensor, *, segment_ids: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy per token: fp32 [b * s], 0 where the target is -100. Arguments as in `forward`; targets int64 [b, s].

        Raises:
            DataError: as `forward`, and targets outside the vocabulary.
        """
        if targets.shape != tokens.shape:
            raise DataError("targets do not fit the tokens", where="GPT.loss", got=tuple(targets.shape), want=tuple(tokens.shape))
        self._check_ids("target", targets.masked_fill(targets == IGNORED, 0))
        logits = self._logits(self._hidden(tokens, segment_ids, position_ids, None))
        return vocab_parallel_cross_entropy(logits, targets, self.mesh, vocab_size=self.config.vocab_size)

    def _hidden(self, tokens: torch.Tensor, segment_ids: torch.Tensor | None, position_ids: torch.Tensor | None, cache) -> torch.Tensor:
        """Normed output of the last block, [b, s, h]."""
        self._check_ids("token", tokens)
        start = 0 if cache is None else cache.length
        length = tokens.shape[1]
        reach = self._check_positions(start, length, position_ids)
        cos, sin = (None, None) if self.rotary is None else self.rotary.rows(start, length, position_ids, reach, tokens.device)
        context = Context(cos, sin, segment_ids, cache)
        stream, delta = self.embedding(tokens, start, position_ids), None
        for layer in self.layers:
            stream, delta = layer(stream, delta, context)
        if cache is not None:
            cache.advance(length)
        return (self.norm(stream) if delta is None else self.norm(delta, stream))[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, v_padded/tp]."""
        return project_to_vocabulary(hidden, self.embedding.word) if self.head is None else self.head(hidden)

    def _check_ids(self, what: str, ids: torch.Tensor) -> None:
        """Checked on the CPU, and on a GPU outside training: there it would wait for the GPU, and the loader has checked."""
        if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise DataError(f"{what} ids have a wrong form", where="GPT", got=f"{ids.dtype} {tuple(ids.shape)}", want="int64 [batch, sequence], not empty")
        if ids.is_meta or torch.compiler.is_compiling() or (self.training and not ids.is_cpu):
            return
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(
                f"{what} id outside the vocabulary",
                where="GPT",
                got=low if low < 0 else high,
                want=f"0 .. {self.config.vocab_size - 1}",
                do="use the tokenizer that the model was made for",
            )

    def _check_positions(self, start: int, length: int, position_ids: torch.Tensor | None) -> int:
        """The number of positions in use: one more than the highest. Given ids are looked at on the CPU; on a GPU they are taken to be below start + length."""
        low, high = start, start + length - 1
        if position_ids is not None and position_ids.is_cpu and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(position_ids))
        limited = self.config.position_embedding in ("rotary", "learned") and not (position_ids is not None and not position_ids.is_cpu)
        if limited and (low < 0 or high >= self.config.max_position_embeddings):
            raise DataError(
                "sequence longer than the model's positions",
                where="model.max_position_embeddings",
                got=f"position {low if low < 0 else high}",
                want=f"0 .. {self.config.max_position_embeddings - 1}",
                do="shorten the input or raise model.max_position_embeddings",
            )
        return high + 1

    def layouts(self) -> dict[str, Layout]:
        """The place of every parameter within its logical tensor, by name."""
        found = {}
        for prefix, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                found[f"{prefix}.{name}"] = module.layouts[name]
        return found

    @torch.no_grad()
    def initialize(self) -> None:
        """Set every parameter to its initial value, which depends on the seed and its name only."""
        layouts = self.layouts()
        for name, parameter in self.named_parameters():
            layout = layouts[name]
            fill(parameter, layout, initial_value(self.config, name, layout.shape, self.seed))

    def materialize(self, device: str | torch.device, *, initialize: bool = True) -> GPT:
        """Give a model built on "meta" its memory on `device`, with initial values unless weights are to be loaded; returns self."""
        self.to_empty(device=device)
        self.mesh = replace(self.mesh, device=torch.device(device))
        if initialize:
            self.initialize()
        return self

    @torch.no_grad()
    def logical_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, logical tensor without padding) of every parameter; with tensor parallelism every member must iterate."""
        layouts = self.layouts()
        for name, parameter in self.named_parameters():
            layout = layouts[name]
            yield name, _gather_logical(parameter.detach(), layout, self.mesh)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take logical tensors by parameter name, cast to the model's dtype and cut to this process's slices.

        Raises:
            CheckpointError: a name is missing, unknown or given twice, or a shape differs. The model is then partly loaded.
        """
        layouts, parameters = self.layouts(), dict(self.named_parameters())
        for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
            if name not in parameters:
                why = "given twice" if name in layouts else "no such parameter"
                raise CheckpointError(f"weight does not fit the model: {why}", where=name, do="check that the weights belong to this model config")
            layout = layouts[name]
            if tuple(tensor.shape) != layout.shape:
                raise CheckpointError("weight has another shape", where=name, got=tuple(tensor.shape), want=layout.shape)
            fill(parameters.pop(name), layout, tensor)
        if parameters:
            raise CheckpointError("weights are missing", where=", ".join(sorted(parameters)[:4]), got=f"{len(layouts) - len(parameters)} of {len(layouts)}")

    def num_parameters(self) -> int:
        """Parameters of the logical model: without vocabulary padding, tied weights once, over all processes."""
        return sum(math.prod(layout.shape) for layout in self.layouts().values())

    def flops_per_token(self, seq_length: int) -> int:
        """FLOPs of forward and backward per token: 2 per multiply-add, backward twice the forward, recomputation not counted.

        Matrix products and attention only. Attention is counted in full, as in Megatron-LM's and llm-foundry's tables: every
        query against all seq_length keys (sliding_window keys where that is fewer), though the causal mask hides half.
        """
        matrices = sum(math.prod(layout.shape) for name, layout in self.layouts().items() if len(layout.shape) == 2 and not name.startswith("embedding."))
        if self.head is None:
            matrices += self.config.vocab_size * self.config.hidden_size
        keys = min(seq_length, self.config.sliding_window or seq_length)
        attention = 2 * self.config.num_layers * self.config.num_attention_heads * self.config.head_dim * keys
        return 6 * (matrices + attention)

    def pipeline_layers(self) -> list[nn.Module]:
        """The model as a sequence, in order: embedding, blocks, final norm and, where it is not tied, the head."""
        return [self.embedding, *self.layers, self.norm, *([] if self.head is None else [self.head])]


def _gather_logical(parameter: torch.Tensor, layout: Layout, mesh: Mesh) -> torch.Tensor:
    """The logical tensor of a parameter that may be cut along one dimension over the tensor group."""
    cut = [dim for dim, size in enumerate(layout.shape) if parameter.shape[dim] != size or layout.slices[dim] != (0, size)]
    if mesh.tp_group is not None and cut:
        parameter = all_gather(parameter, cut[0], mesh.tp_group)
    return parameter[: layout.shape[0]]
