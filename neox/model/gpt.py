"""The language model: embedding, blocks, final norm, output projection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from neox.config.schema import ModelConfig
from neox.errors import CheckpointError, ConfigError, DataError
from neox.model.adapters import add_adapters, is_trained
from neox.model.attention import Context
from neox.model.block import Block
from neox.model.init import fill, initial_value
from neox.model.norm import make_norm
from neox.model.partition import partition_layers
from neox.model.positional import PositionEmbedding, RotaryTable
from neox.model.shapes import flops_per_token, logical_shapes, num_parameters
from neox.parallel.collectives import SEQUENCE, all_gather, gather_from, local_slice
from neox.parallel.cross_entropy import IGNORED, vocab_parallel_cross_entropy
from neox.parallel.embedding import ScoreHead, TiedCopy, VocabParallelEmbedding, VocabParallelHead, project_to_vocabulary
from neox.parallel.gradients import sum_partial_gradients
from neox.parallel.mesh import Mesh
from neox.parallel.p2p import broadcast_from_last_stage, recv_forward, send_forward
from neox.parallel.rng import tensor_parallel_stream
from neox.parallel.shard_spec import ShardSpec

TIED = "embedding.word.weight"


class Embedding(nn.Module):
    """Words, plus learned positions where the config has them, with dropout."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, dtype: torch.dtype):
        super().__init__()
        self.mesh = mesh
        self.dropout = config.hidden_dropout
        self.word = VocabParallelEmbedding(config.vocab_size, config.padded_vocab_size(mesh.tp), config.hidden_size, mesh, dtype=dtype)
        learned = config.position_embedding == "learned"
        self.position = PositionEmbedding(config.max_position_embeddings, config.hidden_size, mesh, dtype=dtype) if learned else None

    def forward(self, tokens: torch.Tensor, start: int, position_ids: torch.Tensor | None) -> torch.Tensor:
        """tokens int64 [b, s], positions from `start` on or position_ids [b, s] -> [b, s, h]; with sequence parallelism the own [b, s/tp, h]."""
        x = self.word(tokens)
        if self.position is not None:
            length = x.shape[1]
            if self.mesh.sequence:
                start += self.mesh.tp_rank * length
                position_ids = None if position_ids is None else local_slice(position_ids, SEQUENCE, self.mesh.tp_group)
            x = x + self.position(start, length, position_ids)
        if not self.dropout or not self.training:
            return x
        with tensor_parallel_stream(self.mesh, x.device, differs=self.mesh.sequence):
            return F.dropout(x, self.dropout)


