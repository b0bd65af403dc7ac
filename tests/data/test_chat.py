"""Conversations to tokens and labels: what is learned is what the assistant says, as the template writes it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neox.data.chat import MESSAGES, PAIR, TEMPLATES, ChatEncoder, ChatEncoding, Template, Unusable, conversations, find_template, preprocess_chat
from neox.data.indexed import IndexedDataset
from neox.data.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DataError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [said("system", "Be brief."), said("user", "How are you?"), said("assistant", "Fine é."), said("user", "And now?"), said("assistant", "Still fine.")]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return train_tokenizer([message["content"] for message in TALK] * 3, 300, tmp_path / "t.json")


def learned(tokenizer: Tokenizer, tokens: np.ndarray, labels: np.ndarray) -> str:
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
    return tokenizer.decode([int(token) for token, label in zip(tokens, labels, strict=True) if label != -100])


@pytest.mark.parametrize(
    ("last_only", "want"),
    [(False, "Fine é.<|im_end|>\nStill fine.<|im_end|>\n<|endoftext|>"), (True, "Still fine.<|im_end|>\n<|endoftext|>")],
)
def test_only_answers_are_learned(tokenizer, last_only, want):
    tokens, labels = ChatEncoder(ChatEncoding(tokenizer.file, None, TEMPLATES["chatml"], last_only=last_only)).encode(TALK)
    assert tokenizer.decode(tokens) == Template(TEMPLATES["chatml"], {}).render(TALK) + "<|endoftext|>"
    assert learned(tokenizer, tokens, labels) == want


def test_an_end_that_the_template_writes_is_not_written_twice(tokenizer):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokens, labels = ChatEncoder(ChatEncoding(tokenizer.file, None, template)).encode(TALK[1:3])
    assert tokens.tolist().count(tokenizer.eod_id) == 2 and tokens[-1] == labels[-1] == tokenizer.eod_id
    tokens, labels = ChatEncoder(ChatEncoding(tokenizer.file, None, TEMPLATES["chatml"])).encode(TALK[:4])
    assert tokens[-1] == tokenizer.eod_id and labels[-1] == -100  # the person speaks last: nothing is learned of how it ends


def test_templates_that_do_not_append_and_those_that_refuse():
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"
    with pytest.raises(Unusable, match="does not append"):
        Template(forgetful, {}).answers(TALK)
    with pytest.raises(Unusable, match="no system messages"):
        Template("{{ raise_exception('no system messages') }}", {}).answers(TALK)
    with pytest.raises(ConfigError, match="no Jinja"):
        Template("{% for %}", {})
    with pytest.raises(Unusable, match="refuses"):  # sandboxed
        Template("{{ messages.__class__.__mro__ }}", {}).answers(TALK)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not JSON"),
        ("[1]", "a JSON list"),
        ('{"text": "a"}', "no key 'messages'"),
        ('{"messages": "a"}', "not a list of messages"),
        ('{"messages": [{"role": "user"}]}', "not a list of messages"),
    ],
)
def test_lines_that_are_no_conversation(line, reason):
    with pytest.raises(Unusable, match=reason):
        conversations(line.encode(), MESSAGES)


def test_pairs_in_their_usual_forms():
    question, yes, no = said("user", "Q"), said("assistant", "yes"), said("assistant", "no")
    for line in (
        {"chosen": [question, yes], "rejected": [question, no]},
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": [question], "chosen": [yes], "rejected": [no]},
        {"prompt": "Q", "chosen": [question, yes], "rejected": [question, no]},
    ):
        assert conversations(json.dumps(line).encode(), PAIR) == [[question, yes], [question, no]]


def test_files_are_the_same_for_any_number_of_workers(tokenizer, tmp_path):
    lines = [json.dumps({"messages": [said("user", f"say {i}"), said("assistant", f"{i} " * (i % 7 + 1))]}) for i in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:30], "{oops", "", *lines[30:]]) + "\n")
    encoding = ChatEncoding(tokenizer.file, None, TEMPLATES["chatml"])
    found = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        summary = preprocess_chat([str(tmp_path / "in.jsonl")], out, encoding, workers=workers, bad_lines="skip")
        assert (summary.documents, summary.bad_lines, summary.blank_lines) == (60, 1, 1)
        tokens, labels = IndexedDataset(out), IndexedDataset(f"{out}_labels")
        assert (tokens.sizes == labels.sizes).all() and labels.dtype == np.int32
        assert summary.learned == sum(int((row != -100).sum()) for row in labels) < summary.tokens == tokens.num_tokens
        assert learned(tokenizer, tokens[9], labels[9]) == "9 9 9 <|im_end|>\n<|endoftext|>"
        found.append([(tmp_path / f"out{workers}{kind}.bin").read_bytes() for kind in ("", "_labels")])
    assert found[0] == found[1]
    with pytest.raises(DataError, match="in.jsonl:31; got=not JSON"):
        preprocess_chat([str(tmp_path / "in.jsonl")], tmp_path / "strict", encoding)
    assert not list(tmp_path.glob("strict*"))


def test_where_a_template_comes_from(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        find_template(None, tokenizer.file)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from settings"}))
    assert find_template(None, tokenizer.file) == "from settings"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert find_template(None, tokenizer.file) == "from a file"
    assert find_template("plain", tokenizer.file) == TEMPLATES["plain"]
    with pytest.raises(ConfigError, match="cannot read"):
        find_template("nowhere.jinja", tokenizer.file)


def test_the_text_is_that_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer.file, eos_token="<|endoftext|>")
    for name in ("chatml", "plain"):
        theirs.chat_template = TEMPLATES[name]
        ours = Template(TEMPLATES[name], {"eos_token": "<|endoftext|>"})
        assert theirs.apply_chat_template(TALK, tokenize=False) == ours.render(TALK)
        assert theirs.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True) == ours.render(TALK[:4], ask=True)
