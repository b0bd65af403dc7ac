"""Handing a model and an optimizer to DeepSpeed: its config, and the few of its defaults that have to be told otherwise."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime import compiler
from deepspeed.utils import groups

from neox.config.schema import Config
from neox.engine.footprint import bucket_elements, effective_stage
from neox.engine.mpu import MeshMPU
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh
from neox.parallel.wait_tracker import raise_group_timeouts

# DeepSpeed keys that the config has under names of its own: key -> ours.
OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision.dtype",
    "bfloat16": "precision.dtype",
    "fp16": "precision",
    "zero_optimization.stage": "zero.stage",
    "managed_gradient_accumulation": "none: the engine owns it",
    "data_types.grad_accum_dtype": "none: gradients accumulate in fp32",
}


class PlainCPU(CPU_Accelerator):
    """DeepSpeed's CPU accelerator without operators of its own: it would compile them at the first start; gloo is enough."""

    def create_op_builder(self, class_name):
        """No builder for any operator."""
        return

    def get_op_builder(self, class_name):
        """No builder for any operator."""
        return

    def is_fp16_supported(self):
        """True: torch computes in fp16 on every CPU; DeepSpeed asks whether the CPU does so by itself, which few do. A run refuses fp16 here anyway."""
        return True


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def check_passed_through(raw: dict[str, Any]) -> None:
    """Refuse keys under `deepspeed:` that have a key of their own.

    Raises:
        ConfigError: names the first such key and what to write instead.
    """
    for path, ours in OURS.items():
        section, _, key = path.partition(".")
        value = raw.get(section)
        if section in raw and (not key or (isinstance(value, dict) and key in value)):
            raise ConfigError("a DeepSpeed key that has a key of its own", where=f"deepspeed.{path}", got=value, want=f"set here: {ours}", do="remove it")


def deepspeed_config(config: Config, micro_batch_size: int, gradient_accumulation: int, replicas: int, num_parameters: int) -> dict[str, Any]:
    """The config that DeepSpeed gets, the user's `deepspeed:` section merged in last.

    Args:
        config: the run.
        micro_batch_size, gradient_accumulation: resolved sizes of one process.
        replicas: processes that hold the same parameters.
        num_parameters: of this process; buckets need not be larger.

    Raises:
        ConfigError: `deepspeed:` sets what has a key of its own.
    """
    check_passed_through(config.deepspeed)
    bucket = bucket_elements(num_parameters)
    precision = config.precision
    stage = effective_stage(config)
    base: dict[str, Any] = {
        "train_batch_size": micro_batch_size * gradient_accumulation * replicas,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping if stage > 0 else 0.0,  # stage 0: Engine.clip_plain
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "reduce_scatter": config.optimizer.type != "muon",  # DeepSpeed's Muon needs whole gradients
        },
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": precision.dtype == "bf16", "check_grad_overflow": True},
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # on a GPU it synchronises at every micro-batch
        "steps_per_print": 1 << 62,
    }
    if precision.dtype == "fp16":
        base["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.loss_scale_window,
            "min_loss_scale": max(1, int(precision.min_loss_scale)),
            "hysteresis": 1,
        }
    return merge(base, config.deepspeed)


def join_alone(device: torch.device) -> None:
    """Give DeepSpeed the process group that it insists on where this process works alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler. Its ZeRO asks whether an optimizer is a Muon, whose module calls torch.compile when it is imported:
    a second of every start.

    For runs without Muon; one with it has imported it by now, compiled.
    """
    compiled = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Keep what is there out of garbage collection: DeepSpeed collects half a dozen times as it starts, 0.4 s each over all that was imported."""
    frozen_before = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


def init_deepspeed(config: Config, module: torch.nn.Module, optimizer: torch.optim.Optimizer, sizes: tuple[int, int], mesh: Mesh) -> Any:
    """Wrap the module and the optimizer; returns DeepSpeed's engine.

    Args:
        module: parameters in fp32 on mesh.device; DeepSpeed rounds and cuts them in place.
        sizes: (micro_batch_size, gradient_accumulation).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if mesh.device.type == "cpu" and not isinstance(get_accelerator(), PlainCPU):
        set_accelerator(PlainCPU())
    join_alone(mesh.device)
    count = sum(p.numel() for p in module.parameters())
    settings = deepspeed_config(config, *sizes, mesh.replicas, count)
    # Data parallelism alone goes without a grid: DeepSpeed has features (Muon in bf16) that refuse one, whatever it says.
    grid = MeshMPU(mesh) if mesh.tp * mesh.pp * mesh.cp > 1 else None
    if config.optimizer.type != "muon":
        import_muon_uncompiled()
    groups.mpu = grid  # else an engine without a grid would find that of the one before it in this process
    with contextlib.redirect_stdout(io.StringIO()), frozen_objects():  # it prints memory statistics whatever its log level
        engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=grid, dist_init_required=False)
    raise_group_timeouts(config.guard.hang_timeout)  # of the groups that it has made
    return engine
