"""Conversations: which forms a line may have, which tokens are learned, and the datasets of pairs."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import psutil
import pytest
import tokenizers

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
    prefixes,
    preprocess_chat,
    special_tokens,
)
from neox.data.text.preprocess import Options
from neox.data.text.reading import BadLine, TextChunk
from neox.data.text.template_process import RefusedConversation
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError, DataError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


Q, YES, NO = said("user", "Q"), said("assistant", "yes"), said("assistant", "no")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return train_tokenizer(["user Q assistant yes no"] * 3, 300, tmp_path / "t.json")


@pytest.mark.parametrize(
    ("keys", "line", "found"),
    [
        (MESSAGES, {"messages": [Q, YES], "prompt": "ignored"}, [[Q, YES]]),
        (PAIR, {"prompt": [Q], "chosen": [YES], "rejected": "no"}, [[Q, YES], [Q, NO]]),
        (
            PAIR,
            {"prompt": [Q, YES], "chosen": [Q, YES, Q, NO], "rejected": [Q, NO]},
            [[Q, YES, Q, NO], [Q, YES, Q, NO]],
        ),
        (PAIR, {"prompt": [], "chosen": [Q, YES], "rejected": [Q, NO]}, [[Q, YES], [Q, NO]]),
        # a question that is asked again is no repeated prompt
        (PAIR, {"prompt": [Q], "chosen": [YES, Q, NO], "rejected": [NO]}, [[Q, YES, Q, NO], [Q, NO]]),
        (MESSAGES, {"messages": []}, [[]]),
        (MESSAGES, {"messages": [Q, CALL]}, [[Q, CALL]]),
    ],
)
def test_forms_of_a_line(keys, line, found):
    assert conversations(json.dumps(line).encode(), keys) == (found, {})


@pytest.mark.parametrize(
    ("keys", "line", "reason"),
    [
        (PAIR, {"chosen": [Q, YES]}, "no key 'rejected'"),
        (PAIR, {"rejected": [Q, YES]}, "no key 'chosen'"),
        (PAIR, {}, "no key 'chosen'"),
        (PAIR, {"chosen": "yes", "rejected": "no"}, "key 'chosen' is not a list of messages"),
        (PAIR, {"chosen": [Q, YES], "rejected": [5]}, "key 'rejected' is not a list of messages"),
        (PAIR, {"prompt": 5, "chosen": [YES], "rejected": [NO]}, "key 'prompt' is not a list of messages"),
        (PAIR, {"prompt": [{}], "chosen": [YES], "rejected": [NO]}, "key 'prompt' is not a list of messages"),
        (PAIR, {"prompt": None, "chosen": [YES], "rejected": [NO]}, "key 'prompt' is not a list of messages"),
        (MESSAGES, {"messages": [Q, {"role": 1, "content": "x"}]}, "key 'messages' is not a list of messages"),
        (MESSAGES, {"messages": [Q, {"content": "x"}]}, "key 'messages' is not"),
        (
            MESSAGES,
            {"messages": [Q, {**CALL, "content": 1}]},
            "key 'messages' is not",
        ),
        (
            MESSAGES,
            {"messages": [Q, {**CALL, "tool_calls": {}}]},
            "key 'messages' is not",
        ),
        (MESSAGES, {"messages": [Q, {"role": "assistant", "content": None}]}, "key 'messages' is not"),
        (MESSAGES, {"messages": None}, "key 'messages' is not"),
    ],
)
def test_forms_that_are_refused_name_the_key(keys, line, reason):
    with pytest.raises(RefusedConversation, match=f"^{reason}"):
        conversations(json.dumps(line).encode(), keys)


def test_tools_and_documents_belong_to_every_answer_of_the_line():
    more = {"tools": [{"name": "f"}], "documents": [{"text": "d"}]}
    line = json.dumps({"prompt": "Q", "chosen": "yes", "rejected": "no", **more, "other": [1]})
    assert conversations(line.encode(), PAIR) == ([[Q, YES], [Q, NO]], more)


@pytest.mark.parametrize(
    ("spans", "learned"),
    [
        ([(0, 4)], [0, 1]),
        ([(1, 2)], [0]),
        ([(2, 3)], [1]),
        ([(1, 3)], [0, 1]),
        ([(4, 6), (0, 1)], [0, 2]),
        ([(6, 9)], []),
        ([], []),
    ],
)
def test_a_token_is_learned_if_it_shares_a_character_with_an_answer(spans, learned):
    assert [i for i, each in enumerate(learned_tokens([(0, 2), (2, 4), (4, 6)], spans)) if each] == learned


def test_names_of_the_datasets():
    assert prefixes("out", MESSAGES) == [("out", "out_labels")]
    pair = [("out_chosen", "out_chosen_labels"), ("out_rejected", "out_rejected_labels")]
    assert prefixes("out", PAIR) == pair


@pytest.mark.parametrize("content", ["[]", '"text"', "5"])
def test_settings_of_another_form_have_no_template_and_no_tokens(tokenizer, tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot read the chat template; where=.*; want=a Jinja file"):
        find_template(None, tokenizer.file)
    assert special_tokens(tokenizer.file, "e") == {"eos_token": "e"}


@pytest.mark.parametrize("given", [None, 5, [], [{"name": "tool_use", "template": "x"}], [{"name": "default"}]])
def test_settings_without_a_template_of_text(tokenizer, tmp_path, given):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    message = r"no chat template; where=.*: chat_template\.jinja, tokenizer_config\.json; do=.*chatml, plain"
    with pytest.raises(ConfigError, match=message):
        find_template(None, tokenizer.file)


def test_a_template_that_is_named_comes_before_the_files(tokenizer, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("next to the tokenizer")
    (tmp_path / "mine.jinja").write_text("mine é")
    assert find_template(str(tmp_path / "mine.jinja"), tokenizer.file) == "mine é"
    assert find_template("chatml", tokenizer.file) == TEMPLATES["chatml"]
    with pytest.raises(ConfigError, match=r"cannot read the chat template; where=nowhere; got=No such file"):
        find_template("nowhere", tokenizer.file)


def test_lines_are_counted_and_named(tokenizer):
    good = json.dumps({"messages": [Q, YES]}).encode()
    only_asked = json.dumps({"messages": [Q]}).encode()
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "yes"}]}'
    block = [
        TextChunk("a.jsonl", 7, b"\n".join([good, b" \r", b"{", only_asked, surrogate, good]) + b"\n"),
        TextChunk("b.txt", 0, b"a text"),
        BadLine("c.jsonl", 3, "too long", None),
        TextChunk("d.jsonl", 1, json.dumps({"messages": [Q, YES], "tools": [{"name": "tool "}]}).encode()),
    ]
    template = "{% if tools %}{{ tools[0].name }}{% endif %}" + TEMPLATES["plain"]
    with contextlib.closing(ChatEncoder(ChatEncoding(tokenizer.file, None, template))) as encoder:
        found = encoder(block)
    text = "user: Q\nassistant: yes<|endoftext|>\n<|endoftext|>"
    assert [tokenizer.decode(tokens) for ((tokens, _),) in found.rows] == [text, text, "tool " + text]
    assert len(found.rows) == 3 and all(len(row) == 1 for row in found.rows) and found.blank == 1
    assert found.text_bytes == sum(len(block[i].content) for i in (0, 1, 3))
    bad = [(each.path, each.line, each.reason, each.content) for each in found.bad]
    assert bad[0] == ("c.jsonl", 3, "too long", None)
    assert bad[1][:2] == ("a.jsonl", 9) and bad[1][2].startswith("not JSON") and bad[1][3] == b"{"
    assert bad[2:] == [
        ("a.jsonl", 10, "no answer of the assistant", only_asked),
        ("a.jsonl", 11, "not JSON: a lone surrogate in the text", surrogate),
        ("b.txt", 0, "not JSON lines: conversations are read from .jsonl files", None),
    ]


def test_the_end_is_appended_only_if_asked(tokenizer, tmp_path):
    def encoded(**options: object) -> tuple[list[int], list[int]]:
        encoding = ChatEncoding(tokenizer.file, None, "{% for m in messages %}{{ m.content }}{% endfor %}", **options)
        with contextlib.closing(ChatEncoder(encoding)) as encoder:
            tokens, labels = encoder.encode([Q, YES])
            assert tokens.dtype == labels.dtype == np.int64
            return tokens.tolist(), labels.tolist()

    question, answer = tokenizer.encode("Q"), tokenizer.encode("Qyes")[1:]
    assert len(question) == 1
    assert encoded(append_eod=False) == ([*question, *answer], [-100, *answer])
    end = [tokenizer.eod_id]
    assert encoded() == ([*question, *answer, *end], [-100, *answer, *end])
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    plain.save(str(tmp_path / "plain.json"))
    with pytest.raises(ConfigError, match=r"no end-of-document token; where=.*plain\.json; do=name it by --eod-token"):
        ChatEncoder(ChatEncoding(str(tmp_path / "plain.json"), None, "{{ messages }}"))
    ChatEncoder(ChatEncoding(str(tmp_path / "plain.json"), None, "{{ messages }}", append_eod=False)).close()


def test_pairs_become_four_datasets_of_equal_numbers(tokenizer, tmp_path):
    lines = [{"prompt": f"Q{i}", "chosen": "yes" * (i + 1), "rejected": "no"} for i in range(5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n{}\n")
    seen, children = [], set(psutil.Process().children())
    encoding = ChatEncoding(tokenizer.file, None, TEMPLATES["plain"], keys=PAIR)
    summary = preprocess_chat(
        [str(tmp_path / "in.jsonl")],
        tmp_path / "out",
        encoding,
        Options(bad_lines="skip"),
        progress=lambda found: seen.append(found.documents),
    )
    made = {name: IndexedDataset(tmp_path / f"out_{name}") for name in ("chosen", "rejected")}
    labels = {name: IndexedDataset(tmp_path / f"out_{name}_labels") for name in made}
    assert (summary.documents, summary.bad_lines, summary.blank_lines, summary.files) == (5, 1, 1, 1)
    assert seen == [5] and summary.seconds > 0 and summary.text_bytes == (tmp_path / "in.jsonl").stat().st_size
    assert summary.tokens == sum(dataset.num_tokens for dataset in made.values())
    assert summary.bad_reasons == {"no key 'chosen'": 1}
    learned = 0
    for name, answers in (("chosen", ["yes" * (i + 1) for i in range(5)]), ("rejected", ["no"] * 5)):
        for i, answer in enumerate(answers):
            text = f"user: Q{i}\nassistant: {answer}<|endoftext|>\n<|endoftext|>"
            assert tokenizer.decode(made[name][i]) == text
            kept = [int(token) for token in labels[name][i] if token != -100]
            assert tokenizer.decode(kept).strip() == f"{answer}<|endoftext|>\n<|endoftext|>"
            learned += len(kept)
        for dataset in (made[name], labels[name]):
            sidecar = dataset.sidecar
            assert (sidecar.tokenizer_hash, sidecar.vocab_size, sidecar.eod_id) == (
                tokenizer.hash,
                tokenizer.vocab_size,
                0,
            )
        assert (made[name].dtype, labels[name].dtype) == (np.uint16, np.int32)
    assert summary.learned == learned
    with pytest.raises(DataError, match=r"dataset already exists; where=.*out_chosen\.idx"):
        preprocess_chat([str(tmp_path / "in.jsonl")], tmp_path / "out", encoding)
    again = preprocess_chat(
        [str(tmp_path / "in.jsonl")], tmp_path / "out", encoding, Options(bad_lines="skip", overwrite=True)
    )
    assert set(psutil.Process().children()) <= children  # the processes of the template have ended
    assert again.tokens == summary.tokens and len(list(tmp_path.glob("out*"))) == 12


def test_input_without_a_conversation_is_an_error_and_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n\n{}\n")
    encoding = ChatEncoding(tokenizer.file, None, TEMPLATES["plain"])
    with pytest.raises(DataError, match=r"input has no conversations; where=.*in\.jsonl; got=2 bad, 1 blank lines"):
        preprocess_chat([str(tmp_path / "in.jsonl")], tmp_path / "out", encoding, Options(bad_lines="quarantine"))
    assert not list(tmp_path.glob("out*"))


def test_the_form_of_the_input_is_passed_on(tokenizer, tmp_path):
    (tmp_path / "in.txt").write_text(json.dumps({"messages": [Q, YES]}) + "\n")
    encoding = ChatEncoding(tokenizer.file, None, TEMPLATES["plain"], form="txt")
    with pytest.raises(DataError, match=r"bad file; where=.*in\.txt; got=not JSON lines"):
        preprocess_chat([str(tmp_path / "in.txt")], tmp_path / "out", encoding)
