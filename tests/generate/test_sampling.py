"""Sampling: ranges, greedy, top-k, top-p against brute force, and independence of the batch."""

import math

import pytest
import torch

from neox.errors import ConfigError
from neox.generate.sampling import LOWEST_TEMPERATURE, SamplingParams, choose, filter_logits, prompt_generator


@pytest.mark.parametrize(
    "change, key",
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-320}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_values_out_of_range_are_named(change, key):
    with pytest.raises(ConfigError, match=f"where={key}"):
        SamplingParams(**change)


def test_the_ends_of_every_range_are_accepted():
    params = SamplingParams(max_new_tokens=1, temperature=0.0, top_k=1, top_p=1.0, seed=0)
    assert params.greedy and not SamplingParams().greedy


def test_top_p_is_of_the_tokens_that_top_k_left():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()  # 0.4, 0.3, 0.2, 0.1; of the first two: 4/7, 3/7
    assert filter_logits(logits, 2, 0.55).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, 4, 0.55).isfinite().tolist() == [[True, True, False, False]]


def test_draws_are_from_the_tokens_that_are_left():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log().repeat(200, 1)
    for params, left in ((SamplingParams(top_k=2), {0, 1}), (SamplingParams(top_p=0.65), {0, 1})):
        assert set(choose(logits, params, [prompt_generator(7, 0)] * 200).tolist()) == left
    colder = SamplingParams(temperature=0.5, top_p=0.5)  # 16, 9, 4 and 1 of 30
    assert set(choose(logits, colder, [prompt_generator(7, 0)] * 200).tolist()) == {0}


def test_greedy_takes_the_largest_logit_and_draws_nothing():
    logits = torch.randn(5, 31, generator=torch.Generator().manual_seed(0))
    generator = prompt_generator(1, 0)
    before = generator.get_state()
    assert torch.equal(choose(logits, SamplingParams(temperature=0), [generator] * 5), logits.argmax(-1))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("top_k", [1, 3, 31, 100])
def test_top_k_keeps_the_k_largest(top_k):
    logits = torch.randn(4, 31, generator=torch.Generator().manual_seed(1))
    kept = filter_logits(logits, top_k, None).isfinite()
    for row in range(4):
        expected = set(sorted(range(31), key=lambda v: -logits[row, v].item())[:top_k])
        assert set(kept[row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    logits = torch.randn(6, 17, generator=torch.Generator().manual_seed(2))
    kept = filter_logits(logits, None, top_p).isfinite()
    probability = logits.double().softmax(-1)
    for row in range(6):
        expected, mass = set(), 0.0
        for token in sorted(range(17), key=lambda v: -probability[row, v].item()):
            expected.add(token)
            mass += probability[row, token].item()
            if mass >= top_p:
                break
        assert set(kept[row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_top_p_stops_where_p_is_reached_exactly(top_p, count):
    assert filter_logits(torch.zeros(1, 4), None, top_p).isfinite().sum() == count


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]]).repeat(4000, 1)
    generator = prompt_generator(7, 0)
    share = choose(logits, SamplingParams(), [generator] * 4000).bincount(minlength=3) / 4000
    assert share[2] == 0
    assert abs(share[1].item() - 0.75) < 0.03


def test_the_lowest_temperature_is_still_finite():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, SamplingParams(temperature=LOWEST_TEMPERATURE), [generator]).tolist() == [0]


def test_temperature_sharpens():
    logits = torch.tensor([[0.0, 1.0]]).repeat(4000, 1)
    generator = prompt_generator(7, 0)
    share = choose(logits, SamplingParams(temperature=0.25), [generator] * 4000).float().mean().item()
    assert abs(share - 1 / (1 + math.exp(-4))) < 0.02


def test_a_prompt_draws_the_same_alone_and_in_a_batch():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(seed=11)
    together = choose(logits, params, [prompt_generator(11, row) for row in range(3)])
    alone = torch.cat([choose(logits[row : row + 1], params, [prompt_generator(11, row)]) for row in range(3)])
    assert torch.equal(together, alone)
    assert not torch.equal(prompt_generator(11, 0).get_state(), prompt_generator(11, 1).get_state())


def test_the_streams_of_prompts_are_pinned():
    """Each prompt has a stream of its own; the first is not that of the bare seed, which training and other tools
    use.
    """
    seeds = [prompt_generator(seed, prompt).initial_seed() for seed, prompt in ((0, 0), (0, 1), (1, 0), (1234, 7))]
    assert seeds == [2177342782468422677, 4354685564936845354, 2177342782468422678, 8195370222892606842]
    assert prompt_generator(1234, 0).initial_seed() != 1234


def test_the_defaults_are_those_of_the_command():
    params = SamplingParams()
    assert (params.max_new_tokens, params.temperature, params.top_k, params.top_p) == (64, 1.0, None, None)
    assert params.seed == 1234 and not SamplingParams(temperature=LOWEST_TEMPERATURE).greedy
    with pytest.raises(ConfigError, match="where=temperature; got=9e-06; want=0 .greedy., or finite and >= 1e-05"):
        SamplingParams(temperature=9e-6)


def test_the_more_likely_tokens_of_half_precision_are_drawn_in_single():
    """Its softmax and sums would round: 4,096 equal tokens have a probability each that bf16 cannot add up."""
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    assert choose(logits, SamplingParams(temperature=0), []).tolist() == [0]
    drawn = choose(logits.repeat(300, 1), SamplingParams(top_p=0.5), [prompt_generator(3, 0)] * 300)
    assert drawn.dtype == torch.int64 and drawn.max() < 2048 and drawn.max() > 1900 and drawn.min() < 148


def test_tokens_as_likely_as_the_last_one_of_top_k_stay():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert filter_logits(logits, 2, None).isfinite().tolist() == [[True, False, True, True, False]]
    assert torch.equal(filter_logits(logits, 5, 1.0), logits) and torch.equal(filter_logits(logits, None, None), logits)
    assert filter_logits(logits, 1, None).tolist() == [[3.0] + [-math.inf] * 4]


def test_a_row_draws_from_its_own_stream():
    logits = torch.zeros(2, 1000)
    first, second = (choose(logits[:1], SamplingParams(), [prompt_generator(5, row)]).item() for row in (0, 1))
    streams = [prompt_generator(5, 1), prompt_generator(5, 0)]
    assert choose(logits, SamplingParams(), streams).tolist() == [second, first]
    assert [choose(logits, SamplingParams(), streams).tolist() != [second, first]] == [True]  # they continue
    with pytest.raises(ValueError, match="zip"):
        choose(logits, SamplingParams(), streams[:1])
