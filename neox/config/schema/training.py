"""The sections that describe the optimisation: optimizer, schedule, precision, parallel, zero, train, evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from neox.config.schema.base import (
    BatchInt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    Seed,
)


class OptimizerConfig(Section, frozen=True):
    """The optimizer. Weight decay never applies to biases, norms and other one-dimensional parameters."""

    type: Literal["adamw", "lion", "sgd", "muon"] = Field(
        default="adamw", description="adamw (fused), lion (arXiv 2302.06675), sgd, muon (matrices; adamw for the rest)"
    )
    lr: PositiveFloat = Field(default=6e-4, description="peak learning rate")
    betas: tuple[Probability, Probability] = Field(
        default=(0.9, 0.95), strict=False, description="decay rates of the first and second moment"
    )
    eps: PositiveFloat = Field(default=1e-8, description="added to the square root of the second moment")
    weight_decay: NonNegativeFloat = Field(default=0.1, description="decoupled weight decay of matrices")
    momentum: Probability = Field(default=0.9, description="sgd: momentum; muon: momentum of the matrices")
    gradient_clipping: NonNegativeFloat = Field(
        default=1.0, description="maximum global L2 norm of the gradient; 0: no clipping"
    )
    row_bias_lr_multiplier: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1,
        description="multiplies the learning rate of the row-parallel biases (attention.out.bias, mlp.down.bias); "
        "for runs that continue or reproduce one of GPT-NeoX with gpt_j_residual: its model_parallel_size, "
        "because GPT-NeoX trains that many copies of these biases and adds all of them",
    )


def integral(number: float) -> float:
    """Convert a float without a fractional part to int, so that 20 stays 20 in config.lock.yml."""
    return int(number) if number == int(number) else number


class ScheduleConfig(Section, frozen=True):
    """The learning rate over the iterations. After decay_iters it stays at min_lr, unless `rule` differs."""

    type: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = Field(
        default="cosine", description="wsd: warmup, stable, decay over the last cooldown_iters"
    )
    rule: Literal["native", "gpt_neox"] = Field(
        default="native",
        description="native: a function of the step, constant after decay_iters; gpt_neox: a function of the updates "
        "made before the step, as in GPT-NeoX (constant, linear, cosine): linear decays towards 0 and stops at "
        "min_lr, cosine rises again after decay_iters",
    )
    warmup_iters: Annotated[NonNegativeFloat, AfterValidator(integral)] = Field(
        default=0, description="iterations of linear warmup from 0; a fraction is accepted with rule: gpt_neox only"
    )
    decay_iters: PositiveInt | None = Field(
        default=None, description="iteration at which min_lr is reached; null: train.train_iters"
    )
    cooldown_iters: NonNegativeInt = Field(default=0, description="wsd: iterations of the final decay")
    min_lr: NonNegativeFloat = Field(default=0.0, description="learning rate at and after decay_iters")


class PrecisionConfig(Section, frozen=True):
    """Number formats. Master weights, moments, accumulated gradients and statistics are always fp32."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="bf16", description="dtype of weights and activations in the forward and backward pass"
    )
    initial_scale_power: Annotated[int, Field(ge=0, le=127)] = Field(
        default=16, description="fp16: the initial loss scale is 2 to this power"
    )
    loss_scale_window: PositiveInt = Field(
        default=1000, description="fp16: the loss scale doubles after this many steps without overflow"
    )
    min_loss_scale: PositiveFloat = Field(default=1.0, description="fp16: minimum loss scale")


class ParallelConfig(Section, frozen=True):
    """Model parallelism. The remaining processes are data-parallel."""

    tensor: PositiveInt = Field(default=1, description="tensor parallelism: processes that share each layer")
    pipeline: PositiveInt = Field(
        default=1, description="pipeline parallelism: stages that the layers are divided into"
    )
    sequence: bool = Field(
        default=False, description="sequence parallelism: shard norms and residual stream over the tensor group"
    )
    context: PositiveInt = Field(
        default=1,
        description="context parallelism: processes that share the sequence of each sample; "
        "each computes the attention of some of the heads",
    )
    partition: Literal["parameters", "time"] | Annotated[tuple[PositiveInt, ...], Field(strict=False)] = Field(
        default="parameters",
        description="blocks per pipeline stage: minimise the parameters or the time of the largest stage, "
        "or a list of numbers",
    )


class ZeroConfig(Section, frozen=True):
    """DeepSpeed ZeRO: what data-parallel processes shard instead of replicating."""

    stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1, description="0: nothing; 1: optimizer state; 2: gradients too; 3: parameters too"
    )


class TrainConfig(Section, frozen=True):
    """Length and batch size of a run.

    global_batch_size = micro_batch_size x gradient_accumulation x data-parallel size. One of the three may be omitted.
    """

    train_iters: PositiveInt = Field(default=1000, description="optimizer steps")
    micro_batch_size: BatchInt | None = Field(default=None, description="samples per forward pass of one process")
    gradient_accumulation: BatchInt | None = Field(
        default=None, description="forward passes of one process per optimizer step"
    )
    global_batch_size: BatchInt | None = Field(
        default=None, description="samples per optimizer step over all processes"
    )
    seed: Seed = Field(default=1234, description="seed of initialisation, data order and dropout")
    deterministic: bool = Field(
        default=False,
        description="make runs on a GPU repeatable bit for bit: deterministic torch algorithms and a fixed cuBLAS "
        "workspace; slower, and an error where an operation has no deterministic implementation",
    )
    objective: Literal["pretrain", "sft", "dpo", "reward"] = Field(
        default="pretrain",
        description="pretrain: next token; sft: next token where labels are set; dpo: preferences "
        "(arXiv 2305.18290) relative to the initial weights; reward: a score that ranks the chosen answer above "
        "the rejected one (Bradley-Terry)",
    )
    dpo_beta: PositiveFloat = Field(default=0.1, description="dpo: weight of the divergence from the initial weights")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="recompute in the backward pass: nothing, the inner activations of the MLP, complete blocks",
    )

    @property
    def on_pairs(self) -> bool:
        """Whether a sample is a pair of a chosen and a rejected answer."""
        return self.objective in ("dpo", "reward")

    @property
    def rows_per_sample(self) -> int:
        """Rows of a batch that one sample takes: each answer of a pair has one."""
        return 2 if self.on_pairs else 1


class EvaluateConfig(Section, frozen=True):
    """Validation during training."""

    interval: NonNegativeInt = Field(default=0, description="iterations between evaluations; 0: no evaluation")
    iters: PositiveInt = Field(default=10, description="batches per evaluation")
