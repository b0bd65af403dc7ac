"""The page: self-contained, complete, safe against what runs are named."""

from __future__ import annotations

import re
from html import unescape

import pytest

from neox.config.load import loads
from neox.config.values import flatten
from neox.report.page import PLOTS, STYLE, data_mix, difference_table, incidents, page, plots, short_names, table
from neox.report.plot import COLORS
from neox.report.runs import RunRecord, read_run
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


def cells(text: str) -> list[list[str]]:
    """The rows of all tables of a page."""
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [[unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def record(name: str, config: str = "model: {vocab_size: 100}", **rows: list) -> RunRecord:
    """A run of few steps, with lists of values per key."""
    steps = len(next(iter(rows.values())))
    listed = [{"step": i + 1, **{key: values[i] for key, values in rows.items()}} for i in range(steps)]
    return RunRecord(name, loads(config), listed, [])


def test_the_summary_has_a_column_for_each_run_also_where_one_lacks_a_fact(tmp_path):
    first = record("runs/a", loss=[3.0], validation_loss=[2.5], grad_norm=[1.0])
    second = record("runs/b", loss=[4.0], tokens_per_s=[10.0], grad_norm=[1.0])
    rows = {row[0]: row[1:] for row in cells(page([first, second]))}
    assert rows[""] == ["runs/a", "runs/b"] and rows["last loss"] == ["3.0000", "4.0000"]
    assert rows["last validation loss"] == ["2.5000", ""] and rows["tokens/s, median"] == ["", "10"]


def test_every_curve_has_the_colour_and_the_name_of_its_run():
    values = {key: [0.5, 0.25] for _, key, _ in PLOTS} | {"validation_loss": [0.75, 0.5]}
    text = plots([record("runs/a", **values), record("runs/b", **values)])
    figures = re.findall(r"<figure>.*?</figure>", text)
    assert len(figures) == 6 and text.startswith("<h2>Curves</h2>")
    titles = [re.search("<figcaption>(.*?)<", each)[1] for each in figures]
    assert titles == [title + (", logarithmic" if log else "") for title, _, log in PLOTS]
    for figure in figures:
        stroke = re.findall('stroke="(#......)"', figure)
        names = [(name, COLORS.index(color)) for color, name in re.findall('fill:(#......)" class="n">(.*?)<', figure)]
        loss = "<figcaption>loss<" in figure
        assert names == [("a", 0), ("b", 1), *([("a, validation", 3), ("b, validation", 4)] if loss else [])]
        assert [COLORS.index(each) for each in stroke] == [number for _, number in names]
        assert figure.count("<circle") == (4 if loss else 0)  # validations are few
    alone = plots([record("runs/a", **values)])
    assert re.findall('class="n">(.*?)<', alone) == ["loss", "validation"]
    assert "step" in re.findall(">([a-z]+)</text>", alone)


def test_incidents_name_their_run():
    skipped = {"loss": [1.0, 1.0], "grad_norm": [None, 1.0]}
    runs = [record("a", **skipped), record("b", loss=[1.0], grad_norm=[1.0]), record("c", **skipped)]
    assert cells(incidents(runs)) == [["run", "what"], *([name, "step 1: update skipped"] for name in "ac")]
    assert incidents(runs[1:2]) == "<h2>Incidents</h2><p>None.</p>" and "<h2>Incidents</h2><p>" not in incidents(runs)


def test_configs_are_compared_only_where_there_are_several():
    runs = [record(name, f"model: {{vocab_size: {size}}}", loss=[1.0]) for name, size in (("a", 1), ("b", 2))]
    assert cells(difference_table(runs)) == [["key", "a", "b"], ["model.vocab_size", "1", "2"]]
    assert difference_table([runs[0], runs[0]]).endswith("</h2><p>None.</p>")
    assert "Differences" in page(runs) and "Differences" not in page(runs[:1])


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ("train: [{path: a, weight: 1}, {path: b, weight: 2}]", [["a", "33.33 %"], ["b", "66.67 %"]]),
        ("path: x\n  split: 90,5,5", [["x", "split 90,5,5"]]),
        ("text: [p.txt, q.txt]\n  split: 8,1,1", [["p.txt", "split 8,1,1"], ["q.txt", "split 8,1,1"]]),
    ],
)
def test_the_shares_of_the_data(data, wanted):
    run = record("a<b", f"model: {{vocab_size: 9}}\ntokenizer: {{file: t.json}}\ndata:\n  {data}", loss=[1.0])
    text = data_mix(run)
    assert cells(text) == [["source", "share"], *wanted] and "<h2>Training data of a&lt;b</h2>" in text


def test_the_page_of_several_runs_has_the_complete_config_of_each(tmp_path):
    runs = [read_run(write_run(tmp_path / name, lr=lr)) for name, lr in (("a", 1.0), ("b", 2.0))]
    text = page(runs)
    assert text == page(runs)
    titles = re.findall("<summary>Config of (.*?)</summary>", text)
    assert titles == [run.name for run in runs]
    for run, shown in zip(runs, re.findall("(?s)<pre>(.*?)</pre>", text), strict=True):
        assert [line.partition(":")[0] for line in shown.splitlines()] == [key for key, _ in flatten(run.config)]
        assert f"optimizer.lr: {run.config.optimizer.lr}" in shown
    assert text.count("Training data of") == 2 and f"<title>neox report: {runs[0].name}, {runs[1].name}</title>" in text


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["r/a/x", "r/a/y", "r/b/x"], ["a/x", "a/y", "b/x"]),
        (["r/a", "r/a/b"], ["a", "a/b"]),
        (["only"], ["only"]),
        (["r/only"], ["only"]),
    ],
)
def test_shared_folders_go_as_far_as_all_share_them(names, wanted):
    assert short_names(names) == wanted
