"""Show a config with the origin of every value, explain a key, or compare two configs.

example: neox config show 1-3B.yml --set train.seed=7
         neox config explain model.rotary_pct
         neox config diff pythia/160M.yml pythia/410M.yml
"""

from __future__ import annotations

import argparse
import json

from neox.config.explain import diff, explain, inline, show
from neox.config.load import Loaded, load, plain
from neox.config.schema import Config
from neox.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `neox config`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|explain|diff")
    shower = actions.add_parser("show", help="the whole resolved config, with the origin of each value", description="Print the whole resolved config.")
    shower.add_argument("files", nargs="*", metavar="FILE", help="config files, later ones win; bare names are looked for under configs/")
    explainer = actions.add_parser("explain", help="meaning, type and default of a key", description="Explain a key, or list the keys of a section.")
    explainer.add_argument("key", nargs="?", metavar="KEY", help="such as model.rotary_pct, or a section such as model; none: list the sections")
    explainer.add_argument("files", nargs="*", metavar="FILE", help="also tell the value in these configs, and where it comes from")
    differ = actions.add_parser("diff", help="keys in which two configs differ", description="Print the keys in which two configs differ.")
    differ.add_argument("left", metavar="A")
    differ.add_argument("right", metavar="B")
    for each in (shower, explainer):
        each.add_argument("--conf", nargs="+", default=[], metavar="FILE", help="the same as FILE, spelt as for train.py")
    for each in (shower, explainer, differ):
        each.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="single values, as section.key=value")
        each.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run `neox config`; returns 0. A config that does not load raises ConfigError."""
    if args.action == "diff":
        print(diff_text(load([args.left], args.overrides), load([args.right], args.overrides), args))
        return 0
    files = [*args.files, *args.conf]
    given = bool(files or args.overrides)
    if args.action == "explain":
        print(explain_text(args.key, load(files, args.overrides) if given else None, args.json))
        return 0
    if not given:
        raise ConfigError("no config to show", where="neox config show", want="at least one FILE", do="neox config show --help")
    print(show_text(load(files, args.overrides), args.json))
    return 0


def show_text(loaded: Loaded, as_json: bool) -> str:
    """The config as YAML with comments, or as JSON with the origins beside it."""
    if not as_json:
        return show(loaded)
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    return json.dumps({"config": plain(loaded.config), "origins": origins}, indent=2)


def explain_text(key: str | None, loaded: Loaded | None, as_json: bool) -> str:
    """What explain() found, as lines or JSON; without a key, the sections."""
    if key is None:
        sections = {name: explain(name).meaning for name in Config.model_fields}
        return json.dumps(sections, indent=2) if as_json else "\n".join(f"{name}: {meaning}" for name, meaning in sections.items())
    found = explain(key, loaded)
    history = [] if found.origin is None else [{"origin": str(origin), "value": value} for origin, value in found.origin.overridden]
    if as_json:
        content = {"key": found.key, "meaning": found.meaning, "type": found.type, "default": found.default, "keys": list(found.keys)}
        if found.origin is not None:
            content |= {"value": found.value, "origin": str(found.origin), "overridden": history}
        return json.dumps(content, indent=2)
    lines = [f"{found.key}: {found.meaning}", f"  type: {found.type}"]
    if found.default is not None:
        lines.append(f"  default: {found.default}")
    lines += [f"  {name}" if name.startswith("deepspeed.") else f"  {name}: {explain(name).meaning}" for name in found.keys]
    if found.origin is not None:
        lines.append(f"  value: {inline(found.value)}, from {found.origin}")
        lines += [f"  overridden: {inline(row['value'])}, from {row['origin']}" for row in history]
    return "\n".join(lines)


def diff_text(left: Loaded, right: Loaded, args: argparse.Namespace) -> str:
    """The differences, as lines or JSON."""
    rows = diff(left, right)
    if args.json:
        return json.dumps([vars(row) for row in rows], indent=2)
    if not rows:
        return "no difference"
    width = max(len(row.key) for row in rows)
    return "\n".join(f"{row.key:<{width}}  {inline(row.left)} ({row.left_origin})  ->  {inline(row.right)} ({row.right_origin})" for row in rows)
