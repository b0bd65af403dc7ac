"""The account of a step (benchmarks/train/account.py): each rule on an operator whose cost is counted by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from neox import ops
from tests.cuda.account_cases import ROW, WIDE, X
from tests.cuda.fake_cuda import FakeCuda

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "train" / "account.py"
spec = importlib.util.spec_from_file_location("account", PATH)
assert spec is not None and spec.loader is not None
account = importlib.util.module_from_spec(spec)
sys.modules["account"] = account
spec.loader.exec_module(account)

B, S, H = 2, 3, 8


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


IDS = ((5,), torch.int64)
CALLS = {  # shapes and dtypes, the call, and (launches, bytes read, bytes written) of every operator
    "add": ([X, X], lambda x, y: x + y, [(1, 128, 64)]),
    "same operand twice": ([X], lambda x: x * x, [(1, 64, 64)]),
    "broadcast": ([X, ((8,), torch.bfloat16)], lambda x, y: x + y, [(1, 80, 64)]),
    "expanded": ([X, ((1,), torch.bfloat16)], lambda x, y: x + y.expand(4, 8), [(1, 66, 64)]),
    "in place": ([X, X], lambda x, y: x.add_(y), [(1, 128, 64)]),
    "fill": ([X], lambda x: x.zero_(), [(1, 0, 64)]),
    "fills of a list": ([X, X], lambda x, y: torch._foreach_zero_([x, y]), [(1, 0, 128)]),
    "zeros": ([X], torch.zeros_like, [(1, 0, 64)]),
    "new zeros": ([X], lambda x: x.new_zeros(2, 3), [(1, 0, 12)]),
    "allocation": ([X], lambda x: (torch.empty_like(x), x.new_empty(100)), []),
    "view": ([X], lambda x: x.view(-1).unflatten(0, (8, 4)).t().narrow(0, 1, 2).unsqueeze(0), []),
    "split and chunk": ([X], lambda x: (x.split(2), x.chunk(2, 1), x.unbind(), x.select(0, 1)), []),
    "expand": ([ROW], lambda row: row.expand(4, 8), []),
    "contiguous already": ([X], lambda x: x.contiguous().reshape(32).to(torch.bfloat16), []),
    "cast": ([X], lambda x: x.float(), [(1, 64, 128)]),
    "clone of a slice": ([X], lambda x: x.narrow(1, 0, 4).clone(), [(1, 32, 32)]),
    "clone of an expanded row": ([ROW], lambda row: row.expand(4, 8).clone(), [(1, 16, 64)]),
    "reshape that copies": ([X], lambda x: x.t().reshape(-1), [(1, 64, 64)]),
    "concatenation": ([X, ROW], lambda x, row: torch.cat([x, row]), [(1, 80, 80)]),
    "sum into fp32": ([WIDE, X], lambda sums, x: sums.add_(x), [(1, 128 + 64, 128)]),
    "product": ([X, ((8, 2), torch.bfloat16)], lambda x, y: x @ y, [(1, 96, 16)]),
    "lookup": ([IDS, ((100, 8), torch.bfloat16)], torch.nn.functional.embedding, [(1, 40 + 80, 80)]),
    "norm": (
        [((6, 8), torch.bfloat16), ((8,), torch.bfloat16), ((6, 8), torch.bfloat16)],
        lambda x, weight, residual: ops.rms_norm(x, weight, 1e-5, residual=residual),
        [(1, 2 * 96 + 16, 2 * 96 + 24)],
    ),
    "rotation": (
        [((B, S, 1, 3, H), torch.bfloat16), ((S, 4), torch.float32)],
        lambda qkv, table: ops.rotary_qkv(qkv, table, table),
        [(1, B * S * 2 * 4 * 2 + 48, B * S * 2 * 4 * 2)],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_costs_of_an_operator(name):
    inputs, call, expected = CALLS[name]
    with FakeCuda(), account.Account() as counted, torch.no_grad():
        tensors = [tensor(*shape, dtype=dtype) for shape, dtype in inputs]
        counted.start()
        call(*tensors)
    assert [(row.cost.launches, row.cost.read, row.cost.written) for row in counted.rows] == expected


def test_flops_of_a_product_and_of_visible_pairs():
    with FakeCuda(), account.Account() as counted, torch.no_grad():
        tensor(4, 8) @ tensor(8, 2)
        ops.attention_qkv(tensor(B, S, 1, 3, H), backend="native")
        ops.attention_qkv(tensor(B, S, 1, 3, H), backend="native", window=2)
        ops.attention_qkv(tensor(B, S, 1, 3, H), backend="native", causal=False)
    pairs = (1 + 2 + 3, 1 + 2 + 2, 3 * 3)
    assert [row.cost.flops for row in counted.rows] == [2 * 4 * 8 * 2, *(4 * B * count * H for count in pairs)]


def test_arguments_that_a_call_leaves_out_have_their_defaults():
    """torch drops the last arguments of a call that equal their defaults, such as is_causal=False."""
    q, k = (torch.empty(B, 1, length, H, dtype=torch.bfloat16, device="meta") for length in (S, 5))
    for name in ("flash", "efficient"):
        packet = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
        given = (q, k, k) if name == "flash" else (q, k, k, None, True)
        assert account.cost_of(packet.default, given, {}, ()).flops == 4 * B * S * 5 * H
        assert account.cost_of(packet.default, given, {"is_causal": True}, ()).flops == 4 * B * (3 + 4 + 5) * H


def test_lists_take_as_many_kernels_as_torch_launches():
    launches = account.multi_tensor_launches
    assert launches([[torch.empty(10)] * 110]) == 1
    assert launches([[torch.empty(10)] * 111]) == 2
    assert (
        launches([[torch.empty(10)] * 37, [torch.empty(10)] * 37, [torch.empty(10)] * 37, [torch.empty(10)] * 37]) == 2
    )
    assert launches([[torch.empty(320 * 65536, device="meta")]]) == 1
    assert launches([[torch.empty(320 * 65536 + 1, device="meta")]]) == 2
    assert launches([[]]) == 0


def test_memory_at_the_peak_counts_what_was_alive_together():
    with FakeCuda(), account.Account() as counted:
        first = tensor(1000)
        second = tensor(500)
        view = first.view(10, 100)
        del first
        assert counted.memory.now == 3000
        del view
        assert counted.memory.now == 1000
        third = tensor(600)
        assert (counted.memory.now, counted.memory.peak) == (2200, 3000)
        del second, third


def test_the_documented_table_is_that_of_the_results(repository):
    """Every number of both tables in docs/kernels.md, from the only JSON of bench_account.py."""
    (path,) = (repository / "benchmarks" / "results").glob("*-account.json")
    page = (repository / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"`benchmarks/results/{path.name}`" in page
    expected = {"steps": [], "engines": []}
    for row in json.loads(path.read_text(encoding="utf-8")):
        model, parts = row["preset"], row["by_phase"]
        assert sum(launches for launches, _ in parts.values()) == row["launches"]
        assert sum(gigabytes for _, gigabytes in parts.values()) == pytest.approx(row["gigabytes"])
        expected["steps"].append(
            f"| {model} | {row['batch']} x {row['seq']:,} | {row['contestant']} | {row['launches']:,} "
            f"| {row['gigabytes']:,.1f} | {row['over_floor']:.2f} | {row['teraflop']:.1f} "
            f"| {row['peak_gigabytes']:.1f} |"
        )
        launches, gigabytes = parts["engine"]
        if launches:
            each = 1e9 * gigabytes / row["parameters"]
            expected["engines"].append(f"| {model} | {launches:,} | {gigabytes:,.1f} | {each:.1f} |")
    assert len(expected["steps"]) == 15 and len(expected["engines"]) == 3
    tables = page[page.index("## The account of a step") :].split("\n## ")[0].splitlines()
    rows = [line for line in tables if line.startswith(("| pythia", "| llama"))]
    assert rows == expected["steps"] + expected["engines"]
