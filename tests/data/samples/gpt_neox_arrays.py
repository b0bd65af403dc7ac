"""GPT-NeoX's sample orders and its blend, of which the repository holds parameters and digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

GPT_NEOX = json.loads(Path(__file__).with_suffix(".json").read_text())


def assert_equal(arrays: dict[str, np.ndarray], wanted: dict[str, dict]) -> None:
    """Compare every array: shape, first values (for the message) and the digest of all values."""
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        assert list(array.shape) == wanted[name]["shape"], name
        assert array[:4].tolist() == wanted[name]["first"], name
        values = np.ascontiguousarray(array, dtype="<i8")
        assert hashlib.sha256(values.tobytes()).hexdigest() == wanted[name]["sha256"], name
