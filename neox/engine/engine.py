"""The engine: one optimizer step over a global batch, on DeepSpeed's ZeRO, in any layout of processes.

    engine = Engine(config, Mesh.single(), GPT(config.model, Mesh.single()))
    result = engine.train_step([Batch(tokens, targets, None, None, sample_ids)])

What DeepSpeed does and what is done here:
- DeepSpeed reduces, shards and gathers (ZeRO 0 to 3), holds the fp32 master weights and gradient accumulators, and
  scales the loss in fp16.
- The optimizer, its parameter groups, the learning rate and the weight of every token are ours. The loss of a step is
  sum(loss of tokens) / (number of targets in the GLOBAL batch); micro-batches with fewer targets weigh less.
- Tensor and context parallelism are in the model; each pipeline stage runs this engine over its layers
  (neox.engine.pipeline).
- A weight, loss or gradient that is not finite is found before the update, from numbers that all processes share, so
  that all decide the same.

Stage 0 in bf16 or fp16 runs on DeepSpeed's stage 1: its stage 0 has no fp32 accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from neox.checkpoint.reader import Checkpoint
from neox.checkpoint.reshard import Fragment
from neox.config.schema import Config
from neox.data.samples.loader import Batch
from neox.engine.batch import context_slice, to_device
from neox.engine.drift import check_replicas, find_non_finite, gather_findings, largest
from neox.engine.guard import non_finite_error
from neox.engine.objective import TokenLoss, build_objective
from neox.engine.pipeline import OneForwardOneBackward, backward_root, tie_embedding
from neox.engine.sharding import shard_model
from neox.engine.update import Update, Updater, sum_over
from neox.errors import NonFinite
from neox.files import JsonObject
from neox.model.dtypes import DTYPES
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.phases import Phases


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; identical on every process.

    Attributes:
        step: number of this step; 1 is the first.
        loss: mean loss per target of the global batch; NaN if the batch has no target.
        grad_norm, skipped, problem, spike: see neox.engine.update.Update.
        lr: learning rate of the update.
        tokens: number of targets of the global batch.
        stop: some process asked to stop before the update.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool
    stop: bool
    problem: str | None = None
    spike: bool = False


class Engine:
    """Trains a model on global batches. Every process makes the same calls in the same order.

    Args:
        config: the run; `train` gives the batch sizes and the number of steps.
        mesh: the layout of processes.
        model: GPT with fp32 parameters on mesh.device. The engine changes its parameters' storage and dtype.
        phases: follows the steps: heartbeat, profiler, fault injection.
    """

    def __init__(self, config: Config, mesh: Mesh, model: GPT, *, phases: Phases | None = None):
        self.config = config
        self.mesh = mesh
        self.model = model
        self.phases = Phases() if phases is None else phases
        self.step = 0
        self.updates = 0
        self.token_weight = 1.0  # of a token's loss in the gradient of the current step
        self.objective = build_objective(config.train)
        self.trained, self.deepspeed, self.state = shard_model(config, mesh, model, self.objective)
        self.updater = Updater(config, mesh, self.deepspeed, self.state, self.phases)
        dtype = DTYPES[config.precision.dtype]
        self.tied = tie_embedding(model, mesh, dtype)
        self.pipeline = OneForwardOneBackward(
            mesh, self.forward, self.backward, lambda batch: model.boundary_shape(batch.tokens), dtype
        )
        if self.phases.changes_values:
            self.trained[0][1].register_hook(partial(self.phases.value, "gradient"))

    def train_step(self, batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """One optimizer step over this process's micro-batches of one global batch.

        Args:
            batches: gradient_accumulation micro-batches, on the CPU or on the device.
            stop: this process asks to stop; whether any process does is in the result.

        Raises:
            NonFinite: a weight, the loss or the gradient is NaN or infinite, and guard.non_finite does not skip the
                step, or no longer does. No parameter changed, on any process.
        """
        step, mesh, phases = self.step + 1, self.mesh, self.phases
        phases.enter("step", step)
        if phases.changes_values:
            self.pass_parameter()
        magnitudes = largest(self.trained)
        parts = [context_slice(batch, mesh) for batch in batches]
        # on the host: on the device, every micro-batch would wait for the work queued there
        count = sum(self.objective.count(batch) for batch in parts)
        with phases.waiting():
            targets = int(sum_over([count], mesh.replica_group, mesh.device)[0])
        self.token_weight = mesh.replicas / max(targets, 1)  # DeepSpeed averages gradients over the replicas
        loss = self.pipeline.train([to_device(batch, mesh.device) for batch in parts])
        finite = torch.isfinite(magnitudes).all().to(loss.device)
        loss = phases.value("loss_number", torch.where(finite, loss, math.nan))
        self.tied.send_gradient()
        reports = mesh.last_stage and mesh.tp_rank == 0  # 0 times what is not finite is not
        sums = torch.stack([loss.double() * reports, loss.new_full((), stop, dtype=torch.float64)])
        with phases.waiting():  # the only read of a step without an error before the norm; a queue holds collectives
            if self.everyone is not None:
                dist.all_reduce(sums, group=self.everyone)
            loss_sum, stops = sums.tolist()
        mean = loss_sum / max(targets, 1)
        lr = self.updater.set_learning_rate(step, self.updates)
        phases.enter("update")
        update = self.update(step, mean, targets, batches)
        phases.enter("updated")
        self.tied.publish()
        self.step = step
        self.updates += not update.skipped
        return StepResult(
            step,
            mean if targets else math.nan,
            update.grad_norm,
            lr,
            targets,
            update.skipped,
            stops > 0,
            update.problem,
            update.spike,
        )

    def update(self, step: int, mean: float, targets: int, batches: Sequence[Batch]) -> Update:
        """Update the parameters, or skip the update. All processes call it together. Raises NonFinite."""
        not_finite = partial(self.not_finite, step, batches)
        if not math.isfinite(mean):
            found = gather_findings(
                [f"{name} on rank {self.mesh.rank}" for name in find_non_finite(self.trained)], self.mesh
            )
            problem = not_finite("weight", found[0]) if found else not_finite("loss", mean)
            return self.updater.apply(step, mean, problem, not_finite)
        return self.updater.apply(step, mean, None, not_finite) if targets else self.updater.skip_empty_batch()

    def not_finite(self, step: int, batches: Sequence[Batch], what: str, got: object) -> NonFinite:
        """The error for a weight, loss or gradient that is not finite. All processes call it together."""
        return non_finite_error(what, got, step, [batch.sample_ids for batch in batches], self.mesh)

    @torch.no_grad()
    def pass_parameter(self) -> None:
        """Pass the first element of the first parameter through the observers."""
        p = self.trained[0][1]
        first = (getattr(p, "ds_tensor", p) if p.numel() == 0 else p).detach().view(-1)[:1]
        first.copy_(self.phases.value("parameter", first.clone()))

    def forward(self, batch: Batch, received: torch.Tensor | None) -> torch.Tensor:
        """Forward pass of one micro-batch through this stage."""
        self.phases.enter("forward")
        expected = (
            self.token_weight * self.updater.loss_scale
            if torch.is_grad_enabled() and isinstance(self.objective, TokenLoss)
            else None
        )
        return self.phases.value("loss", self.deepspeed(batch, received, expected))

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, last: bool) -> None:
        """Backward pass of one micro-batch through this stage; the last one reduces gradients over the replicas."""
        self.phases.enter("backward")
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.tied.last_backward = last
        # Always weighted outside: DeepSpeed divides the gradient by gradient_accumulation after all if backward() gets
        # the very tensor that forward() returned (its hook on the output then runs before the one that marks the graph
        # as scaled).
        root = output * self.token_weight if gradient is None else backward_root(output, gradient)
        self.deepspeed.backward(root, scale_wrt_gas=False)

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """The group of all processes; None if there is one."""
        return dist.group.WORLD if self.mesh.world_size > 1 else None

    def check_replicas(self) -> None:
        """Compare the parameters that several processes hold. Every process calls it. Raises ReplicaDrift."""
        check_replicas(self.trained, self.mesh, self.step)

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Every process calls it."""
        with self.phases.waiting():
            return sum_over([float(flag)], self.everyone, self.mesh.device)[0] > 0

    def fragments(self) -> Iterator[Fragment]:
        """The fp32 weights and optimizer state that this process writes to a checkpoint (views, not copies)."""
        return self.state.fragments()

    def state_dict(self) -> JsonObject:
        """The rest of the state, as JSON."""
        state = {
            "step": self.step,
            "updates": self.updates,
            "optimizer": self.config.optimizer.type,
            "guard": self.updater.guard.state_dict(),
        }
        scaler = self.updater.scaler_state()
        return {**state, "loss_scale": scaler} if scaler else state

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint, whatever layout wrote it.

        Raises:
            CheckpointError: it holds other tensors than this model, or the state of another optimizer.
        """
        saved = checkpoint.state
        self.state.restore(checkpoint, self.config.optimizer.type)
        self.step, self.updates = saved["step"], saved["updates"]
        self.tied.publish()
        self.deepspeed.global_steps = self.step
        self.updater.guard.restore(saved.get("guard", {}))
        self.updater.restore_scaler(saved.get("loss_scale", {}))

    def take_weights(self, checkpoint: Checkpoint) -> None:
        """Start from the weights of a checkpoint, in fp32; step, optimizer and schedule stay at their start. Raises
        as `OptimizerState.take_weights`.
        """
        self.state.take_weights(checkpoint)
        self.tied.publish()
