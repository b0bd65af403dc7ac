"""Memory of one process of every pipeline stage: resident and temporary memory, and the phase of a step with the peak.

The sums follow DeepSpeed's ZeRO stages as neox.engine.deepspeed_setup configures them (stage_1_and_2.py, stage3.py and
bf16_optimizer.py of DeepSpeed 0.19, and neox.engine.gradients): master weights, moments and accumulated gradients are
fp32 for any dtype of the weights, and buckets have at most BUCKET elements. tests/plan/test_live_memory.py compares
them with the tensors of an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from neox.config.schema import Config
from neox.engine.footprint import LIVE, bucket_elements, effective_stage
from neox.plan.activations import Activations, activations
from neox.plan.sizes import ELEMENT, ResolvedLayout, Stage, optimizer_elements

FP32, FP64 = 4, 8  # bytes
LATE_BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time where it reduces after the backward pass


@dataclass(frozen=True)
class StageMemory:
    """Memory of one process of a stage, bytes.

    Attributes:
        parameters: weights of the forward pass; with ZeRO 3 the local shard and gathered weights.
        optimizer: fp32 master weights and optimizer state.
        gradients: accumulated gradients.
        buffers: buckets of DeepSpeed, messages between stages, the copy of a tied embedding.
        activations: activations of the stage.
        phases: total in each phase, by name.
        host: host memory in addition to a GPU: copies for checkpoints, offloaded state.
        checkpoint: size of the checkpoint files that this process writes.
    """

    parameters: int
    optimizer: int
    gradients: int
    buffers: int
    activations: Activations
    phases: Mapping[str, int]
    host: int
    checkpoint: int

    @property
    def peak(self) -> int:
        """Largest total of all phases."""
        return max(self.phases.values())

    @property
    def moment(self) -> str:
        """Phase with the largest total."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class OptimizerMemory:
    """Memory of weights, gradients and optimizer in one process, bytes.

    Attributes:
        weights: weights of the forward pass.
        masters: fp32 master weights.
        state: optimizer state.
        gradients: gradients accumulated over micro-batches.
        bucket: bucket of the reduction; 0 if a single process reduces nothing.
        share: the share of one replica of the fp32 gradients.
        flat: copy of the share that the update reads; 0 if it reads the share itself.
        fresh: gradient of the largest parameter before it is accumulated.
        second: another bucket, which stages 1 and 2 fill while the first is reduced; 0 without `overlap_comm`.
    """

    weights: int
    masters: int
    state: int
    gradients: int
    bucket: int
    share: int
    flat: int
    fresh: int
    second: int = 0


