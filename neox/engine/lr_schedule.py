"""Learning-rate schedules: pure functions of the step and of the number of updates.

A resumed run therefore needs no schedule state.

Steps count from 1: `learning_rate(n)` is the rate of the n-th optimizer step. With w = warmup_iters, d = decay_iters,
c = cooldown_iters and p = (n - w) / (d - w) cut to [0, 1], `rule: native` is:

    n < w          peak n / w
    constant       peak
    linear         min + (peak - min) (1 - p)
    cosine         min + (peak - min) (1 + cos(pi p)) / 2            (arXiv 1608.03983, no restarts)
    wsd            peak until d - c, then linear to min at d         (arXiv 2404.06395)
    inverse_sqrt   peak sqrt(max(w, 1) / n), never below min         (arXiv 1706.03762)

The rate stays constant after step d.

`rule: gpt_neox` is GPT-NeoX's AnnealingLR (megatron/learning_rates.py), which is stepped after the optimizer. With m
updates made before the step (n - 1 where none was skipped), w a real number and x = (m - w) / (d - w), never cut:

    m <= w, w > 0  peak max(1, m) / w
    constant       peak
    linear         peak (1 - x), never below min
    cosine         min + (peak - min) (1 + cos(pi x)) / 2

Its cosine rises again after d. A skipped update (an fp16 overflow) does not advance it. DeepSpeed's schedulers are not
used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neox.config.schema import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class LRSchedule:
    """A learning rate over the optimizer steps."""

    type: str
    peak: float
    min_lr: float
    warmup_iters: float
    decay_iters: int
    cooldown_iters: int = 0
    rule: str = "native"

    def learning_rate(self, step: int, updates: int | None = None) -> float:
        """The learning rate of step `step` (from 1), before which `updates` updates were made (None: step - 1)."""
        if self.rule == "gpt_neox":
            return gpt_neox(self, step - 1 if updates is None else updates)
        if step < self.warmup_iters:
            return self.peak * step / self.warmup_iters
        return FORMULAS[self.type](self, min(step, max(self.decay_iters, self.warmup_iters)))

    def progress(self, step: float, begin: float) -> float:
        """Share of the way from step `begin` to decay_iters, in [0, 1]."""
        if self.decay_iters <= begin:
            return 0.0 if step < self.decay_iters else 1.0
        return min(max((step - begin) / (self.decay_iters - begin), 0.0), 1.0)


def gpt_neox(schedule: LRSchedule, updates: int) -> float:
    """GPT-NeoX's rate after `updates` updates."""
    peak, low, warmup = schedule.peak, schedule.min_lr, schedule.warmup_iters
    if warmup > 0 and updates <= warmup:
        return peak * max(1, updates) / warmup
    if schedule.type == "constant":
        return peak
    length = schedule.decay_iters - warmup
    if length <= 0:
        return low  # GPT-NeoX divides by zero here
    passed = (updates - warmup) / length
    if schedule.type == "linear":
        return max(low, peak * (1.0 - passed))
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * passed))


def constant(schedule: LRSchedule, step: float) -> float:
    """The peak."""
    return schedule.peak


def linear(schedule: LRSchedule, step: float) -> float:
    """A straight line from the peak to min_lr."""
    return schedule.min_lr + (schedule.peak - schedule.min_lr) * (1.0 - schedule.progress(step, schedule.warmup_iters))


def cosine(schedule: LRSchedule, step: float) -> float:
    """Half a cosine from the peak to min_lr."""
    return schedule.min_lr + (schedule.peak - schedule.min_lr) * 0.5 * (
        1.0 + math.cos(math.pi * schedule.progress(step, schedule.warmup_iters))
    )


def wsd(schedule: LRSchedule, step: float) -> float:
    """The peak, then a straight line to min_lr over the last cooldown_iters."""
    begin = max(schedule.decay_iters - schedule.cooldown_iters, schedule.warmup_iters)
    return schedule.min_lr + (schedule.peak - schedule.min_lr) * (1.0 - schedule.progress(step, begin))


def inverse_sqrt(schedule: LRSchedule, step: float) -> float:
    """Falls with the root of the step; min_lr is a floor."""
    return max(schedule.min_lr, schedule.peak * math.sqrt(max(schedule.warmup_iters, 1) / max(step, 1)))


FORMULAS = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd, "inverse_sqrt": inverse_sqrt}


def build_lr_schedule(config: ScheduleConfig, optimizer: OptimizerConfig, train_iters: int) -> LRSchedule:
    """The schedule of a run. Without `decay_iters`, it decays until the end of the run."""
    end = config.decay_iters or train_iters
    return LRSchedule(
        config.type, optimizer.lr, config.min_lr, config.warmup_iters, end, config.cooldown_iters, config.rule
    )
