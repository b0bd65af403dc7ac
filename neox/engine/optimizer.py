"""Optimizers, built here rather than by DeepSpeed, so that every ZeRO stage makes the same update.

Weight decay is decoupled in all of them and applies to matrices only: parameters of one dimension (biases, norms) are
in a separate group without decay. A group's `lr_scale` multiplies the learning rate that the engine sets at every step.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from neox.config.schema import OptimizerConfig
from neox.engine.footprint import is_hidden_matrix

ROW_BIASES = (".attention.out.bias", ".mlp.down.bias")


class NoCompiler:
    """Mixin: torch's methods without their decorator, whose first call imports the compiler.

    The decorator disables torch.compile in them.

    The import takes 2.4 of the 3.4 s of CPU time of a small run (docs/log.md), in every process. The price is a
    dependency on `__wrapped__`, which functools.wraps sets; tests/engine/test_deepspeed_setup.py fails if the compiler
    is imported.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(NoCompiler, torch.optim.AdamW):
    """AdamW (arXiv 1711.05101), with torch's fused kernel and state.

    `step` is written here because torch's is decorated as well.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. `closure` is not supported."""
        for group in self.param_groups:
            same_kind = defaultdict(list)  # the kernel takes tensors of one device and dtype at a time
            for p in group["params"]:
                if p.grad is not None:
                    same_kind[p.device, p.dtype].append(p)
            for params in same_kind.values():
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                zeros = {
                    name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")
                }
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **zeros}
        grads = [p.grad for p in params if p.grad is not None]
        steps, averages, squares = ([self.state[p][name] for p in params] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        settings = {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
        }
        torch._fused_adamw_(params, grads, averages, squares, [], steps, amsgrad=False, maximize=False, **settings)


class Lion(NoCompiler, Optimizer):
    """Lion (arXiv 2302.06675, algorithm 2): p <- p - lr (sign(b1 m + (1 - b1) g) + wd p), m <- b2 m + (1 - b2) g."""

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. `closure` is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            averages = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
            update = torch._foreach_lerp(averages, grads, 1.0 - beta1)
            torch._foreach_sign_(update)
            torch._foreach_add_(params, update, alpha=-group["lr"])
            torch._foreach_lerp_(averages, grads, 1.0 - beta2)


class SGD(NoCompiler, Optimizer):
    """SGD with heavy-ball momentum and decoupled decay: m <- mu m + g, p <- p - lr (m + wd p)."""

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. `closure` is not supported."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, [p.grad for p in params])
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def groups(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig) -> list[dict]:
    """Parameter groups, in this order; empty ones are omitted.

    1. matrices that Muon updates;
    2. other matrices, with weight decay;
    3. parameters of one dimension, without weight decay;
    4. row-parallel biases, if row_bias_lr_multiplier is above 1.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    muon = [p for name, p in named if config.type == "muon" and is_hidden_matrix(name, p.ndim)]
    taken = {id(p) for p in muon}
    scaled = [p for name, p in named if config.row_bias_lr_multiplier > 1 and name.endswith(ROW_BIASES)]
    taken |= {id(p) for p in scaled}
    rest = [p for _, p in named if id(p) not in taken]
    out = [
        {"params": muon, "weight_decay": config.weight_decay, "use_muon": True},
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay, "use_muon": False},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "use_muon": False},
        {"params": scaled, "weight_decay": 0.0, "use_muon": False, "lr_scale": config.row_bias_lr_multiplier},
    ]
    return [group for group in out if group["params"]]


def build_muon(param_groups: list[dict], config: OptimizerConfig) -> Optimizer:
    """DeepSpeed's Muon, which knows how ZeRO shards matrices, with AdamW for all other parameters."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # here, because the import takes two seconds

    for group in param_groups:
        group["lr"] = config.lr
        if group["use_muon"]:
            group["momentum"] = config.momentum
        else:
            group.update(betas=config.betas, eps=config.eps)
        for p in group["params"]:
            p.use_muon = group["use_muon"]
    return MuonWithAuxAdam(param_groups)


def build_optimizer(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig) -> Optimizer:
    """The optimizer of a run over the parameters of one process.

    Args:
        named_parameters: logical names and parameters; the names decide what Muon takes.
        config: the `optimizer` section.
    """
    param_groups = groups(named_parameters, config)
    if config.type == "muon":
        return build_muon(param_groups, config)
    for group in param_groups:
        del group["use_muon"]
    if config.type == "adamw":
        return AdamW(param_groups, config.lr, config.betas, config.eps, config.weight_decay)
    if config.type == "lion":
        return Lion(param_groups, config.lr, config.betas, config.weight_decay)
    return SGD(param_groups, config.lr, config.momentum, config.weight_decay)


def counter(optimizer: Optimizer, group: dict, device: torch.device, updates: int) -> dict:
    """The `step` entry of a parameter's state after `updates` updates; empty if the optimizer has none."""
    if isinstance(optimizer, AdamW):
        return {"step": torch.tensor(float(updates), device=device)}
    if group.get("use_muon") is False:
        return {"step": updates}
    return {}
