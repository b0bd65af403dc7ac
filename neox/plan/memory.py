"""Memory of one process of every stage: what stays, what comes and goes, and the moment at which there is most of it.

The sums follow DeepSpeed's stages as neox.engine.deepspeed_setup configures them (stage_1_and_2.py, stage3.py of DeepSpeed 0.19): fp32 masters, moments and
accumulated gradients whatever the dtype of the weights; buckets of at most BUCKET elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neox.config.schema import Config
from neox.engine.footprint import LIVE, bucket_elements, effective_stage
from neox.plan.activations import Activations, activations
from neox.plan.sizes import ELEMENT, Layout, Stage, optimizer_elements

FP32 = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one process of a stage.

    Attributes:
        parameters: weights that the forward reads; with ZeRO 3 the own share and what is gathered.
        optimizer: fp32 masters and the optimizer's state.
        gradients: accumulated ones.
        buffers: DeepSpeed's buckets, messages between stages, the copy of a tied embedding.
        activations: of the stage.
        phases: total at each moment, by name.
        host: bytes of host memory beside a GPU: copies for checkpoints, what is offloaded.
        checkpoint: bytes that this process writes to a checkpoint.
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
        """Largest total."""
        return max(self.phases.values())

    @property
    def moment(self) -> str:
        """When it is reached."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclass(frozen=True)
class Held:
    """Bytes that the optimizer's side of a process holds; `_share` is what one of the replicas has.

    Attributes:
        weights, masters, state: as in Memory.
        gradients: accumulated over micro-batches.
        bucket: of the reduction.
        second: another bucket, which stages 1 and 2 fill while the first is reduced; 0 without `overlap_comm`.
        share: of the fp32 gradients.
        flat: copy of the share that the update reads; 0 where it reads the share itself.
        fresh: gradient of the largest parameter before it is added to the others.
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


def held(config: Config, layout: Layout, stage: Stage) -> Held:
    """Weights, masters, optimizer state and gradients under the ZeRO stage that DeepSpeed runs."""
    zero, element = effective_stage(config), ELEMENT[config.precision.dtype]
    count, replicas = stage.parameters, layout.replicas
    state = FP32 * optimizer_elements(config, stage)
    single = config.precision.dtype == "fp32"
    accumulates = layout.batch.gradient_accumulation > 1
    bucket, share = int(zero_section(config).get("reduce_bucket_size", bucket_elements(count))), -(-count // replicas)
    fresh = element * stage.largest if accumulates or not single else 0
    if zero == 0:
        return Held(element * count, 0, state, FP32 * count, FP32 * min(count, 500_000_000), 0, 0, fresh)
    common = {"masters": FP32 * share, "state": -(-state // replicas), "share": FP32 * share, "flat": FP32 * share if single else 0, "fresh": fresh}
    overlaps = zero_section(config).get("overlap_comm") is True
    if zero == 1:
        return Held(weights=element * count, gradients=FP32 * count, bucket=FP32 * bucket, second=FP32 * bucket * overlaps, **common)
    if zero == 2:
        gradients = FP32 * share * (2 if single and accumulates else 1)
        return Held(weights=element * count, gradients=gradients, bucket=element * bucket, second=element * bucket * overlaps, **common)
    weights = element * (share + min(count, LIVE)) if replicas > 1 else element * count
    return Held(weights=weights, gradients=FP32 * share, bucket=element * bucket, **common)


def phases(config: Config, layout: Layout, stage: Stage, have: Held, act: Activations) -> dict[str, int]:
    """Bytes at the moments that can be the largest, resident copies for checkpoints aside.

    start: model, its unrounded copy and DeepSpeed's flat tensors; loss: logits and their gradient; backward: the blocks; reduce: gradients and
    buckets after the last backward; update: gradients and the copy that the optimizer reads.
    """
    zero, element = effective_stage(config), ELEMENT[config.precision.dtype]
    count = stage.parameters
    resident = have.weights + have.masters + have.state + stage.tied * (element + FP32)
    # The model is made whole, in fp32; rounded dtypes keep a copy of it until the masters are written; stages 1 and 2 flatten group by group.
    exact = 0 if element == FP32 else FP32 * count
    start = FP32 * count + exact
    if zero in (1, 2):
        start = max(start, exact + 2 * element * count, exact + element * count + have.masters)
    elif zero == 3:
        start = max(start, exact + have.weights + have.masters)
    repeated = layout.batch.gradient_accumulation > 1
    cut = zero >= 2
    before = (have.gradients if repeated or cut else 0) + (have.bucket + have.second if repeated and zero > 0 else 0)
    messages = 2 * act.boundary if layout.pp > 1 else 0
    loss = resident + before + act.resident + act.logits + messages + have.fresh
    during = have.gradients if repeated or cut else element * stage.largest  # else the head's is the first, and others come as activations go
    bucket = have.bucket if zero > 0 else 0
    backward = resident + during + bucket + have.second + act.resident + act.recomputed + act.working + messages + (have.fresh if repeated else 0)
    # Gradients move into the bucket; where it is smaller than they are, the reduced share grows beside it.
    moved = max(have.gradients + bucket, max(have.gradients - bucket, 0) + bucket + have.share) if zero == 1 else have.gradients + have.bucket
    if zero in (1, 2) and layout.replicas > 1:
        filled = min(have.bucket, (FP32 if zero == 1 else element) * count)  # a config may ask for a bucket that the model never fills
        moved += filled + (filled // 2 if zero == 1 and element < FP32 else 0)  # owners' parts are reduced in a copy, of 16 bits where weights are
    update = resident + (have.gradients if zero == 0 else have.share) + have.flat
    if zero == 1 and layout.replicas > 1:
        update += have.bucket  # small gradients of others lie in it until they are let go
    last = act.working + max(act.recomputed, act.kept // stage.blocks)  # the first block's backward
    return {"start": start, "loss": loss, "backward": backward, "reduce": resident + moved + have.second + last, "update": update}


def zero_section(config: Config) -> dict:
    """What the config hands to DeepSpeed under zero_optimization."""
    section = config.deepspeed.get("zero_optimization")
    return section if isinstance(section, dict) else {}


def offloaded(config: Config) -> bool:
    """Whether deepspeed: moves the optimizer's state to the host."""
    target = zero_section(config).get("offload_optimizer")
    return isinstance(target, dict) and target.get("device") in ("cpu", "nvme")


