"""A self-contained HTML page about one or more runs: numbers, plots, incidents, config. It has no scripts."""

from __future__ import annotations

from html import escape
from pathlib import Path

from neox.config.values import flatten, inline
from neox.report.plot import COLORS, Line, plot
from neox.report.runs import RunRecord, differences

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1180px; margin: 1.5rem auto; padding: 0 1rem; }
h1, h2, summary { overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
vertical-align: top; }
th { font-weight: 600; } tr + tr td { border-top: 1px solid #8884; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: .6rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; margin-left: 4rem; } svg { width: 100%; height: auto;
}
svg text { font-size: 11px; fill: currentColor; } svg text.n { font-weight: 600; } .g { stroke: #8883; }
code, pre { font: 12.5px/1.4 ui-monospace, monospace; } pre { overflow-x: auto; }
"""
PLOTS = (  # title, key of metrics.jsonl, logarithmic
    ("loss", "loss", False),
    ("learning rate", "lr", False),
    ("gradient norm", "grad_norm", True),
    ("tokens per second", "tokens_per_s", False),
    ("model FLOPs utilisation", "mfu", False),
    ("peak memory of a process, GB", "memory_gb", False),
)


def page(runs: list[RunRecord]) -> str:
    """Return the HTML of the page. The same runs give the same page."""
    title = "neox report: " + ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(title)}</h1>", summary(runs), plots(runs), incidents(runs)]
    if len(runs) > 1:
        body.append(difference_table(runs))
    body += [data_mix(run) + config(run) for run in runs]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    screen = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{screen}<meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells}</tr>{lines}</table></div>'


def summary(runs: list[RunRecord]) -> str:
    """Return a table with the summary of each run."""
    facts = [run.summary() for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    return table(["", *(run.name for run in runs)], [[name, *(each.get(name, "") for each in facts)] for name in names])


def plots(runs: list[RunRecord]) -> str:
    """Return all figures. The figure of the loss includes the validation loss."""
    figures, names = [], short_names([run.name for run in runs])
    for title, key, log in PLOTS:
        lines = [Line(names[i] if len(runs) > 1 else title, run.series(key), i) for i, run in enumerate(runs)]
        if key == "loss":
            for i, run in enumerate(runs):
                name = f"{names[i]}, validation" if len(runs) > 1 else "validation"
                lines.append(Line(name, run.series("validation_loss"), (i + len(COLORS) // 2) % len(COLORS), dots=True))
        figures.append(plot(title + (", logarithmic" if log else ""), lines, log=log))
    return f'<h2>Curves</h2><div class="plots">{"".join(figures)}</div>'


def short_names(names: list[str]) -> list[str]:
    """Shorten paths for a legend by the folders that they have in common."""
    parts = [Path(name).parts for name in names]
    shared = 0
    while parts and all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return [str(Path(*each[shared:])) for each in parts]


def incidents(runs: list[RunRecord]) -> str:
    """Return the incidents of the runs."""
    rows = [[run.name, text] for run in runs for text in run.incidents()]
    return "<h2>Incidents</h2>" + (table(["run", "what"], rows) if rows else "<p>None.</p>")


def difference_table(runs: list[RunRecord]) -> str:
    """Return the config keys that differ."""
    rows = [[key, *values] for key, values in differences(runs)]
    return "<h2>Differences of the configs</h2>" + (
        table(["key", *(run.name for run in runs)], rows) if rows else "<p>None.</p>"
    )


def data_mix(run: RunRecord) -> str:
    """Return the sources of the training data and their shares."""
    sources = run.config.data.train
    total = sum(source.weight for source in sources)
    rows = [[source.path, f"{100 * source.weight / total:.2f} %"] for source in sources] if total else []
    data = run.config.data
    rows += [[path, f"split {data.split}"] for path in (*([data.path] if data.path is not None else []), *data.text)]
    return f"<h2>Training data of {escape(run.name)}</h2>" + table(["source", "share"], rows)


def config(run: RunRecord) -> str:
    """Return the complete config, collapsed."""
    text = "\n".join(f"{key}: {inline(value)}" for key, value in flatten(run.config))
    return f"<details><summary>Config of {escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
