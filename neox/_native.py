"""The dataset core (csrc/data). Importing it raises a clear error if it is not built, or built from older sources."""

from __future__ import annotations

from neox.errors import INSTALL, EnvironmentProblem

# what the Python sources use of it
NAMES = (
    "Dataset",
    "EncodeThreads",
    "EpochOrder",
    "Started",
    "TextEncoder",
    "Writer",
    "best_fit",
    "blend",
    "count_lines",
    "document_statistics",
    "epochs_needed",
    "file_checksum",
    "first_outside",
    "mix",
    "nfc",
    "positions_in_segments",
    "read_spans",
    "read_xxh3",
    "sample_index",
    "start_writeback",
    "xxh3",
)

try:
    from neox import _data as core
except ImportError as missing:
    raise EnvironmentProblem(
        "the dataset core is not built or does not load", where="neox._data", got=missing, do=INSTALL
    ) from missing

if lacking := [name for name in NAMES if not hasattr(core, name)]:
    raise EnvironmentProblem(
        "the dataset core is older than the Python sources",
        where=core.__file__,
        got=f"no {', '.join(lacking)}",
        do=f"rebuild: {INSTALL}",
    )

__all__ = ["core"]
