"""The fp32 weights and the optimizer state of one process, wherever the ZeRO stage stores them.

A `ParameterShard` hides the location. Saving and restoring both go through the views of a shard, so they cannot
disagree.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Fragment
from neox.engine.optimizer import counter
from neox.errors import CheckpointError
from neox.model.adapters import HEAD, SCORE, is_added
from neox.parallel.shard_spec import ShardSpec

Named = Iterable[tuple[str, torch.nn.Parameter, ShardSpec]]
ZeroWrapper: TypeAlias = DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3 | BF16_Optimizer


@dataclass(frozen=True)
class ParameterShard:
    """Flat range [start, stop) of a local parameter, as the optimizer sees it.

    Attributes:
        name: logical name of the parameter.
        layout: where the local parameter lies in the logical tensor.
        flat: the tensor that the optimizer steps: the parameter itself, or a flat partition of many.
        offset: start of the range in `flat`.
        start, stop: range of the local parameter, vocabulary padding included.
        group: index of the optimizer's parameter group; -1 for a frozen parameter.
        owned: part of [start, stop) that this process writes to a checkpoint; a range that several processes hold is
            divided among them.
    """

    name: str
    layout: ShardSpec
    flat: torch.Tensor
    offset: int
    start: int
    stop: int
    group: int
    owned: tuple[int, int]

    def view(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the local parameter in `tensor`, which has the shape of `flat`."""
        return tensor.detach().view(-1)[self.offset + start - self.start : self.offset + stop - self.start]


