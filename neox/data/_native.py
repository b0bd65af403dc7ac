"""The dataset core (csrc/data), with an error that says what to do when it is not built."""

from __future__ import annotations

from neox.errors import EnvironmentProblem

try:
    from neox import _data as core
except ImportError as missing:
    raise EnvironmentProblem(
        "the dataset core is not built or does not load", where="neox._data", got=missing, do="pip install --no-build-isolation -e ."
    ) from missing

__all__ = ["core"]
