"""Ranges of numeric options."""

from __future__ import annotations

import argparse

import pytest

from neox.cli.options import require_at_least
from neox.errors import ConfigError


def test_the_first_option_below_its_bound_is_named():
    args = argparse.Namespace(batch_size=1, seq_length=None, max_documents=0)
    require_at_least(args, 1, "batch_size", "seq_length")
    with pytest.raises(ConfigError) as caught:
        require_at_least(args, 1, "batch_size", "max_documents")
    assert caught.value.line() == "error[2] option out of range; where=--max-documents; got=0; want=at least 1"
