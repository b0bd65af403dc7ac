"""`neox init`: what it writes and what it leaves."""

from __future__ import annotations

import subprocess
import sys

from neox.cli.main import main
from neox.config.files import SHARED_FILES


def test_init_writes_the_files_and_leaves_those_that_exist(tmp_path, capsys):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm.sh").write_text("mine")
    assert main(["init", str(tmp_path)]) == 0
    assert (tmp_path / "train.py").read_bytes() == (SHARED_FILES / "train.py").read_bytes()
    assert (tmp_path / "launch" / "slurm.sh").read_text() == "mine"
    assert "slurm.sh: exists, not changed" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "train.py")]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    """A second start would not change an empty train.py."""
    (tmp_path / "old.yml").write_text("model: {vocab_size: 100}\n")
    for arguments in ("init new", "config convert old.yml -o new.yml"):
        command = f'ulimit -f 0; exec "$0" -m neox.cli.main {arguments}'  # no file may have a byte
        done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 5 and done.stderr.startswith("error[5] cannot write; where=new"), done.stderr
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["old.yml"]
