"""What all sections of a config share: the base class and the constrained number types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST_INT = 2**53  # larger integers are not exact in JSON and in the floats of schedules and plans
LARGEST_BATCH = 2**31 - 1

PositiveInt = Annotated[int, Field(gt=0, le=LARGEST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT)]
BatchInt = Annotated[int, Field(gt=0, le=LARGEST_BATCH)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel, frozen=True):
    """A frozen section. It rejects unknown keys and does not convert types: 1 is not a boolean."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def attributes(cls) -> dict[str, str]:
        """YAML key -> attribute. They differ where Python reserves the key as a keyword (`async`)."""
        return {field.alias or name: name for name, field in cls.model_fields.items()}

    def entries(self) -> Iterator[tuple[str, object]]:
        """(YAML key, value) in the order of the schema."""
        return ((key, getattr(self, name)) for key, name in self.attributes().items())
