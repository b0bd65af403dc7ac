"""`neox init`: what it writes and what it leaves."""

from __future__ import annotations

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
