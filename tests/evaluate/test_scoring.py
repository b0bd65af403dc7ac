"""Batches, windows, log-likelihoods against one text at a time."""

from __future__ import annotations

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.evaluate.scoring import batches, complete, log_likelihoods, rolling_windows, truncate
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def model() -> GPT:
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_position_embeddings=16, init_std=0.3
    )
    return GPT(config, Mesh.single("cpu")).eval()


PAIRS = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9, 10]), ([11, 12], [13, 14]), ([1] * 20, [2, 3]), ([7], [7])]
FULL = [([1], list(range(2, 18))), ([1], list(range(2, 19))), ([1] * 3, list(range(2, 30)))]  # 16 tokens are scored


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_log_likelihoods_do_not_depend_on_the_batch(model, batch_size):
    seen = []
    got = log_likelihoods(model, PAIRS + FULL, max_length=16, batch_size=batch_size, on_done=seen.append)
    assert sum(seen) == len(PAIRS + FULL) and max(seen) == batch_size
    for (context, continuation), (value, greedy) in zip(PAIRS + FULL, got, strict=True):
        row = (context + continuation)[-17:]
        continuation = continuation[-16:]
        with torch.no_grad():
            scores = torch.log_softmax(model(torch.tensor([row[:-1]]))[0].double(), -1)[-len(continuation) :]
        assert value == pytest.approx(float(scores[range(len(continuation)), continuation].sum()), abs=1e-5)
        assert greedy == (scores.argmax(-1).tolist() == continuation)


def test_greedy_flag_agrees_with_greedy_decoding(model):
    with torch.no_grad():
        best = int(model(torch.tensor([[3, 4]]))[0, -1].argmax())
    assert (
        log_likelihoods(model, [([3, 4], [best]), ([3, 4], [(best + 1) % 50])], max_length=16, batch_size=2)[0][1]
        is True
    )
    assert log_likelihoods(model, [([3, 4], [(best + 1) % 50])], max_length=16, batch_size=2)[0][1] is False


@pytest.mark.parametrize("length", [1, 4, 5, 8, 11, 13])
def test_rolling_windows_are_those_of_the_harness(length):
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm-evaluation-harness (the extra eval)")
    tokens = list(range(10, 10 + length))
    theirs = [
        utils.make_disjoint_window(pair)
        for pair in utils.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=4, context_len=1)
    ]
    ours = rolling_windows(tokens, 0, 4)
    assert ours == [(list(context), list(continuation)) for context, continuation in theirs]
    assert [token for _, continuation in ours for token in continuation] == tokens


def test_batches_go_from_long_to_short():
    assert list(batches([3, 9, 5], 2)) == [[1, 2], [0]]


def test_texts_end_before_the_first_stop(model):
    assert truncate("ab\ncd.", [".", "\n"]) == ("ab", True)
    assert truncate("ab", ["x", ""]) == ("ab", False)
    assert truncate("\nab", ["b", "\n"]) == ("", True)

    def decode(tokens: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)

    whole = complete(model, [[1], [2, 3]], SamplingParams(12, 0.0), decode=decode, stops=[], eod_id=None, batch_size=2)
    stop = whole[0][4]
    stopped = complete(
        model, [[1], [2, 3]], SamplingParams(12, 0.0), decode=decode, stops=[stop], eod_id=None, batch_size=1
    )
    assert [len(text) for text in whole] == [12, 12]
    assert stopped == [text.split(stop)[0] for text in whole]


