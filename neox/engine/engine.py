"""The engine: one optimizer step over a global batch, on DeepSpeed's data-parallel machinery, over any layout of processes.

What is ours and what is DeepSpeed's:
- DeepSpeed reduces, cuts and gathers (ZeRO 0-3), keeps the fp32 master weights and accumulators, scales the loss for fp16.
- The optimizer instance, its groups, the learning rate, and the weight of every token are ours. The loss of a step is
  sum(loss of tokens) / (number of targets in the GLOBAL batch); micro-batches with fewer targets weigh less.
- Tensor and context parallelism are in the model; pipeline stages each run this engine over their layers (neox.engine.pipeline).
- A weight, loss or gradient that is not finite is found before the update, from numbers that all processes share, so that all decide alike.

Stage 0 with bf16 or fp16 runs on DeepSpeed's stage 1: its stage 0 has no fp32 accumulation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from neox.checkpoint.reshard import Fragment
from neox.config.schema import Config
from neox.engine.batch import Batch, context_slice, to_device
from neox.engine.deepspeed_setup import init_deepspeed
from neox.engine.drift import check_replicas, known_to_all, largest, not_finite
from neox.engine.footprint import optimizer_state_keys
from neox.engine.guard import Guard
from neox.engine.lr_schedule import build_lr_schedule
from neox.engine.objective import Objective, TokenLoss, answer_log_probabilities, build_objective
from neox.engine.optimizer import build_optimizer
from neox.engine.optimizer_state import OptimizerState, held_gradients
from neox.engine.pipeline import OneForwardOneBackward, TiedExchange, hand_over
from neox.errors import CheckpointError, NonFinite
from neox.faults import NO_FAULTS, Faults
from neox.model.adapters import HEAD, SCORE, is_added, is_trained
from neox.parallel.mesh import Mesh
from neox.parallel.shard_spec import ShardSpec
from neox.parallel.wait_tracker import WaitTracker

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
NO_TARGETS = "no token of the global batch is a target: there is no loss"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BatchSizes(Protocol):
    """The batch triangle (neox.config.validate.BatchSizes)."""

    micro_batch_size: int
    gradient_accumulation: int
    global_batch_size: int


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every process.

    Attributes:
        step: number of this step, 1 is the first.
        loss: mean loss per target of the global batch; NaN where the batch has no target.
        grad_norm: L2 norm of its gradient before clipping.
        lr: learning rate of the update.
        tokens: targets that counted.
        skipped: no update was made: an fp16 gradient overflowed and the loss scale was lowered, there was no target, or `problem`.
        stop: some process asked to stop before the update.
        problem: what was wrong with the step in words: not finite, or a spike of the loss; None: nothing.
        spike: whether it was a spike.
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


class SummedLoss(torch.nn.Module):
    """What DeepSpeed wraps: the model, ending in the sum that the objective makes of its per-token losses, or in what the next stage receives."""

    def __init__(self, model: torch.nn.Module, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, received: torch.Tensor | None = None, dloss: float | None = None) -> torch.Tensor:
        """Sum of the batch's losses, fp32 scalar; on a stage that is not the last, the residual stream [b, s, h].

        dloss is the gradient that every token's loss is going to get, where it is known.
        """
        stage: dict[str, Any] = {"checked": True} if received is None else {"checked": True, "received": received}  # by the loader
        if dloss is not None:
            stage["expected_dloss"] = dloss
        out = self.model.loss(batch.tokens, batch.targets, segment_ids=batch.segment_ids, position_ids=batch.position_ids, **stage)
        return self.objective(out, batch) if out.ndim == 1 else out


class Engine:
    """Trains a model on global batches. Every process makes the same calls in the same order.

    Args:
        config: the run.
        mesh: place of this process.
        model: GPT with fp32 parameters on mesh.device. It belongs to the engine from now on.
        batch_sizes: the resolved batch triangle.
        total_steps: length of the run, where the schedule ends unless the config says otherwise.
        faults: faults on purpose.
        alive: called at each micro-batch, as a sign of life.
        waits: marks where the step waits for other processes.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: torch.nn.Module,
        batch_sizes: BatchSizes,
        total_steps: int,
        *,
        faults: Faults = NO_FAULTS,
        alive: Callable[[], None] | None = None,
        waits: WaitTracker | None = None,
    ):
        self.faults = faults
        self.waits = WaitTracker() if waits is None else waits
        self.alive = alive
        self.guard = Guard(config.guard)
        self.config = config
        self.mesh = mesh
        self.model = model
        self.schedule = build_lr_schedule(config.schedule, config.optimizer, total_steps)
        self.clip = config.optimizer.gradient_clipping
        self.step = 0
        self.updates = 0
        self.objective = build_objective(config.train)
        layouts: dict[str, ShardSpec] = model.shard_specs()
        held = [(name, p, layouts[name]) for name, p in model.named_parameters()]
        named = [row for row in held if row[1].requires_grad]
        self.named = named
        parameters = [(name, p) for name, p, _ in named]
        self.optimizer = build_optimizer(parameters, config.optimizer)
        shapes = model.logical_shapes()
        kinds = {name: optimizer_state_keys(config.optimizer, name, len(shape)) if is_trained(config.model, name) else () for name, shape in shapes.items()}
        for _, p, layout in named:
            p.tensor_model_parallel = layout.dim is not None and mesh.tp > 1  # DeepSpeed's norm counts others on one member of the tensor group only
        rounded = config.precision.dtype != "fp32"
        initial = on_the_host(parameters) if rounded else {}
        self.deepspeed = init_deepspeed(
            config, SummedLoss(model, self.objective), self.optimizer, (batch_sizes.micro_batch_size, batch_sizes.gradient_accumulation), mesh
        )
        self.wrapper = self.deepspeed.optimizer
        self.plain = self.wrapper is self.optimizer
        self.state = OptimizerState(held, self.wrapper, self.optimizer, kinds, shapes, (mesh.replica_rank, mesh.replicas))
        if rounded:
            self.state.write_weights(initial)  # DeepSpeed made its masters from weights that were already rounded
        self.dtype = DTYPES[config.precision.dtype]
        self.weight = 1.0  # of a token's loss in the gradient of this step
        self.tied = tie(model, mesh, self.dtype)
        if faults:
            named[0][1].register_hook(lambda gradient: faults.value("gradient", gradient))
        self.schedule_of_stages = OneForwardOneBackward(mesh, self.forward, self.backward, lambda batch: model.boundary_shape(batch.tokens), self.dtype)

    def train_step(self, batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """One optimizer step over this process's micro-batches of one global batch.

        Args:
            batches: gradient_accumulation micro-batches, on the CPU or on the device.
            stop: this process asks to stop; the answer of all is in the result.

        Raises:
            NonFinite: a weight, the loss or the gradient is NaN or infinite, and guard.non_finite does not skip it, or not any more; nothing was
                updated, on any process.
        """
        step = self.step + 1
        self.begin_step()
        weights = largest(self.named)
        parts = [context_slice(batch, self.mesh) for batch in batches]
        # counted where the loader left them: on the device, every micro-batch would wait for what is under way there
        total = int(self.sum_over([sum(self.objective.count(batch) for batch in parts)], self.mesh.replica_group)[0])
        local = [to_device(batch, self.mesh.device) for batch in parts]
        self.weight = self.mesh.replicas / max(total, 1)  # DeepSpeed averages gradients over the replicas
        loss = self.schedule_of_stages.train(local)
        finite = torch.isfinite(weights).all().to(loss.device)
        with self.waits():  # the one of a step without an error; a GPU's queue holds collectives
            loss = float(torch.where(finite, loss, math.nan))
        loss = self.faults.value("loss_number", loss)
        if self.tied is not None:
            self.tied.send_gradient()
        speaks = self.mesh.last_stage and self.mesh.tp_rank == 0
        loss_sum, stops = self.sum_over([loss if speaks else 0.0 * loss, float(stop)], self.everyone)
        mean = loss_sum / max(total, 1)
        problem = None if math.isfinite(mean) else self.bad_weight_or_loss(mean, step, batches)
        learning_rate = self.schedule.learning_rate(step, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1)
        self.faults("update")
        if total == 0 and problem is None:
            mean, norm, skipped, words, spike = self.no_update_without_targets()
        else:
            norm, skipped, words, spike = self.judged_update(mean, problem, step, batches)
        self.faults("updated")
        if self.tied is not None:
            self.tied.publish()
        self.step = step
        self.updates += not skipped
        return StepResult(step, mean, norm, learning_rate, total, skipped, stops > 0, words, spike)

    def no_update_without_targets(self) -> tuple[float, float, bool, str, bool]:
        """Leave out the update of a step whose batch has no target: nothing was learned, so neither decay nor momentum may move the weights.

        All processes call it together. Returns what `train_step` records: loss and norm (there are none), and the rest as `judged_update`.
        """
        scaler = self.wrapper.loss_scaler if self.config.precision.dtype == "fp16" else None
        before = {key: getattr(scaler, key) for key in SCALER_STATE} if scaler is not None else {}
        self.drop_gradients()
        for key, value in before.items():  # DeepSpeed takes the gradients that were dropped for an overflow
            setattr(scaler, key, value)
        return math.nan, math.inf, True, NO_TARGETS, False

    def bad_weight_or_loss(self, mean: float, step: int, batches: Sequence[Batch]) -> NonFinite:
        """Why the mean loss is not finite. All processes call it together."""
        weights = known_to_all([f"{name} on rank {self.mesh.rank}" for name in not_finite(self.named)], self.mesh)
        return self.not_finite("weight", weights[0], step, batches) if weights else self.not_finite("loss", mean, step, batches)

    def begin_step(self) -> None:
        """Sites of a step's beginning."""
        self.faults("step")
        if self.faults:
            p = self.named[0][1]
            spoil(getattr(p, "ds_tensor", p) if p.numel() == 0 else p, self.faults)

    def judged_update(self, mean: float, problem: NonFinite | None, step: int, batches: Sequence[Batch]) -> tuple[float, bool, str | None, bool]:
        """Update unless something is wrong. Returns norm, whether the update was left out, what was wrong in words, and whether that was a spike."""
        spike = problem is None and self.guard.spikes(mean)
        if problem is not None or (spike and self.guard.refuses_spikes):
            self.drop_gradients()
            norm, skipped = math.inf, True
        else:
            norm, skipped, problem = self.update(step, batches)
        if problem is not None:
            self.guard.refuse(problem)
            return norm, skipped, f"{problem.what}: {problem.got}", False
        words = self.guard.spike(mean) if spike else None
        if not skipped:
            self.guard.accept(mean)
        elif spike:
            self.guard.count(NonFinite("the loss jumps and does not come back", where=f"step {step}", got=words, do="lower the learning rate"))
        return norm, skipped, words, spike

    def forward(self, batch: Batch, received: torch.Tensor | None) -> torch.Tensor:
        """One micro-batch through this stage."""
        self.faults("forward")
        if self.alive is not None:
            self.alive()
        return self.faults.value("loss", self.deepspeed(batch, received, self.expected_dloss()))

    def expected_dloss(self) -> float | None:
        """The gradient that the loss of every token is going to get in the backward; None where there is none, or it differs from token to token."""
        if not torch.is_grad_enabled() or not isinstance(self.objective, TokenLoss):
            return None
        return self.weight * (self.wrapper.loss_scale if self.config.precision.dtype == "fp16" else 1.0)

    def backward(self, output: torch.Tensor, gradient: torch.Tensor | None, last: bool) -> None:
        """Backward of one micro-batch through this stage; after the last one gradients are reduced over the replicas."""
        self.faults("backward")
        self.deepspeed.set_gradient_accumulation_boundary(last)
        if self.tied is not None:
            self.tied.last_backward = last
        # Always weighted outside: DeepSpeed divides the gradient by gradient_accumulation after all where backward() gets the very tensor
        # that forward() returned (its hook on the output then runs before the one that marks the graph as scaled).
        root = output * self.weight if gradient is None else hand_over(output, gradient)
        self.deepspeed.backward(root, scale_wrt_gas=False)

    def update(self, step: int, batches: Sequence[Batch]) -> tuple[float, bool, NonFinite | None]:
        """Clip, and step the optimizer. Returns the gradient's norm, whether the update was left out, and why where that is no overflow of fp16."""
        if self.plain:
            norm = self.clip_plain()
            if not math.isfinite(norm):
                self.drop_gradients()
                return norm, True, self.not_finite("gradient", norm, step, batches)
            self.step_optimizer()
            return norm, False, None
        self.step_optimizer()
        if not self.wrapper.overflow:
            with self.waits():
                return float(self.deepspeed.get_global_grad_norm()), False, None
        self.state.gather_persistent()
        if self.config.precision.dtype == "fp16" and self.wrapper.loss_scale > self.config.precision.min_loss_scale:
            return math.inf, True, None
        return math.inf, True, self.not_finite("gradient", "NaN or infinity", step, batches)

    def drop_gradients(self) -> None:
        """Forget the gradients of this step, on all processes, without an update."""
        if self.plain:
            self.optimizer.zero_grad(set_to_none=True)
            return
        for gradient in held_gradients(self.wrapper):  # DeepSpeed clears all that it holds where it finds one that is not finite
            gradient.fill_(math.nan)
        self.step_optimizer()
        self.state.gather_persistent()

    def check_replicas(self) -> None:
        """Compare the parameters with those of the processes that should hold the same. Every process calls it; raises ReplicaDrift."""
        check_replicas(self.named, self.mesh, self.step)

    def any_asks(self, stop: bool) -> bool:
        """Whether any process asks to stop. Every process calls it."""
        return self.sum_over([float(stop)], self.everyone)[0] > 0

    def step_optimizer(self) -> None:
        """DeepSpeed's step. Its Muon is torch.compiled: on a CPU that would start a C++ compiler in the middle of a run, so it stays eager there."""
        eager = self.config.optimizer.type == "muon" and self.mesh.device.type == "cpu"
        with self.waits(), torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            self.deepspeed.step()  # it reads the norm that all share

    def clip_plain(self) -> float:
        """Stage 0: the norm of the reduced gradients, which are then scaled to at most the clipping norm."""
        held = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        counted = [p.grad for p in held if p.tensor_model_parallel or self.mesh.tp_rank == 0]
        with self.waits():
            square = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(counted)))) ** 2 if counted else 0.0
        value = math.sqrt(self.sum_over([square], self.mesh.model_group)[0])
        if 0.0 < self.clip < value < math.inf:
            torch._foreach_mul_([p.grad for p in held], self.clip / (value + 1e-6))
        return value

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """The group of all processes; None where there is one."""
        return dist.group.WORLD if self.mesh.world_size > 1 else None

    def sum_over(self, values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
        """Sum numbers over a group, in double precision."""
        if group is None:
            return list(values)
        out = torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
        with self.waits():
            dist.all_reduce(out, group=group)
            return out.tolist()

    def not_finite(self, what: str, got: object, step: int, batches: Sequence[Batch]) -> NonFinite:
        """The error for a weight, loss or gradient that is NaN or infinite, with the samples of the global batch. All processes call it together."""
        samples = torch.cat([batch.sample_ids for batch in batches]).to(self.mesh.device)
        everyone = [samples]
        if self.mesh.dp_group is not None:
            everyone = [torch.empty_like(samples) for _ in range(self.mesh.dp)]
            dist.all_gather(everyone, samples, group=self.mesh.dp_group)
        return NonFinite(
            f"the {what} is not finite",
            where=f"rank {self.mesh.rank}: step {step}",
            got=f"{got}, samples {sorted(torch.cat(everyone).tolist())}",
            want="a finite number",
            do="nothing was updated; lower the learning rate, or look at these samples (neox data which --run DIR --step N)",
        )

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss per target over the batches of all processes, NaN where there is no target; the training state and the random streams are untouched."""
        total, targets, _ = self.evaluate_part(batches)
        return total / targets if targets else math.nan

    @torch.no_grad()
    def evaluate_part(self, batches: Iterable[Batch], *, stop: bool = False) -> tuple[float, float, bool]:
        """Part of an evaluation: sum of the losses, number of targets, and whether any process asks to stop, over all processes."""
        self.faults("evaluate")
        self.deepspeed.eval()
        parts = [context_slice(batch, self.mesh) for batch in batches]
        count = sum(self.objective.count(batch) for batch in parts)  # where the loader left them, as in `train_step`
        loss = self.schedule_of_stages.evaluate([to_device(batch, self.mesh.device) for batch in parts])
        self.deepspeed.train()
        speaks = self.mesh.last_stage and self.mesh.tp_rank == 0
        counted = self.mesh.first_stage and self.mesh.tp_rank == 0
        sums = torch.tensor([0.0, float(count) if counted else 0.0, float(stop)], dtype=torch.float64).to(self.mesh.device)
        if speaks:
            sums[0] = loss
        with self.waits():  # the only one: the loss is summed before it is read
            if self.everyone is not None:
                dist.all_reduce(sums, group=self.everyone)
            total, targets, stops = sums.tolist()
        return total, targets, stops > 0

    @torch.no_grad()
    def log_probabilities(self, batch: Batch) -> torch.Tensor:
        """Log-probability of the targets of each row, fp32 [rows] on the CPU, by the model as it is; the training state is untouched."""
        self.deepspeed.eval()
        local = to_device(batch, self.mesh.device)
        losses = self.model.token_losses(local.tokens, local.targets, checked=True)
        self.deepspeed.train()
        return answer_log_probabilities(losses, len(local.tokens)).cpu()

    def fragments(self) -> Iterator[Fragment]:
        """The fp32 weights and optimizer state that this process writes to a checkpoint (views, not copies)."""
        return self.state.fragments()

    def state_dict(self) -> dict[str, Any]:
        """The rest of the state: JSON numbers."""
        out: dict[str, Any] = {"step": self.step, "updates": self.updates, "optimizer": self.config.optimizer.type}
        out["guard"] = self.guard.state_dict()
        if self.config.precision.dtype == "fp16":
            scaler = self.wrapper.loss_scaler
            out["loss_scale"] = {key: getattr(scaler, key) for key in SCALER_STATE}
        return out

    def restore(self, checkpoint: Any) -> None:
        """Take up the state of a neox.checkpoint.reader.Checkpoint, whatever layout wrote it.

        Raises:
            CheckpointError: its tensors are not those of this model, or its optimizer is another.
        """
        saved = checkpoint.state
        if "optimizer" not in saved:
            do = f"checkpoint.init_from: {checkpoint.path}, to start at step 0 from it"
            raise CheckpointError("the checkpoint holds weights only: nothing to resume", where=checkpoint.path, do=do)
        if saved["optimizer"] != self.config.optimizer.type:
            raise CheckpointError(
                "the checkpoint is of another optimizer",
                where=f"{checkpoint.path}: optimizer.type",
                got=saved["optimizer"],
                want=self.config.optimizer.type,
                do=f"optimizer.type: {saved['optimizer']}, or another run.dir to start anew",
            )
        checkpoint.check(self.state.tensors())
        self.step, self.updates = saved["step"], saved["updates"]
        self.state.prepare(self.updates)
        self.state.write(checkpoint)
        if self.tied is not None:
            self.tied.publish()
        self.deepspeed.global_steps = self.step
        self.guard.restore(saved.get("guard", {}))
        if "loss_scale" in saved and self.config.precision.dtype == "fp16":
            for key, value in saved["loss_scale"].items():
                setattr(self.wrapper.loss_scaler, key, value)

    def take_weights(self, checkpoint: Any) -> None:
        """Start from the weights of a checkpoint, the fp32 ones included; step, optimizer and schedule stay at their beginning.

        Adapters and a reward model's head begin at their initial values where the checkpoint has none; a reward model leaves its logits' head unread.

        Raises:
            CheckpointError: its tensors are not those of this model.
        """
        have = set(checkpoint.names())
        wanted = {name: shape for name, shape in self.state.shapes.items() if name in have or not is_added(name)}
        if SCORE in self.state.shapes and HEAD in have:
            wanted[HEAD] = checkpoint.info(HEAD).shape
        checkpoint.check((name, "weight", shape) for name, shape in wanted.items())
        self.state.write(checkpoint, weights_of=wanted.keys())
        if self.tied is not None:
            self.tied.publish()


def tie(model: torch.nn.Module, mesh: Mesh, dtype: torch.dtype) -> TiedExchange | None:
    """The exchange of a tied embedding between the first and the last stage; None where it is not needed."""
    tied = mesh.pp > 1 and model.config.tie_embeddings and model.config.output == "tokens"
    owner = model.embedding.word.weight if mesh.first_stage and tied else None
    if owner is None and (not tied or model.tied is None):
        return None
    if owner is None and model.tied.weight.dtype != dtype:
        model.tied.replace(model.tied.weight.to(dtype))
    return TiedExchange(mesh, owner, model.tied)


def on_the_host(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Copies in memory of the host, by name: on a GPU a second set of fp32 weights beside DeepSpeed's would be the peak of the whole start."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters}


@torch.no_grad()
def spoil(tensor: torch.Tensor, faults: Faults) -> None:
    """The site `parameter`: the first element of a weight."""
    first = tensor.detach().view(-1)[:1]
    first.copy_(faults.value("parameter", first.clone()))
