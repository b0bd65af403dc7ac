"""Conversations to tokens and labels: the answers of the assistant are learned, as the template renders them."""

from __future__ import annotations

import contextlib
import functools
import json
import os

import numpy as np
import pytest

from neox.data.store.indexed import IndexedDataset
from neox.data.text.chat import (
    MESSAGES,
    PAIR,
    TEMPLATES,
    ChatEncoder,
    ChatEncoding,
    conversations,
    find_template,
    learned_tokens,
    preprocess_chat,
    special_tokens,
)
from neox.data.text.chat_template import Template
from neox.data.text.preprocess import Options
from neox.data.text.template_process import RefusedConversation
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DataError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [
    said("system", "Be brief."),
    said("user", "How are you?"),
    said("assistant", "Fine é."),
    said("user", "And now?"),
    said("assistant", "Still fine."),
]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return train_tokenizer([message["content"] for message in TALK] * 3, 300, tmp_path / "t.json")


def learned(tokenizer: Tokenizer, tokens: np.ndarray, labels: np.ndarray) -> str:
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
    return tokenizer.decode([int(token) for token, label in zip(tokens, labels, strict=True) if label != -100])


def encoded(encoding: ChatEncoding, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    with contextlib.closing(ChatEncoder(encoding)) as encoder:
        return encoder.encode(messages)


@pytest.mark.parametrize(
    ("last_only", "want"),
    [
        (False, "Fine é.<|im_end|>\nStill fine.<|im_end|>\n<|endoftext|>"),
        (True, "Still fine.<|im_end|>\n<|endoftext|>"),
    ],
)
def test_only_answers_are_learned(tokenizer, last_only, want):
    tokens, labels = encoded(ChatEncoding(tokenizer.file, None, TEMPLATES["chatml"], last_only=last_only), TALK)
    assert tokenizer.decode(tokens) == Template(TEMPLATES["chatml"], {}).render(TALK, {})[0] + "<|endoftext|>"
    assert learned(tokenizer, tokens, labels) == want


def test_an_end_that_the_template_writes_is_not_written_twice(tokenizer):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokens, labels = encoded(ChatEncoding(tokenizer.file, None, template), TALK[1:3])
    assert tokens.tolist().count(tokenizer.eod_id) == 2 and tokens[-1] == labels[-1] == tokenizer.eod_id
    tokens, labels = encoded(ChatEncoding(tokenizer.file, None, TEMPLATES["chatml"]), TALK[:4])
    # the person speaks last: nothing is learned of how it ends
    assert tokens[-1] == tokenizer.eod_id and labels[-1] == -100


def test_templates_that_do_not_append_and_those_that_refuse():
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"
    with pytest.raises(RefusedConversation, match="does not only append"):
        Template(forgetful, {}).render_with_answers(TALK, {})
    with pytest.raises(RefusedConversation, match="no system messages"):
        Template("{{ raise_exception('no system messages') }}", {}).render_with_answers(TALK, {})
    with pytest.raises(RefusedConversation, match="refuses"):  # sandboxed
        Template("{{ messages.__class__.__mro__ }}", {}).render_with_answers(TALK, {})


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
    with pytest.raises(RefusedConversation, match=reason):
        conversations(line.encode(), MESSAGES)


@pytest.mark.parametrize("template", [TEMPLATES["plain"], "<|endoftext|>"])
def test_a_conversation_without_messages_is_refused(tokenizer, template):
    with pytest.raises(RefusedConversation, match="no messages"):
        encoded(ChatEncoding(tokenizer.file, None, template), [])


def test_pairs_in_their_usual_forms():
    question, yes, no = said("user", "Q"), said("assistant", "yes"), said("assistant", "no")
    for line in (
        {"chosen": [question, yes], "rejected": [question, no]},
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": [question], "chosen": [yes], "rejected": [no]},
        {"prompt": "Q", "chosen": [question, yes], "rejected": [question, no]},
    ):
        assert conversations(json.dumps(line).encode(), PAIR)[0] == [[question, yes], [question, no]]


def test_files_are_the_same_for_any_number_of_workers(tokenizer, tmp_path):
    lines = [
        json.dumps({"messages": [said("user", f"question {i}"), said("assistant", f"{i} " * (i % 7 + 1))]})
        for i in range(60)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:30], "{oops", "", *lines[30:]]) + "\n")
    encoding = ChatEncoding(tokenizer.file, None, TEMPLATES["chatml"])
    found = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        summary = preprocess_chat(
            [str(tmp_path / "in.jsonl")], out, encoding, Options(workers=workers, bad_lines="skip")
        )
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
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "the default"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert find_template(None, tokenizer.file) == "the default"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert find_template(None, tokenizer.file) == "from a file"
    assert find_template("plain", tokenizer.file) == TEMPLATES["plain"]
    with pytest.raises(ConfigError, match="cannot read"):
        find_template("nowhere.jinja", tokenizer.file)


