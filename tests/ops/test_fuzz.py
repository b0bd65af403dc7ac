"""The fuzz suite: 2,000 random cases of every operator against fp64, `make fuzz`. A failing case prints the line
that runs it again.
"""

from __future__ import annotations

import time

import pytest
import torch

from tests import reference
from tests.ops import fuzz_cases

CASES = 2000  # per operator
CHUNKS = 10  # tests per operator, so that processes share the work
BUDGET = 300  # seconds of CPU time for a chunk, whatever else the machine does


@pytest.mark.fuzz
@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("op", fuzz_cases.MAKERS)
def test_random_cases(op, chunk, request):
    base = request.config.getoption("--fuzz-base")
    only = request.config.getoption("--fuzz-case")
    if only is not None:
        chosen, _, seed = only.partition(":")
        if chosen != op or chunk:
            pytest.skip("--fuzz-case names another")
        return fuzz_cases.run(op, int(seed))
    library = request.config.getoption("--ops-library")
    if library and not any((reference.OPERATORS / op).rglob("*_cuda.cu")):
        pytest.skip(f"{op} has no CUDA kernels: its CPU kernels are tested without --ops-library")
    start = time.process_time()
    for seed in range(base + chunk * CASES // CHUNKS, base + (chunk + 1) * CASES // CHUNKS):
        assert time.process_time() - start < BUDGET, f"the budget of {BUDGET} s ended at seed {seed}"
        try:
            fuzz_cases.run(op, seed)
        except AssertionError as problem:
            again = f"pytest -m fuzz tests/ops/test_fuzz.py --fuzz-case {op}:{seed}" + (
                f" --ops-library {library}" if library else ""
            )
            pytest.fail(f"{problem}\nagain: {again}", pytrace=False)
    return None


@pytest.mark.parametrize("op", fuzz_cases.MAKERS)
def test_a_few_cases(op):
    """That every maker makes cases that run, in the suite that is not called fuzz."""
    for seed in range(12):
        fuzz_cases.run(op, seed)


@pytest.mark.parametrize("op", fuzz_cases.MAKERS)
def test_a_wrong_result_is_seen(op, monkeypatch):
    """A case whose first output is off by a tenth in one element fails, and the message names the case."""
    maker = fuzz_cases.MAKERS[op]

    def wrong(draw):
        case = maker(draw)
        right = case.op

        def op_with_error(**inputs):
            out = right(**inputs)
            first = out[0] if isinstance(out, tuple) else out
            error = torch.zeros_like(first)
            error.view(-1)[-1:] = 0.2 * first.detach().abs().max() + 0.2 if first.numel() else 0
            return (first + error, *out[1:]) if isinstance(out, tuple) else first + error

        case.op = op_with_error
        return case

    monkeypatch.setitem(fuzz_cases.MAKERS, op, wrong)
    with pytest.raises(AssertionError, match="output 0 error .*; drawn: "):
        fuzz_cases.run(op, 3)
