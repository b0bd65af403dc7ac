"""What the config tests share: the smallest config, and the error lines of a config that does not load."""

from __future__ import annotations

import pytest

from neox.config.load import load
from neox.errors import ConfigError

MINIMAL = "model: {vocab_size: 100}\n"


def refusal(*paths: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """The error lines of files and overrides that do not load."""
    with pytest.raises(ConfigError) as caught:
        load(paths, overrides)
    return caught.value.line().splitlines()