def test_the_token_that_holds_the_first_character_of_an_answer_is_learned(tmp_path):
    tokenizer = train_tokenizer(["user: Is it? assistant: yes no yes no " * 20], 400, tmp_path / "t.json")
    talk = [said("user", "Is it?"), said("assistant", "yes")]
    tokens, labels = encoded(ChatEncoding(tokenizer.file, None, TEMPLATES["plain"]), talk)
    # the token " yes" begins before the answer
    assert learned(tokenizer, tokens, labels) == " yes<|endoftext|>\n<|endoftext|>"


def test_learned_tokens_are_those_that_overlap_a_span():
    offsets = [(0, 2), (2, 5), (5, 5), (5, 6), (5, 6), (6, 9)]
    assert learned_tokens(offsets, [(3, 6)]) == [False, True, True, True, True, False]
    assert learned_tokens(offsets, [(0, 1), (8, 9)]) == [True, False, False, False, False, True]
    assert learned_tokens(offsets, [(2, 2), (9, 12)]) == [False] * 6


def test_messages_that_call_tools_need_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    line = json.dumps({"messages": [said("user", "Q"), call], "tools": [{"name": "f"}], "documents": "none"})
    assert conversations(line.encode(), MESSAGES) == ([[said("user", "Q"), call]], {"tools": [{"name": "f"}]})


def test_special_tokens_are_those_of_the_settings(tokenizer, tmp_path):
    assert special_tokens(tokenizer.file, "<|endoftext|>") == {"eos_token": "<|endoftext|>"}
    assert special_tokens(tokenizer.file, None) == {}
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "unk_token": None,
        "pad_token": "<pad>",
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert special_tokens(tokenizer.file, "<|endoftext|>") == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    assert special_tokens(tokenizer.file, None) == {}


def test_a_template_that_is_no_regular_file_is_refused_at_once(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ConfigError, match="cannot read the chat template; .*not a regular file"):
            find_template(str(path), tokenizer.file)
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ConfigError, match="a FIFO, not a regular file"):
        find_template(None, tokenizer.file)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        find_template(None, tokenizer.file)


@pytest.mark.parametrize("bad_lines", ["skip", "quarantine", "fail"])
def test_bad_conversations_are_quarantined_only_if_requested(tokenizer, tmp_path, bad_lines):
    good = json.dumps({"messages": [said("user", "say"), said("assistant", "yes")]})
    (tmp_path / "in.jsonl").write_text(f"{good}\n{{oops\n")
    run = functools.partial(
        preprocess_chat,
        [str(tmp_path / "in.jsonl")],
        tmp_path / "out",
        ChatEncoding(tokenizer.file, None, TEMPLATES["chatml"]),
    )
    if bad_lines == "fail":
        with pytest.raises(DataError, match=r"bad line; where=.*in\.jsonl"):
            run(Options(bad_lines=bad_lines))
        assert not list(tmp_path.glob("out*"))
        return
    summary = run(Options(bad_lines=bad_lines))
    kept = tmp_path / "out.quarantine.jsonl"
    assert (summary.documents, summary.bad_lines) == (1, 1)
    assert summary.quarantine == (str(kept) if bad_lines == "quarantine" else None) and kept.exists() == (
        bad_lines == "quarantine"
    )


def test_a_template_that_fails_is_a_bad_line_with_its_message(tokenizer, tmp_path):
    lines = [{"messages": [said("user", text), said("assistant", "yes")]} for text in ("good", "bad", "good")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = "{% if messages[0].content == 'bad' %}{{ 1 / 0 }}{% endif %}" + TEMPLATES["chatml"]
    for workers in (0, 1):
        out = tmp_path / f"out{workers}"
        summary = preprocess_chat(
            [str(tmp_path / "in.jsonl")],
            out,
            ChatEncoding(tokenizer.file, None, template),
            Options(workers=workers, bad_lines="skip"),
        )
        assert (summary.documents, summary.bad_lines) == (2, 1)
        assert summary.bad_examples[0]["reason"] == "chat template refuses the conversation: division by zero"
    with pytest.raises(ConfigError, match="chat template cannot be used; .*got=No filter named 'nowhere'"):
        preprocess_chat(
            [str(tmp_path / "in.jsonl")], tmp_path / "no", ChatEncoding(tokenizer.file, None, "{{ 1 | nowhere }}")
        )
