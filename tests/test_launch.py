"""The Slurm script on this machine, with stand-ins for Slurm's own programs; and what can be checked of the
Dockerfile without Docker.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from neox.config.values import to_builtins
from tests.distributed import environment, free_port
from tests.train.corpus import make_config, make_corpus, records

ROOT = Path(__file__).resolve().parent.parent

# srun as the script uses it: that many tasks on this node, each with Slurm's variables; ends with the highest exit
# code. SLURM_SIGNAL stands for the signal that Slurm sends to the tasks ahead of the time limit: here once the run has
# made that many steps.
SRUN = """#!/usr/bin/env bash
tasks=1
while [[ $1 == --* ]]; do
    case $1 in
        --ntasks-per-node) tasks=$2; shift 2 ;;
        --cpus-per-task) shift 2 ;;
        --kill-on-bad-exit=*) shift ;;
        *) echo "srun: unknown option $1" >&2; exit 99 ;;
    esac
done
pids=()
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_NODELIST=127.0.0.1 "$@" &
    pids+=($!)
done
if [[ -n ${SIGNAL_AFTER:-} ]]; then
    until [[ -e $METRICS && $(wc -l <"$METRICS") -ge $SIGNAL_AFTER ]]; do sleep 0.1; done
    kill -USR1 "${pids[@]}"
fi
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >>"$REQUEUED"\n'


@pytest.fixture
def slurm(tmp_path):
    """slurm(*arguments, **variables) runs the script as sbatch would."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    base = environment()
    venv = Path(sys.prefix)

    def run(*arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
        job = {
            "SLURM_SUBMIT_DIR": ROOT,
            "SLURM_GPUS_ON_NODE": 2,
            "SLURM_CPUS_ON_NODE": 2,
            "SLURM_JOB_ID": 77,
            "MASTER_PORT": free_port(),
            "VENV": venv,
        }
        env = (
            base
            | {key: str(value) for key, value in (job | variables).items()}
            | {"PATH": f"{programs}:{base['PATH']}"}
        )
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "slurm.sh"), *map(str, arguments)],
            env=env,
            capture_output=True,
            text=True,
            timeout=180,
        )

    return run


@pytest.mark.distributed
def test_a_job_stops_ahead_of_its_limit_queues_itself_and_resumes(slurm, tmp_path):
    make_corpus(tmp_path / "corpus")
    conf = tmp_path / "config.yml"
    # a batch for two processes, and steps long enough to be stopped between
    conf.write_text(
        json.dumps(
            to_builtins(
                make_config(
                    tmp_path / "corpus",
                    tmp_path / "run",
                    "train.train_iters=400",
                    "checkpoint.save_interval=0",
                    "evaluate.interval=0",
                )
            )
        )
    )
    queue = tmp_path / "requeued"
    first = slurm("--conf", conf, SIGNAL_AFTER=3, METRICS=tmp_path / "run" / "metrics.jsonl", REQUEUED=queue)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (
        "2 processes by srun: SLURM_PROCID" in first.stdout
        and "error[10] stopped by a signal after saving" in first.stderr
    )
    assert queue.read_text() == "requeue 77\n"
    stopped = records(tmp_path / "run")[-1]["step"]
    assert 3 <= stopped < 400
    second = slurm("--conf", conf, "--set", f"train.train_iters={stopped + 2}", REQUEUED=queue)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"at step {stopped}" in second.stdout and f"done: step {stopped + 2}" in second.stdout
    assert queue.read_text() == "requeue 77\n"


def test_the_exit_code_of_a_failed_run_is_the_jobs(slurm, tmp_path):
    (tmp_path / "bad.yml").write_text("model: {num_layers: none}\n")
    done = slurm("--conf", tmp_path / "bad.yml", REQUEUED=tmp_path / "requeued")
    assert done.returncode == 2 and "error[2]" in done.stderr
    assert not (tmp_path / "requeued").exists()


def test_outside_of_a_job_the_script_reports_how_to_start_it():
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sh")],
        env={"PATH": environment()["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and "start this by sbatch" in done.stderr


def test_the_image_is_built_from_what_is_there():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    base = re.search(r"^ARG BASE=(.+)$", text, re.MULTILINE)[1]
    assert "." not in base.split("/")[0], "an image by its conventional name, without a host"
    torch = re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert f"ARG TORCH={torch}\n" in text
    extras = re.search(r'-e "\.\[(.+)\]"', text)[1].split(",")
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)
