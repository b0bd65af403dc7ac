"""Reference pages of the configs, written from the schema and the table of GPT-NeoX's keys. docs/ holds them; a test compares."""

from __future__ import annotations

from collections.abc import Iterator

from neox.config.explain import explain
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.load import known_keys
from neox.config.schema import Config


def upstream_names() -> dict[str, list[str]]:
    """Native key -> the keys of GPT-NeoX that decide it."""
    names: dict[str, list[str]] = {}
    for name, row in GPT_NEOX_KEYS.items():
        for target in row.to:
            names.setdefault(target, []).append(name)
    return names


def cell(text: str) -> str:
    """Text as it stands in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    """Text as code in a table; nothing for no text."""
    return f"`{cell(text)}`" if text else ""


def config_reference() -> str:
    """docs/config-reference.md: every key by section, with type, default, meaning and upstream's name."""
    return "\n".join(_config_lines()) + "\n"


def _config_lines() -> Iterator[str]:
    yield "# Config reference"
    yield ""
    yield "Written from the schema by `neox config reference`. Times are in iterations, lengths in tokens, sizes in elements unless a key says"
    yield "otherwise. The last column names the keys of GPT-NeoX that decide it ([all of them](gpt-neox-keys.md))."
    names = upstream_names()
    for section in Config.model_fields:
        if section == "deepspeed":
            continue
        found = explain(section)
        yield from ("", f"## {section}", "", found.meaning, "")
        yield "| key | values | default | meaning | GPT-NeoX |"
        yield "|---|---|---|---|---|"
        for key in known_keys():
            if key.startswith(f"{section}."):
                row = explain(key)
                default = "derived, or required" if row.default is None or row.default.startswith("derived") else code(row.default)
                upstream = " ".join(code(name) for name in names.get(key, ()))
                yield f"| `{key}` | {cell(row.type)} | {default} | {cell(row.meaning)} | {upstream} |"
    yield from ("", "## deepspeed", "", "Keys handed to DeepSpeed as they are:", "")
    yield from (f"- `{key}`" for key in explain("deepspeed").keys)


def upstream_reference() -> str:
    """docs/gpt-neox-keys.md: what is done with every key of GPT-NeoX."""
    return "\n".join(_upstream_lines()) + "\n"


def _upstream_lines() -> Iterator[str]:
    yield "# Every key of GPT-NeoX"
    yield ""
    yield "Written from the table by `neox config reference --gpt-neox`. How its files are read: [coming from GPT-NeoX](coming-from-gpt-neox.md)."
    titles = {
        "renamed": "Another name, the same meaning",
        "translated": "Worked out, alone or together with others",
        "unsupported": "An error, unless the value switches nothing on",
        "ignored": "No effect here",
    }
    heads = {
        "renamed": ("| key | is | GPT-NeoX's default |", "|---|---|---|"),
        "translated": ("| key | decides | how | GPT-NeoX's default |", "|---|---|---|---|"),
        "unsupported": ("| key | do |", "|---|---|"),
        "ignored": ("| key | why |", "|---|---|"),
    }
    for kind, title in titles.items():
        yield from ("", f"## {title}", "", *heads[kind])
        for name, row in GPT_NEOX_KEYS.items():
            if row.kind != kind:
                continue
            default = code("" if row.default is None else str(row.default))
            to = " ".join(code(target) for target in row.to)
            cells = {"renamed": (to, default), "translated": (to, cell(row.text), default)}.get(kind, (cell(row.text),))
            yield f"| `{name}` | {' | '.join(cells)} |"
