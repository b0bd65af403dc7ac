"""Lookup of config files by name."""

from __future__ import annotations

import pytest

from neox.config.files import find_config
from tests.config.refusals import MINIMAL, refusal


def test_names_are_searched_under_configs_and_without_suffix(write, tmp_path):
    write("configs/mine/tiny.yml", MINIMAL)
    for name in ("configs/mine/tiny.yml", "mine/tiny.yml", "mine/tiny"):
        assert find_config(name) == tmp_path / "configs/mine/tiny.yml"


def test_a_name_that_no_file_can_have_is_a_missing_file():
    assert find_config("x" * 5000) is None
    assert "no such config file" in refusal("x" * 5000)[0]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("1-3b", "1-3B.yml"),
        ("pythia/160m.yml", "pythia/160M.yml"),
        ("pytha/160M.yml", "pythia/160M.yml"),
        ("configs/2-7B.yml", "gpt3/2-7B.yml"),
    ],
)
def test_a_missing_file_names_the_most_similar_preset(name, close, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {close}?" in refusal(name)[0]
