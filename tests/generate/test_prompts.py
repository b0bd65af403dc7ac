"""Prompts with the tokens that transformers puts around them, and answers with the spaces that follow the prompt."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.errors import ConfigError
from neox.generate.prompts import AnswerText, TextStream, encode_prompt
from tests.generate.sentencepiece import write_tokenizer

PROMPT = "river stone"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize(
    ("options", "before"),
    [
        ({}, [1]),
        ({"template": False}, []),
        ({"template": False, "add_bos_token": True}, []),
        ({"add_bos_token": False}, [1]),
    ],
)
def test_prompts_are_encoded_as_by_transformers(options, before, tmp_path):
    """The post-processor of tokenizer.json decides; transformers 5 does not read add_bos_token where that file
    exists.
    """
    tokenizer = Tokenizer(write_tokenizer(tmp_path, **options))
    assert tokenizer.template_tokens == (before, [])
    got = encode_prompt(tokenizer, PROMPT)
    assert got == AutoTokenizer.from_pretrained(tmp_path)(PROMPT)["input_ids"] == [*before, *tokenizer.encode(PROMPT)]
    assert encode_prompt(tokenizer, PROMPT, bos=False) == tokenizer.encode(PROMPT)


def test_a_leading_token_is_not_added_twice(llama):
    assert encode_prompt(llama, "<s>river").count(1) == 1


def test_byte_level_tokenizers_add_no_tokens(tmp_path):
    assert train_tokenizer(["some text"] * 9, 270, tmp_path / "t.json").template_tokens == ([], [])


def test_an_answer_retains_its_first_space(llama):
    prompt, answer = encode_prompt(llama, PROMPT), llama.encode("story")
    assert llama.decode(answer) == "story"  # decoded alone it has lost it
    assert AnswerText(llama, prompt).decode(answer) == " story"
    # nothing stands before it
    assert AnswerText(llama, [1]).decode(answer) == AnswerText(llama).decode(answer) == "story"


@pytest.mark.parametrize("prompt", ["river", "river stone " * 9, "東京", "café 東京 " * 5, "a\n", " ", "<s>"])
def test_prompt_and_answer_are_the_text_of_all_tokens(llama, prompt):
    draw = random.Random(3)
    ids = llama.encode(prompt)
    for _ in range(40):
        tokens = [draw.randrange(3, llama.vocab_size) for _ in range(draw.randrange(1, 12))]
        whole = llama.decode([*ids, *tokens])
        if whole.startswith(llama.decode(ids)):  # bytes that end no character make those before them undecodable
            assert llama.decode(ids) + AnswerText(llama, [1, *ids]).decode(tokens) == whole


def test_streamed_parts_concatenate_to_the_text(llama):
    prompt, answer = encode_prompt(llama, PROMPT), llama.encode("stone 東京 garden")
    pieces: list[str] = []
    stream = TextStream(llama, pieces.append, prompt)
    for token in answer:
        stream.add(token)
    stream.finish()
    assert "".join(pieces) == " stone 東京 garden"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_is_written_at_the_end_alone(tmp_path):
    tokenizer = train_tokenizer(["plain"], 257, tmp_path / "t.json")  # a token for every byte
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    tokens = tokenizer.encode("a東b東")
    assert len(tokens) == 8
    for token in tokens[:-1]:
        stream.add(token)
    assert pieces == ["a", "東", "b"]
    stream.finish()
    assert pieces[3:] == ["\ufffd"]


def test_an_answer_completes_a_character_of_the_prompt(tmp_path):
    """It is decoded alone then, as the prompt's text has changed; the context grows to the begin of a character."""
    tokenizer = train_tokenizer(["plain"], 257, tmp_path / "t.json")
    tokens = tokenizer.encode("東")
    assert AnswerText(tokenizer, tokens[:2]).decode(tokens[2:]) == tokenizer.decode(tokens[2:]) == "\ufffd"
    for text in ("東" * 9, "a" + "東" * 9, "ab" + "東" * 5):
        assert AnswerText(tokenizer, tokenizer.encode(text)).decode(tokenizer.encode("a東")) == "a東"


@pytest.mark.parametrize("length", [7, 8, 9, 40])
def test_the_context_is_the_end_of_the_prompt(llama, length):
    """Its beginning loses its space, so that the text of the answer does not begin with it."""
    ids = llama.encode("river stone garden letter " * 9)[:length]
    seen = []

    class Watched:
        template_tokens = ([1], [])

        def decode(self, tokens):
            seen.append(list(tokens))
            return llama.decode(tokens)

    assert AnswerText(Watched(), [1, *ids]).decode(llama.encode("stone")) == " stone"
    assert seen[-2:] == [ids[-8:], ids[-8:] + llama.encode("stone")]


def test_a_prompt_that_is_not_utf8_is_shown_as_far_as_fits(llama):
    with pytest.raises(ConfigError) as caught:
        encode_prompt(llama, "a\udcff" + "b" * 99)
    assert caught.value.got == "a\\xff" + "b" * 78