def optimizer_memory(config: Config, layout: ResolvedLayout, stage: Stage) -> OptimizerMemory:
    """Compute the memory of weights, master weights, optimizer state and gradients under the effective ZeRO stage.

    Frozen weights (LoRA) have no master weights, gradients or optimizer state.
    """
    zero, element = effective_stage(config), ELEMENT[config.precision.dtype]
    count, trained, replicas = stage.parameters, stage.trained, layout.replicas
    state = FP32 * optimizer_elements(config, stage)
    single = config.precision.dtype == "fp32"
    accumulates = layout.batch.gradient_accumulation > 1
    bucket, share = int(zero_section(config).get("reduce_bucket_size", bucket_elements(count))), -(-trained // replicas)
    fresh = element * stage.largest if accumulates or not single else 0
    if zero == 0:
        late = FP32 * min(trained, LATE_BUCKET) if replicas > 1 else 0
        return OptimizerMemory(element * count, 0, state, FP32 * trained, late, 0, 0, fresh)
    memory = OptimizerMemory(
        weights=element * count,
        masters=FP32 * share,
        state=-(-state // replicas),
        gradients=FP32 * (trained if zero == 1 else share),
        bucket=(FP32 if zero == 1 else element) * bucket,
        share=FP32 * share,
        flat=FP32 * share if single else 0,
        fresh=fresh,
    )
    if holds_gradient_sums(config):
        # matrices and vectors are two flat tensors, which are joined if both fit, and rounded
        late = (FP32 * trained if trained <= LATE_BUCKET else 0) + element * trained
        return replace(memory, bucket=late if replicas > 1 else 0)
    if zero == 3:
        weights = element * (share + min(count, LIVE)) if replicas > 1 else element * count
        return replace(memory, weights=weights)
    if zero == 2 and single and accumulates:
        memory = replace(memory, gradients=2 * memory.gradients)
    overlaps = zero_section(config).get("overlap_comm") is True
    return replace(memory, second=memory.bucket if overlaps else 0)


def phases(
    config: Config, layout: ResolvedLayout, stage: Stage, have: OptimizerMemory, act: Activations, kind: str
) -> dict[str, int]:
    """Compute the memory of each phase that can have the peak, bytes, without copies for checkpoints.

    - start: the model, its unrounded copy on a CPU, and the flat tensors of DeepSpeed.
    - loss: logits and their gradient.
    - backward: backward pass of the blocks.
    - reduce: gradients and buckets after the last backward pass.
    - update: gradients, and the copy that the optimizer reads.
    """
    zero, element = effective_stage(config), ELEMENT[config.precision.dtype]
    permanent = have.gradients if holds_gradient_sums(config) else 0
    resident = have.weights + have.masters + have.state + permanent + stage.tied * (element + FP32)
    repeated, buckets = layout.batch.gradient_accumulation > 1, 0 if permanent or zero == 0 else have.bucket
    messages = 2 * act.boundary if layout.pp > 1 else 0

    accumulated = have.gradients if not permanent and (repeated or zero >= 2) else 0
    loss = resident + accumulated + act.resident + act.logits + messages + have.fresh
    loss += buckets + have.second if repeated else 0

    # Without accumulation the gradient of the head is the first, and the others replace activations.
    gradients = accumulated or (0 if permanent else element * stage.largest)
    temporary = act.resident + act.recomputed + act.working + messages + (have.fresh if repeated or permanent else 0)
    backward = resident + gradients + buckets + have.second + temporary

    update = resident + have.flat + (0 if permanent else have.gradients if zero == 0 else have.share)
    if zero == 2 and element < FP32:
        update += FP64 * stage.largest  # for the norm
    return {
        "start": start_memory(config, stage, have, kind),
        "loss": loss,
        "backward": backward,
        "reduce": resident + reduction_memory(config, layout, stage, have, act),
        "update": update,
    }


def start_memory(config: Config, stage: Stage, have: OptimizerMemory, kind: str) -> int:
    """Compute the memory while DeepSpeed is initialised.

    The model is created in fp32. With 16-bit weights an exact copy of the trained weights exists in host memory until
    the master weights are written. Stages 1 and 2 flatten the trained weights group by group.
    """
    zero, element = effective_stage(config), ELEMENT[config.precision.dtype]
    weights, exact = element * stage.parameters, unrounded_copy(config, stage) if kind == "cpu" else 0
    created = FP32 * stage.parameters + exact
    if zero in (1, 2):
        sums = have.gradients if holds_gradient_sums(config) else 0
        return max(created, exact + weights + element * stage.trained, exact + weights + have.masters + sums)
    return max(created, exact + have.weights + have.masters) if zero == 3 else created


def unrounded_copy(config: Config, stage: Stage) -> int:
    """Bytes of the fp32 copy of the initial trained weights, in host memory, that 16-bit weights need."""
    return FP32 * stage.trained if config.precision.dtype != "fp32" else 0


def reduction_memory(
    config: Config, layout: ResolvedLayout, stage: Stage, have: OptimizerMemory, act: Activations
) -> int:
    """Compute the memory of gradients and buckets, but for permanent ones, in the reduction of the last backward pass.

    That is in the backward pass of the first block, or later.
    """
    zero, element = effective_stage(config), ELEMENT[config.precision.dtype]
    last = act.working + max(act.recomputed, act.saved // stage.blocks)
    if holds_gradient_sums(config):
        return max(have.bucket, last)
    if zero == 0:
        return have.gradients + max(have.bucket, last)
    # The config may set a bucket that the gradients never fill.
    filled = min(have.bucket, (FP32 if zero == 1 else element) * stage.trained)
    joined = filled if layout.replicas > 1 else 0  # gloo may hold it while the share is copied
    moved = have.gradients
    if zero == 1:
        # Gradients move into the bucket. If it is smaller than the gradients, the reduced share grows in addition.
        remaining = max(have.gradients - have.bucket, 0)
        rounded = joined // 2 if element < FP32 else 0  # the parts of each owner, in the dtype of the weights
        moved = max(moved, remaining + have.share + joined + rounded)
    elif zero == 2:
        # in 16 bits one process joins gradients, too, and each is widened before it is added to the share
        moved += joined if element == FP32 else filled + FP32 * stage.largest
    return have.bucket + moved + have.second + last


def holds_gradient_sums(config: Config) -> bool:
    """Whether every process holds fp32 sums of all its gradients from the start to the end of the run.

    DeepSpeed's BF16_Optimizer does, which runs stage 1 in bf16 unless the optimizer state is offloaded.
    """
    return config.precision.dtype == "bf16" and effective_stage(config) == 1 and not offloaded(config)


def zero_section(config: Config) -> dict:
    """Return what the config passes to DeepSpeed under zero_optimization."""
    section = config.deepspeed.get("zero_optimization")
    return section if isinstance(section, dict) else {}


def offloaded(config: Config) -> bool:
    """Whether the config offloads optimizer state to the host."""
    target = zero_section(config).get("offload_optimizer")
    return isinstance(target, dict) and target.get("device") in ("cpu", "nvme")


def stage_memory(config: Config, layout: ResolvedLayout, stage: Stage, kind: str) -> StageMemory:
    """Compute the memory of one process of a stage.

    Args:
        config: config of the run.
        layout: from `resolve`.
        stage: one of layout.stages.
        kind: kind of the device; on a "cpu" copies for checkpoints are in the same memory as the model.
    """
    have = optimizer_memory(config, layout, stage)
    act = activations(config, layout, stage)
    # A checkpoint has the master weights. At stage 0 the replicas divide the writing.
    frozen = ELEMENT[config.precision.dtype] * (stage.parameters - stage.trained)
    checkpoint = -(-(FP32 * (stage.trained + optimizer_elements(config, stage)) + frozen) // layout.replicas)
    copies = checkpoint if config.checkpoint.in_background else 0
    moments = phases(config, layout, stage, have, act, kind)
    offloaded_bytes = have.masters + have.state if offloaded(config) else 0
    moments = {name: total - (offloaded_bytes if name != "start" else 0) for name, total in moments.items()}
    if kind == "cpu":
        every = config.checkpoint.save_interval
        saved_before_end = bool(every and every < config.train.train_iters) or any(
            0 < step < config.train.train_iters for step in config.checkpoint.save_iters
        )
        resident = have.weights + have.masters + have.state
        moments = {
            name: total + (copies if saved_before_end and name != "start" else 0) for name, total in moments.items()
        }
        moments["checkpoint"] = resident + (have.gradients if holds_gradient_sums(config) else 0) + copies
    return StageMemory(
        parameters=have.weights,
        optimizer=have.masters + have.state - offloaded_bytes,
        gradients=have.gradients,
        buffers=have.bucket + have.second + have.flat + stage.tied * (ELEMENT[config.precision.dtype] + FP32),
        activations=act,
        phases=moments,
        host=offloaded_bytes + (max(copies, unrounded_copy(config, stage)) if kind == "cuda" else 0),
        checkpoint=checkpoint,
    )
