"""The schema of a config: one frozen pydantic model per YAML section.

Every key that a user may write is a field here.
"""

from __future__ import annotations

from pydantic import Field

from neox.config.schema.base import Section
from neox.config.schema.data import DataConfig, DataSource, FimConfig, SpecialIds, TokenizerConfig, parse_split
from neox.config.schema.model import GATED, LoraConfig, ModelConfig, RopeScaling
from neox.config.schema.run import (
    CheckpointConfig,
    CometConfig,
    GuardConfig,
    LoggingConfig,
    ProfileConfig,
    RunConfig,
    WandbConfig,
)
from neox.config.schema.training import (
    EvaluateConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "GATED",
    "CheckpointConfig",
    "CometConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "EvaluateConfig",
    "FimConfig",
    "GuardConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ProfileConfig",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SpecialIds",
    "TokenizerConfig",
    "TrainConfig",
    "WandbConfig",
    "ZeroConfig",
    "parse_split",
]


class Config(Section, frozen=True):
    """The complete config of a run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    guard: GuardConfig = GuardConfig()
    run: RunConfig = RunConfig()
    deepspeed: dict[str, object] = Field(
        default_factory=dict,
        description="keys of DeepSpeed's own config, passed through; they are checked against the keys it knows",
    )

    @property
    def tokens_per_sample(self) -> int:
        """Input tokens of a sample, both answers of a pair included."""
        return self.train.rows_per_sample * self.data.seq_length

    @property
    def computes_grad_norm(self) -> bool:
        """Whether a step has a gradient norm, which a key of DeepSpeed can turn off."""
        section = self.deepspeed.get("zero_optimization")
        return bool(section.get("compute_grad_norm", True)) if isinstance(section, dict) else True
