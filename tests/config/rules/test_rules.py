"""Every rule: contradictions are reported with their keys and values, valid configs next to them pass."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys

import pytest

from neox.config import rules
from neox.config.load import load_config
from neox.config.rules import data, layout, model, training
from neox.config.rules.conflict import Conflict
from neox.config.validate import validate
from neox.config.values import flatten
from tests.config.rules.contradictions import BASE, CASES, Case, report

MODULES = (data, layout, model, training)
YAML_CONSTANTS = {"None": "null", "True": "true", "False": "false"}


def test_there_are_many_cases_and_no_duplicates():
    assert len({(case.overrides, case.world_size) for case in CASES}) == len(CASES) > 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.overrides)[:80] + f" x{case.world_size}")
def test_a_contradiction_names_its_keys_their_values_and_the_rule(case: Case):
    lines = report(case).splitlines()
    naming = [line for line in lines if all(key in line for key in case.keys)]
    assert naming, lines
    values = {
        key: value for key, value in flatten(load_config(overrides=[*BASE, *case.overrides])) if "api_key" not in key
    }
    for key in case.keys:
        if key in values:
            text = YAML_CONSTANTS.get(repr(values[key]), repr(values[key]))
            assert any(f"{key} = {text}" in line for line in naming), (key, naming)
    assert all(line.startswith("error[2] ") and "; want=" in line for line in lines)


def test_optimised_python_reports_the_same(repository):
    run = [sys.executable, "-m", "tests.config.rules.contradictions"]
    plain, optimised = (
        subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repository)
        for command in (run, [run[0], "-O", *run[1:]])
    )
    assert plain.returncode == optimised.returncode == 0, plain.stderr + optimised.stderr
    assert plain.stdout == optimised.stdout
    assert plain.stdout.count("error[2] ") >= len(CASES)


VALID = [
    ("model.hidden_size=100", "model.num_attention_heads=12", "model.head_dim=16"),
    ("model.num_kv_heads=1",),
    ("model.num_kv_heads=4",),
    ("model.head_dim=256",),
    ("model.head_dim=320", "model.attention_backend=sdpa"),
    ("model.rotary_pct=0.25",),
    ("model.position_embedding=alibi", "data.seq_length=4096"),
    ("model.position_embedding=none", "data.seq_length=4096"),
    ("model.rope_scaling={type: linear, factor: 2}",),
    ("model.rope_scaling={type: yarn, factor: 2, original_max_position_embeddings: 32}",),
    ("model.parallel_residual=true", "model.shared_residual_norm=true"),
    ("data.train=[]", "data.path=x", "evaluate.interval=5"),
    ("data.validation=[v]", "evaluate.interval=5"),
    ("data.train=[{path: a, weight: 0}, b]",),
    ("schedule.warmup_iters=100",),
    ("schedule.warmup_iters=20.0",),
    ("schedule.warmup_iters=0.25", "schedule.rule=gpt_neox"),
    ("schedule.type=wsd", "schedule.warmup_iters=40", "schedule.cooldown_iters=60"),
    ("schedule.decay_iters=1000",),
    ("schedule.min_lr=6e-4",),
    ("schedule.type=constant",),
    ("zero.stage=3", "deepspeed.zero_optimization.offload_param.device=cpu"),
    (
        "deepspeed.zero_optimization.compute_grad_norm=false",
        "precision.dtype=bf16",
        "optimizer.gradient_clipping=0",
        "zero.stage=2",
    ),
    ("deepspeed.zero_optimization.overlap_comm=true", "deepspeed.wall_clock_breakdown=true"),
    ("deepspeed.wandb={enabled: true, project: x}",),
    ("train.gradient_accumulation=4", "train.global_batch_size=4"),
    ("checkpoint.resume=some/where", "run.dir='a b; rm -rf $HOME'"),
]


VALID_ON_A_GPU = [
    ("model.head_dim=64", "model.attention_backend=hopper", "precision.dtype=bf16"),
    ("model.head_dim=128", "model.attention_backend=hopper", "precision.dtype=fp16"),
    ("model.attention_backend=native", "precision.dtype=bf16"),
    ("model.attention_softcap=30", "precision.dtype=fp16"),
    ("model.attention_dropout=0.1", "precision.dtype=fp32"),
    ("model.position_embedding=alibi", "model.attention_backend=sdpa", "precision.dtype=fp32"),
]


@pytest.mark.parametrize("overrides", VALID_ON_A_GPU, ids=" ".join)
def test_valid_configs_pass_on_a_gpu(overrides):
    validate(load_config(overrides=[*BASE, *overrides]), 1, "cuda")


@pytest.mark.parametrize("overrides", VALID, ids=" ".join)
def test_valid_configs_pass(overrides):
    validate(load_config(overrides=[*BASE, *overrides]), 1, "cpu")


def test_every_conflict_has_a_case(tmp_path, monkeypatch):
    """A case reaches each line that yields a Conflict, so a new rule needs a case."""
    (tmp_path / "t.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 100}}}))
    reached = set()

    def recorded(*arguments, **named) -> Conflict:
        caller = sys._getframe(1)
        reached.add((caller.f_globals["__name__"], caller.f_lineno))
        return Conflict(*arguments, **named)

    for module in MODULES:
        monkeypatch.setattr(module, "Conflict", recorded)
    file = f"tokenizer.file={tmp_path}/t.json"
    long = f"run.dir={'a' * 300}"  # an error shows its beginning
    for options in ((file,), (file, "data.fim.rate=0.5", "tokenizer.eod_token=x"), (long,)):
        report(Case(options, ()))
    for case in CASES:
        report(case)
    calls = {
        (module.__name__, node.lineno): ast.unparse(node.args[0])
        for module in MODULES
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Conflict"
    }
    assert len(calls) > 40
    assert {place: what for place, what in calls.items() if place not in reached} == {}


def test_every_rule_is_listed():
    defined = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if getattr(value, "__annotations__", {}).get("return") == "Iterator[Conflict]"
    }
    parts_of_rules = {"deepspeed_key", "gradient_norm", "hopper", "offload", "source_lists", "split"}
    assert defined - parts_of_rules == {rule.__name__ for rule in rules.RULES}
    assert len(set(rules.RULES)) == len(rules.RULES)
