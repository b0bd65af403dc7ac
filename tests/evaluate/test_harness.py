"""lm-evaluation-harness on our models gives what its own `hf` model gives on the exported ones: NeoX and Llama form,
local task files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.convert.huggingface import to_huggingface
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DataError, EnvironmentProblem
from neox.evaluate.harness import (
    continuations,
    find_tasks,
    group_by_options,
    harness_model,
    prefix_token,
    run_tasks,
    sampling,
)
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.generate.sentencepiece import write_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra eval)")
pytestmark = pytest.mark.usefixtures("without_launcher")

TEXTS = [
    "The cat that the dogs chase sleeps on the mat near the window of the old house",
    "Nobody knew why the river had turned green and the fishermen stayed at home",
    "She opened the letter, read it twice, and put it back into the drawer",
    "When the train arrived, the platform was empty but for a boy and his drum",
    "They wrote that the garden beyond the wall has never been seen by anyone",
]
LLAMA = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "num_kv_heads": 2,
}
SIZES = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 32}
FORMS = {"neox": {"parallel_residual": True, "rotary_pct": 0.5}, "llama": LLAMA}


def write_tasks(folder: Path, continuations: list[dict], choices: list[dict]) -> None:
    """Tasks in the form of LAMBADA, BLiMP, WikiText and a generated answer, on local files."""
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, continuations)))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, choices)))
    texts, pairs = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\ntest_split: test\n"
        for name in ("texts", "pairs")
    )
    mean = "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    perplexity = "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    (folder / "lambada.yaml").write_text(
        f"task: local_lambada\n{texts}output_type: loglikelihood\ndoc_to_text: \"{{{{text.split(' ')[:-1]|join(' "
        f"')}}}}\"\n"
        f"doc_to_target: \"{{{{' '+text.split(' ')[-1]}}}}\"\nmetric_list:\n{perplexity}{mean}"
    )
    (folder / "blimp.yaml").write_text(
        f'task: local_blimp\n{pairs}output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_target: 0\n'
        f'doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"\nnum_fewshot: 0\nmetric_list:\n{mean}'
    )
    (folder / "rolling.yaml").write_text(
        f'task: local_rolling\n{texts}output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\n'
        "metric_list:\n  - {metric: word_perplexity}\n  - {metric: bits_per_byte}\n"
    )
    (folder / "answer.yaml").write_text(
        f'task: local_answer\n{texts}output_type: generate_until\ndoc_to_text: "{{{{text[:20]}}}}"\ndoc_to_target: "{{{{text}}}}"\n'
        'generation_kwargs: {until: ["\\n", "he"], max_gen_toks: 12, do_sample: false}\nmetric_list:\n  - {metric: exact_match, aggregation: mean}\n'
    )


def train(config: ModelConfig, tokenizer: Tokenizer, texts: list[str], steps: int = 60) -> GPT:
    """A small model that has learnt these texts a little, so that its scores are not all the same."""
    model = GPT(config, Mesh.single("cpu"), seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [[tokenizer.eod_id, *tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    for step in range(steps):
        row = torch.tensor([rows[step % len(rows)]])[:, : config.max_position_embeddings]
        optimizer.zero_grad()
        model(row[:, :-1], row[:, 1:]).mean().backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    swapped = [" ".join([*text.split(" ")[2:], *text.split(" ")[:2]]) for text in TEXTS]
    write_tasks(
        folder,
        [{"text": text} for text in TEXTS],
        [{"sentence_good": a, "sentence_bad": b} for a, b in zip(TEXTS, swapped, strict=True)],
    )
    train_tokenizer(TEXTS * 3, 400, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module", params=FORMS)
def trained(request, place, tmp_path_factory) -> tuple[GPT, Tokenizer, Path]:
    tokenizer = Tokenizer(place / "tokenizer.json")
    model = train(ModelConfig(**SIZES, vocab_size=tokenizer.vocab_size, **FORMS[request.param]), tokenizer, TEXTS[:3])
    out = tmp_path_factory.mktemp("export") / "theirs"
    to_huggingface(model.config, model.logical_weights(), out, tokenizer_file=tokenizer.file)
    return model, tokenizer, out


TASKS = ["local_lambada", "local_blimp", "local_rolling", "local_answer"]


def test_results_are_those_of_the_hf_model(trained, place):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer, out = trained
    ours = run_tasks(model, tokenizer, TASKS, task_files=str(place), batch_size=3)["results"]
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(out), dtype="float32", device="cpu", batch_size=2),
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        bootstrap_iters=1000,
    )["results"]
    compared = 0
    for task in TASKS:
        for name, value in theirs[task].items():
            if isinstance(value, float) and "stderr" not in name:
                if name.startswith(("acc", "exact_match")):
                    assert ours[task][name] == value, (task, name)
                else:
                    assert ours[task][name] == pytest.approx(value, rel=1e-4), (task, name)
                compared += 1
    assert compared >= 6
    assert 0 < ours["local_blimp"]["acc,none"] <= 1


def test_log_likelihoods_and_texts_are_those_of_the_hf_model(trained):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, out = trained
    hf, ours = (
        HFLM(pretrained=str(out), dtype="float32", device="cpu", batch_size=2),
        harness_model(model, tokenizer, 3),
    )
    pairs = [(TEXTS[0], " and more"), ("", TEXTS[1]), ("trailing spaces  ", "word"), (" ".join(TEXTS), " the end")]

    def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
        return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]

    for (a, greedy), (b, greedy_hf) in zip(
        ours.loglikelihood(ask("loglikelihood", pairs)), hf.loglikelihood(ask("loglikelihood", pairs)), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-4) and greedy == greedy_hf
    long = [(" ".join(TEXTS),), (TEXTS[2],)]
    assert ours.loglikelihood_rolling(ask("loglikelihood_rolling", long)) == pytest.approx(
        hf.loglikelihood_rolling(ask("loglikelihood_rolling", long)), abs=1e-4
    )
    prompts = [*(text[:30] for text in TEXTS), " ".join(TEXTS)]  # the last is too long and loses its beginning
    assert len(tokenizer.encode(prompts[-1])) > SIZES["max_position_embeddings"]
    options = [(prompt, {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}) for prompt in prompts]
    assert ours.generate_until(ask("generate_until", options)) == hf.generate_until(ask("generate_until", options))


def test_no_limit_by_default(trained, place):
    model, tokenizer, _ = trained
    assert run_tasks(model, tokenizer, ["local_blimp"], task_files=str(place))["n-samples"]["local_blimp"][
        "effective"
    ] == len(TEXTS)
    assert (
        run_tasks(model, tokenizer, ["local_blimp"], task_files=str(place), limit=2)["n-samples"]["local_blimp"][
            "effective"
        ]
        == 2
    )


def test_unknown_tasks_and_missing_files_are_named(place, tmp_path, monkeypatch):
    """An unknown task is sought among those of the harness too; reading its 14,000 files takes 14 s, so not here."""
    from lm_eval.tasks import TaskManager

    sought = []

    class LocalTasks(TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            sought.append(include_defaults)
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", LocalTasks)
    tokenizer = Tokenizer(place / "tokenizer.json")
    model = GPT(ModelConfig(**SIZES, vocab_size=tokenizer.vocab_size), Mesh.single("cpu"))
    with pytest.raises(ConfigError, match="no such task.*got=frobnicate.*do=lm_eval ls tasks"):
        run_tasks(model, tokenizer, ["local_blimp", "frobnicate"], task_files=str(place))
    assert sought == [False, True]
    with pytest.raises(ConfigError, match=r"no such task.*do=did you mean local_blimp\?"):
        run_tasks(model, tokenizer, ["local_blimpp"], task_files=str(place))
    (tmp_path / "x.yaml").write_text((place / "blimp.yaml").read_text().replace("pairs.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match="local_blimp"):
        run_tasks(model, tokenizer, ["local_blimp"], task_files=str(tmp_path))


def test_the_prefix_comes_from_the_tokenizer(place, tmp_path):
    tokenizer = Tokenizer(place / "tokenizer.json")
    assert prefix_token(tokenizer) == tokenizer.eod_id
    (tmp_path / "tokenizer.json").write_text((place / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "!"}}')
    assert prefix_token(Tokenizer(tmp_path / "tokenizer.json")) == tokenizer.token_id("!") != tokenizer.eod_id


def test_a_task_may_generate_up_to_one_token_less_than_the_model_reads(trained):
    model, tokenizer, _ = trained
    size, prompts = SIZES["max_position_embeddings"], [tokenizer.encode(TEXTS[0])]
    assert len(continuations(model, tokenizer, prompts, {"max_gen_toks": size - 1}, 2)) == 1
    with pytest.raises(ConfigError, match="generates more tokens than the model reads.*got=32.*want=< 32"):
        continuations(model, tokenizer, prompts, {"max_gen_toks": size}, 2)


def test_options_of_generation():
    params, stops = sampling({"until": "\n", "temperature": 0.7, "do_sample": True, "top_p": 0.9, "max_gen_toks": 5})
    assert (params.temperature, params.top_p, params.max_new_tokens, stops) == (0.7, 0.9, 5, ["\n"])
    assert sampling({"temperature": 0.7})[0].temperature == 0.7 and sampling({"do_sample": True})[0].temperature == 1.0
    assert (
        sampling({"temperature": 0.7, "do_sample": False})[0].greedy and sampling({"top_p": 0.9, "top_k": 3})[0].greedy
    )
    assert (
        sampling({"do_sample": True, "top_k": 3})[0].top_k == 3
        and sampling({"max_tokens": 6, "max_new_tokens": 7})[0].max_new_tokens == 7
    )
    assert sampling({"temperature": 0.0})[0].greedy and sampling({})[0].max_new_tokens == 256
    with pytest.raises(ConfigError, match="num_beams"):
        sampling({"num_beams": 4})
    assert group_by_options([{"a": 1}, {"a": 2}, {"a": 1}]) == [({"a": 1}, [0, 2]), ({"a": 2}, [1])]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ('{"bos_token": "!"}', "!"),
        ('{"bos_token": null}', None),
        ('{"bos_token": "no such token"}', None),
        ('{"bos_token": {"content": "a"}}', "a"),
        ('{"bos_token": {}}', None),
        ("{}", None),
    ],
)
def test_the_prefix_of_every_form_of_settings(place, tmp_path, settings, found):
    (tmp_path / "tokenizer.json").write_text((place / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert prefix_token(tokenizer) == (tokenizer.eod_id if found is None else tokenizer.token_id(found))


def test_a_prefix_that_cannot_be_found(place, tmp_path):
    (tmp_path / "tokenizer.json").write_text((place / "tokenizer.json").read_text())
    for settings in ("[]", "{", "1"):
        (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(ConfigError, match="cannot read the tokenizer's settings; where=.*tokenizer_config.json"):
            prefix_token(Tokenizer(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    end = content["added_tokens"][0]["content"]
    (tmp_path / "tokenizer.json").write_text((place / "tokenizer.json").read_text().replace(end, "<other>"))
    with pytest.raises(ConfigError, match=r"the tokenizer has no end-of-document token; where=.*tokenizer\.json"):
        prefix_token(Tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (256, 0.0, None, None, [])),
        (
            {"until": ["a", "b"], "max_new_tokens": 9, "max_gen_toks": 5, "max_tokens": 7},
            (5, 0.0, None, None, ["a", "b"]),
        ),
        ({"max_tokens": 7, "until": None}, (7, 0.0, None, None, [])),
        ({"max_gen_toks": 0, "max_tokens": 7, "num_beams": 1}, (7, 0.0, None, None, [])),
        ({"temperature": 0.5, "top_k": 0, "top_p": 0}, (256, 0.5, None, None, [])),
        ({"do_sample": True, "temperature": 0, "top_p": 0.5, "top_k": 2}, (256, 1.0, 2, 0.5, [])),
        ({"do_sample": False, "temperature": 2.0, "until": "stop"}, (256, 0.0, None, None, ["stop"])),
    ],
)
def test_what_a_task_asks_for(options, wanted):
    params, stops = sampling(options)
    assert (params.max_new_tokens, params.temperature, params.top_k, params.top_p, stops) == wanted
    for unknown, said in ((("typical_p", "eta"), "eta, typical_p"), (("num_beams",), "num_beams")):
        with pytest.raises(ConfigError, match=f"where=generation_kwargs; got={said}$"):
            sampling(options | dict.fromkeys(unknown, 2))


def test_requests_of_the_same_options_are_one_group():
    options = [{"a": 1, "b": [2]}, {"b": [2], "a": 1}, {"a": 1}, {"a": "1"}]
    assert group_by_options(options) == [(options[0], [0, 1]), (options[2], [2]), (options[3], [3])]
    assert group_by_options([]) == []


def test_run_tasks_passes_on_its_options(trained, place, monkeypatch):
    model, tokenizer, _ = trained
    told = {}

    def evaluate(adapter, **options):
        told.update(options)
        return {"results": {"t": {}}, "versions": {}, "configs": {}, "n-shot": {"t": 2}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    options = {"task_files": str(place), "num_fewshot": 2, "limit": 3, "batch_size": 5}
    found = run_tasks(model, tokenizer, ("local_blimp", "local_rolling"), **options)
    assert found == {"results": {"t": {}}, "n-shot": {"t": 2}, "versions": {}}
    assert (told["tasks"], told["num_fewshot"], told["limit"]) == (["local_blimp", "local_rolling"], 2, 3)
    assert set(told["task_manager"].all_tasks) == set(TASKS) and told["log_samples"] is False
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda adapter, **options: None)  # of ranks above 0
    assert run_tasks(model, tokenizer, ["local_blimp"], task_files=str(place)) == {}
    for error in (OSError("gone"), ConnectionError("no network"), ValueError("bad")):

        def fail(adapter, error=error, **options):
            raise error

        monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
        with pytest.raises(
            DataError, match=f"a task could not be evaluated; where=local_blimp; got={error}; do=without"
        ):
            run_tasks(model, tokenizer, ["local_blimp"], task_files=str(place))


def test_the_adapter_names_the_tokens_of_the_tokenizer(trained, place, tmp_path):
    model, tokenizer, _ = trained
    adapter = harness_model(model, tokenizer, 2)
    assert (adapter.eot_token_id, adapter.prefix_token_id) == (tokenizer.eod_id, tokenizer.eod_id)
    assert adapter.tokenizer_name == tokenizer.file
    (tmp_path / "tokenizer.json").write_text((place / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    other = Tokenizer(tmp_path / "tokenizer.json")
    adapter = harness_model(model, other, 2)
    assert (adapter.eot_token_id, adapter.prefix_token_id) == (other.eod_id, other.token_id("a"))


def test_a_template_is_applied_unless_the_text_begins_with_it(trained, tmp_path):
    """As transformers' `hf` model of the harness does."""
    model, *_ = trained
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    adapter = harness_model(model, tokenizer, 2)
    plain = tokenizer.encode("river")
    assert adapter.tok_encode("river") == adapter.tok_encode("river", add_special_tokens=True) == [1, *plain]
    assert adapter.tok_encode("river", add_special_tokens=False) == plain
    assert adapter.tok_encode("<s>river").count(1) == 1


