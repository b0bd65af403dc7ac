"""Text for terminals and logs."""

from __future__ import annotations

import os

from neox.printing import json_line, printable


def test_names_that_are_not_utf8_become_text():
    assert printable("plain é") == "plain é"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("\ud800") == "\\ud800"
    ends = "\udc7f\udc80\udcff\udd00\udfff\ue000"
    assert printable(ends) == "\\udc7f\\x80\\xff\\udd00\\udfff\ue000"


def test_a_json_line_holds_names_that_are_not_utf8():
    assert json_line({"a": [1, "b"]}) == '{"a":[1,"b"]}'
    assert json_line({os.fsdecode(b"caf\xe9"): ("\ud800",)}) == '{"caf\\\\xe9":["\\\\ud800"]}'
