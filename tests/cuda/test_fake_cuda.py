"""What a training step asks of the host on a GPU: nothing on the wrong device, no synchronisation, and few reads.

On a fake GPU (tests.cuda.fake_cuda) the engine runs DeepSpeed's CUDA branches, with streams and as with NCCL, and every
value that the host reads is counted with its source line. `make test` runs set-ups in which every two properties meet,
`make sweep` all of them (tests.cuda.fake_setups).
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
from tests.cuda.fake_setups import AXES, Setup, every_setup, is_allowed, pairs_of, pairwise_setups
from tests.model.models import FORMS

READS = 3  # per step: the number of targets, the loss, the norm
# In the first step alone: tables of positions, and the order of the parameters, on which ranks of ZeRO 3 agree.
TABLES = {"neox/model/positional.py:_extend": 2, "neox/model/attention.py:_attend": 2}
AGREEMENT = "deepspeed/runtime/zero/utils.py:assert_ints_same_as_other_ranks"
# Moved around the model per parameter and step of one process in bf16: AdamW 28, the fp32 sum of the gradient 6, the
# copy of the weight 6, the norm of the gradient 4, the largest magnitude of the weight 2.
BYTES = 46
MEMORY = 10  # bytes per parameter at the start: the weight 2, DeepSpeed's fp32 weight 4, the fp32 sum of the gradient 4
OTHER_LAUNCHES = 70  # besides one for the gradient of each tensor


@functools.cache
def answers(*form: str) -> dict[str, dict[str, list] | str]:
    """What the runs of tests.cuda.fake_runs waited for, from one process for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        command = [sys.executable, "-m", "tests.cuda.fake_runs", str(out), *form]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())


def counts(found: dict[str, list], kind: str) -> Counter[str]:
    """How often each function did something."""
    out: Counter[str] = Counter()
    for site, count in found.get(kind, []):
        out[site.rpartition(":")[0]] += count
    return out


def check_step(found: dict[str, list], setup: Setup, first: bool = False) -> None:
    """Reads, synchronisations and copies of a step."""
    reads, waits, copies = (counts(found, kind) for kind in ("read", "synchronize", "pageable copy"))
    if first:
        reads.pop(AGREEMENT, None)
        assert all(copies.pop(site, 0) <= count for site, count in TABLES.items()), found
    assert reads.total() == READS, reads
    assert all("zero3" in setup.precision and site.startswith("deepspeed/") for site in waits), waits
    copies = Counter({site: count for site, count in copies.items() if site.startswith("neox/")})
    tensors = copies.pop("neox/engine/batch.py:<dictcomp>", 0) + copies.pop("neox/engine/batch.py:to_device", 0)
    assert tensors == setup.accumulation * (4 if setup.documents else 2), copies
    assert copies in ({}, {"neox/engine/update.py:sum_over": 1}), copies


def check_evaluation(found: dict[str, list]) -> None:
    """One read, whatever the number of micro-batches."""
    assert counts(found, "read") == {"neox/engine/evaluation.py:evaluate_part": 1}


def check_engines(found: dict[str, dict[str, list] | str], setups: list[Setup]) -> None:
    """Every set-up ran on one device, and the host waited no more than it may."""
    assert {setup.name: found[setup.name] for setup in setups if setup.name in found} == {}  # errors
    for setup in setups:
        checks = {"step 1": functools.partial(check_step, setup=setup, first=True)}
        if setup.is_long:
            checks |= {"step 2": functools.partial(check_step, setup=setup), "evaluation": check_evaluation}
        for part, check in checks.items():
            events = found[f"{part} {setup.name}"]
            assert isinstance(events, dict)
            try:
                check(events)
            except AssertionError as error:
                raise AssertionError(f"{part} {setup.name}: {events}") from error


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


def test_every_two_properties_meet():
    """Of those that a run accepts together."""
    met = set().union(*map(pairs_of, pairwise_setups()))
    assert met == set().union(*map(pairs_of, every_setup()))
    assert {value for axis in AXES for value in axis} == {value for pair in met for _, value in pair}
    assert any(setup.is_long for setup in pairwise_setups())


def test_engines_wait_for_three_reads_a_step():
    check_engines(answers(), pairwise_setups())


@pytest.mark.sweep
@pytest.mark.parametrize("form", FORMS)
def test_engines_in_every_setup_wait_for_three_reads_a_step(form):
    setups = [setup for setup in every_setup() if setup.form == form]
    assert all(map(is_allowed, setups))
    check_engines(answers(form), setups)


def test_generation_reads_each_token_once():
    found = {name: events for name, events in answers().items() if name.startswith("generate ")}
    assert len(found) == len(FORMS) + 3
    for name, events in found.items():
        assert isinstance(events, dict), (name, events)
        assert counts(events, "read").total() <= 3 and not counts(events, "synchronize"), (name, events)


def test_a_gradient_takes_few_bytes_to_the_optimizer_and_none_in_the_model():
    """DeepSpeed alone takes 94 per parameter, and four kernels for each tensor."""
    answer = answers()["account"]
    assert isinstance(answer, dict), answer
    tensors, elements = (count for _, count in answer["parameters"])
    launches, moved = (count for _, count in answer["engine"])
    assert BYTES <= moved / elements < BYTES + 0.5
    assert tensors < launches < tensors + OTHER_LAUNCHES
    assert answer["copies"] == []


def test_the_start_holds_no_copy_of_the_fp32_weights():
    answer = answers()["start"]
    assert isinstance(answer, dict), answer
    ((_, elements),), ((_, peak),) = answer["parameters"], answer["memory"]
    assert peak == MEMORY * elements


@pytest.mark.parametrize("name", COPIES)
def test_costs_of_a_copy(name):
    assert answers()["copies"][name] == COPIES[name][2]