def test_a_missing_harness_names_how_to_install_it(trained, monkeypatch):
    model, tokenizer, _ = trained
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(
        EnvironmentProblem, match="lm-evaluation-harness is not installed; got=.*; do=pip install 'lm-eval=="
    ):
        run_tasks(model, tokenizer, ["x"])


def test_the_tasks_of_the_harness_are_read_where_the_folder_lacks_one(monkeypatch):
    made = []

    class Tasks:
        def __init__(self, **options):
            made.append(options)
            local = ["ours"] if "include_path" in options else []
            self.all_tasks = local + (["theirs", "their_group"] if options.get("include_defaults", True) else [])

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Tasks)
    without_defaults = {"include_path": "x", "include_defaults": False}
    assert find_tasks(["theirs"], None).all_tasks == ["theirs", "their_group"] and made == [{}]
    assert find_tasks(["ours"], "x").all_tasks == ["ours"] and made[1:] == [without_defaults]
    assert len(find_tasks(["ours", "theirs"], "x").all_tasks) == 3
    assert made[2:] == [without_defaults, {"include_path": "x"}]
    with pytest.raises(ConfigError, match=r"where=--tasks; got=thiers, mine; .* do=did you mean theirs\?"):
        find_tasks(["their_group", "thiers", "mine"], None)


