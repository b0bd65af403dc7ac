"""What a training step asks of the host on a GPU: nothing on the wrong device, no synchronisation, and few reads.

On a fake GPU (tests.cuda.fake_cuda) the engine runs DeepSpeed's CUDA branches, with streams and as with NCCL, and every
value that the host reads is counted with its source line.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.cuda.account_cases import COPIES

READS = 3  # per step: the number of targets, the loss, the norm
PIPELINE_READS = 1  # in addition, per flush of a pipeline
# Moved around the model per parameter and step of one process in bf16: AdamW 28, the fp32 sum of the gradient 6, the
# copy of the weight 6, the norm of the gradient 4, the largest magnitude of the weight 2.
BYTES = 46
OTHER_LAUNCHES = 70  # besides one for the gradient of each tensor


@functools.cache
def answers() -> dict[str, dict[str, list] | str]:
    """What every run of tests.cuda.fake_runs waited for, from one process for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        command = [sys.executable, "-m", "tests.cuda.fake_runs", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())


def of_kind(kind: str, *parts: str) -> dict[str, list]:
    """[site, count] of an event, by run; of the runs whose names begin with one of `parts`."""
    chosen = {name: answer for name, answer in answers().items() if name.startswith(parts)}
    return {name: answer.get(kind, []) for name, answer in chosen.items() if isinstance(answer, dict)}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        *[(name, "read") for name in ("item", "tolist", "bool", "cpu")],
        *[(name, "synchronize") for name in ("synchronize", "stream", "event")],
        *[(name, "pageable copy") for name in ("to", "tensor", "copy")],
        ("pinned", "pinned copy"),
    ],
)
def test_a_planted_fault_is_counted(fault, kind):
    found = answers()[f"planted {fault}"]
    assert isinstance(found, dict), found
    assert {kind: [count for _, count in sites] for kind, sites in found.items()} == {kind: [1]}


@pytest.mark.parametrize(
    ("fault", "match"),
    [("two devices", "device"), ("nonzero", "makes the host wait"), ("equal", "makes the host wait")],
)
def test_a_planted_fault_ends_the_run(fault, match):
    found = answers()[f"planted {fault}"]
    assert isinstance(found, str) and match in found


def test_everything_runs_on_one_device():
    failed = {name: answer for name, answer in answers().items() if isinstance(answer, str)}
    assert {name: text for name, text in failed.items() if not name.startswith("planted ")} == {}
    assert len(answers()) > 50


def test_nothing_synchronises_but_stage_3_of_deepspeed():
    for name, sites in of_kind("synchronize", "model ", "generate ", "engine ").items():
        packages = {site.partition("/")[0] for site, _ in sites}
        assert packages <= ({"deepspeed"} if "zero3" in name else set()), (name, sites)
        assert sum(count for _, count in sites) <= 3, (name, sites)  # one step of two micro-batches


def test_a_model_reads_nothing():
    assert {name: sites for name, sites in of_kind("read", "model ").items() if sites} == {}


def test_a_step_reads_its_loss_and_its_norm():
    for name, sites in of_kind("read", "engine ").items():
        allowed = READS + PIPELINE_READS * ("pp2" in name)
        assert 0 < sum(count for _, count in sites) <= allowed, (name, sites)


def test_a_step_copies_its_tokens_and_its_number_of_targets():
    for name, sites in of_kind("pageable copy", "engine ").items():
        copied = Counter({site.rpartition(":")[0]: count for site, count in sites if site.startswith("neox")})
        tokens = copied.pop("neox/engine/batch.py:<dictcomp>", 0) + copied.pop("neox/engine/batch.py:to_device", 0)
        assert tokens == 4, (name, sites)  # tokens and targets of two micro-batches
        assert copied in ({}, {"neox/engine/update.py:sum_over": 1}), (name, sites)


def test_generation_reads_each_token_once():
    for name, sites in of_kind("read", "generate ").items():
        assert sum(count for _, count in sites) <= 3, (name, sites)


def test_a_gradient_takes_few_bytes_to_the_optimizer_and_none_in_the_model():
    """DeepSpeed alone takes 94 per parameter, and four kernels for each tensor."""
    answer = answers()["account"]
    assert isinstance(answer, dict), answer
    tensors, elements = (count for _, count in answer["parameters"])
    launches, moved = (count for _, count in answer["engine"])
    assert BYTES <= moved / elements < BYTES + 0.5
    assert tensors < launches < tensors + OTHER_LAUNCHES
    assert answer["copies"] == []


@pytest.mark.parametrize("name", COPIES)
def test_costs_of_a_copy(name):
    assert answers()["copies"][name] == COPIES[name][2]
