"""The dataset core that is loaded has what the Python sources use of it."""

from __future__ import annotations

import re
import subprocess
import sys

from neox._native import NAMES


def test_the_list_of_names_is_what_the_sources_use(repository):
    used = {
        name
        for path in (repository / "neox").rglob("*.py")
        for name in re.findall(r"(?<![.\w])core\.([A-Za-z]\w*)", path.read_text(encoding="utf-8"))
    }
    assert sorted(NAMES) == sorted(used)


def test_an_older_build_is_refused_with_what_to_do(repository):
    probe = (
        "import neox._data as core; del core.xxh3, core.best_fit\n"
        "from neox.errors import EnvironmentProblem\n"
        "try: import neox.data.store.indexed\n"
        "except EnvironmentProblem as error: print(error.line())"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, cwd=repository)
    assert "older than the Python sources" in done.stdout, done.stderr
    assert "got=no best_fit, xxh3;" in done.stdout
    assert "pip install -e ." in done.stdout
