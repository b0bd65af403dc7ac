"""A dialogue: history, its end, streaming, stop texts."""

from __future__ import annotations

import pytest

from neox.config.schema import ModelConfig
from neox.data.text.tokenizer import Tokenizer, train_tokenizer
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.generate.session import Session, TextStream
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from tests.generate.sentencepiece import write_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[GPT, Tokenizer]:
    tokenizer = train_tokenizer(
        ["naïve café 東京 and so on "] * 30, 290, tmp_path_factory.mktemp("session") / "tokenizer.json"
    )
    sizes = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "init_std": 0.4,
    }
    return GPT(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes), Mesh.single("cpu")), tokenizer


def test_streamed_parts_concatenate_and_split_no_character(parts):
    _, tokenizer = parts
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for token in tokenizer.encode("naïve 東京"):
        stream.add(token)
        assert "\ufffd" not in "".join(pieces)
    stream.finish()
    assert "".join(pieces) == "naïve 東京"


def test_a_turn_continues_the_history(parts):
    model, tokenizer = parts
    session = Session(model, tokenizer, SamplingParams(5, 0.0))
    pieces: list[str] = []
    first = session.respond("so on", pieces.append)
    assert "".join(pieces) == first
    assert session.history[: len(tokenizer.encode("so on"))] == tokenizer.encode("so on")
    before = list(session.history)
    second = session.respond("café", pieces.append)
    expected = generate(model, [before + tokenizer.encode("café")], SamplingParams(5, 0.0), eod_id=tokenizer.eod_id)[0]
    assert second == tokenizer.decode(expected)
    session.reset()
    assert session.respond("so on", pieces.append) == first


def test_a_long_history_loses_its_beginning(parts):
    model, tokenizer = parts
    session = Session(model, tokenizer, SamplingParams(8, 0.0))
    for _ in range(12):
        session.respond("and so on and so on ", lambda text: None)
    assert len(session.history) > 32


@pytest.mark.parametrize("bos", [True, False])
def test_what_the_model_reads_of_a_long_history(parts, monkeypatch, tmp_path, bos):
    model, _ = parts
    tokenizer = Tokenizer(write_tokenizer(tmp_path))  # begins every text with <s>
    asked = []

    def note(model, prompts, params, **options):
        asked.append((prompts[0], params.seed, options))
        return [[9, 8]]

    monkeypatch.setattr("neox.generate.session.generate", note)
    session = Session(model, tokenizer, SamplingParams(8, 0.0, seed=5), bos=bos)
    first = [1] if bos else []
    history = []
    for turn in range(4):
        history += tokenizer.encode("river stone garden")
        session.respond("river stone garden", lambda text: None)
        prompt, seed, options = asked[-1]
        assert prompt == first + history[-(32 - 8 - len(first)) :] and seed == 5 + turn
        assert options["eod_id"] == tokenizer.end_ids and options["is_done"] is None
        history += [9, 8]
        assert session.history == history
    assert len(asked[-1][0]) == 24 < len(history)
    Session(model, tokenizer, SamplingParams(40, 0.0), bos=False).respond("river stone", lambda text: None)
    assert asked[-1][0] == tokenizer.encode("river stone")[-1:]  # no room: the last token alone
    Session(model, tokenizer, SamplingParams(8, 0.0), bos=bos).respond("<s>river", lambda text: None)
    assert asked[-1][0] == [1, *tokenizer.encode("<s>river")[1:]]


def test_an_answer_ends_after_a_stop(parts):
    model, tokenizer = parts
    full = Session(model, tokenizer, SamplingParams(12, 0.0)).respond("so", lambda text: None)
    answer = Session(model, tokenizer, SamplingParams(12, 0.0), stops=["", full[1]]).respond("so", lambda text: None)
    assert full.startswith(answer) and full[1] in answer and len(answer) < len(full)


def test_samples_differ_between_turns_and_not_between_runs(parts):
    model, tokenizer = parts

    def talk() -> list[str]:
        session = Session(model, tokenizer, SamplingParams(12, 1.0))
        answers = []
        for _ in range(3):
            session.reset()
            answers.append(session.respond("so", lambda text: None))
        return answers

    assert talk() == talk() and len(set(talk())) > 1


def test_an_empty_history_starts_with_end_of_document(parts):
    model, tokenizer = parts
    session = Session(model, tokenizer, SamplingParams(3, 0.0), stops=[""])
    session.respond("", lambda text: None)
    assert session.history[0] == tokenizer.eod_id


def test_leading_tokens_of_a_later_message_stay(parts, monkeypatch, tmp_path):
    """Only a text at the beginning stands where the template's tokens are already."""
    model, _ = parts
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    asked = []
    monkeypatch.setattr(
        "neox.generate.session.generate", lambda model, prompts, params, **_: asked.append(prompts[0]) or [[9]]
    )
    session = Session(model, tokenizer, SamplingParams(8, 0.0))
    own = tokenizer.encode("<s>river")
    for _ in range(2):
        session.respond("<s>river", str)
        session.respond("<s>river", str)
        assert asked[-2:] == [own, [*own, 9, *own]]
        session.reset()
    session = Session(model, tokenizer, SamplingParams(8, 0.0), bos=False)
    session.respond("<s>river", str)
    session.respond("", str)
    assert asked[-2:] == [own, [*own, 9]]  # no end of document where there is a history


def test_an_answer_ends_with_the_first_of_several_stops(parts):
    model, tokenizer = parts
    whole = Session(model, tokenizer, SamplingParams(12, 0.0)).respond("so", str)
    pieces: list[str] = []
    session = Session(model, tokenizer, SamplingParams(12, 0.0), ["@@@", "", whole[2]])
    answer = session.respond("so", pieces.append)
    assert "".join(pieces) == answer and session.stops == ["@@@", whole[2]] and session.turns == 1
    assert whole.startswith(answer) and whole[2] in answer and len(answer) < len(whole)


def test_an_interrupted_answer_leaves_the_message_alone(parts):
    model, tokenizer = parts
    session = Session(model, tokenizer, SamplingParams(3, 0.0))

    def fail(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        session.respond("so on", fail)
    assert session.history == tokenizer.encode("so on") and session.turns == 0
