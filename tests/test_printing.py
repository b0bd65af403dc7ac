"""Text for terminals and logs."""

from __future__ import annotations

import os

from neox.printing import counted, json_line, printable


def test_names_that_are_not_utf8_become_text():
    assert printable("plain é") == "plain é"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("\ud800") == "\\ud800"
    ends = "\udc7f\udc80\udcff\udd00\udfff\ue000"
    assert printable(ends) == "\\udc7f\\x80\\xff\\udd00\\udfff\ue000"


def test_a_json_line_holds_names_that_are_not_utf8():
    assert json_line({"a": [1, "b"]}) == '{"a":[1,"b"]}'
    assert json_line({os.fsdecode(b"caf\xe9"): ("\ud800",)}) == '{"caf\\\\xe9":["\\\\ud800"]}'


def test_a_count_agrees_with_its_noun():
    counts = [counted(0, "token"), counted(1, "token"), counted(2048, "token"), counted(1, "process")]
    assert counts == ["0 tokens", "1 token", "2,048 tokens", "1 process"]
    assert counted(2, "process") == "2 processes"


def test_paths_and_nested_values_are_printed(tmp_path):
    assert printable(tmp_path) == str(tmp_path)
    bad = os.fsdecode(b"\xff")
    assert json_line({"a": {"b": [bad, 1, None, True]}, "c": 2.5}) == '{"a":{"b":["\\\\xff",1,null,true]},"c":2.5}'
    assert json_line("é") == '"é"'


def test_large_counts_have_thousands_and_one_has_none():
    assert counted(1_000_000, "class") == "1,000,000 classes" and counted(1000, "bus") == "1,000 buses"
