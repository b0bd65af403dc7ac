"""The prose of the repository uses the field's words: no word of the glossary's left column, and the checker sees
one that is planted.
"""

from __future__ import annotations

import pytest

from tests import language


def words(name: str, text: str) -> list[tuple[int, str]]:
    """(line, word) of the findings in a file's text."""
    return sorted((line, word) for line, word, _ in language.findings(name, text))


def test_the_glossary_is_followed():
    found = []
    for path in language.sources():
        name = str(path.relative_to(language.ROOT))
        found += [
            f"{name}:{line}: {word!r}: {better}"
            for line, word, better in language.findings(name, path.read_text(encoding="utf-8"))
        ]
    assert found == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.py",
            '"""A sign of life."""\nx = 1  # looks at it anew\n',
            [(1, "sign of life"), (2, "anew"), (2, "looks")],
        ),
        ("a.py", 'raise E(f"the launcher is gone; got={gone[0]}")\n', [(1, "gone")]),
        ("a.py", "def test_the_run_goes_on():\n    pass\n", [(1, "goes on")]),
        ("a.py", 'x = """One.\n\nData are kept."""\n', [(3, "Data are"), (3, "kept")]),
        ("a.md", "The run\nwas told.\n```\nneox plan whole  # says so\n```\n", [(2, "told"), (4, "says")]),
        ("a.cuh", "int own;  // a warp's pieces\n/* one\n   foretold */\n", [(1, "pieces"), (3, "foretold")]),
        ("a.cpp", 'fail("is no number");\n', [(1, "is no number")]),
        ("a.yml", "a: whole  # faults on purpose\n", [(1, "on purpose")]),
    ],
)
def test_a_planted_word_is_found(name, text, expected):
    assert words(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", 'own = kept["whole"]  # looked up in place by `whole`; each rank its own, as a whole\n'),
        ("a.py", 'x = f"{whole} bytes"\n'),
        ("a.md", "See `neox/whole.py`, [this](docs/whole.md#piece), SentencePiece, and the sixth decimal place.\n"),
        ("a.cu", 'int whole = own;  // out of place\nconst char* name = "piece";\n'),
        ("a.yml", "whole: kept\n"),
    ],
)
def test_names_and_terms_of_the_field_pass(name, text):
    assert words(name, text) == []


def test_every_word_has_a_better_one_and_is_found():
    samples = {
        "beside": "beside it",
        "piece": "a piece of it",
        "whole": "the whole file",
        "mend": "mends the file",
        "alike": "all alike",
    }
    for word, text in samples.items():
        assert any(word in found for _, found in words("a.md", text)), word
    assert all(better for better in language.GLOSSARY.values())


def test_the_command_reports_what_it_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(language, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("Clean.\nThe launcher is gone.\n")
    assert language.main([str(tmp_path / "docs")]) == 1
    assert capsys.readouterr().out == "docs/a.md:2: 'gone': missing, exited\n"
    (tmp_path / "docs" / "a.md").write_text("Clean.\n")
    assert language.main([]) == 0
