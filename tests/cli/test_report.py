"""`neox report` from its command line."""

from __future__ import annotations

import json

import pytest

from neox.cli.main import main
from tests.report.records import write_run


def test_report_of_two_runs(tmp_path, capsys):
    write_run(tmp_path / "a"), write_run(tmp_path / "b")
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["steps"] for run in found["runs"]] == ["120 of 120"] * 2 and len(found["runs"][0]["incidents"]) == 3
    assert out.read_text().startswith("<!doctype html>")


def test_a_page_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_run(tmp_path / "a")
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), "--out", str(out)]) == 0
    earlier = out.read_text()

    def fail(runs):
        raise ZeroDivisionError

    monkeypatch.setattr("neox.cli.report.page", fail)
    with pytest.raises(ZeroDivisionError):
        main(["report", str(tmp_path / "a"), "--out", str(out)])
    assert out.read_text() == earlier


def test_another_file_is_not_replaced(tmp_path, capsys):
    write_run(tmp_path / "a")
    out = tmp_path / "mine.yml"
    out.write_text("run: {dir: runs/mine}")
    words = ["report", str(tmp_path / "a"), "--out", str(out)]
    assert main(words) == 2 and out.read_text() == "run: {dir: runs/mine}"
    assert f"file exists and is no report; where=--out {out}; do=choose" in capsys.readouterr().err
    out.write_text("")
    assert main(words) == 0
    first = out.read_text()
    write_run(tmp_path / "b")
    assert main(["report", str(tmp_path / "b"), "--out", str(out)]) == 0 and out.read_text() != first
    assert main(["report", str(tmp_path / "a"), "--out", "/dev/null"]) == 0


def test_what_is_no_run_and_where_nothing_can_be_written(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 3
    write_run(tmp_path / "a")
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "nowhere" / "x.html")]) == 5
    assert "not the folder of a run" in capsys.readouterr().err


def test_the_page_and_the_numbers_of_each_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", steps=2), write_run(tmp_path / "b", steps=3)
    assert main(["report", "b", "a"]) == 0
    assert capsys.readouterr().out == "wrote report.html\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>neox report: b, a</title>" in text
    assert main(["report", "b", "a", "--out", "é.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == "é.html" and [(run["run"], run["steps"]) for run in found["runs"]] == [
        ("b", "3 of 3"),
        ("a", "2 of 2"),
    ]
    assert found["runs"][0]["incidents"] == ["resumed from runs/x at step 60"]
    assert (tmp_path / "é.html").read_text(encoding="utf-8") == text
