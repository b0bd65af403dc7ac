"""Every rule between keys: contradictions named with both keys and both values, sound neighbours accepted."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys

import pytest

from neox.config import rules
from neox.config.load import flatten, load_config
from neox.config.rules import parse_split
from neox.config.validate import validate
from neox.errors import ConfigError
from tests.config.contradictions import BASE, CASES, Case, report


def test_there_are_enough_of_them_and_none_twice():
    assert len({(case.overrides, case.world_size) for case in CASES}) == len(CASES) > 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.overrides)[:80] + f" x{case.world_size}")
def test_a_contradiction_names_its_keys_their_values_and_the_rule(case: Case):
    lines = report(case).splitlines()
    naming = [line for line in lines if all(key in line for key in case.keys)]
    assert naming, lines
    values = {key: value for key, value in flatten(load_config(overrides=[*BASE, *case.overrides])) if "api_key" not in key}
    for key in case.keys:
        if key in values:
            assert any(f"{key} = {values[key]!r}" in line for line in naming), (key, naming)
    assert all(line.startswith("error[2] ") and "; want=" in line for line in lines)


def test_optimised_python_says_the_same(repository):
    run = [sys.executable, "-m", "tests.config.contradictions"]
    plain, optimised = (subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repository) for command in (run, [run[0], "-O", *run[1:]]))
    assert plain.returncode == optimised.returncode == 0, plain.stderr + optimised.stderr
    assert plain.stdout == optimised.stdout
    assert plain.stdout.count("error[2] ") >= len(CASES)


def test_a_secret_is_not_repeated():
    assert "s3cret" not in report(Case(("deepspeed.comet.api_key=s3cret",), ()))


SOUND = [
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
    ("deepspeed.zero_optimization.overlap_comm=true", "deepspeed.wall_clock_breakdown=true"),
    ("deepspeed.wandb={enabled: true, project: x}",),
    ("train.gradient_accumulation=4", "train.global_batch_size=4"),
    ("checkpoint.resume=some/where", "run.dir='a b; rm -rf $HOME'"),
]


PAIRS = "data.train=[{path: a, rejected: b}]"
SOUND_LAYOUTS = [  # (processes, overrides): each condition of a rule but one
    (1, "model.attention_softcap=30"),
    (1, "model.head_dim=256 model.attention_backend=native"),
    (1, "model.position_embedding=alibi model.head_dim=9"),
    (1, "model.position_embedding=learned data.seq_length=64"),
    (1, "model.rope_scaling={type: linear, factor: 1}"),
    (1, "model.rope_scaling={type: linear, factor: 2, low_freq_factor: 4, high_freq_factor: 4, beta_slow: 32, beta_fast: 32}"),
    (1, "model.rope_scaling={type: llama3, factor: 4, original_max_position_embeddings: 64}"),
    (1, "model.parallel_residual=true"),
    (1, "data.packing=best_fit"),
    (1, "data.order=neox"),
    (1, "train.objective=sft data.train=[{path: a, labels: b}] data.packing=best_fit"),
    (1, f"train.objective=dpo {PAIRS}"),
    (1, f"train.objective=dpo {PAIRS} data.validation=[{{path: c, rejected: d}}] evaluate.interval=5"),
    (1, f"train.objective=reward model.output=score {PAIRS}"),
    (2, f"train.objective=reward model.output=score {PAIRS} parallel.tensor=2 parallel.sequence=true"),
    (2, f"train.objective=dpo {PAIRS} parallel.pipeline=2"),
    (2, "train.objective=sft data.train=[{path: a, labels: b}] parallel.context=2"),
    (1, "data.train=[] data.path=x data.split='99,1'"),
    (1, "model.lora={rank: 2} zero.stage=2"),
    (1, "model.lora={rank: 2, targets: [mlp.gate]} model.activation=swiglu"),
    (1, "model.lora={rank: 2, targets: [mlp.gate, mlp.up]}"),
    (1, "model.lora={rank: 2} model.tie_embeddings=true"),
    (2, "model.lora={rank: 2} parallel.pipeline=2 model.tie_embeddings=false"),
    (2, f"model.lora={{rank: 2}} parallel.pipeline=2 model.tie_embeddings=true train.objective=reward model.output=score {PAIRS}"),
    (1, "zero.stage=3"),
    (1, "schedule.type=wsd schedule.warmup_iters=99 schedule.cooldown_iters=1"),
    *((1, f"schedule.rule=gpt_neox schedule.type={kind}") for kind in ("constant", "linear", "cosine")),
    (1, "precision.min_loss_scale=4 precision.initial_scale_power=2"),
    (1, "optimizer.type=muon"),
    (4, "parallel.tensor=2 parallel.pipeline=2"),
    (8, "parallel.tensor=2 parallel.pipeline=2 parallel.context=2"),
    (8, "parallel.tensor=2"),
    (2, "parallel.tensor=2 data.seq_length=63"),
    (4, "parallel.tensor=2 parallel.context=2 parallel.sequence=true data.seq_length=60"),
    (4, "parallel.tensor=2 parallel.context=2 model.num_kv_heads=4"),
    (2, "parallel.pipeline=2 zero.stage=1"),
    (2, "parallel.pipeline=2 parallel.partition=[1, 1]"),
    (2, "zero.stage=2"),
    (1, "zero.stage=1 deepspeed.zero_optimization.offload_optimizer.device=cpu"),
    (1, "guard.loss_spike=rollback checkpoint.save_interval=0 checkpoint.save_iters=[5]"),
    (1, "guard.loss_spike=rollback checkpoint.save_interval=5"),
    (1, "guard.loss_spike=skip data.order=neox checkpoint.save_interval=0"),
]


@pytest.mark.parametrize(("world_size", "overrides"), SOUND_LAYOUTS, ids=str)
def test_sound_layouts_pass(world_size, overrides):
    values = re.split(r" (?=[a-z0-9_.]+=)", overrides)
    validate(load_config(overrides=[*BASE, *values]), world_size, "cpu")


@pytest.mark.parametrize("overrides", SOUND, ids=" ".join)
def test_sound_neighbours_pass(overrides):
    validate(load_config(overrides=[*BASE, *overrides]), 1, "cpu")


def test_a_tokenizer_with_more_ids_than_the_vocabulary(tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 100}}}))
    config = load_config(overrides=[*BASE, f"tokenizer.file={file}"])
    with pytest.raises(ConfigError, match=r"model.vocab_size = 100, tokenizer.file = .*ids = 101; want=vocab_size at least 101"):
        validate(config, 1, "cpu")
    validate(load_config(overrides=[*BASE, f"tokenizer.file={file}", "model.vocab_size=101"]), 1, "cpu")


def test_tokens_of_fill_in_the_middle_are_in_the_vocabulary(tmp_path):
    file = tmp_path / "t.json"
    added = [{"content": f"<|fim_{name}|>", "id": 2 + number} for number, name in enumerate(("prefix", "suffix"))]
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}))
    options = [*BASE, f"tokenizer.file={file}", "data.fim.rate=0.5"]
    with pytest.raises(ConfigError, match=r"not in the vocabulary; where=data.fim.middle_token, .*got=data.fim.middle_token = '<\|fim_middle\|>'"):
        validate(load_config(overrides=options), 1, "cpu")
    validate(load_config(overrides=[*options, "data.fim.middle_token=a"]), 1, "cpu")
    with pytest.raises(ConfigError, match=r"where=.*data.fim.split_sample"):
        validate(load_config(overrides=[*options, "data.fim.middle_token=a", "data.fim.split_sample=zz"]), 1, "cpu")


def test_split_is_normalised():
    assert parse_split("969,30,1") == (0.969, 0.03, 0.001)
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split("3/1") == parse_split(" 3, 1 ") == (0.75, 0.25, 0.0)


def test_every_conflict_has_a_case(tmp_path, monkeypatch):
    """Each place in rules.py that refuses something is reached by a case here: a new rule needs one."""
    (tmp_path / "t.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 100}}}))
    reached, conflict = set(), rules.Conflict

    def recorded(*arguments: object, **named: object) -> rules.Conflict:
        caller = sys._getframe(1)
        reached.add(caller.f_lineno)
        return conflict(*arguments, **named)

    monkeypatch.setattr(rules, "Conflict", recorded)
    with_tokenizer = [(f"tokenizer.file={tmp_path}/t.json",), (f"tokenizer.file={tmp_path}/t.json", "data.fim.rate=0.5")]
    for case in (*CASES, *(Case(overrides, ()) for overrides in with_tokenizer)):
        report(case)
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(rules))) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Conflict"]
    missing = {node.lineno: ast.unparse(node.args[0]) for node in calls if node.lineno not in reached}
    assert len(calls) > 40 and not missing


def test_every_rule_is_listed():
    named = {name for name, value in vars(rules).items() if getattr(value, "__annotations__", {}).get("return") == "Iterator[Conflict]"}
    assert named - {"deepspeed_key", "offload"} == {rule.__name__ for rule in rules.RULES}


@pytest.mark.parametrize("name", ["/", "//", "/.", "/tmp/..", "/../"])
def test_the_root_is_no_folder_of_a_run(name):
    with pytest.raises(ConfigError, match="the run's folder is the root of the file system; where=.*run.dir"):
        validate(load_config(overrides=[*BASE, f"run.dir={name}"]), 1, "cpu")


@pytest.mark.parametrize("letter", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
def test_control_characters_in_the_folder_of_a_run(letter):
    with pytest.raises(ConfigError, match="control characters in its name; where=.*run.dir") as caught:
        validate(load_config(overrides=[*BASE, f"run.dir=runs/a{letter}b"]), 1, "cpu")
    assert len(caught.value.line().splitlines()) == 1
