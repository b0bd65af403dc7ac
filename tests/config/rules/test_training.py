"""Rules of output folders and of DeepSpeed's keys."""

from __future__ import annotations

import pytest

from neox.config.load import load_config
from neox.config.validate import validate
from neox.errors import ConfigError
from tests.config.rules.contradictions import BASE, Case, report


@pytest.mark.parametrize("name", ["/", "//", "/.", "/tmp/..", "/../"])
def test_the_root_is_not_a_folder_of_a_run(name):
    with pytest.raises(ConfigError, match="run.dir is the root of the file system; where=.*run.dir"):
        validate(load_config(overrides=[*BASE, f"run.dir={name}"]), 1, "cpu")


def test_a_folder_with_a_name_that_is_too_long():
    with pytest.raises(ConfigError, match="run.dir has a name that is too long; where=.*run.dir"):
        validate(load_config(overrides=[*BASE, f"run.dir={'a' * 300}"]), 1, "cpu")


@pytest.mark.parametrize("letter", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
def test_control_characters_in_the_folder_of_a_run(letter):
    with pytest.raises(ConfigError, match="control characters in its name; where=.*run.dir") as caught:
        validate(load_config(overrides=[*BASE, f"run.dir=runs/a{letter}b"]), 1, "cpu")
    assert len(caught.value.line().splitlines()) == 1


def test_a_secret_is_not_repeated():
    assert "s3cret" not in report(Case(("deepspeed.comet.api_key=s3cret",), ()))
