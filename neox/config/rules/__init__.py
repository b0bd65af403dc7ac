"""Rules between keys: values that are valid alone and invalid together, or invalid on this machine.

Each rule takes the config and the Environment, and yields a Conflict per violation. No rule depends on another one, and
none reads the process environment.
"""

from __future__ import annotations

from neox.config.rules.conflict import Conflict, Environment
from neox.config.rules.data import fill_in_the_middle, objective, packing, sources
from neox.config.rules.layout import batch, context, data_parallel_size, parallel, stages
from neox.config.rules.model import (
    attention_kernels,
    heads,
    lora,
    positions,
    residual,
    rope_scaling,
    row_biases,
    vocabulary,
)
from neox.config.rules.training import deepspeed, folders, precision, rollback, schedule

__all__ = ["LAYOUT_RULES", "RULES", "Conflict", "Environment", "batch", "data_parallel_size"]

# Rules that need neither data nor folders. `neox plan` checks these for every layout that it considers.
LAYOUT_RULES = (heads, attention_kernels, positions, residual, precision, parallel, stages, context, batch)
RULES = (
    *LAYOUT_RULES,
    rope_scaling,
    row_biases,
    vocabulary,
    sources,
    packing,
    fill_in_the_middle,
    objective,
    lora,
    schedule,
    folders,
    rollback,
    deepspeed,
)
