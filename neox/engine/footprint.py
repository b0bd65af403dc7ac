"""What training stores besides the model's parameters, for the engine that allocates it and for the plan that
predicts it. Does not import torch.
"""

from __future__ import annotations

from neox.config.schema import Config, OptimizerConfig

BUCKET = 200_000_000  # elements that DeepSpeed reduces or gathers at a time
LIVE = 1_000_000_000  # elements of parameters that its stage 3 holds gathered at most

# Per-element state of each optimizer, which a checkpoint stores in addition to the fp32 weights. `step` counters are
# not per element.
STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgd": ("momentum_buffer",)}
MUON_MATRIX_KEYS = ("momentum_buffer",)


def effective_stage(config: Config) -> int:
    """The ZeRO stage that DeepSpeed runs: its stage 0 cannot accumulate 16-bit gradients in fp32, its stage 1 can."""
    return max(config.zero.stage, 1) if config.precision.dtype != "fp32" else config.zero.stage


def bucket_elements(num_parameters: int) -> int:
    """Elements of DeepSpeed's bucket: even, and no more than the process has parameters."""
    bucket = max(min(BUCKET, num_parameters), 1024)
    return bucket + bucket % 2


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon updates this parameter: a matrix in a block.

    Embeddings and the output head use AdamW, as Muon's authors advise.
    """
    return dimensions == 2 and name.startswith("layers.")


def optimizer_state_keys(config: OptimizerConfig, name: str, dimensions: int) -> tuple[str, ...]:
    """Names of the per-element optimizer state of a parameter with this name and number of dimensions."""
    if config.type == "muon" and is_hidden_matrix(name, dimensions):
        return MUON_MATRIX_KEYS
    return STATE_KEYS["adamw" if config.type == "muon" else config.type]
