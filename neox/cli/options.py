"""Ranges of numeric options."""

from __future__ import annotations

import argparse

from neox.errors import ConfigError


def require_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Check that options are absent or at least a number.

    Raises:
        ConfigError: names the first option that is below it.
    """
    for name in names:
        value = vars(args)[name]
        if value is not None and value < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError("option out of range", where=option, got=value, want=f"at least {least}")
