"""`neox init`: what it writes and what it leaves."""

from __future__ import annotations

import os
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


def test_what_is_written_is_listed_and_starts_as_the_original(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["train.py", "launch/slurm.sh"] and shown.err == ""
    for name in ("train.py", "launch/slurm.sh"):
        assert (tmp_path / name).read_bytes() == (SHARED_FILES / name).read_bytes()
        assert os.access(tmp_path / name, os.X_OK) == os.access(SHARED_FILES / name, os.X_OK)
        assert (tmp_path / name).stat().st_mode == (SHARED_FILES / name).stat().st_mode
    (tmp_path / "train.py").unlink()
    (tmp_path / "train.py").symlink_to(tmp_path / "nowhere")
    assert main(["init"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines() == [
        "train.py: exists, not changed",
        "launch/slurm.sh: exists, not changed",
    ]
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "launch").write_text("a file")
    assert main(["init", str(tmp_path)]) == 5
    assert capsys.readouterr().err.startswith(
        f"error[5] cannot write file; where={tmp_path / 'launch' / 'slurm.sh'}; got="
    )
    assert (tmp_path / "train.py").is_file()
