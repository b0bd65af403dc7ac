"""Lookup of config files by name."""

from __future__ import annotations

import pytest

from neox.config.files import PRESETS, display_path, find_config
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


def test_a_file_is_searched_here_then_under_configs_then_among_the_presets(write, tmp_path):
    preset = find_config("pythia/70M.yml")
    assert preset == PRESETS / "pythia/70M.yml"
    write("configs/pythia/70M.yml", MINIMAL)
    assert find_config("pythia/70M") == tmp_path / "configs/pythia/70M.yml"
    write("pythia/70M.yml", MINIMAL)
    assert find_config("pythia/70M") == tmp_path / "pythia/70M.yml"
    write("pythia/70M", MINIMAL)  # the name as it is given comes before the name with a suffix
    assert find_config("pythia/70M") == tmp_path / "pythia/70M"


def test_an_include_is_searched_in_its_base_and_not_in_the_working_folder(write, tmp_path):
    write("here.yml", MINIMAL)
    write("base/there.yml", MINIMAL)
    write("configs/shared.yml", MINIMAL)
    base = tmp_path / "base"
    assert find_config("there", base) == base / "there.yml"
    assert find_config("here", base) is None
    assert find_config("../here", base) == tmp_path / "here.yml"
    assert find_config("shared", base) == tmp_path / "configs/shared.yml"
    assert find_config("gpt3/125M", base) == PRESETS / "gpt3/125M.yml"


def test_an_absolute_name_is_searched_nowhere_else(write, tmp_path):
    write("configs/a.yml", MINIMAL)
    assert find_config(str(tmp_path / "configs/a")) == tmp_path / "configs/a.yml"
    assert find_config(str(tmp_path / "a.yml")) is None


def test_a_folder_does_not_hide_the_file_with_its_name(write, tmp_path):
    write("size/70M.yml", MINIMAL)
    assert find_config("size") is None
    write("size.yml", MINIMAL)
    assert find_config("size") == tmp_path / "size.yml"


@pytest.mark.parametrize("name", ["", "a\0b", "caf\udce9"])
def test_a_name_that_cannot_be_written_to_a_log_finds_no_file(name, write):
    write("caf\udce9", MINIMAL)
    assert find_config(name) is None


def test_a_link_is_followed(write, tmp_path):
    write("real.yml", MINIMAL)
    (tmp_path / "link.yml").symlink_to("real.yml")
    assert find_config("link") == tmp_path / "real.yml"


def test_a_path_is_shown_relative_to_the_working_folder_if_it_is_inside_it(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert display_path(tmp_path / "inner" / "sub" / "a.yml") == "sub/a.yml"
    assert display_path(tmp_path / "a.yml") == str(tmp_path / "a.yml")


def test_a_missing_file_that_resembles_none_has_no_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("qqqq.yml") == ["error[2] no such config file; got=qqqq.yml; want=a file, or a name under configs/"]
    (line,) = refusal("else/where/13B.yml")
    assert line.endswith("do=did you mean gpt3/13B.yml?")
