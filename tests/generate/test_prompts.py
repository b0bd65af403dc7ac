"""Prompts with the tokens that transformers puts around them, and answers with the spaces that follow the prompt."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from neox.data.text.tokenizer import Tokenizer, train_tokenizer
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