def replicated_shards(named: Named, optimizer: torch.optim.Optimizer, rank: int, size: int) -> Iterator[ParameterShard]:
    """Stage 0: every process holds everything and writes its share."""
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for name, p, layout in named:
        count = p.numel()
        yield ParameterShard(
            name, layout, p, 0, 0, count, group_of[id(p)], (count * rank // size, count * (rank + 1) // size)
        )


def frozen_shards(named: Named, rank: int, size: int) -> Iterator[ParameterShard]:
    """Frozen parameters: every process holds all of them in the dtype of the forward pass and writes its share."""
    for name, p, layout in named:
        count = p.numel()
        yield ParameterShard(name, layout, p, 0, 0, count, -1, (count * rank // size, count * (rank + 1) // size))


def flat_partition_shards(named: Named, wrapper: DeepSpeedZeroOptimizer | BF16_Optimizer) -> Iterator[ParameterShard]:
    """Stages 1 and 2: DeepSpeed's fragment map gives the address of a parameter's part in the flat fp32 partition."""
    for name, p, layout in named:
        fragment = vars(p)["_hp_mapping"]
        if fragment is None:
            continue
        flat = wrapper.optimizer.param_groups[fragment.param_group_index]["params"][0]
        start = fragment.lp_fragment_address.start
        stop = start + fragment.lp_fragment_address.numel
        yield ParameterShard(
            name,
            layout,
            flat,
            fragment.hp_fragment_address.start,
            start,
            stop,
            fragment.param_group_index,
            (start, stop),
        )


def stage3_shards(named: Named, wrapper: DeepSpeedZeroOptimizer_Stage3, rank: int) -> Iterator[ParameterShard]:
    """Stage 3: every parameter is sharded evenly over the processes; the last shards are padded."""
    for name, p, layout in named:
        sub_group, offset, share = wrapper.grad_position[wrapper.get_param_id(p)]
        count = vars(p)["ds_numel"]
        start = min(rank * share, count)
        stop = min(start + share, count)
        if start < stop:
            flat = wrapper.fp32_partitioned_groups_flat[sub_group]
            yield ParameterShard(
                name, layout, flat, offset, start, stop, wrapper.sub_group_to_group_id[sub_group], (start, stop)
            )


class OptimizerState:
    """The fp32 weights and the optimizer state of one process under any ZeRO stage.

    Args:
        named: logical name, parameter and layout of every parameter of this process; those without a gradient are
            frozen.
        wrapper: DeepSpeed's optimizer; None at stage 0, which has none.
        optimizer: our optimizer inside.
        kinds: by parameter, the names of its per-element optimizer state, besides the weight.
        shapes: logical shape of every parameter of the model, those of other pipeline stages included.
        replica: rank of this process among its replicas, and their number.
    """

    def __init__(
        self,
        named: Named,
        wrapper: ZeroWrapper | None,
        optimizer: torch.optim.Optimizer,
        kinds: dict[str, tuple[str, ...]],
        shapes: dict[str, tuple[int, ...]],
        replica: tuple[int, int],
    ):
        self.wrapper = wrapper
        self.optimizer = optimizer
        self.kinds = kinds
        self.shapes = shapes
        rank, size = replica
        frozen, named = (
            [row for row in named if not row[1].requires_grad],
            [row for row in named if row[1].requires_grad],
        )
        if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            self.shards = list(stage3_shards(named, wrapper, rank))
        elif wrapper is not None:
            self.shards = list(flat_partition_shards(named, wrapper))
        else:
            self.shards = list(replicated_shards(named, optimizer, rank, size))
        self.shards += frozen_shards(frozen, rank, size)

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, kind, logical shape) of every tensor in a checkpoint of this run."""
        for name, shape in self.shapes.items():
            for kind in ("weight", *self.kinds[name]):
                yield name, kind, shape

    def tensor(self, shard: ParameterShard, kind: str) -> torch.Tensor | None:
        """The tensor of a kind, with the shape of shard.flat; None before the first update."""
        return shard.flat if kind == "weight" else self.optimizer.state.get(shard.flat, {}).get(kind)

    def fragments(self) -> Iterator[Fragment]:
        """What this process writes to a checkpoint, without padding: views, which change with the next update, or
        copies of frozen 16-bit weights.
        """
        for shard in self.shards:
            layout = shard.layout
            start, stop = shard.owned[0], min(shard.owned[1], layout.numel)
            if start >= stop:
                continue
            for kind in ("weight", *self.kinds[shard.name]):
                held = self.tensor(shard, kind)
                data = torch.zeros(stop - start) if held is None else shard.view(held, start, stop).float()
                yield Fragment(shard.name, kind, layout.shape, layout.slices, start, stop, data)

    def restore(self, checkpoint: Checkpoint, optimizer_type: str) -> None:
        """Overwrite weights and optimizer state with those of a checkpoint, whatever layout wrote it.

        Args:
            checkpoint: an open checkpoint.
            optimizer_type: optimizer.type of this run.

        Raises:
            CheckpointError: it holds other tensors than this model, no optimizer state, or that of another optimizer.
        """
        saved = checkpoint.state
        if "optimizer" not in saved:
            do = f"checkpoint.init_from: {checkpoint.path}, to start at step 0 from it"
            raise CheckpointError("the checkpoint holds weights only: nothing to resume", where=checkpoint.path, do=do)
        if saved["optimizer"] != optimizer_type:
            raise CheckpointError(
                "the checkpoint is of another optimizer",
                where=f"{checkpoint.path}: optimizer.type",
                got=saved["optimizer"],
                want=optimizer_type,
                do=f"optimizer.type: {saved['optimizer']}, or another run.dir to start from scratch",
            )
        checkpoint.check(self.tensors())
        self.allocate(saved["updates"])
        self.read(checkpoint)

    def take_weights(self, checkpoint: Checkpoint) -> None:
        """Overwrite the weights with those of a checkpoint, in fp32; the optimizer state stays as it is.

        Adapters and the head of a reward model keep their initial values if the checkpoint has none. A reward model
        does not read the output head.

        Raises:
            CheckpointError: the checkpoint holds other tensors than this model.
        """
        available = set(checkpoint.names())
        wanted = {name: shape for name, shape in self.shapes.items() if name in available or not is_added(name)}
        if SCORE in self.shapes and HEAD in available:
            wanted[HEAD] = checkpoint.info(HEAD).shape
        checkpoint.check((name, "weight", shape) for name, shape in wanted.items())
        self.read(checkpoint, weights_of=wanted.keys())

    def allocate(self, updates: int) -> None:
        """Create the optimizer state as it is after `updates` updates, with zeros for what is per element."""
        for shard in self.shards:
            if shard.group < 0:
                continue
            state = self.optimizer.state[shard.flat]
            for kind in self.kinds[shard.name]:
                state[kind] = torch.zeros_like(shard.flat)
            state.update(counter(self.optimizer, self.optimizer.param_groups[shard.group], shard.flat.device, updates))

    @torch.no_grad()
    def read(self, checkpoint: Checkpoint, *, weights_of: Container[str] | None = None) -> None:
        """Overwrite weights and optimizer state with those of a checkpoint; `allocate` must have run.

        Args:
            checkpoint: an open checkpoint.
            weights_of: names whose weights are overwritten, and nothing else; None overwrites everything.
        """
        with checkpoint.async_reads():
            for shard in self.shards:
                layout = shard.layout
                start, stop = shard.start, min(shard.stop, layout.numel)
                if start >= stop or (weights_of is not None and shard.name not in weights_of):
                    continue
                for kind in ("weight", *self.kinds[shard.name]) if weights_of is None else ("weight",):
                    held = cast(torch.Tensor, self.tensor(shard, kind))
                    checkpoint.read_into(shard.view(held, start, stop), shard.name, kind, layout.slices, start, stop)
        self.publish()

    @torch.no_grad()
    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        """Overwrite the fp32 weights with full local parameters, by name: the initial weights before rounding."""
        for shard in self.shards:
            if shard.group < 0:
                continue
            shard.view(shard.flat, shard.start, shard.stop).copy_(values[shard.name].view(-1)[shard.start : shard.stop])
        self.publish()

    def publish(self) -> None:
        """Copy the fp32 weights to the parameters of the forward pass, on every process."""
        wrapper = self.wrapper
        if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            for sub_group in range(len(wrapper.fp16_groups)):
                wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
            self.gather_persistent()
        elif wrapper is not None:
            wrapper.update_lp_params()

    def gather_persistent(self) -> None:
        """Stage 3: gather the small parameters that every process holds in full.

        DeepSpeed leaves them sharded when it skips an update.
        """
        if isinstance(self.wrapper, DeepSpeedZeroOptimizer_Stage3) and self.wrapper.persistent_parameters:
            self.wrapper.persistent_parameters[0].all_gather(self.wrapper.persistent_parameters)


def zero_wrapper(deepspeed: DeepSpeedEngine) -> ZeroWrapper | None:
    """DeepSpeed's optimizer around ours; None at stage 0, which has none."""
    wrapper = deepspeed.optimizer
    return wrapper if isinstance(wrapper, ZeroWrapper) else None


def pending_gradients(wrapper: ZeroWrapper) -> Iterator[torch.Tensor]:
    """The reduced gradients of this process that the next step of DeepSpeed's optimizer would apply."""
    if isinstance(wrapper, BF16_Optimizer):
        yield from wrapper.fp32_groups_gradients_flat
    else:
        yield from (
            gradient
            for group in wrapper.averaged_gradients.values()
            for gradient in group or ()
            if gradient is not None
        )
