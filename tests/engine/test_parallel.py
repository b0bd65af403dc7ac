"""The same model in every layout: a covering subset here, the complete matrix by `make parallel-test`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.engine.layouts import MATRIX_FORMS, Cell, matrix, write_cells, write_references
from tests.engine.mutations import MUTATIONS

LIMIT = 1e-5  # relative: losses of every step, gradient against the reference's norm, norm before clipping
BF16_LIMITS = {"loss": 5e-3, "gradient": 3e-2, "norm": 2e-2}  # rounding to 8 bits in another order of summation
SUBSET_STEPS = 3  # with which test_every_broken_reduction_is_seen sees each of them

SUBSET = {
    2: (
        Cell("neox", tp=2, zero=3, sequence=True),
        Cell("llama-tied", pp=2, zero=1),
        Cell("gpt2", tp=2, zero=1, sequence=True, checkpointing="full"),
        Cell("gptj", cp=2, zero=2, documents=True),
        Cell("llama", pp=2, zero=0, documents=True, checkpointing="selective"),
    ),
    4: (
        Cell("llama-tied", tp=2, pp=2, zero=1, sequence=True, documents=True),
        Cell("neox-tied", pp=2, dp=2, zero=0),
        Cell("neox", tp=2, dp=2, zero=2),
        Cell("gpt2", pp=4, zero=1, partition=(1, 1, 1, 1)),
        Cell("llama", tp=4, zero=0, sequence=True),
        Cell("llama-tied", tp=2, cp=2, zero=1, sequence=True),
        Cell("neox", cp=4, zero=1, documents=True),
    ),
}
BF16 = (
    Cell("neox", tp=2, pp=2, zero=1, dtype="bf16"),
    Cell("llama-tied", pp=4, zero=0, dtype="bf16"),
    Cell("llama", tp=2, dp=2, zero=2, dtype="bf16"),
)
# context parallelism at 8,192 tokens, with document masks and without; one step takes seconds, so there are few
LONG = {
    2: (
        Cell("llama", cp=2, length=8192, samples=2),
        Cell("neox", cp=2, zero=1, length=8192, samples=2, documents=True),
    ),
    4: (
        Cell("llama", cp=4, length=8192, samples=2),
        Cell("neox", cp=4, zero=1, length=8192, samples=2, documents=True),
    ),
}
LONG_STEPS = 3
CAUGHT_BY = {  # mutation -> a layout in which it matters
    "column input gradient not summed over the tensor group": Cell("llama", tp=2),
    "norm gradients not summed under sequence parallelism": Cell("llama", tp=2, sequence=True),
    "tied embedding gradient not added": Cell("gpt2", pp=2),
    "tied embedding not published": Cell("gpt2", pp=2),
    "norm of one stage only": Cell("llama", pp=2, zero=1),
    "loss weighted by micro-batches": Cell("llama", tp=2),
}


def run(cells: list[Cell], folder: Path, steps: int, timeout: float = 420.0) -> list[dict]:
    """Run cells that need the same number of processes; how far each is from one process."""
    write_references(cells, folder / "references", steps)
    write_cells(cells, folder / "cells.json")
    run_ranks(
        "tests.engine.layouts:run_cells",
        cells[0].world_size,
        folder,
        [folder / "cells.json", folder / "references", folder / "out.json"],
        timeout,
    )
    return json.loads((folder / "out.json").read_text())


def far(answer: dict, limit: float = LIMIT) -> list[str]:
    """What is further from the reference than it may be; a NaN is."""
    return [
        f"{answer['name']}: {key} {answer[key]:.2g}"
        for key in ("initial", "loss", "norm", "gradient", "validation")
        if not answer[key] <= limit
    ]


@pytest.mark.distributed
def test_a_covering_subset_is_the_same_model(tmp_path):
    answers = run(list(SUBSET[2]), tmp_path, SUBSET_STEPS)
    assert len(answers) == len(SUBSET[2])
    assert [line for answer in answers for line in far(answer)] == []


@pytest.mark.distributed
@pytest.mark.parallel
def test_four_processes_in_fp32_and_in_bf16_within_its_bound(tmp_path):
    answers = run([*SUBSET[4], *BF16], tmp_path, SUBSET_STEPS)  # one start of four processes
    exact, rounded = answers[: len(SUBSET[4])], answers[len(SUBSET[4]) :]
    assert len(rounded) == len(BF16)
    assert [line for answer in exact for line in far(answer)] == []
    assert [a["name"] for a in rounded if any(not a[key] <= limit for key, limit in BF16_LIMITS.items())] == []
    assert all(answer["initial"] == 0 for answer in rounded)


@pytest.mark.distributed
def test_every_broken_reduction_is_seen(tmp_path):
    assert set(CAUGHT_BY) == set(MUTATIONS)
    cells = [Cell(**{**vars(cell), "mutation": name}) for name, cell in CAUGHT_BY.items()]
    answers = run(cells, tmp_path, SUBSET_STEPS)
    assert [answer["name"] for answer in answers if not far(answer, 1e-4)] == []


@pytest.mark.parallel
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_long_sequences_over_a_context_group(processes, tmp_path, capsys):
    answers = run(list(LONG[processes]), tmp_path, LONG_STEPS, timeout=1800.0)
    show(answers, capsys)
    assert [line for answer in answers for line in far(answer)] == []


def show(answers: list[dict], capsys: pytest.CaptureFixture) -> None:
    """The table of what was seen."""
    with capsys.disabled():
        print()
        for answer in answers:
            figures = "  ".join(
                f"{key} {answer[key]:.1e}" for key in ("loss", "gradient", "norm", "validation", "weights")
            )
            print(
                f"{answer['name']:<34} {figures}  {'initial equal' if answer['initial'] == 0 else 'INITIAL DIFFERS'}  "
                f"{'FAIL' if far(answer) else 'ok'}"
            )


@pytest.mark.parallel
@pytest.mark.distributed
@pytest.mark.parametrize("form", MATRIX_FORMS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_complete_matrix(processes, form, tmp_path, capsys):
    answers = run(list(matrix(processes, [form])), tmp_path, 20, timeout=3000.0)
    show(answers, capsys)
    assert not any(math.isnan(answer["loss"]) for answer in answers)
    assert [line for answer in answers for line in far(answer)] == []
