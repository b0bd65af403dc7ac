"""`neox import` from its command line: Hugging Face folders and checkpoints of GPT-NeoX, checked or refused."""

from __future__ import annotations

import argparse
import json
import math
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from neox.checkpoint.find import resolve
from neox.checkpoint.reader import Checkpoint
from neox.cli import importer
from neox.cli.generate import run_tokenizer
from neox.cli.main import main
from neox.config.load import load_config, loads
from neox.config.schema import ModelConfig, SpecialIds, TokenizerConfig
from neox.convert.huggingface import from_huggingface, to_huggingface
from neox.data.text.tokenizer import Tokenizer
from neox.errors import CheckpointError, ConfigError
from neox.generate.generate import generate, load_model
from neox.generate.sampling import SamplingParams
from tests.config.gpt_neox.sample_files import BASE, flow_text
from tests.convert.gpt_neox_checkpoints import write_gpt_neox
from tests.convert.models import MODELS
from tests.convert.test_gpt_neox import make
from tests.generate.sentencepiece import write_tokenizer
from tests.gpt_neox_tokenizer import write_gpt_neox_tokenizer


def call(*arguments) -> int:
    return main(["import", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    to_huggingface(*from_huggingface(MODELS["llama-gqa-tied"]()), tmp_path / "theirs", max_shard_bytes=20_000)
    return tmp_path / "theirs"


def test_import_checked_and_export_give_the_same_bits(folder, tmp_path, capsys):
    assert call("--from", folder, "--out", tmp_path / "ours", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 <= report["max_logit_difference"] <= 2e-5
    assert (
        main(["export", "--checkpoint", str(tmp_path / "ours"), "--out", str(tmp_path / "again"), "--no-tokenizer"])
        == 0
    )
    (config, weights), (config2, weights2) = from_huggingface(folder), from_huggingface(tmp_path / "again")
    assert config2 == config
    assert all(torch.equal(weights2[name], weights[name]) for name in weights)
    assert loads((tmp_path / "ours" / "config.lock.yml").read_text()).model == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "ours", "theirs"]


def test_a_llama_makes_the_same_tokens_there_and_back(tmp_path):
    from transformers import AutoModelForCausalLM

    theirs = tmp_path / "theirs"
    MODELS["llama-gqa-tied"]().save_pretrained(theirs)
    assert call("--from", theirs, "--out", tmp_path / "ours") == 0
    assert (
        main(["export", "--checkpoint", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--no-tokenizer"]) == 0
    )
    prompt = [1, 40, 47, 26, 78]
    with torch.no_grad():
        want = [
            AutoModelForCausalLM.from_pretrained(path)
            .eval()
            .generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0]
            .tolist()
            for path in (theirs, tmp_path / "back")
        ]
    assert want[0] == want[1]
    got = generate(load_model(tmp_path / "ours"), [prompt], SamplingParams(max_new_tokens=40, temperature=0.0))[0]
    assert prompt + got == want[0][: len(prompt) + len(got)] and len(got) >= 30


def test_tokenizer_and_settings_go_there_and_back(tmp_path, folder):
    config = json.loads((folder / "config.json").read_text())
    write_gpt_neox_tokenizer(folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ messages }}",
        "eos_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    assert config["vocab_size"] == 101
    assert call("--from", folder, "--out", tmp_path / "ours", "--no-check") == 2  # 323 ids for 101 rows
    small = json.loads((folder / "tokenizer.json").read_text())
    small["model"] |= {
        "vocab": {token: number for token, number in small["model"]["vocab"].items() if number < 101},
        "merges": [],
    }
    small["added_tokens"] = small["added_tokens"][:1]
    (folder / "tokenizer.json").write_text(json.dumps(small))
    assert call("--from", folder, "--out", tmp_path / "ours", "--no-check") == 0
    assert main(["export", "--checkpoint", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--no-check"]) == 0
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == settings
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize(
    ("bos", "eos", "ids"), [("<s>", "</s>", (1, [2, 7])), ("<\uff5cbegin\uff5c>", "<\uff5cend\uff5c>", (1, 2))]
)
def test_special_ids_go_there_and_back_and_end_texts(bos, eos, ids, tmp_path, capsys):
    model = MODELS["llama-gqa-tied"]()
    model.resize_token_embeddings(400)
    to_huggingface(
        *from_huggingface(model),
        tmp_path / "theirs",
        special_ids=SpecialIds(bos=ids[0], eos=tuple(ids[1]) if isinstance(ids[1], list) else ids[1]),
    )
    write_tokenizer(tmp_path / "theirs", bos=bos, eos=eos)
    (tmp_path / "theirs" / "generation_config.json").unlink()
    assert call("--from", tmp_path / "theirs", "--out", tmp_path / "ours", "--no-check") == 0
    assert main(["export", "--checkpoint", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--no-check"]) == 0
    for name in ("config.json", "generation_config.json"):
        back = json.loads((tmp_path / "back" / name).read_text())
        assert (back["bos_token_id"], back["eos_token_id"]) == ids
    ends = run_tokenizer(resolve(tmp_path / "ours"), None).end_ids
    assert ends == run_tokenizer(resolve(tmp_path / "ours"), str(tmp_path / "theirs" / "tokenizer.json")).end_ids | ends
    assert ends == set(ids[1] if isinstance(ids[1], list) else [ids[1]])


def test_differing_logits_leave_nothing_and_exit_4(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importer, "compare", lambda out, model, tokens: float("nan"))
    assert call("--from", folder, "--out", tmp_path / "ours") == 4
    assert "imported model computes different logits" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_checkpoint_of_gpt_neox_with_its_yaml(tmp_path, capsys, by_layer):
    config, weights = make("neox")
    write_gpt_neox(tmp_path / "old", weights, config, 2, by_layer=by_layer, padded_rows=50, old_names=True)
    values = BASE | {
        "hidden_size": 24,
        "max_position_embeddings": 16,
        "seq_length": 16,
        "gpt_j_residual": True,
        "rotary_pct": 0.5,
    }
    (tmp_path / "old" / "global_step7" / "configs").mkdir()
    (tmp_path / "old" / "global_step7" / "configs" / "model.yml").write_text(flow_text(values))
    assert call("--from", tmp_path / "old", "--out", tmp_path / "ours") == 4  # the file speaks of 50,304 ids
    assert "vocabulary is smaller" in capsys.readouterr().err
    assert call("--from", tmp_path / "old", "--out", tmp_path / "ours", "--set", "model.vocab_size=50", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["loss_on_probe"] > 0 and "note: the import has no tokenizer" in printed.err
    with Checkpoint(resolve(tmp_path / "ours")) as checkpoint:
        assert all(torch.equal(checkpoint.tensor(name), weights[name]) for name in weights)


def test_a_flat_folder_as_it_is_published(tmp_path, capsys):
    config, weights = make("neox")
    write_gpt_neox(tmp_path / "old", weights, config, 2, by_layer=True, padded_rows=50, old_names=True)
    flat = (tmp_path / "old" / "global_step7").rename(tmp_path / "flat")
    values = BASE | {
        "hidden_size": 24,
        "max_position_embeddings": 16,
        "seq_length": 16,
        "gpt_j_residual": True,
        "rotary_pct": 0.5,
    }
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 45)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.save(str(tmp_path / "words.json"))
    for number, vocabulary in enumerate(
        [{"vocab_file": "/not/here/words.json"}, {"vocab_file": None, "tokenizer_type": None}]
    ):
        (flat / "model.yml").write_text(
            flow_text({key: value for key, value in (values | vocabulary).items() if value is not None})
        )
        for i, conf in enumerate([[], ["--conf", flat / "model.yml"]]):
            out = tmp_path / f"ours{number}{i}"
            assert (
                call("--from", flat, *conf, "--out", out, "--tokenizer", tmp_path / "words.json", "--no-check") == 0
            ), capsys.readouterr().err
            assert "model.vocab_size: 50, the embedding rows of the checkpoint" in capsys.readouterr().err
            with Checkpoint(resolve(out)) as checkpoint:
                assert all(torch.equal(checkpoint.tensor(name), weights[name]) for name in weights)
            assert (out / "tokenizer.json").is_file()
    (tmp_path / "words.json").rename(flat / "tokenizer.json")  # the default
    out = tmp_path / "named"
    assert call("--from", flat, "--out", out, "--no-check", "--set", "tokenizer.eod_token=w7") == 0
    assert "no tokenizer" not in capsys.readouterr().err
    assert (out / "tokenizer.json").is_file()
    assert load_config(out / "config.lock.yml").tokenizer.eod_token == "w7"


def test_errors_name_why_an_import_fails(folder, tmp_path, capsys):
    assert call("--from", tmp_path / "nowhere", "--out", tmp_path / "ours") == 4
    assert call("--from", folder, "--out", tmp_path / "ours", "--conf", "x.yml") == 2
    assert call("--from", folder, "--out", tmp_path / "ours", "--tokenizer", "nowhere.json") == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert call("--from", folder, "--out", tmp_path / "full") == 4
    config, weights = make("neox")
    write_gpt_neox(tmp_path / "old", weights, config, 1, by_layer=True, padded_rows=50, old_names=True)
    assert call("--from", tmp_path / "old", "--out", tmp_path / "ours") == 2
    lines = capsys.readouterr().err.splitlines()
    for line, said in zip(
        lines,
        [
            "got=no such folder; want=a folder with config.json",
            "with a config on the command line",
            "tokenizer file is missing",
            "would overwrite",
            "checkpoint has no config",
        ],
        strict=True,
    ):
        assert said in line
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("positions", "dtype", "length", "precision"),
    [
        (64, torch.bfloat16, 64, "bf16"),
        (2048, torch.float16, 2048, "fp16"),
        (4096, torch.float32, 2048, "fp32"),
        (2049, torch.float64, 2048, "fp32"),
    ],
)
def test_the_config_of_a_run_that_continues(tmp_path, positions, dtype, length, precision):
    model = ModelConfig(vocab_size=9, max_position_embeddings=positions)
    weights = {"a": SimpleNamespace(dtype=dtype), "b": SimpleNamespace(dtype=torch.int8)}
    tokenizer = TokenizerConfig(file="t.json", eod_token="<e>")
    config = importer.run_config(model, weights, tokenizer, tmp_path / "out")
    assert (config.model, config.tokenizer, config.run.dir) == (model, tokenizer, str(tmp_path / "out"))
    assert (config.data.seq_length, config.precision.dtype, config.train.micro_batch_size) == (length, precision, 1)


@pytest.mark.parametrize(
    ("known", "ids", "wanted"),
    [
        (0, {"eos": 5}, None),
        (None, {"eos": 5}, "<5>"),
        (None, {"eos": (9, 5, 6)}, "<5>"),
        (None, {"eos": 9, "stop": (8, 6)}, "<6>"),
        (None, {"stop": (6,)}, "<6>"),
        (None, {"eos": 0}, "<0>"),
        (None, {"bos": 5, "pad": 6}, None),
    ],
)
def test_the_end_of_a_document_is_the_first_id_that_stops(known, ids, wanted):
    texts = {0: "<0>", 5: "<5>", 6: "<6>"}
    tokenizer = SimpleNamespace(eod_id=known, token_text=texts.get)
    assert importer.end_token(tokenizer, SpecialIds(**ids)) == wanted


def test_where_a_tokenizer_is_read(tmp_path):
    args = argparse.Namespace(tokenizer=None)
    assert importer.tokenizer_of(args, tmp_path) is None
    for name in ("tokenizer.json", "mine.json"):
        (tmp_path / name).write_text("")
    assert importer.tokenizer_of(args, tmp_path) == tmp_path / "tokenizer.json"
    args.tokenizer = str(tmp_path / "mine.json")
    assert importer.tokenizer_of(args, tmp_path) == tmp_path / "mine.json"
    args.tokenizer = str(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="tokenizer file is missing; where=--tokenizer; got=.*missing.json"):
        importer.tokenizer_of(args, tmp_path)


def test_a_tokenizer_of_exactly_the_vocabulary_is_copied_with_its_settings(tmp_path):
    source, stage = tmp_path / "source", tmp_path / "stage"
    stage.mkdir()
    size = Tokenizer(write_tokenizer(source)).vocab_size
    (source / "chat_template.jinja").write_text("x")
    (source / "other.json").write_text("x")
    args = argparse.Namespace(tokenizer=None)

    def config(vocab_size, file="t"):
        return SimpleNamespace(model=SimpleNamespace(vocab_size=vocab_size), tokenizer=SimpleNamespace(file=file))

    importer.copy_tokenizer(args, source, config(size, None), stage)
    with pytest.raises(
        ConfigError, match=f"tokenizer ids exceed the vocabulary; where=.*; got={size}; want=at most {size - 1}"
    ):
        importer.copy_tokenizer(args, source, config(size - 1), stage)
    assert list(stage.iterdir()) == []
    importer.copy_tokenizer(args, source, config(size), stage)
    assert sorted(path.name for path in stage.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (stage / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_what_an_import_reports(folder, tmp_path, capsys, monkeypatch):
    """Its parameters, and the largest difference, also where it is as large as it may be."""
    (tmp_path / "ours").mkdir()  # an empty folder is replaced
    monkeypatch.setattr(importer, "compare", lambda source, model, tokens: 1e-4 if source == folder else math.nan)
    assert call("--from", folder, "--out", tmp_path / "ours") == 0
    _, weights = from_huggingface(folder)
    count = sum(weight.numel() for weight in weights.values())
    shown = capsys.readouterr()
    assert shown.out == f"wrote {tmp_path / 'ours'}: {count:,} parameters; max logit difference 0.0001\n"
    assert shown.err == "note: the import has no tokenizer; generate, evaluate and export take --tokenizer FILE\n"
    assert call("--from", folder, "--out", tmp_path / "b", "--json", "--no-check") == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "b"), "parameters": count}
    monkeypatch.setattr(importer, "compare", lambda source, model, tokens: 1.01e-4)
    with pytest.raises(CheckpointError, match="want=a difference of at most 0.0001"):
        importer.check(tmp_path / "b", folder)


def test_without_a_peer_the_loss_is_reported_with_that_of_a_guess(folder, tmp_path, monkeypatch):
    assert call("--from", folder, "--out", tmp_path / "ours", "--no-check") == 0
    model = load_model(tmp_path / "ours")
    tokens = torch.arange(20).reshape(2, 10)
    monkeypatch.setattr(importer, "probe_tokens", lambda config, file: tokens)
    with torch.no_grad():
        scores = model(tokens[:, :-1]).log_softmax(-1)
    want = -scores.gather(2, tokens[:, 1:, None]).mean().item()
    found = importer.check(tmp_path / "ours", None)
    assert found == {
        "loss_on_probe": pytest.approx(want, rel=1e-5),
        "loss_of_uniform_guess": math.log(model.config.vocab_size),
    }
    monkeypatch.setattr(math, "isfinite", lambda value: False)
    with pytest.raises(CheckpointError, match="loss of the imported model is not finite; got="):
        importer.check(tmp_path / "ours", None)