def stage_memory(config: Config, layout: Layout, stage: Stage, kind: str) -> Memory:
    """Memory of one process of a stage.

    Args:
        config: the run.
        layout: from `resolve`.
        stage: one of layout.stages.
        kind: of the device: on a "cpu" copies for checkpoints lie in the memory that the model lies in.
    """
    have = held(config, layout, stage)
    act = activations(config, layout, stage)
    # Masters are the weights of a checkpoint; at stage 0 the replicas share the writing.
    checkpoint = -(-(FP32 * stage.parameters + FP32 * optimizer_elements(config, stage)) // layout.replicas)
    copies = checkpoint if config.checkpoint.in_background else 0
    moments = phases(config, layout, stage, have, act)
    aside = have.masters + have.state if offloaded(config) else 0
    moments = {name: total - (aside if name != "start" else 0) for name, total in moments.items()}
    if kind == "cpu":
        every = config.checkpoint.save_interval
        saved_before_end = bool(every and every < config.train.train_iters) or any(0 < step < config.train.train_iters for step in config.checkpoint.save_iters)
        resident = have.weights + have.masters + have.state
        moments = {name: total + (copies if saved_before_end and name != "start" else 0) for name, total in moments.items()}
        moments["checkpoint"] = resident + (have.gradients if effective_stage(config) == 0 else 0) + copies
    return Memory(
        parameters=have.weights,
        optimizer=have.masters + have.state - aside,
        gradients=have.gradients,
        buffers=have.bucket + have.second + have.flat + stage.tied * (ELEMENT[config.precision.dtype] + FP32),
        activations=act,
        phases=moments,
        host=aside + (copies if kind == "cuda" else 0),
        checkpoint=checkpoint,
    )
