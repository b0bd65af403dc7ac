"""The report page in headless Chromium: no errors, no requests, and plots that can be seen."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from neox.report.page import PLOTS, page
from neox.report.plot import COLORS
from neox.report.runs import read_run
from tests.report.records import write_run

WIDTH, HEIGHT = 1200, 1500
QUIET = (  # what Chromium would do by itself
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-features=OptimizationHints,MediaRouter,Translate",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-pings",
)
NOBODY = "not an origin"
GAP = 60  # rows without a curve between two plots


@pytest.fixture(scope="module")
def chromium() -> str:
    """The program; skips where there is none."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))),
        None,
    )
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    return found


def look(chromium: str, html: str, folder: Path) -> tuple[str, set[str], Path]:
    """The console output, the requested addresses except that of the page, and the screenshot."""
    address = folder / "report.html"
    address.write_text(html, encoding="utf-8")
    shot, log = folder / "shot.png", folder / "net.json"
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
    ]
    asked = [
        f"--window-size={WIDTH},{HEIGHT}",
        f"--screenshot={shot}",
        f"--log-net-log={log}",
        "--net-log-capture-mode=Everything",
    ]
    done = subprocess.run(
        [chromium, *options, *QUIET, *asked, address.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    text = log.read_text()
    events = json.loads(text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}")["events"]
    # Requests of Chromium's own (updates, time, accounts) have no page as their initiator.
    asked_by_page = [event["params"] for event in events if event.get("params", {}).get("initiator", NOBODY) != NOBODY]
    return console, {request["url"] for request in asked_by_page if "url" in request}, shot


def bands(mask: np.ndarray) -> int:
    """Stretches of rows that have a marked pixel, GAP rows without one between them."""
    rows = np.flatnonzero(mask.any(axis=1))
    return 0 if rows.size == 0 else 1 + int((np.diff(rows) > GAP).sum())


def test_the_page_opens_quietly_and_shows_its_plots(chromium, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow to read the screenshot")
    console, requests, shot = look(chromium, page([read_run(write_run(tmp_path / "run"))]), tmp_path)
    assert console == "" and requests == set()
    pixels = np.asarray(image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert COLORS[0] == "#1f6fb2"
    blue = pixels[..., 2] - pixels[..., 0] > 50  # the curve's colour, also where it is mixed with the adjacent white
    assert bands(blue[:, : WIDTH // 2]) + bands(blue[:, WIDTH // 2 :]) == len(PLOTS)


def test_what_is_wrong_is_seen(chromium, tmp_path):
    html = (
        '<!doctype html><title>x</title><img src="http://127.0.0.1:9/a.png"><script>console.error("oh"); '
        "nothing()</script>"
    )
    console, requests, _ = look(chromium, html, tmp_path)
    assert "oh" in console and "nothing is not defined" in console
    assert requests == {"http://127.0.0.1:9/a.png"}
