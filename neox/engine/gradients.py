"""Passes gradients to the optimizer with fewer reads and writes than DeepSpeed.

In bf16 at stage 1, AdamW moves 28 bytes per parameter and step. DeepSpeed (0.19.8) moves 66 more, and launches more
kernels than the model (benchmarks/train/bench_account.py): it casts each gradient to fp32, adds it to sums that it has
cleared twice, and flattens, rounds and copies all sums to reduce them, even in a single process. Here it is 18 more.
The price is that three methods of DeepSpeed are replaced. tests/cuda/test_fake_cuda.py counts the bytes.
"""

from __future__ import annotations

import types

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine

BUFFER = 500_000_000  # elements that DeepSpeed reduces at a time


def shorten_gradient_path(engine: DeepSpeedEngine, replicas: int) -> None:
    """Replace methods of an engine, and of its optimizer in bf16 at stage 1.

    Args:
        engine: the engine of DeepSpeed.
        replicas: processes that hold the same parameters.
    """
    if isinstance(engine.optimizer, BF16_Optimizer):
        accumulate_in_one_pass(engine.optimizer)
    reduce = engine.buffered_allreduce_fallback

    def reduce_sums(grads: list[torch.Tensor] | None = None, elements_per_buffer: int = BUFFER) -> None:
        if isinstance(engine.optimizer, BF16_Optimizer):
            clear_unused(engine.optimizer)
        if replicas > 1:
            reduce(grads, elements_per_buffer)
        elif not isinstance(engine.optimizer, BF16_Optimizer):
            engine._get_gradients_for_reduction()  # parameters without a gradient get one of zeros

    engine.buffered_allreduce_fallback = reduce_sums


def accumulate_in_one_pass(wrapper: BF16_Optimizer) -> None:
    """Let the first gradient of a step overwrite the fp32 sum, and the others be added without a cast.

    The sums are cleared only where a step has no gradient, and after an update that was skipped, whose sums may be NaN.
    """
    clear = wrapper.clear_hp_grads

    @torch.no_grad()
    def accumulate(self: BF16_Optimizer, lp: torch.nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        total, used = self.fp32_groups_gradients[group][index], self.fp32_groups_has_gradients[group]
        (total.add_ if used[index] else total.copy_)(lp.grad.reshape(-1))
        vars(lp)["_hp_grad"] = total
        used[index] = True

    def forget() -> None:
        if wrapper.overflow:
            clear()
        for used in wrapper.fp32_groups_has_gradients:
            used[:] = [False] * len(used)

    wrapper._update_hp_grad = types.MethodType(accumulate, wrapper)
    wrapper.clear_hp_grads = forget


@torch.no_grad()
def clear_unused(wrapper: BF16_Optimizer) -> None:
    """Clear the sums of parameters without a gradient in this step: they are still those of an earlier step."""
    for totals, used in zip(wrapper.fp32_groups_gradients, wrapper.fp32_groups_has_gradients, strict=True):
        for total, has_gradient in zip(totals, used, strict=True):
            if not has_gradient:
                total.zero_()
