"""The update at the end of a step: clipped and applied, or skipped, identically on every process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from neox.config.schema import Config
from neox.engine.guard import Guard
from neox.engine.lr_schedule import build_lr_schedule
from neox.engine.optimizer_state import OptimizerState, pending_gradients
from neox.errors import NonFinite
from neox.parallel.mesh import Mesh
from neox.phases import Phases

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
NO_TARGETS = "no token of the global batch is a target: there is no loss"


@dataclass(frozen=True)
class Update:
    """What became of the update of a step; identical on every process.

    Attributes:
        grad_norm: L2 norm of the gradient before clipping; infinite if the update was skipped.
        skipped: no parameter changed: an fp16 gradient overflowed and the loss scale was lowered, no token was a
            target, or `problem`.
        problem: a description of what was wrong with the step: not finite, or a spike of the loss; None if nothing was.
        spike: whether it was a spike.
    """

    grad_norm: float
    skipped: bool
    problem: str | None = None
    spike: bool = False


class Updater:
    """Decides on updates and makes them. Every process makes the same calls with the same numbers.

    Args:
        config: the run.
        mesh: the layout of processes.
        deepspeed: DeepSpeed's engine.
        state: the weights and optimizer state of this process.
        phases: marks where this process waits for others.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        deepspeed: DeepSpeedEngine,
        state: OptimizerState,
        phases: Phases,
    ):
        self.config = config
        self.mesh = mesh
        self.deepspeed = deepspeed
        self.optimizer = state.optimizer
        self.zero = state.wrapper
        fp16 = config.precision.dtype == "fp16"
        self.scaled = self.zero if fp16 and not isinstance(self.zero, BF16_Optimizer) else None
        self.count_good_step: Callable[[], None] = lambda: None
        if self.scaled is not None:
            self.count_good_step = defer_growth(self.scaled.loss_scaler)
            # an overflow at the smallest scale, or gradients dropped there: the guard decides, not DeepSpeed
            vars(self.scaled.loss_scaler)["raise_error_at_min_scale"] = False
        self.state = state
        self.phases = phases
        self.guard = Guard(config.guard)
        self.lr_schedule = build_lr_schedule(config.schedule, config.optimizer, config.train.train_iters)

    @property
    def loss_scale(self) -> float:
        """The factor of the loss in the backward pass; 1 unless the run is in fp16."""
        return 1.0 if self.scaled is None else self.scaled.loss_scale

    def scaler_state(self) -> dict[str, float]:
        """The state of fp16's loss scaler; empty in other precisions."""
        if self.scaled is None:
            return {}
        return {key: getattr(self.scaled.loss_scaler, key) for key in SCALER_STATE}

    def restore_scaler(self, state: dict[str, float]) -> None:
        """Restore what `scaler_state` returned; does nothing in other precisions than fp16."""
        if self.scaled is not None:
            for key, value in state.items():
                setattr(self.scaled.loss_scaler, key, value)

    def set_learning_rate(self, step: int, updates: int) -> float:
        """Set the learning rate of a step, before which `updates` updates were made, in the optimizer's groups.

        Returns it.
        """
        lr = self.lr_schedule.learning_rate(step, updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        return lr

    def apply(
        self, step: int, loss: float, problem: NonFinite | None, not_finite: Callable[[str, object], NonFinite]
    ) -> Update:
        """Update, unless something is wrong with the step. All processes call it together.

        Args:
            step: number of the step.
            loss: mean loss of the global batch.
            problem: a weight or loss that is not finite; None if all are.
            not_finite: (what, value found) -> the error for a gradient that is not finite.

        Raises:
            NonFinite: `guard.non_finite` does not skip the problem, or too many updates in a row were skipped. No
                parameter changed.
        """
        spike = problem is None and self.guard.is_spike(loss)
        outcome: Update | NonFinite
        if problem is not None:
            self.drop_gradients()
            outcome = problem
        elif spike and self.guard.skips_spikes:
            self.drop_gradients()
            outcome = Update(math.inf, skipped=True)
        else:
            outcome = self.clip_and_step(not_finite)
        if isinstance(outcome, NonFinite):
            self.guard.note_non_finite(outcome)
            return Update(math.inf, skipped=True, problem=f"{outcome.what}: {outcome.got}")
        description = self.guard.describe_spike(loss) if spike else None
        if not outcome.skipped:
            self.guard.accept(loss)
        elif spike and self.guard.skips_spikes:  # with `warn`, an overflow in fp16 is what skipped the update
            self.guard.count_skipped(
                NonFinite(
                    "loss spike did not recover", where=f"step {step}", got=description, do="lower the learning rate"
                )
            )
        return replace(outcome, problem=description, spike=spike)

    def clip_and_step(self, not_finite: Callable[[str, object], NonFinite]) -> Update | NonFinite:
        """Clip the gradient and step the optimizer.

        If the gradient is not finite, no parameter changes and the error is returned.
        """
        if self.zero is None:
            norm = self.clip_gradients()
            if not math.isfinite(norm):
                self.drop_gradients()
                return not_finite("gradient", norm)
            self.step_optimizer()
            return Update(norm, skipped=False)
        scale = self.loss_scale
        self.step_optimizer()  # DeepSpeed clips, and skips the update on overflow
        if not self.zero.overflow:
            norm = self.deepspeed.get_global_grad_norm()
            with self.phases.waiting():
                return Update(math.nan if norm is None else float(norm), skipped=False)
        self.state.gather_persistent()
        if self.loss_scale < scale:  # at its minimum no scale is too high: the gradient itself is not finite
            return Update(math.inf, skipped=True)
        return not_finite("gradient", "NaN or infinity")

    def skip_empty_batch(self) -> Update:
        """Skip the update of a batch without a target: neither weight decay nor momentum may move the weights.

        All processes call it together.
        """
        scaler = self.scaler_state()
        self.drop_gradients()
        self.restore_scaler(scaler)  # DeepSpeed counts dropped gradients as an overflow
        return Update(math.inf, skipped=True, problem=NO_TARGETS)

    def drop_gradients(self) -> None:
        """Discard the gradients of this step without an update. All processes call it together."""
        if self.zero is None:
            self.optimizer.zero_grad(set_to_none=True)
            return
        for gradient in pending_gradients(self.zero):  # DeepSpeed discards all gradients when one is not finite
            gradient.fill_(math.nan)
        self.step_optimizer()
        self.state.gather_persistent()

    def step_optimizer(self) -> None:
        """Step DeepSpeed's engine. Its Muon is torch.compiled: on a CPU that would start a C++ compiler in the
        middle of a run, so it stays eager there.
        """
        eager = self.config.optimizer.type == "muon" and self.mesh.device.type == "cpu"
        with self.phases.waiting(), torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            self.deepspeed.step()  # reads the norm over all processes
        if self.zero is not None and not self.zero.overflow:
            self.count_good_step()

    def clip_gradients(self) -> float:
        """Stage 0: scale the reduced gradients to at most `optimizer.gradient_clipping`. Returns their norm before."""
        limit = self.config.optimizer.gradient_clipping
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        counted = [p.grad for p in trained if p.tensor_model_parallel or self.mesh.tp_rank == 0]
        square = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if counted:
            square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(counted))).double().square()
        with self.phases.waiting():  # one read, of the sum over the processes
            if self.mesh.model_group is not None:
                dist.all_reduce(square, group=self.mesh.model_group)
            norm = math.sqrt(float(square))
        if 0.0 < limit < norm < math.inf:
            torch._foreach_mul_([p.grad for p in trained], limit / (norm + 1e-6))
        return norm


def defer_growth(scaler: DynamicLossScaler | LossScaler) -> Callable[[], None]:
    """Let a loss scaler grow only after a step, by the function that is returned.

    DeepSpeed (0.19.8) grows the scale before it divides the gradient by it, so that the step would be made with half
    of the gradient. The price is a method of DeepSpeed's that is replaced; tests/engine/test_fp16.py compares the steps
    with plain PyTorch's.
    """
    update = scaler.update_scale
    scaler.update_scale = lambda overflow: update(True) if overflow else None
    return lambda: update(False)


def sum_over(values: Sequence[float], group: dist.ProcessGroup | None, device: torch.device) -> list[float]:
    """Sum numbers over a group, in double precision; None is the group of this process alone."""
    if group is None:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums, group=group)
    return sums.tolist()
