"""The data section: short forms of sources, the split, special ids."""

from __future__ import annotations

import pytest

from neox.config.schema import DataConfig, SpecialIds, parse_split


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
