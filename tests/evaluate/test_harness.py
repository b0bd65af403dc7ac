"""lm-evaluation-harness on our models gives what its own `hf` model gives on the exported ones: NeoX and Llama form,
local task files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.convert.huggingface import to_huggingface
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DataError
from neox.evaluate.harness import continuations, group_by_options, harness_model, prefix_token, run_tasks, sampling
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

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
