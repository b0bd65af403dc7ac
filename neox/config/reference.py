"""Reference pages of the config keys, generated from the schema and the table of GPT-NeoX's keys.

docs/ has the generated pages; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator

from neox.config.explain import explain
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.schema import Config
from neox.config.values import known_keys

DEFAULT_WORDS = {"derived (see the meaning)": "derived", "required": "required"}


def gpt_neox_names() -> dict[str, list[str]]:
    """Native key -> the keys of GPT-NeoX that set it."""
    names: dict[str, list[str]] = {}
    for name, rule in GPT_NEOX_KEYS.items():
        for target in rule.to:
            names.setdefault(target, []).append(name)
    return names


def cell(text: str) -> str:
    """Escape a text for a table cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    """Format a text as code in a table cell; an empty text stays empty."""
    return f"`{cell(text)}`" if text else ""


def config_reference() -> str:
    """Write docs/config-reference.md: every key by section, with type, default, meaning and GPT-NeoX's name."""
    return "\n".join(_config_lines()) + "\n"


def _config_lines() -> Iterator[str]:
    yield "# Config reference"
    yield ""
    yield "Generated from the schema by `neox config reference`."
    yield "Times are in iterations, lengths in tokens and sizes in elements, unless stated otherwise."
    yield "The last column names the keys of GPT-NeoX that set the key ([all of them](gpt-neox-keys.md))."
    names = gpt_neox_names()
    for section in Config.attributes():
        if section == "deepspeed":
            continue
        found = explain(section)
        yield from ("", f"## {section}", "", found.meaning, "")
        yield "| key | values | default | meaning | GPT-NeoX |"
        yield "|---|---|---|---|---|"
        for key in known_keys():
            if key.startswith(f"{section}."):
                row = explain(key)
                default = DEFAULT_WORDS.get(row.default or "") or code(row.default or "")
                theirs = " ".join(code(name) for name in names.get(key, ()))
                yield f"| `{key}` | {cell(row.type)} | {default} | {cell(row.meaning)} | {theirs} |"
    yield from ("", "## deepspeed", "", "Keys that are passed to DeepSpeed unchanged:", "")
    yield from (f"- `{key}`" for key in explain("deepspeed").keys)


def gpt_neox_reference() -> str:
    """Write docs/gpt-neox-keys.md: the treatment of every key of GPT-NeoX."""
    return "\n".join(_gpt_neox_lines()) + "\n"


def _gpt_neox_lines() -> Iterator[str]:
    yield "# Every key of GPT-NeoX"
    yield ""
    yield "Generated from the table by `neox config reference --gpt-neox`."
    yield "For how GPT-NeoX files are read, see [coming from GPT-NeoX](coming-from-gpt-neox.md)."
    titles = {
        "renamed": "Renamed: the same meaning under another name",
        "translated": "Translated: computed, alone or together with other keys",
        "unsupported": "Unsupported: an error, unless the value has no effect",
        "ignored": "Ignored: no effect in neox",
    }
    heads = {
        "renamed": ("| key | is | default of GPT-NeoX |", "|---|---|---|"),
        "translated": ("| key | sets | how | default of GPT-NeoX |", "|---|---|---|---|"),
        "unsupported": ("| key | what to do |", "|---|---|"),
        "ignored": ("| key | reason |", "|---|---|"),
    }
    for kind, title in titles.items():
        yield from ("", f"## {title}", "", *heads[kind])
        for name, rule in GPT_NEOX_KEYS.items():
            if rule.kind != kind:
                continue
            default = code("" if rule.default is None else str(rule.default))
            to = " ".join(code(target) for target in rule.to)
            cells = {"renamed": (to, default), "translated": (to, cell(rule.text), default)}.get(
                kind, (cell(rule.text),)
            )
            yield f"| `{name}` | {' | '.join(cells)} |"
