"""What training keeps beside the model's parameters, in numbers: for the engine that asks for it, and for the plan that foretells it.

Nothing here imports torch.
"""

from __future__ import annotations

from neox.config.schema import Config, OptimizerConfig

BUCKET = 200_000_000  # elements that DeepSpeed reduces or gathers at a time
LIVE = 1_000_000_000  # elements of parameters that its stage 3 keeps gathered at most

# Per-element state of each optimizer: what a checkpoint holds beside the fp32 weights. `step` counters are not per element.
STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "sgd": ("momentum_buffer",)}
MUON_MATRIX_KEYS = ("momentum_buffer",)


def effective_stage(config: Config) -> int:
    """The ZeRO stage that DeepSpeed runs: its stage 0 cannot accumulate 16-bit gradients in fp32, its stage 1 can."""
    return max(config.zero.stage, 1) if config.precision.dtype != "fp32" else config.zero.stage


def bucket_elements(num_parameters: int) -> int:
    """Elements of DeepSpeed's bucket, even; no larger than the parameters of the process need it."""
    bucket = max(min(BUCKET, num_parameters), 1024)
    return bucket + bucket % 2


def is_hidden_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon takes this parameter: matrices inside the blocks. Embeddings and the output head are left to AdamW (Muon's own advice)."""
    return dimensions == 2 and name.startswith("layers.")


def optimizer_state_keys(config: OptimizerConfig, name: str, dimensions: int) -> tuple[str, ...]:
    """Names of the per-element state that the optimizer keeps for a parameter of this name and number of dimensions."""
    if config.type == "muon" and is_hidden_matrix(name, dimensions):
        return MUON_MATRIX_KEYS
    return STATE_KEYS["adamw" if config.type == "muon" else config.type]
