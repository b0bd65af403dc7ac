"""What benchmarks need: log-likelihoods of continuations, and continuations, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F

from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model import pipeline
from neox.model.gpt import GPT

OnDone = Callable[[int], None]


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, longest first.

    There is little padding, and memory peaks in the first batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def log_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    max_length: int,
    batch_size: int,
    on_done: OnDone | None = None,
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation after its context, and whether greedy decoding would generate it.

    Args:
        model: in evaluation mode.
        pairs: (context, continuation) token ids, neither empty. Where they exceed max_length + 1 together, the
            beginning of the context is dropped.
        max_length: tokens that the model reads at once.
        batch_size: pairs of one forward pass.
        on_done: called with the number of pairs of each batch.

    Returns:
        (log-likelihood in nats, greedy) per pair, in their order.
    """
    device = next(model.parameters()).device
    rows = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for batch in batches([len(row) for row in rows], batch_size):
        longest = max(len(rows[i]) for i in batch) - 1
        inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
        for line, i in enumerate(batch):
            inputs[line, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
        lengths = torch.tensor([len(rows[i]) - 1 for i in batch])[:, None]
        positions = torch.minimum(torch.arange(longest)[None], lengths - 1)  # padding must not count in a text's length
        dynamic = model.rotary is not None and model.rotary.dynamic
        # [b, s, v]
        logits = pipeline.logits(model, inputs.to(device), position_ids=positions.to(device) if dynamic else None)
        for line, i in enumerate(batch):
            end, count = len(rows[i]) - 1, min(len(pairs[i][1]), max_length)
            scores = F.log_softmax(logits[line, end - count : end].float(), dim=-1)  # [count, v]
            targets = torch.tensor(rows[i][-count:], device=device)
            total = scores.gather(1, targets[:, None]).double().sum()  # fp32 sums above 1,024 nats round to 1e-4
            results[i] = (float(total), bool((scores.argmax(dim=-1) == targets).all()))
        if on_done is not None:
            on_done(len(batch))
    return results


def rolling_windows(tokens: list[int], prefix: int, max_length: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that predict every token of a text once, with as much context as fits.

    The context of the first window is `prefix`; the last window starts early enough to be full.
    """
    pairs = []
    done = 0
    while done < len(tokens):
        end = min(done + max_length, len(tokens))
        context = tokens[end - max_length - 1 : done] if done else [prefix]
        pairs.append((context, tokens[done:end]))
        done = end
    return pairs


def complete(
    model: GPT,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    decode: Callable[[list[int]], str],
    stops: Sequence[str],
    eod_id: int | Collection[int] | None,
    batch_size: int,
) -> list[str]:
    """Continue each prompt to a stop text, end-of-document or max_new_tokens; the stop text is not returned."""
    results = [""] * len(prompts)
    for batch in batches([len(prompt) for prompt in prompts], batch_size):
        rows = generate(
            model,
            [prompts[i] for i in batch],
            params,
            eod_id=eod_id,
            is_done=lambda _, tokens: truncate(decode(tokens), stops)[1],
            streams=batch,
        )
        for i, tokens in zip(batch, rows, strict=True):
            results[i] = truncate(decode(tokens), stops)[0]
    return results


def truncate(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop text, and whether there was one."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