def test_answers_stand_where_they_were_requested(trained):
    """Requests of the same options are answered together, and two groups of them alternate here."""
    model, tokenizer, _ = trained
    adapter = harness_model(model, tokenizer, 2)
    options = [{"max_gen_toks": count, "until": ["\n"]} for count in (3, 6)]
    requests = [SimpleNamespace(args=(text[:20], options[i % 2])) for i, text in enumerate(TEXTS)]
    found = adapter.generate_until(requests)
    assert found == [adapter.generate_until([request])[0] for request in requests] and len(set(found)) > 2
    assert adapter.generate_until([]) == []
    texts = [SimpleNamespace(args=(text,)) for text in (" ".join(TEXTS), TEXTS[0], "the")]
    alone = [adapter.loglikelihood_rolling([text])[0] for text in texts]
    assert adapter.loglikelihood_rolling(texts) == pytest.approx(alone, abs=1e-4)


def test_a_task_gets_texts_without_special_tokens(trained, monkeypatch):
    model, tokenizer, _ = trained
    seen = {}

    def complete(model, prompts, params, **options):
        seen.update(options, prompts=prompts, params=params)
        return ["answer"]

    monkeypatch.setattr("neox.evaluate.harness.complete", complete)
    prompt = list(range(40))
    options = {"max_gen_toks": 10, "until": ["x", "y"], "temperature": 0.5}
    assert continuations(model, tokenizer, [prompt, [5]], options, 3) == ["answer"]
    assert seen["prompts"] == [prompt[-22:], [5]]  # of the 32 tokens that the model reads
    assert (seen["params"].max_new_tokens, seen["params"].temperature) == (10, 0.5)
    assert (seen["stops"], seen["eod_id"], seen["batch_size"]) == (["x", "y"], tokenizer.end_ids, 3)
    assert seen["decode"]([tokenizer.eod_id, *tokenizer.encode("the cat")]) == "the cat"
