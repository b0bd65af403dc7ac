"""Set-up of DeepSpeed: its config, and the defaults that are overridden."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
from collections.abc import Iterable, Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime import bf16_optimizer, compiler
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.utils import groups

from neox.config.deepspeed_keys import OWNED_KEYS
from neox.config.schema import Config
from neox.config.validate import BatchSizes
from neox.engine.footprint import bucket_elements, effective_stage
from neox.engine.gradients import shorten_gradient_path
from neox.engine.mpu import MeshMPU
from neox.errors import ConfigError
from neox.files import JsonObject
from neox.parallel.mesh import Mesh
from neox.parallel.wait_tracker import raise_group_timeouts


class CPUWithoutOps(CPU_Accelerator):
    """DeepSpeed's CPU accelerator without its operators, which it would compile at the first start.

    Gloo needs none of them.
    """

    def create_op_builder(self, class_name):
        """No builder for any operator."""
        return

    def get_op_builder(self, class_name):
        """No builder for any operator."""
        return

    def is_fp16_supported(self):
        """True: torch computes in fp16 on every CPU.

        DeepSpeed asks for native fp16 instructions. A run refuses fp16 on a CPU in any case.
        """
        return True


def merge(base: JsonObject, over: JsonObject) -> JsonObject:
    """`base` with the values of `over`, section by section."""
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def check_passed_through(raw: JsonObject) -> None:
    """Check that no key under `deepspeed:` is set by a key of our config.

    Raises:
        ConfigError: the first such key and the key to set instead.
    """
    for path, ours in OWNED_KEYS.items():
        section, _, key = path.partition(".")
        value = raw.get(section)
        if section in raw and (not key or (isinstance(value, dict) and key in value)):
            raise ConfigError(
                "DeepSpeed key that neox sets",
                where=f"deepspeed.{path}",
                got=value,
                want=f"set by {ours}",
                do=f"set {ours}",
            )


def deepspeed_config(config: Config, sizes: BatchSizes, replicas: int, num_parameters: int) -> JsonObject:
    """The config for DeepSpeed; the user's `deepspeed:` section is merged in last.

    Args:
        config: the run.
        sizes: the complete batch sizes.
        replicas: number of processes that hold the same parameters.
        num_parameters: number of parameters of this process; buckets need not be larger.

    Raises:
        ConfigError: `deepspeed:` sets a key that has a key in our config.
    """
    check_passed_through(config.deepspeed)
    bucket = bucket_elements(num_parameters)
    precision = config.precision
    stage = effective_stage(config)
    base: JsonObject = {
        "train_batch_size": sizes.micro_batch_size * sizes.gradient_accumulation * replicas,
        "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
        "gradient_accumulation_steps": sizes.gradient_accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping
        if stage > 0
        else 0.0,  # stage 0: Updater.clip_gradients
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "reduce_scatter": config.optimizer.type != "muon",  # DeepSpeed's Muon needs complete gradients
        },
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        # a gradient is added to its fp32 sum, and freed, as soon as it is complete
        "bf16": {"enabled": precision.dtype == "bf16", "check_grad_overflow": True, "immediate_grad_update": True},
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


def ensure_process_group(device: torch.device) -> None:
    """Create what DeepSpeed requires: a process group, and the index of this process's GPU in the launcher's variables.

    DeepSpeed makes cuda:LOCAL_RANK the current device, which does not exist where each process sees one GPU only. It
    compares LOCAL_RANK with mpirun's variable.
    """
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device.index or 0)
    if not dist.is_initialized():
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
        )


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler, in a run that does not use Muon.

    DeepSpeed's ZeRO checks whether an optimizer is a Muon, and imports its module, which calls torch.compile. The
    compiler's import takes 2.4 of the 3.4 s of CPU time of a small run (docs/log.md). The price is a function of
    DeepSpeed that is patched during one import; tests/engine/test_deepspeed_setup.py fails if the compiler is imported.
    """
    compiled = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled


def combined_norm_on_host(norm_groups: Iterable[torch.Tensor], norm_type: int = 2) -> torch.Tensor:
    """DeepSpeed's function, with its result in host memory."""
    return combine_grad_norm_groups(norm_groups, norm_type).cpu()


def global_norm_on_host(
    input_tensors: Iterable[torch.Tensor],
    norm_type: int = 2,
    mpu: MeshMPU | None = None,
    moe_ep_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """DeepSpeed's function, with its result in host memory, and few kernels instead of one per tensor."""
    norms = torch.stack(torch._foreach_norm(list(input_tensors), norm_type))
    return get_global_norm_of_tensors([norms], norm_type, mpu, moe_ep_group).cpu()


def read_norm_once(engine: DeepSpeedEngine) -> None:
    """Let an update read one number from the device, the norm of the gradient.

    DeepSpeed reads up to four: whether a gradient is not finite, after a pass over each of them; whether the norm is;
    whether it is above the limit; and we report it. A gradient that is not finite has such a norm, so that the pass
    finds nothing more. The price is that three functions of DeepSpeed are replaced; tests/cuda/test_fake_cuda.py fails
    if a later version reads more.
    """
    for module, name, function in (
        (bf16_optimizer, "get_global_norm_of_tensors", global_norm_on_host),
        (stage_1_and_2, "combine_grad_norm_groups", combined_norm_on_host),
        (stage3, "combine_grad_norm_groups", combined_norm_on_host),
    ):
        setattr(module, name, function)
    wrapper = engine.optimizer
    zero = isinstance(wrapper, stage_1_and_2.DeepSpeedZeroOptimizer | stage3.DeepSpeedZeroOptimizer_Stage3)
    if zero and getattr(wrapper, "compute_grad_norm", True):  # stage 3 always does
        wrapper.has_overflow = lambda partition_gradients=True: False


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Exclude all current objects from garbage collection.

    DeepSpeed collects six times as it starts, 0.4 s each over everything imported. A caller that has frozen its imports
    pays for the objects since then only, and those stay collectable.
    """
    if gc.get_freeze_count() > 0:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def init_deepspeed(
    config: Config, module: torch.nn.Module, optimizer: torch.optim.Optimizer, sizes: BatchSizes, mesh: Mesh
) -> DeepSpeedEngine:
    """Wrap a module and its optimizer.

    Args:
        config: the run.
        module: parameters in fp32 on mesh.device; DeepSpeed rounds and shards them in place.
        optimizer: over the module's parameters.
        sizes: the complete batch sizes.
        mesh: the layout of processes.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if mesh.device.type == "cpu" and not isinstance(get_accelerator(), CPUWithoutOps):
        set_accelerator(CPUWithoutOps())
    ensure_process_group(mesh.device)
    count = sum(p.numel() for p in module.parameters())
    settings = deepspeed_config(config, sizes, mesh.replicas, count)
    # Pure data parallelism works without an mpu: some features of DeepSpeed (Muon in bf16) refuse any.
    mpu = MeshMPU(mesh) if mesh.tp * mesh.pp * mesh.cp > 1 else None
    if config.optimizer.type != "muon":
        import_muon_uncompiled()
    groups.mpu = mpu  # else an engine without an mpu would find that of an earlier engine in this process
    with contextlib.redirect_stdout(io.StringIO()), frozen_objects():  # it prints memory statistics at any log level
        engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
        )
    read_norm_once(engine)
    shorten_gradient_path(engine, mesh.replicas)
    raise_group_timeouts(config.guard.hang_timeout)  # of the groups that DeepSpeed created
    return engine
