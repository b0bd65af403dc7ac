"""What every command reads of its command line: names, types and defaults of its options."""

from __future__ import annotations

import pytest
import torch

from neox.cli.main import parse
from neox.errors import ConfigError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JSON = {"json": False}
SAMPLING = {"max_new_tokens": 64, "temperature": 1.0, "top_k": None, "top_p": None, "seed": 1234, "stop": []}
PROMPTS = {"prompt": [], "prompt_file": None, "unconditional": None, "interactive": False, "no_bos": False}
MODEL = {"tokenizer": None, "dtype": "fp32", "device": DEVICE, "tensor": 1, "pipeline": 1, "batch_size": 8}
TASKS = {"tasks": None, "task_files": None, "num_fewshot": None, "limit": None}
CHAT = {"chat": False, "pairs": False, "chat_template": None, "last_only": False}
TEXT = {"eod_token": None, "append_eod": True, "prepend_bos": False, "bos_token": None, "special_tokens": "match"}
RUN = {"overwrite": False, "resume": False, "workers": None, "bad_lines": "fail"}
INPUT = {"input": ["a"], "suffix": None, "format": "auto"}
VALUES = {"conf": [], "overrides": []}

DEFAULTS = [
    ("init", {"folder": "."}),
    (
        "tokenizer train --input a --vocab-size 300 --out o",
        INPUT
        | {"action": "train", "vocab_size": 300, "out": "o", "eod_token": "<|endoftext|>", "special_token": []}
        | {"json_key": "text", "bad_lines": "fail", "overwrite": False}
        | JSON,
    ),
    (
        "preprocess --input a --tokenizer t --out o",
        INPUT | TEXT | CHAT | RUN | JSON | {"tokenizer": "t", "out": "o", "json_key": None},
    ),
    ("data inspect p", {"prefix": "p", "tokenizer": None, "samples": 0, "scan": None} | JSON),
    ("data verify p q", {"prefix": ["p", "q"], "vocab_size": None} | JSON),
    ("data merge p q --out o", {"prefix": ["p", "q"], "out": "o", "overwrite": False} | JSON),
    ("data overlap", {"prefix": [], "conf": None} | JSON),
    (
        "data which --run r --step 3",
        {"run": "r", "step": 3, "document": None, "source": None, "rank": None, "world_size": None, "batch": None}
        | JSON,
    ),
    ("data seen --run r", {"run": "r", "step": None, "batch": None} | JSON),
    ("config show", {"action": "show", "files": []} | VALUES | JSON),
    ("config explain", {"action": "explain", "key": None, "files": []} | VALUES | JSON),
    ("config diff a b", {"action": "diff", "left": "a", "right": "b", "overrides": []} | JSON),
    ("config convert a", {"action": "convert", "files": ["a"], "out": None, "overrides": []} | JSON),
    ("config reference", {"action": "reference", "gpt_neox": False}),
    ("plan", {"files": [], "world_size": 1, "device": "cpu"} | VALUES | JSON),
    ("train", {"files": [], "conf": [], "conf_dir": None, "set": [], "local_rank": None}),
    (
        "generate --checkpoint c",
        MODEL
        | SAMPLING
        | PROMPTS
        | JSON
        | {"checkpoint": "c", "no_cache": False, "jsonl": False, "out": None, "overwrite": False},
    ),
    (
        "evaluate --checkpoint c",
        MODEL | TASKS | JSON | {"checkpoint": "c", "data": None, "seq_length": None, "max_documents": None},
    ),
    (
        "export --checkpoint c --out o",
        {"checkpoint": "c", "out": "o", "dtype": None, "tokenizer": None, "no_tokenizer": False, "check": True} | JSON,
    ),
    ("import --from s --out o", {"source": "s", "out": "o", "tokenizer": None, "check": True} | VALUES | JSON),
    (
        "checkpoint hash p",
        {"action": "hash", "path": "p", "out": None, "weights_only": False, "dtype": None, "shard_gb": 4.0} | JSON,
    ),
    (
        "verify-resume a b --steps 5 --kill-at 3",
        {"conf": ["a", "b"], "steps": 5, "kill_at": 3, "set": [], "processes": 1, "dir": None} | JSON,
    ),
    ("report a", {"runs": ["a"], "out": "report.html"} | JSON),
    ("doctor", JSON),
]


def values(words: list[str]) -> dict[str, object]:
    """The options of a command line, without what finds the function that runs it."""
    _, parser, rest = parse(words)
    found = vars(parser.parse_args(rest))
    return {name: value for name, value in found.items() if name not in ("neox_run", "data_run", "debug")}


