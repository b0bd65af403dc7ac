"""What a step is checked for before its update is applied, and what happens then: losses that are not finite, losses that jump."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from neox.config.schema import GuardConfig
from neox.errors import NonFinite

FEWEST = 8  # losses before which nothing counts as a spike


class Guard:
    """Decides from numbers that all processes share, so that all decide alike. Its state belongs to a checkpoint.

    Args:
        config: the policies.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = 0

    def spikes(self, loss: float) -> bool:
        """Whether a finite loss is more than spike_factor times the median of the last losses, of which only good ones count.

        A median of 0 (a model that has learned its data by heart) measures nothing: no loss is a spike then.
        """
        if self.config.loss_spike == "off" or len(self.losses) < min(FEWEST, self.config.spike_window):
            return False
        median = statistics.median(self.losses)
        return median > 0 and loss > self.config.spike_factor * median

    @property
    def refuses_spikes(self) -> bool:
        """Whether the update of a step with a spike is not applied."""
        return self.config.loss_spike in ("skip", "rollback")

    def spike(self, loss: float) -> str:
        """A spike in words."""
        return f"loss {loss:.6g} is {loss / statistics.median(self.losses):.3g} times the median of the last {len(self.losses)}"

    def accept(self, loss: float) -> None:
        """A step was applied."""
        if math.isfinite(loss):
            self.losses.append(loss)
        self.skipped = 0

    def refuse(self, problem: NonFinite) -> None:
        """A step is not applied.

        Raises:
            NonFinite: the policy is to stop, or too many steps in a row were skipped.
        """
        if self.config.non_finite == "stop":
            raise problem
        self.count(problem)

    def count(self, problem: NonFinite) -> None:
        """Count a skipped step; raises NonFinite where there were too many in a row."""
        self.skipped += 1
        if self.skipped > self.config.max_skipped:
            want = f"at most {self.config.max_skipped} steps skipped in a row (guard.max_skipped)"
            raise NonFinite(problem.what, where=problem.where, got=problem.got, want=want, do=problem.do)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON."""
        return {"losses": list(self.losses), "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; of one from before there was any, nothing."""
        losses: Sequence[float] = state.get("losses", ())
        self.losses = deque(losses, maxlen=self.config.spike_window)
        self.skipped = state.get("skipped", 0)
