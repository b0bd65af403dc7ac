"""Checks of a step before its update, and the policies for losses that are not finite and for loss spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from neox.config.schema import GuardConfig
from neox.errors import NonFinite
from neox.files import JsonObject
from neox.parallel.mesh import Mesh

MIN_LOSSES = 8  # accepted losses before any loss counts as a spike


class Guard:
    """Decides from numbers that all processes share, so that all decide the same. Its state is part of a checkpoint.

    Args:
        config: the policies.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = 0

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss exceeds spike_factor times the median of the last accepted losses.

        A median of 0 (a model that has memorised its data) is no measure; no loss is a spike then.
        """
        if self.config.loss_spike == "off" or len(self.losses) < min(MIN_LOSSES, self.config.spike_window):
            return False
        median = statistics.median(self.losses)
        return median > 0 and loss > self.config.spike_factor * median

    @property
    def skips_spikes(self) -> bool:
        """Whether the update of a step with a spike is skipped."""
        return self.config.loss_spike in ("skip", "rollback")

    def describe_spike(self, loss: float) -> str:
        """Describe a spike."""
        return (
            f"loss {loss:.6g} is {loss / statistics.median(self.losses):.3g} times the median of the last "
            f"{len(self.losses)}"
        )

    def accept(self, loss: float) -> None:
        """Note an update that was applied."""
        if math.isfinite(loss):
            self.losses.append(loss)
        self.skipped = 0

    def note_non_finite(self, problem: NonFinite) -> None:
        """Note an update that was skipped because a number is not finite.

        Raises:
            NonFinite: the policy is to stop, or too many updates in a row were skipped.
        """
        if self.config.non_finite == "stop":
            raise problem
        self.count_skipped(problem)

    def count_skipped(self, problem: NonFinite) -> None:
        """Count a skipped update. Raises NonFinite if there were too many in a row."""
        self.skipped += 1
        if self.skipped > self.config.max_skipped:
            want = f"at most {self.config.max_skipped} steps skipped in a row (guard.max_skipped)"
            raise NonFinite(problem.what, where=problem.where, got=problem.got, want=want, do=problem.do)

    def state_dict(self) -> JsonObject:
        """The state, as JSON."""
        return {"losses": list(self.losses), "skipped": self.skipped}

    def restore(self, state: JsonObject) -> None:
        """Restore the state of a checkpoint. One written before guards had a state has an empty one."""
        losses: Sequence[float] = state.get("losses", ())
        self.losses = deque(losses, maxlen=self.config.spike_window)
        self.skipped = state.get("skipped", 0)


def non_finite_error(what: str, got: object, step: int, sample_ids: Sequence[torch.Tensor], mesh: Mesh) -> NonFinite:
    """The error for a weight, loss or gradient that is not finite, with the samples of the global batch.

    All processes call it together.

    Args:
        what: weight, loss or gradient.
        got: the value, or the name of the weight.
        step: number of the step.
        sample_ids: int64 [b] per micro-batch of this process.
        mesh: the layout of processes.
    """
    local = torch.cat(list(sample_ids)).to(mesh.device)
    everyone = [local]
    if mesh.dp_group is not None:
        everyone = [torch.empty_like(local) for _ in range(mesh.dp)]
        dist.all_gather(everyone, local, group=mesh.dp_group)
    return NonFinite(
        f"the {what} is not finite",
        where=f"rank {mesh.rank}: step {step}",
        got=f"{got}, samples {sorted(torch.cat(everyone).tolist())}",
        want="a finite number",
        do="no update was applied; lower the learning rate, or inspect these samples (neox data which --run DIR "
        "--step N)",
    )
