"""Import of GPT-NeoX checkpoints, at any tensor-parallel size, in either of its two file layouts.

- `layer_LL-model_TT-model_states.pt`: one file per layer and rank (0 embedding, 2.. blocks, then final norm and
output).
- `mp_rank_TT_model_states.pt`: all parameters of a rank, with keys `sequential.LL.*`.

Both are pickles. Column-parallel matrices are sharded along rows, row-parallel matrices along columns. Every rank has
complete row-parallel biases and norms. With gpt_j_residual each rank adds a separate bias before the single all-reduce
of a block, so the bias of the model is their sum; otherwise the bias is identical on all ranks and added once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from neox.config.gpt_neox.model import NO_ATTENTION
from neox.config.schema import ModelConfig
from neox.convert.family_rules import join_qkv
from neox.convert.pickles import read_pickle
from neox.convert.source import WeightSource
from neox.convert.state import State, check_ranks, named_tensors
from neox.errors import CheckpointError
from neox.files import read_bytes
from neox.model.positional import alibi_slopes
from neox.model.shapes import logical_shapes
from neox.printing import counted

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt$")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")
STEP_FOLDER = re.compile(r"global_step(\d+)$")
NO_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|attention\.(masked_)?bias$|_extra_state$")
SLOPES = "attention.alibi_embed.slopes"
FIRST_BLOCK = 2  # layer 1 has no parameters


def is_gpt_neox_checkpoint(folder: Path) -> bool:
    """Whether a folder, or a step in it, is a checkpoint of GPT-NeoX."""
    return step_folder(folder) is not None


def step_folder(folder: Path) -> Path | None:
    """Return the folder with the files: the folder itself, the step that `latest` names, or the newest step in it."""
    if not folder.is_dir():
        return None
    if _has_files(folder):
        return folder
    latest = folder / "latest"
    name = read_bytes(latest).decode(errors="replace").strip() if latest.is_file() else ""
    steps = [
        (int(match[1]), path) for path in folder.iterdir() if (match := STEP_FOLDER.match(path.name)) and path.is_dir()
    ]
    found = (
        folder / name if STEP_FOLDER.match(name) and (folder / name).is_dir() else max(steps)[1] if steps else folder
    )
    return found if _has_files(found) else None  # never silently an older step


def _has_files(folder: Path) -> bool:
    """Whether a folder contains the files of a step."""
    return folder.is_dir() and any(
        LAYER_FILE.match(path.name) or RANK_FILE.match(path.name) for path in folder.iterdir()
    )


class Layers:
    """Parameters of each layer on each tensor-parallel rank, read on demand. The last layer read is cached."""

    def __init__(self, folder: Path):
        self._files: dict[tuple[int, int], Path] = {}
        self._ranks: dict[int, Path] = {}
        for path in sorted(folder.iterdir()):
            if match := LAYER_FILE.match(path.name):
                self._files[int(match[1]), int(match[2])] = path
            elif match := RANK_FILE.match(path.name):
                self._ranks[int(match[1])] = path
        if self._files:  # mp_rank files then have no weights
            self._ranks = {}
        ranks = {rank for _, rank in self._files} | set(self._ranks)
        self.tp = len(ranks)
        if ranks != set(range(self.tp)) or len(self._files) % max(self.tp, 1):
            raise CheckpointError(
                "files of a tensor-parallel rank are missing",
                where=folder,
                got=f"ranks {sorted(ranks)}, {len(self._files)} layer files",
            )
        self._cached: tuple[int, list[State]] | None = None
        self._by_layer: list[dict[int, State]] | None = None

    def numbers(self) -> list[int]:
        """Return the numbers of the layers that have parameters."""
        return sorted({layer for layer, _ in self._files}) if self._files else sorted(self._by_rank()[0])

    def states(self, layer: int) -> list[State]:
        """Return the parameters of a layer, by tensor-parallel rank.

        Raises:
            CheckpointError: there is no such layer.
        """
        if not self._files:
            if layer not in self._by_rank()[0]:
                raise CheckpointError("layer is missing", where=f"sequential.{layer}", got=f"layers {self.numbers()}")
            states = self._by_rank()
            if any(layer not in state for state in states):
                raise CheckpointError(
                    "layer is missing", where=f"sequential.{layer}", got="missing on some tensor-parallel ranks"
                )
            check_ranks([state[layer] for state in states], f"sequential.{layer}")
            return [state[layer] for state in states]
        if self._cached is None or self._cached[0] != layer:
            paths = [self._files[layer, rank] for rank in range(self.tp) if (layer, rank) in self._files]
            if len(paths) < self.tp:
                raise CheckpointError("layer is missing", where=f"layer_{layer:02d}", got=f"layers {self.numbers()}")
            states = [_parameters(read_pickle(path), path) for path in paths]
            check_ranks(states, f"layer_{layer:02d}")
            self._cached = (layer, states)
        return self._cached[1]

    def _by_rank(self) -> list[dict[int, State]]:
        if self._by_layer is None:
            self._by_layer = []
            for rank in range(self.tp):
                layers: dict[int, State] = {}
                module = read_pickle(self._ranks[rank])
                for name, tensor in _parameters(
                    module.get("module") or {} if isinstance(module, dict) else module, self._ranks[rank]
                ).items():
                    match = re.match(r"(?:module\.)?sequential\.(\d+)\.(.*)$", name)
                    if match:
                        layers.setdefault(int(match[1]), {})[match[2]] = tensor
                self._by_layer.append(layers)
            if not self._by_layer[0]:
                raise CheckpointError(
                    "no weights in the file",
                    where=self._ranks[0],
                    want="module: sequential.*",
                    do="pass the folder that also has layer_* files",
                )
        return self._by_layer


def _parameters(content: object, path: Path) -> State:
    """Return tensors by name, without buffers that are not parameters."""
    return {name: tensor for name, tensor in named_tensors(content, path).items() if not NO_WEIGHTS.search(name)}


def embedding_rows(folder: Path) -> int | None:
    """Return the rows of the word embedding over all ranks, padding included. None if the first layer has none.

    Args:
        folder: folder of a step.

    Raises:
        CheckpointError: files are missing or cannot be read.
    """
    states = Layers(folder).states(0)
    weights = [state["word_embeddings.weight"] for state in states if "word_embeddings.weight" in state]
    return (
        sum(weight.shape[0] for weight in weights) if weights and all(weight.dim() == 2 for weight in weights) else None
    )


def config_files(folder: Path) -> list[Path]:
    """List the YAML files of a step: in its folder `configs`, as GPT-NeoX saves them, or next to the weights."""
    for parent in (folder / "configs", folder):
        if found := sorted(path for path in parent.glob("*") if path.suffix in (".yml", ".yaml") and path.is_file()):
            return found
    return []


def open_gpt_neox_checkpoint(folder: str | Path, config: ModelConfig) -> dict[str, WeightSource]:
    """Return, for each neox parameter, a function that reads it from a checkpoint of GPT-NeoX.

    Args:
        folder: folder of a step, or its parent, whose `latest` is used.
        config: the model. Rows of the vocabulary beyond vocab_size are padding and dropped.

    Raises:
        CheckpointError: files, layers or parameters are missing, or the model does not have some of them.
    """
    found = step_folder(Path(folder))
    if found is None:
        raise CheckpointError(
            "not a checkpoint of GPT-NeoX",
            where=folder,
            want="layer_*-model_*-model_states.pt or mp_rank_*_model_states.pt",
        )
    if config.parallel_residual and not config.mlp_bias:
        raise CheckpointError(
            NO_ATTENTION,
            where="model.parallel_residual",
            want="model.mlp_bias: true",
            do="neox cannot import this model",
        )
    layers = Layers(found)
    conversion = ParameterConversion(layers, config)
    conversion.check_used()
    return conversion.sources


class ParameterConversion:
    """Conversion of the parameters of a checkpoint."""

    def __init__(self, layers: Layers, config: ModelConfig):
        self.layers = layers
        self.config = config
        self.shapes = logical_shapes(config)
        self.sources: dict[str, WeightSource] = {}
        self.used: set[tuple[int, str]] = set()
        self._embedding()
        for i in range(config.num_layers):
            self._block(i)
        final = config.num_layers + FIRST_BLOCK
        number = next((n for n in layers.numbers() if n >= final), final)
        self._norm("norm", number, "norm")
        if not config.tie_embeddings:
            number = next((n for n in layers.numbers() if n > number), number + 1)
            self._add("head.weight", number, ("final_linear.weight",), self._vocabulary)

    def _add(
        self,
        ours: str,
        layer: int,
        names: tuple[str, ...],
        make: Callable[[list[State], str], torch.Tensor],
        needed: bool = True,
    ) -> str | None:
        """Convert the first of some tensors that the layer has to the parameter `ours`. Return its name."""
        state = self.layers.states(layer)[0]
        name = next((name for name in names if name in state), None)
        if name is None:
            if needed:
                raise CheckpointError(
                    "weight is missing", where=f"layer {layer}: {' or '.join(names)}", got=", ".join(sorted(state)[:8])
                )
            return None
        if state[name].dim() != len(self.shapes[ours]):
            got = tuple(state[name].shape)
            raise CheckpointError(
                "weight has another shape",
                where=f"layer {layer}: {name}",
                got=got,
                want=f"{self.shapes[ours]} over all ranks",
            )
        self.used.add((layer, name))
        self.sources[ours] = WeightSource(partial(self._make, ours, layer, name, make), state[name].dtype)
        return name

    def _make(self, ours: str, layer: int, name: str, make: Callable[[list[State], str], torch.Tensor]) -> torch.Tensor:
        """Convert one parameter. Raises CheckpointError for a shape that does not match the config."""
        states = self.layers.states(layer)
        try:
            weight = make(states, name).contiguous()
            got = tuple(weight.shape)
        except (RuntimeError, IndexError):
            got = f"{tuple(states[0][name].shape)} on each of {len(states)} ranks"
        if got != self.shapes[ours]:
            where, want = f"layer {layer}: {name}", f"{self.shapes[ours]} over all ranks"
            raise CheckpointError(
                "weight has another shape", where=where, got=got, want=want, do="check the model section of --conf"
            )
        return weight

    def check_used(self) -> None:
        """Raise CheckpointError if a tensor of the checkpoint was not used."""
        left = []
        for layer in self.layers.numbers():
            for name in self.layers.states(layer)[0]:
                tied = (
                    self.config.tie_embeddings
                    and layer > self.config.num_layers
                    and ("word_embeddings" in name or "embed" in name)
                )
                if (layer, name) not in self.used and not tied:
                    left.append(f"layer {layer}: {name}")
        if left:
            raise CheckpointError(
                "weights do not belong to the model",
                where=", ".join(left[:4]),
                got=counted(len(left), "tensor"),
                do="check the model section",
            )

    def _embedding(self) -> None:
        self._add("embedding.word.weight", 0, ("word_embeddings.weight",), self._vocabulary)
        if self.config.position_embedding == "learned":
            self._add("embedding.position.weight", 0, ("position_embeddings.weight",), replicated)

    def _block(self, i: int) -> None:
        config, layer, ours = self.config, i + FIRST_BLOCK, f"layers.{i}"
        self._norm(f"{ours}.norm1", layer, "input_layernorm")
        if config.parallel_residual and config.shared_residual_norm:
            # stored, but never applied
            self.used |= {(layer, f"post_attention_layernorm.{kind}") for kind in ("weight", "scale", "bias")}
        else:
            self._norm(f"{ours}.norm2", layer, "post_attention_layernorm")
        if config.position_embedding == "alibi":
            self._check_slopes(layer)
        row_bias = summed if config.parallel_residual else replicated
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            self._add(f"{ours}.attention.qkv.{kind}", layer, (f"attention.query_key_value.{kind}",), self._qkv)
        self._add(f"{ours}.attention.out.weight", layer, ("attention.dense.weight",), partial(concatenated, dim=1))
        if config.attention_out_bias:
            self._add(f"{ours}.attention.out.bias", layer, ("attention.dense.bias",), row_bias)
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            into = (f"mlp.linear1.{kind}", f"mlp.dense_h_to_4h.{kind}")
            if config.gated:
                self._add(f"{ours}.mlp.up.{kind}", layer, into, partial(half, index=0))
                self._add(f"{ours}.mlp.gate.{kind}", layer, into, partial(half, index=1))
            else:
                self._add(f"{ours}.mlp.up.{kind}", layer, into, partial(concatenated, dim=0))
            out = (f"mlp.linear2.{kind}", f"mlp.dense_4h_to_h.{kind}")
            self._add(
                f"{ours}.mlp.down.{kind}", layer, out, partial(concatenated, dim=1) if kind == "weight" else row_bias
            )

    def _norm(self, ours: str, layer: int, theirs: str) -> None:
        self._add(f"{ours}.weight", layer, (f"{theirs}.weight", f"{theirs}.scale"), replicated)
        if self.config.norm == "layernorm":
            self._add(f"{ours}.bias", layer, (f"{theirs}.bias",), replicated)

    def _vocabulary(self, states: list[State], name: str) -> torch.Tensor:
        """Concatenate the vocabulary rows of the ranks.

        Old checkpoints may shard the output projection along columns.
        """
        across = 1 if states[0][name].shape[1] * len(states) == self.config.hidden_size and len(states) > 1 else 0
        rows = concatenated(states, name, dim=across)
        if rows.shape[0] < self.config.vocab_size:
            raise CheckpointError(
                "vocabulary is smaller than that of the model",
                where=name,
                got=rows.shape[0],
                want=f"at least {self.config.vocab_size} rows",
            )
        return rows[: self.config.vocab_size].clone() if rows.shape[0] > self.config.vocab_size else rows

    def _qkv(self, states: list[State], name: str) -> torch.Tensor:
        """Convert the QKV projection.

        Without grouped heads each head has its query, key and value together, as in neox. With grouped heads each rank
        has all queries, then all keys, then all values.
        """
        config = self.config
        if config.num_kv_heads == config.num_attention_heads:
            return concatenated(states, name, dim=0)
        sizes = [
            count // len(states) * config.head_dim
            for count in (config.num_attention_heads, config.num_kv_heads, config.num_kv_heads)
        ]
        try:
            q, k, v = (torch.cat(parts) for parts in zip(*(state[name].split(sizes) for state in states), strict=True))
        except RuntimeError as error:
            got = [tuple(state[name].shape) for state in states]
            raise CheckpointError(
                "weight has another shape", where=name, got=got, want=f"{sum(sizes)} rows on each rank"
            ) from error
        return join_qkv(q, k, v, config)

    def _check_slopes(self, layer: int) -> None:
        """Check that the stored ALiBi slopes are those that the model computes."""
        states = self.layers.states(layer)
        if SLOPES not in states[0]:
            return
        self.used.add((layer, SLOPES))
        want = torch.tensor(alibi_slopes(self.config.num_attention_heads))
        got = torch.cat([state[SLOPES].reshape(-1) for state in states])
        if got.shape != want.shape or not torch.allclose(
            got.float(), want, rtol=max(4 * torch.finfo(got.dtype).eps, 1e-6)
        ):
            raise CheckpointError(
                "ALiBi slopes differ", where=f"layer {layer}: {SLOPES}", got=got.tolist()[:4], want=want.tolist()[:4]
            )


def concatenated(states: list[State], name: str, *, dim: int) -> torch.Tensor:
    """Concatenate the shards of all ranks."""
    return states[0][name] if len(states) == 1 else torch.cat([state[name] for state in states], dim=dim)


def replicated(states: list[State], name: str) -> torch.Tensor:
    """Return a replicated tensor. Copies that have diverged are averaged, as in the converter of GPT-NeoX."""
    first = states[0][name]
    if all(torch.equal(state[name], first) for state in states):
        return first
    return torch.stack([state[name].float() for state in states]).mean(0).to(first.dtype)


def summed(states: list[State], name: str) -> torch.Tensor:
    """Sum the biases that the ranks add separately."""
    first = states[0][name]
    return first if len(states) == 1 else torch.stack([state[name].float() for state in states]).sum(0).to(first.dtype)


def half(states: list[State], name: str, *, index: int) -> torch.Tensor:
    """Return one half of a gated MLP. On each rank one matrix has both: the projection (0), then the gate (1)."""
    return torch.cat([state[name].chunk(2, dim=0)[index] for state in states])
