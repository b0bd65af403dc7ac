"""Fixtures that the training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.corpus import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with the datasets `train` and `valid`."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder
