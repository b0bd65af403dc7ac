"""Disks that are full, fail, turn read-only or lose the run's folder in the middle of a training."""

import itertools
import json
import resource
import shutil

import pytest

from neox.cli.main import main
from tests.faults.runs import ENDLESS, PAIR, SHORT, Setting, arguments, assert_same_run, complete, damaged

pytestmark = pytest.mark.distributed

NAMES = {"enospc": "ENOSPC", "edquot": "EDQUOT", "eio": "EIO", "erofs": "EROFS"}
CALLS = ("create", "write", "sync", "close", "rename", "publish", "sync_dir", "make_dir")


def stops(server, corpus, folder, straight, fault: str, setting=SHORT) -> bool:
    """Policy stop: code 5 and one clear line; complete checkpoints remain; the next start resumes.

    Returns whether the fault was reached.
    """
    training = server.start(arguments(corpus, folder / "run", setting), folder, ranks=setting.ranks, fault=fault)
    codes = training.wait()
    if codes == [0] * setting.ranks:
        return False
    assert codes == [5] * setting.ranks, f"{fault}\n{training.outputs()}"
    (line,) = [
        line
        for rank in range(setting.ranks)
        for line in training.output(rank).splitlines()
        if line.startswith("error[")
    ]
    assert NAMES[fault.split("@")[0]] in line and "bytes free" in line and "; do=" in line, line
    assert damaged(folder / "run") == [], fault
    training = server.start(arguments(corpus, folder / "run", setting), folder, ranks=setting.ranks)
    assert training.wait() == [0] * setting.ranks, training.outputs()
    assert_same_run(folder / "run", straight)
    assert not list((folder / "run").glob("checkpoints/**/*.tmp"))
    return True


@pytest.mark.parametrize("fault", ["enospc@0:write:9", "eio@0:sync:4", "erofs@0:publish:2"])
def test_a_disk_that_fails_ends_the_run_and_loses_nothing(server, corpus, tmp_path, straight, fault):
    assert stops(server, corpus, tmp_path, straight, fault)


@pytest.mark.faults
@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_a_run_may_fail(server, corpus, tmp_path, straight, call):
    """The count is swept until it is beyond the end of the run."""
    kinds = itertools.cycle(NAMES)
    for count in itertools.count(1):
        if not stops(server, corpus, tmp_path / f"{count}", straight, f"{next(kinds)}@0:{call}:{count}"):
            break
    assert count > 4, "each of the run's four saves makes the call"


@pytest.mark.parametrize("fault", ["enospc@0:write:9", "eio@0:rename:3"])
def test_training_continues_where_the_policy_allows_it(server, corpus, tmp_path, straight, fault):
    training = server.start(
        arguments(corpus, tmp_path / "run", SHORT, "checkpoint.on_save_error=continue"), tmp_path, fault=fault
    )
    assert training.wait() == [0], training.outputs()
    assert training.output().count("training continues without this checkpoint: error[5]") == 1
    assert_same_run(tmp_path / "run", straight)
    assert damaged(tmp_path / "run") == []
    assert len(complete(tmp_path / "run")) == 3


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_one_of_two_processes(server, corpus, tmp_path, rank):
    straight = server.start(arguments(corpus, tmp_path / "straight", PAIR), tmp_path, ranks=2)
    assert straight.wait() == [0, 0], straight.outputs()
    for count in (1, 3, 6):
        assert stops(server, corpus, tmp_path / f"{count}", tmp_path / "straight", f"enospc@{rank}:write:{count}", PAIR)


def test_a_folder_deleted_in_the_middle_ends_all_with_code_5(server, corpus, tmp_path):
    setting = Setting(2, (*ENDLESS, "checkpoint.save_interval=3"))
    training = server.start(arguments(corpus, tmp_path / "run", setting), tmp_path, ranks=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    training.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert training.wait(30) == [5, 5], training.outputs()
    outputs = training.output(0) + training.output(1)
    assert outputs.count("error[5]") == 1, outputs


def train_with_small_files(limit, *train_arguments):
    """Entry of a process that cannot write a file beyond `limit` bytes: a larger one fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    raise SystemExit(main(["train", *train_arguments]))


def test_the_policy_holds_for_records_too(server, corpus, tmp_path):
    """Checkpoints, and from some step on records and log, do not fit.

    Training continues to its last checkpoint, which must be written.
    """
    more = (
        "train.train_iters=80",
        "logging.interval=1",
        "checkpoint.on_save_error=continue",
        "checkpoint.save_interval=20",
        "evaluate.interval=0",
    )
    words = [12000, *arguments(corpus, tmp_path / "run", SHORT, *more)]
    training = server.call("tests.faults.test_disk:train_with_small_files", words, tmp_path)
    assert training.wait() == [5], training.outputs()
    printed = training.output()
    assert printed.count("training continues without this record: error[5]") == 1, printed
    assert "step 80/80" in printed and "of steps" in printed.split("step 80/80")[1], printed
    kept = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kept == list(range(1, len(kept) + 1)) and 10 < len(kept) < 80
    assert f"{80 - len(kept)} records were lost, of steps {kept[-1] + 1} to 80" in printed