class GPT(nn.Module):
    """A GPT-style language model. `forward` gives logits, `loss` the loss per token without keeping logits of all processes.

    Under pipeline parallelism this is one stage of it: the first has the embedding, the last the final norm and the head. Parameters
    keep the names that they have in the whole model.

    Args:
        config: the architecture.
        mesh: layout over processes, None: this process alone, on the CPU; parameters are made on mesh.device, which may be "meta" (see `materialize`).
        dtype: dtype of parameters and activations.
        seed: seed of the initial weights.
        activation_checkpointing: "none"; "selective": the MLP's activation is computed again in the backward; "full": every block is.
        partition: how blocks are shared out over stages (`partition_layers`).

    Raises:
        ConfigError: sizes that contradict each other or cannot be cut over the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 1234,
        activation_checkpointing: str = "none",
        partition: str | Sequence[int] = "parameters",
    ):
        super().__init__()
        if activation_checkpointing not in ("none", "selective", "full"):
            raise ConfigError(
                "unknown activation checkpointing", where="train.activation_checkpointing", got=activation_checkpointing, want="none, selective or full"
            )
        self.config = config
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        self.seed = seed
        self.rotary = RotaryTable(config) if config.position_embedding == "rotary" else None
        self.embedding = Embedding(config, mesh, dtype=dtype) if mesh.first_stage else None
        first, behind = partition_layers(config, mesh.pp, partition)[mesh.pp_rank] if mesh.pp > 1 else (0, config.num_layers)
        blocks = {str(i): Block(config, mesh, i, dtype=dtype, activation_checkpointing=activation_checkpointing) for i in range(first, behind)}
        self.layers = nn.ModuleDict(blocks)
        self.norm = make_norm(config, mesh, dtype) if mesh.last_stage else None
        self.head: VocabParallelHead | None = None
        self.tied: TiedCopy | None = None
        self.score = ScoreHead(config.hidden_size, mesh, dtype=dtype) if mesh.last_stage and config.output == "score" else None
        table = (config.vocab_size, config.padded_vocab_size(mesh.tp), config.hidden_size, mesh)
        if not mesh.last_stage or config.output == "score":
            pass
        elif not config.tie_embeddings:
            self.head = VocabParallelHead(*table, dtype=dtype)
        elif not mesh.first_stage:
            self.tied = TiedCopy(*table, dtype=dtype)
        if config.lora is not None:
            add_adapters(self.layers.values(), config.lora)
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(is_trained(config, name))
        if mesh.device.type != "meta":
            self.initialize()
            sum_partial_gradients(self, self.shard_specs(), mesh)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        segment_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache=None,
        checked: bool = False,
    ) -> torch.Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 [b, s].
            segment_ids: int32 [b, s], attention only between equal ids; with a cache [b, t], t = cache.length + s.
            position_ids: int64 [b, s]; default cache.length + 0 .. s - 1.
            cache: keys and values of earlier tokens (neox.generate.cache); it takes in these tokens.
            checked: the ids are known to be in the vocabulary. On a GPU they are then not read, which would wait for it.

        Returns:
            [b, s, vocab_size] in the model's dtype; with `model.output: score`, fp32 [b, s, 1].

        Raises:
            DataError: token ids outside the vocabulary, or positions outside max_position_embeddings.
        """
        dtype = next(self.parameters()).dtype
        received = recv_forward((*tokens.shape, self.config.hidden_size), dtype, self.mesh)
        hidden = self._hidden(tokens, segment_ids, position_ids, cache, received, checked)
        logits = None
        if self.config.output == "score":
            dtype = torch.float32
            logits = self.score(hidden) if self.score is not None else None
        elif self.mesh.last_stage:
            logits = gather_from(self._logits(hidden), -1, self.mesh.tp_group)[..., : self.config.vocab_size]
        if not self.mesh.last_stage:
            send_forward(hidden, self.mesh)
        width = 1 if self.config.output == "score" else self.config.vocab_size
        return broadcast_from_last_stage(logits, (*tokens.shape, width), dtype, self.mesh)

    def loss(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        *,
        segment_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        received: torch.Tensor | None = None,
        expected_dloss: float | None = None,
        checked: bool = False,
    ) -> torch.Tensor:
        """Cross-entropy per token: fp32 [b * s], 0 where the target is -100; with `model.output: score`, the scores.

        Arguments as in `forward`; targets int64 [b, s].
        A stage takes what the stage before it gave as `received` ([b, s, h], `boundary_shape`), and one that is not the last returns what
        the next is to receive. expected_dloss is the gradient that every token's loss is going to get, where that is known
        (ops.cross_entropy). With context parallelism tokens, targets and position_ids are the own part of the sequence, segment_ids the
        whole.

        Raises:
            DataError: as `forward`, and targets outside the vocabulary.
        """
        if targets.shape != tokens.shape:
            raise DataError("targets do not fit the tokens", where="GPT.loss", got=tuple(targets.shape), want=tuple(tokens.shape))
        self._check_ids("target", targets.masked_fill(targets == IGNORED, 0), checked)
        hidden = self._hidden(tokens, segment_ids, position_ids, None, received, checked)
        if not self.mesh.last_stage:
            return hidden
        if self.score is not None:
            return self.score(hidden).flatten()
        return vocab_parallel_cross_entropy(self._logits(hidden), targets, self.mesh, vocab_size=self.config.vocab_size, expected_dloss=expected_dloss)

    def token_losses(self, tokens: torch.Tensor, targets: torch.Tensor, *, checked: bool = False) -> torch.Tensor:
        """`loss` of the whole model, on every process of the layout: all of them call it with the same tokens and targets [b, s].

        Raises:
            ConfigError: a reward model, which has no such losses.
        """
        if self.config.output == "score":
            raise ConfigError("a reward model predicts no tokens", where="model.output", got="score", want="tokens")
        dtype = next(self.parameters()).dtype
        out = self.loss(tokens, targets, received=recv_forward(self.boundary_shape(tokens), dtype, self.mesh), checked=checked)
        if not self.mesh.last_stage:
            send_forward(out, self.mesh)
            out = None
        return broadcast_from_last_stage(out, (tokens.numel(),), torch.float32, self.mesh)

    def boundary_shape(self, tokens: torch.Tensor) -> tuple[int, int, int]:
        """Shape of what crosses from stage to stage for these tokens."""
        b, s = tokens.shape
        return b, s // self.mesh.tp if self.mesh.sequence else s, self.config.hidden_size

    def _hidden(
        self, tokens: torch.Tensor, segment_ids: torch.Tensor | None, position_ids: torch.Tensor | None, cache, received: torch.Tensor | None, checked: bool
    ) -> torch.Tensor:
        """Normed output of the last block, [b, s, h] (with sequence parallelism [b, s/tp, h]); the residual stream on a stage that is not the last."""
        self._check_ids("token", tokens, checked)
        length = tokens.shape[1]
        start = self.mesh.cp_rank * length if cache is None else cache.length
        reach = self._check_positions(start, length, position_ids)
        cos, sin = (None, None) if self.rotary is None else self._rotary_rows(start, length, reach, position_ids, cache, tokens.device)
        context = Context(cos, sin, segment_ids, cache)
        stream, delta = received if self.embedding is None else self.embedding(tokens, start, position_ids), None
        for layer in self.layers.values():
            stream, delta = layer(stream, delta, context)
        if cache is not None:
            cache.advance(length)
        if self.norm is None:
            return stream if delta is None else stream + delta
        return (self.norm(stream) if delta is None else self.norm(delta, stream))[0]

    def _rotary_rows(
        self, start: int, length: int, reach: int, position_ids: torch.Tensor | None, cache, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin; under dynamic NTK those of each sequence's own length, whatever the batch."""
        steady = self.rotary.steady_length
        if steady is None or reach <= steady or position_ids is None or cache is not None:
            return self.rotary.rows(start, length, position_ids, reach, device)
        return self.rotary.rows_by_length(position_ids)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, v_padded/tp]."""
        if self.tied is not None:
            return self.tied(hidden)
        return project_to_vocabulary(hidden, self.embedding.word.weight, self.mesh) if self.head is None else self.head(hidden)

    def _check_ids(self, what: str, ids: torch.Tensor, checked: bool) -> None:
        """Always on the CPU; on a GPU, where it waits for the result, unless the caller or, in training, the loader has checked."""
        if ids.dim() != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise DataError(f"{what} ids have a wrong form", where="GPT", got=f"{ids.dtype} {tuple(ids.shape)}", want="int64 [batch, sequence], not empty")
        if ids.is_meta or torch.compiler.is_compiling() or ((self.training or checked) and not ids.is_cpu):
            return
        low, high = torch.stack(torch.aminmax(ids)).tolist()  # one wait
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

    def shard_specs(self) -> dict[str, ShardSpec]:
        """The place of every parameter of this process within its logical tensor, by name."""
        found = {}
        for prefix, module in self.named_modules():
            for name, _ in module.named_parameters(recurse=False):
                found[f"{prefix}.{name}"] = module.shard_specs[name]
        return found

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of every parameter of the whole model, by name, whatever this process holds."""
        return logical_shapes(self.config)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set every parameter to its initial value, which depends on the seed and its name only."""
        for name, parameter, spec in self._places():
            fill(parameter, spec, initial_value(self.config, name, spec.shape, self.seed))

    def _places(self) -> Iterator[tuple[str, torch.Tensor, ShardSpec]]:
        """Name, tensor and layout of all that holds weights here: the parameters, and the last stage's copy of a tied embedding."""
        specs = self.shard_specs()
        for name, parameter in self.named_parameters():
            yield name, parameter, specs[name]
        if self.tied is not None:
            yield TIED, self.tied.weight, self.tied.spec

    def materialize(self, device: str | torch.device, *, initialize: bool = True) -> GPT:
        """Give a model built on "meta" its memory on `device`, with initial values unless weights are to be loaded; returns self."""
        self.to_empty(device=device)
        if self.tied is not None:
            self.tied.replace(torch.empty_like(self.tied.weight, device=device))
        self.mesh = replace(self.mesh, device=torch.device(device))
        if initialize:
            self.initialize()
        sum_partial_gradients(self, self.shard_specs(), self.mesh)
        return self

    @torch.no_grad()
    def logical_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, logical tensor without padding) of every parameter of this stage; with tensor parallelism every member must iterate."""
        specs = self.shard_specs()
        for name, parameter in self.named_parameters():
            yield name, _gather_logical(parameter.detach(), specs[name], self.mesh)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take logical tensors of the whole model by parameter name, cast to the model's dtype and cut to this process's slices.

        Raises:
            CheckpointError: a name is missing, unknown or given twice, or a shape differs. The model is then partly loaded.
        """
        shapes = logical_shapes(self.config)
        missing = dict(shapes)
        places = {name: (tensor, spec) for name, tensor, spec in self._places()}
        for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
            if missing.pop(name, None) is None:
                why = "given twice" if name in shapes else "no such parameter"
                raise CheckpointError(f"weight does not fit the model: {why}", where=name, do="check that the weights belong to this model config")
            if tuple(tensor.shape) != shapes[name]:
                raise CheckpointError("weight has another shape", where=name, got=tuple(tensor.shape), want=shapes[name])
            if name in places:
                target, spec = places[name]
                fill(target, spec, tensor)
        if missing:
            raise CheckpointError("weights are missing", where=", ".join(sorted(missing)[:4]), got=f"{len(shapes) - len(missing)} of {len(shapes)}")

    def num_parameters(self) -> int:
        """Parameters of the logical model: without vocabulary padding, tied weights once, over all processes."""
        return num_parameters(self.config)

    def flops_per_token(self, seq_length: int) -> int:
        """FLOPs of forward and backward of the logical model per token (`neox.model.shapes.flops_per_token`)."""
        return flops_per_token(self.config, seq_length)


def _gather_logical(parameter: torch.Tensor, spec: ShardSpec, mesh: Mesh) -> torch.Tensor:
    """The logical tensor of a parameter that may be cut along one dimension over the tensor group."""
    if mesh.tp_group is not None and spec.dim is not None:
        parameter = all_gather(parameter, spec.dim, mesh.tp_group)
    return parameter[: spec.shape[0]]
