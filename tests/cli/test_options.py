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


@pytest.mark.parametrize(
    ("value", "least", "fits"), [(0, 0, True), (-1, 0, False), (1, 1, True), (0, 1, False), (2, 1, True)]
)
def test_the_bound_itself_fits(value, least, fits):
    args = argparse.Namespace(limit=value)
    if fits:
        require_at_least(args, least, "limit")
    else:
        with pytest.raises(ConfigError, match=f"where=--limit; got={value}; want=at least {least}"):
            require_at_least(args, least, "limit")


def test_every_option_is_checked_in_order():
    args = argparse.Namespace(a=None, b=-2, c=-3)
    with pytest.raises(ConfigError, match="where=--b; got=-2"):
        require_at_least(args, 0, "a", "b", "c")
    with pytest.raises(KeyError):
        require_at_least(args, 0, "d")
