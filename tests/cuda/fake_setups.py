"""The set-ups in which engines run on a fake GPU: every combination of the axes that the rules of the config allow, or
a few of them in which every two values that are allowed together meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

from neox.config.schema import Config
from neox.config.validate import validate
from neox.errors import ConfigError
from tests.model.models import FORMS, SIZES

ROWS, LENGTH = 2, 16
REPLICAS = 2  # data-parallel, in every layout
LAYOUTS: dict[str, dict[str, object]] = {
    "dp": {},
    "tp": {"tensor": 2},
    "sp": {"tensor": 2, "sequence": True},
    "pp first": {"pipeline": 2},
    "pp last": {"pipeline": 2},
    "cp": {"context": 2},
}


class Setup(NamedTuple):
    """One value of each axis.

    Attributes:
        form: of the model.
        checkpointing: of activations.
        precision: dtype and ZeRO stage.
        layout: of the processes, and the pipeline stage of the rank that runs.
        attention: backend, and whether samples are packed documents.
    """

    form: str
    checkpointing: str
    precision: str
    layout: str
    attention: str

    @property
    def name(self) -> str:
        return ", ".join(self)

    @property
    def documents(self) -> bool:
        return self.attention.endswith("documents")

    @property
    def is_long(self) -> bool:
        """Whether it runs two layers, two steps and an evaluation, not one layer and one step."""
        return self.layout == "dp" and self.form == "neox"

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return 2 if self.is_long or "pp" in self.layout else 1

    @property
    def world_size(self) -> int:
        return REPLICAS * (1 if self.layout == "dp" else 2)

    @property
    def rank(self) -> int:
        return REPLICAS if self.layout == "pp last" else 0

    def config(self) -> Config:
        """The config of the run."""
        dtype, _, stage = self.precision.partition(" zero")
        form = FORMS[self.form]
        if "num_kv_heads" in form:
            form = form | {"num_kv_heads": 2}  # which tensor parallelism divides
        layers = 2 if "pp" in self.layout or self.is_long else 1  # the time is proportional to them
        return Config.model_validate(
            {
                "model": SIZES | form | {"num_layers": layers, "attention_backend": self.attention.split()[0]},
                "data": {"train": ["none"], "seq_length": LENGTH},
                "optimizer": {"lr": 0.003, "gradient_clipping": 0.5},
                "precision": {"dtype": dtype},
                "parallel": LAYOUTS[self.layout],
                "zero": {"stage": int(stage)},
                "train": {
                    "micro_batch_size": ROWS,
                    "gradient_accumulation": self.accumulation,
                    "train_iters": 10,
                    "activation_checkpointing": self.checkpointing,
                },
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100}},
            }
        )


AXES: tuple[tuple[str, ...], ...] = (
    tuple(FORMS),
    ("none", "selective", "full"),
    ("fp32 zero0", "bf16 zero1", "bf16 zero2", "bf16 zero3", "fp16 zero1", "fp16 zero2"),
    tuple(LAYOUTS),
    ("sdpa", "native", "sdpa documents", "native documents"),
)
ORDINARY = Setup("neox", "none", "bf16 zero1", "dp", "auto")  # allowed with every value of an axis

Pair = tuple[tuple[int, str], tuple[int, str]]  # (axis, value) twice


def is_allowed(setup: Setup) -> bool:
    """Whether a run on a GPU accepts the set-up."""
    if "fp32" in setup.precision and setup.attention.startswith("native"):
        return False  # for fp32 on a GPU only sdpa has kernels
    try:
        validate(setup.config(), setup.world_size, "cuda")
    except ConfigError:
        return False
    return True


def pairs_of(values: Sequence[str]) -> frozenset[Pair]:
    """Every two values of a set-up."""
    return frozenset(combinations(enumerate(values), 2))


@cache
def allowed_pairs() -> frozenset[Pair]:
    """The pairs that are allowed where all other values are ordinary."""
    found = set()
    for (i, first), (j, second) in combinations(enumerate(AXES), 2):
        for a, b in product(first, second):
            values = [b if axis == j else a if axis == i else value for axis, value in enumerate(ORDINARY)]
            if is_allowed(Setup(*values)):
                found.add(((i, a), (j, b)))
    return frozenset(found)


@cache
def every_setup() -> list[Setup]:
    """All set-ups whose pairs are allowed. No rule needs three values."""
    return [Setup(*values) for values in product(*AXES) if pairs_of(values) <= allowed_pairs()]


@cache
def pairwise_setups() -> list[Setup]:
    """Few set-ups in which every allowed pair occurs: each next one has the most pairs that no earlier one has."""
    left = {setup: pairs_of(setup) for setup in every_setup()}
    missing = set().union(*left.values())
    chosen = []
    while missing:
        best = max(left, key=lambda setup: len(missing & left[setup]))
        missing -= left[best]
        chosen.append(best)
    return chosen