def test_sampled_texts_do_not_depend_on_the_batch(model):
    """Batches are formed by length, and every prompt has its own random stream, also if two prompts are equal."""

    def decode(tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def texts(size: int) -> list[str]:
        prompts = [[1], [2, 3], [1], [4, 5, 6]]
        return complete(model, prompts, SamplingParams(8), decode=decode, stops=[], eod_id=None, batch_size=size)

    alone = texts(1)
    assert texts(2) == texts(4) == alone and len(set(alone)) == 4


@pytest.mark.parametrize(
    ("lengths", "size", "wanted"),
    [
        ([], 2, []),
        ([5], 2, [[0]]),
        ([5, 5, 5, 5], 2, [[0, 1], [2, 3]]),
        ([1, 9, 1, 9, 4], 2, [[1, 3], [4, 0], [2]]),
        ([1, 2], 1, [[1], [0]]),
    ],
)
def test_equal_lengths_keep_their_order_and_no_batch_is_empty(lengths, size, wanted):
    assert list(batches(lengths, size)) == wanted


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("abcabc", ["c", "b"], ("a", True)),
        ("abc", ["abc"], ("", True)),
        ("abc", [], ("abc", False)),
        ("", ["a"], ("", False)),
        ("abab", ["ba", "ab"], ("", True)),
        ("abc", ["c"], ("ab", True)),
    ],
)
def test_the_earliest_of_all_stops_ends_a_text(text, stops, wanted):
    assert truncate(text, stops) == wanted


def test_windows_of_a_long_text_have_all_the_context_that_fits():
    assert rolling_windows([1, 2, 3, 4, 5, 6, 7], 0, 3) == [
        ([0], [1, 2, 3]),
        ([3], [4, 5, 6]),
        ([4, 5, 6], [7]),
    ]
    assert rolling_windows([1, 2, 3], 9, 3) == [([9], [1, 2, 3])] and rolling_windows([], 0, 3) == []
    assert rolling_windows([1, 2], 0, 1) == [([0], [1]), ([1], [2])]


def test_texts_end_at_the_end_of_document_too(model):
    def decode(tokens: list[int]) -> str:
        return ",".join(map(str, tokens))

    prompts, params = [[1], [2, 3], [4]], SamplingParams(6, 0.0)
    options = {"decode": decode, "stops": [], "batch_size": 2}
    whole = complete(model, prompts, params, eod_id=None, **options)
    end = int(whole[1].split(",")[2])
    found = complete(model, prompts, params, eod_id={end}, **options)
    for text, free in zip(found, whole, strict=True):
        tokens = free.split(",")
        until = tokens.index(str(end)) if str(end) in tokens else 6
        assert text == ",".join(tokens[:until])


def test_batches_are_reported_as_they_are_done(model):
    seen = []
    log_likelihoods(model, PAIRS, max_length=16, batch_size=2, on_done=seen.append)
    assert seen == [2, 2, 1] and log_likelihoods(model, [], max_length=16, batch_size=2) == []


def test_long_sums_are_exact_and_half_precision_is_widened_first(model, monkeypatch):
    """40,000 tokens of log 3 each: a sum in fp32 is rounded to multiples of 0.004."""
    monkeypatch.setattr(
        "neox.evaluate.scoring.pipeline.logits", lambda model, tokens, position_ids: torch.zeros(*tokens.shape, 3)
    )
    ((value, greedy),) = log_likelihoods(model, [([1], [0] * 40_000)], max_length=40_000, batch_size=1)
    assert value == pytest.approx(40_000 * float(torch.zeros(3).log_softmax(0)[0]), rel=1e-12) and greedy
    scores = torch.randn(1, 6, 50, generator=torch.Generator().manual_seed(5)).bfloat16()
    monkeypatch.setattr("neox.evaluate.scoring.pipeline.logits", lambda model, tokens, position_ids: scores)
    ((value, greedy),) = log_likelihoods(model, [([1, 2], [3, 4, 5, 6, 7])], max_length=16, batch_size=1)
    wanted = scores[0].double().log_softmax(-1)[range(1, 6), [3, 4, 5, 6, 7]].sum().item()
    assert value == pytest.approx(wanted, abs=1e-5) and greedy is False


def test_a_continuation_is_greedy_if_every_token_is(model):
    (best,) = generate(model, [[3, 4]], SamplingParams(4, 0.0))
    wrong = [[*best[:i], (best[i] + 1) % 50, *best[i + 1 :]] for i in range(4)]
    pairs = [([3, 4], tokens) for tokens in (best, *wrong)]
    found = log_likelihoods(model, pairs, max_length=16, batch_size=3)
    assert [greedy for _, greedy in found] == [True, False, False, False, False]
