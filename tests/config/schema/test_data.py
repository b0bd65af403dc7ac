"""The data section: short forms of sources, the split, special ids."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from neox.config.schema import DataConfig, DataSource, SpecialIds, parse_split


def test_sources_may_be_bare_prefixes():
    data = DataConfig.model_validate({"train": "a", "validation": ["b", {"path": "c", "weight": 2}], "text": "t"})
    sources = [(source.path, source.weight) for source in (*data.train, *data.validation)]
    assert sources == [("a", 1.0), ("b", 1.0), ("c", 2.0)]
    assert data.text == ("t",)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("969,30,1", (0.969, 0.03, 0.001)),
        ("1", (1, 0, 0)),
        ("3/1", (0.75, 0.25, 0)),
        (" 1, 1 ,2 ", (0.25, 0.25, 0.5)),
        ("0,1", (0, 1, 0)),
    ],
)
def test_a_split_is_normalised(text, shares):
    assert parse_split(text) == shares


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan,1", "inf,1", "1,,2", "1e308,1e308"])
def test_a_malformed_split_is_refused(text):
    with pytest.raises(ValueError, match="one to three shares"):
        parse_split(text)


def test_special_ids_that_stop_generation():
    assert SpecialIds().ends() == frozenset()
    assert SpecialIds(eos=3, stop=(4,)).ends() == {3, 4}
    assert SpecialIds(eos=(1, 2)).ends() == {1, 2}


def test_short_forms_of_every_part():
    for part in ("train", "validation", "test"):
        for given in ("a", ["a"], ("a",), [{"path": "a"}], [DataSource(path="a")]):
            assert getattr(DataConfig.model_validate({part: given}), part) == (DataSource(path="a"),)
    content = {"train": ["a"], "text": "t"}
    DataConfig.model_validate(content)
    assert content == {"train": ["a"], "text": "t"}  # not changed
    assert DataConfig.model_validate({"text": ["t", "u"]}).text == ("t", "u")


@pytest.mark.parametrize(
    "given", [{"train": 3}, {"train": [3]}, {"train": {"path": "a"}}, {"text": 3}, {"path": ["a"]}, 3]
)
def test_other_forms_are_refused(given):
    with pytest.raises(ValidationError):
        DataConfig.model_validate(given)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("1,1", (0.5, 0.5, 0)),
        ("1/2/1", (0.25, 0.5, 0.25)),
        ("0,0,2", (0, 0, 1)),
        ("1e-9", (1, 0, 0)),
        ("3,1/4", (3 / 8, 1 / 8, 0.5)),
    ],
)
def test_further_splits(text, shares):
    assert parse_split(text) == shares


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        ({"eos": 0}, {0}),
        ({"eos": [1], "stop": [1, 2]}, {1, 2}),
        ({"stop": [5]}, {5}),
        ({"bos": 1, "pad": 2}, set()),
    ],
)
def test_only_eos_and_stop_end_a_text(ids, ends):
    assert SpecialIds.model_validate(ids).ends() == frozenset(ends)
