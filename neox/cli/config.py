"""Show a config with the origins of its values, explain a key, compare configs, or convert GPT-NeoX files.

example: neox config show 1-3B.yml --set train.seed=7
         neox config explain model.rotary_pct
         neox config diff pythia/160M.yml pythia/410M.yml
         neox config convert 125M.yml local_setup.yml -o mine.yml
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from neox.config.explain import converted, diff, explain, show
from neox.config.load import Loaded, load
from neox.config.reference import config_reference, gpt_neox_reference
from neox.config.schema import Config
from neox.config.values import inline, to_builtins
from neox.errors import ConfigError
from neox.files import write_durably


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `neox config`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|explain|diff|convert|reference")
    shower = actions.add_parser(
        "show", help="the resolved config, with the origin of each value", description="Print the resolved config."
    )
    shower.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="config files, a later one wins; names are also searched under configs/",
    )
    explainer = actions.add_parser(
        "explain",
        help="meaning, type and default of a key",
        description="Explain a key, or list the keys of a section.",
    )
    explainer.add_argument(
        "key",
        nargs="?",
        metavar="KEY",
        help="such as model.rotary_pct, or a section such as model; default: list the sections",
    )
    explainer.add_argument(
        "files", nargs="*", metavar="FILE", help="also show the value in these configs, and its origin"
    )
    differ = actions.add_parser(
        "diff", help="keys in which two configs differ", description="Print the keys in which two configs differ."
    )
    differ.add_argument("left", metavar="A")
    differ.add_argument("right", metavar="B")
    converter = actions.add_parser(
        "convert",
        help="convert GPT-NeoX files to a native config",
        description="Write config files, native or of GPT-NeoX, as one native config.",
    )
    converter.add_argument("files", nargs="+", metavar="OLD", help="files as for --conf")
    converter.add_argument("-o", "--out", metavar="NEW.yml", help="file to create; default: print")
    referrer = actions.add_parser(
        "reference", help="print the reference page of all keys", description="Print a reference page, in Markdown."
    )
    referrer.add_argument("--gpt-neox", action="store_true", help="page about the keys of GPT-NeoX")
    for each in (shower, explainer):
        each.add_argument("--conf", nargs="+", default=[], metavar="FILE", help="the same as FILE, as for train.py")
    for each in (shower, explainer, differ, converter):
        each.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="single values, as section.key=value",
        )
        each.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run `neox config` and return 0. Raises ConfigError if the config does not load."""
    if args.action == "diff":
        print(diff_text(load([args.left], args.overrides), load([args.right], args.overrides), args))
        return 0
    if args.action == "reference":
        print(gpt_neox_reference() if args.gpt_neox else config_reference(), end="")
        return 0
    if args.action == "convert":
        return convert(args)
    files = [*args.files, *args.conf]
    given = bool(files or args.overrides)
    if args.action == "explain":
        print(explain_text(args.key, load(files, args.overrides) if given else None, args.json))
        return 0
    if not given:
        raise ConfigError(
            "no config to show", where="neox config show", want="at least one FILE", do="neox config show --help"
        )
    print(show_text(load(files, args.overrides), args.json))
    return 0


def convert(args: argparse.Namespace) -> int:
    """Write or print files as a native config. Notes are comments in it, and are printed if a file is written."""
    loaded = load(args.files, args.overrides)
    text = converted(loaded)
    if args.out is None:
        print(
            json.dumps({"config": text, "notes": list(loaded.notes)}) if args.json else text,
            end="\n" if args.json else "",
        )
        return 0
    if os.path.lexists(args.out):
        raise ConfigError("file already exists", where=args.out, do="choose another --out, or remove the file")
    write_durably(Path(args.out), text.encode())
    print(
        json.dumps({"out": args.out, "notes": list(loaded.notes)})
        if args.json
        else "\n".join([f"wrote {args.out}", *loaded.notes])
    )
    return 0


def show_text(loaded: Loaded, as_json: bool) -> str:
    """Format a config as YAML with comments, or as JSON with origins."""
    if not as_json:
        return show(loaded)
    origins = {key: str(origin) for key, origin in loaded.origins.items()}
    return json.dumps({"config": to_builtins(loaded.config), "origins": origins, "notes": list(loaded.notes)}, indent=2)


def explain_text(key: str | None, loaded: Loaded | None, as_json: bool) -> str:
    """Format the description of a key as text or JSON; without a key, the sections."""
    if key is None:
        sections = {name: explain(name).meaning for name in Config.attributes()}
        return (
            json.dumps(sections, indent=2)
            if as_json
            else "\n".join(f"{name}: {meaning}" for name, meaning in sections.items())
        )
    found = explain(key, loaded)
    history = (
        []
        if found.origin is None
        else [{"origin": str(origin), "value": value} for origin, value in found.origin.overridden]
    )
    if as_json:
        content = {
            "key": found.key,
            "meaning": found.meaning,
            "type": found.type,
            "default": found.default,
            "keys": list(found.keys),
        }
        if found.origin is not None:
            content |= {"value": found.value, "origin": str(found.origin), "overridden": history}
        return json.dumps(content, indent=2)
    lines = [f"{found.key}: {found.meaning}", f"  type: {found.type}"]
    if found.default is not None:
        lines.append(f"  default: {found.default}")
    lines += [
        f"  {name}" if name.startswith("deepspeed.") else f"  {name}: {explain(name).meaning}" for name in found.keys
    ]
    if found.origin is not None:
        lines.append(f"  value: {inline(found.value)}, from {found.origin}")
        lines += [f"  overridden: {inline(row['value'])}, from {row['origin']}" for row in history]
    return "\n".join(lines)


def diff_text(left: Loaded, right: Loaded, args: argparse.Namespace) -> str:
    """Format differences as text or JSON."""
    rows = diff(left, right)
    if args.json:
        return json.dumps([vars(row) for row in rows], indent=2)
    if not rows:
        return "no difference"
    width = max(len(row.key) for row in rows)
    return "\n".join(
        f"{row.key:<{width}}  {inline(row.left)} ({row.left_origin})  ->  {inline(row.right)} ({row.right_origin})"
        for row in rows
    )