@pytest.mark.parametrize(("words", "wanted"), DEFAULTS, ids=[words for words, _ in DEFAULTS])
def test_the_defaults_of_a_command(words, wanted):
    found = values(words.split())
    assert {name: value for name, value in found.items() if name in wanted} == wanted
    assert set(found) - set(wanted) <= {"action"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("init x", {"folder": "x"}),
        ("generate --checkpoint c --prompt a --prompt b --stop x --stop y", {"prompt": ["a", "b"], "stop": ["x", "y"]}),
        ("generate --checkpoint c --top-k 3 --top-p .5 --temperature 0", {"top_k": 3, "top_p": 0.5}),
        ("generate --checkpoint c --unconditional 2 --no-bos --jsonl", {"unconditional": 2, "jsonl": True}),
        ("generate --checkpoint c --tensor 2 --pipeline 3 --device x", {"tensor": 2, "pipeline": 3, "device": "x"}),
        ("train a --set x=1 y=2 --set z=3 --local_rank=1", {"set": ["x=1", "y=2", "z=3"], "local_rank": 1}),
        ("train --conf a b --conf_dir d", {"conf": ["a", "b"], "conf_dir": "d"}),
        ("train --conf-dir d", {"conf_dir": "d"}),
        ("plan a --conf b c --set x=1 --set y=2", {"files": ["a"], "conf": ["b", "c"], "overrides": ["x=1", "y=2"]}),
        ("config show a --set x=1 --set y=2", {"files": ["a"], "overrides": ["x=1", "y=2"]}),
        ("config explain k a b --conf c", {"key": "k", "files": ["a", "b"], "conf": ["c"]}),
        ("config convert a b -o n", {"files": ["a", "b"], "out": "n"}),
        ("import --from s --out o --conf a b --set x=1 --no-check", {"conf": ["a", "b"], "check": False}),
        ("import --from s --out o --set x=1 --set y=2", {"overrides": ["x=1", "y=2"]}),
        ("export --checkpoint c --out o --no-check --dtype bf16", {"check": False, "dtype": "bf16"}),
        ("checkpoint convert p --weights-only --dtype fp16 --shard-gb .5", {"weights_only": True, "shard_gb": 0.5}),
        ("verify-resume a --steps 5 --kill-at 3 --set x=1 --set y=2 --processes 2", {"set": ["x=1", "y=2"]}),
        ("report a b --out x --json", {"runs": ["a", "b"], "out": "x", "json": True}),
        ("data overlap a b", {"prefix": ["a", "b"]}),
        ("data overlap --conf a b", {"prefix": [], "conf": ["a", "b"]}),
        ("data inspect p --no-scan --samples 4", {"scan": False, "samples": 4}),
        ("data which --run r --document 7 --source s --rank 2 --batch 4", {"document": 7, "rank": 2, "batch": 4}),
        ("evaluate --checkpoint c --limit 2 --num-fewshot 0 --seq-length 9", {"limit": 2, "seq_length": 9}),
        ("preprocess --input a b --tokenizer t --out o --suffix .x --suffix .y", {"suffix": [".x", ".y"]}),
    ],
)
def test_words_become_values(words, wanted):
    found = values(words.split())
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate", "the following arguments are required: --checkpoint"),
        ("evaluate --data d", "the following arguments are required: --checkpoint"),
        ("export --checkpoint c", "the following arguments are required: --out"),
        ("import --out o", "the following arguments are required: --from"),
        ("tokenizer train --input a --out o", "the following arguments are required: --vocab-size"),
        ("preprocess --input a --out o", "the following arguments are required: --tokenizer"),
        ("data merge a", "the following arguments are required: --out"),
        ("data verify", "the following arguments are required: PREFIX"),
        ("data which --run r", "one of the arguments --step --document is required"),
        ("data which --run r --step 1 --document 1", "argument --document: not allowed with argument --step"),
        ("data seen", "the following arguments are required: --run"),
        ("data", "the following arguments are required: ACTION"),
        ("config", "the following arguments are required: show|explain|diff|convert|reference"),
        ("checkpoint inspect", "the following arguments are required: PATH"),
        ("verify-resume a --steps 5", "the following arguments are required: --kill-at"),
        ("report", "the following arguments are required: RUN"),
        ("checkpoint frobnicate p", "invalid choice: 'frobnicate'"),
        ("generate --checkpoint c --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("preprocess --input a --tokenizer t --out o --bad-lines x", "argument --bad-lines: invalid choice: 'x'"),
        ("preprocess --input a --tokenizer t --out o --format x", "argument --format: invalid choice: 'x'"),
        ("preprocess --input a --tokenizer t --out o --special-tokens x", "argument --special-tokens: invalid choice"),
        ("tokenizer train --input a --out o --vocab-size 9 --bad-lines quarantine", "invalid choice: 'quarantine'"),
        ("generate --checkpoint c --seed 1.5", "argument --seed: invalid int value"),
    ],
)
def test_what_is_missing_or_no_choice_is_named(words, said):
    with pytest.raises(ConfigError) as caught:
        values(words.split())
    assert said in caught.value.what


@pytest.mark.parametrize("words", ["data inspect p", "data --debug inspect p", "data inspect p --debug"])
def test_an_action_keeps_the_debug_option_before_it(words):
    _, parser, rest = parse(words.split())
    assert parser.parse_args(rest).debug is ("--debug" in words)
