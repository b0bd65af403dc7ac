"""The page: self-contained, complete, safe against what runs are named."""

from __future__ import annotations

import re

from neox.report.page import STYLE, page, short_names, table
from neox.report.runs import read_run
from tests.report.records import write_run


def test_one_run(tmp_path):
    text = page([read_run(write_run(tmp_path / "run"))])
    for title in (
        "loss",
        "learning rate",
        "gradient norm, logarithmic",
        "tokens per second",
        "model FLOPs utilisation",
        "peak memory of a process, GB",
    ):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "validation" in text and "step 80" in text and "75.00 %" in text and "optimizer.lr: 0.001" in text


def test_two_runs_are_compared(tmp_path):
    text = page([read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", lr=2e-3))])
    assert "Differences of the configs" in text and "<td>optimizer.lr</td><td>0.001</td><td>0.002</td>" in text
    assert text.count("<polyline") >= 14


def test_nothing_is_fetched_and_nothing_is_run(tmp_path):
    text = page([read_run(write_run(tmp_path / "run"))])
    assert not re.search(r"<(script|img|iframe|link|object)\b|@import|url\(|\bsrc=|\bhref=|https?://", text)
    assert "default-src 'none'" in text


def test_names_are_text_and_not_markup(tmp_path):
    record = read_run(write_run(tmp_path / "<script>alert(1)<"))
    text = page([record])
    assert "<script>" not in text and "&lt;script&gt;" in text
    body = text[text.index("<body>") :]
    table, config = body[body.index("Training data of") : body.index("<details>")], body[body.index("<details>") :]
    assert "&lt;a&gt;" in table and "&lt;a&gt;" in config and "<a>" not in body  # the path of a source
    (tmp_path / "<script>alert(1)<" / "log.txt").write_text("stopped by <b>\n")
    both = page([record, read_run(tmp_path / "<script>alert(1)<"), read_run(write_run(tmp_path / "<i>", lr=2e-3))])
    assert "stopped by &lt;b&gt;" in both and not re.search("<(script|b|i|a)>", both)


def test_legends_leave_out_what_names_share():
    assert short_names(["/runs/a/first", "/runs/a/second"]) == ["first", "second"]
    assert short_names(["runs/a", "runs/a"]) == ["a", "a"]
    assert short_names(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert short_names(["runs/a", "runs"]) == ["runs/a", "runs"]
    assert short_names([]) == []


def test_a_narrow_screen_scrolls_tables_and_not_the_page(tmp_path):
    """At 400 pixels: tables scroll in their own box, plots shrink, long names break."""
    text = table(["key"], [["x" * 500]])
    assert text.startswith('<div class="wide"><table>') and text.endswith("</table></div>")
    assert (
        ".wide { overflow-x: auto; }" in STYLE
        and "minmax(min(430px, 100%), 1fr)" in STYLE
        and "overflow-wrap: anywhere" in STYLE
    )
    assert 'name="viewport" content="width=device-width' in page([read_run(write_run(tmp_path / "a"))])
