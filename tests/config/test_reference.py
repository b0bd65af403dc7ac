"""The reference pages in docs/ match the schema and the table."""

from __future__ import annotations

import pytest

from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.reference import cell, config_reference, gpt_neox_reference
from neox.config.values import known_keys


@pytest.mark.parametrize(
    ("page", "write", "command"),
    [
        ("config-reference.md", config_reference, "neox config reference"),
        ("gpt-neox-keys.md", gpt_neox_reference, "neox config reference --gpt-neox"),
    ],
)
def test_the_page_is_up_to_date(repository, page, write, command):
    assert (repository / "docs" / page).read_text(encoding="utf-8") == write(), f"{command} > docs/{page}"


def test_no_key_is_left_out():
    page = config_reference()
    assert all(f"| `{key}` |" in page for key in known_keys() if "." in key)
    assert all(f"| `{name}` |" in gpt_neox_reference() for name in GPT_NEOX_KEYS)


def test_a_line_has_type_default_meaning_and_the_name_of_gpt_neox():
    assert (
        "| `model.parallel_residual` | boolean | `false` | x + attention(norm1(x)) + mlp(norm2(x)) instead of two "
        "sequential steps | `gpt_j_residual` |" in config_reference()
    )


def test_a_cell_is_one_line_without_a_column_mark():
    assert cell("a|b\nc") == "a\\|b c"
