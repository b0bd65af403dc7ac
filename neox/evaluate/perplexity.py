"""Loss, perplexity and bits per byte of a model on an indexed dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from neox.data.store.indexed import IndexedDataset
from neox.data.text.tokenizer import Tokenizer
from neox.errors import ConfigError, DataError
from neox.model.gpt import GPT
from neox.model.pipeline import token_losses
from neox.targets import IGNORED

OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """The result of `evaluate`.

    Args:
        loss: mean negative log-likelihood of a token, nats.
        perplexity: exp(loss).
        bits_per_byte: total negative log-likelihood in bits, end-of-document tokens included, over the bytes of the
            text; it does not depend on the tokenizer. None without a tokenizer.
        tokens: tokens predicted.
        bytes: UTF-8 bytes of the documents' text; None without a tokenizer.
        documents: documents read.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None
    documents: int


def windows(tokens: np.ndarray, seq_length: int, first_context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide a token stream into windows so that every token is a target exactly once.

    Args:
        tokens: [n] the stream.
        seq_length: tokens of a window.
        first_context: context of the first token: the end-of-document token.

    Yields:
        inputs and targets, each [seq_length] int64; the last window is padded with targets that are IGNORED.
    """
    previous = np.concatenate([[first_context], tokens[:-1]]).astype(np.int64)
    for start in range(0, len(tokens), seq_length):
        inputs = previous[start : start + seq_length]
        targets = tokens[start : start + seq_length].astype(np.int64)
        missing = seq_length - len(inputs)
        if missing:
            inputs = np.concatenate([inputs, np.full(missing, first_context, np.int64)])
            targets = np.concatenate([targets, np.full(missing, IGNORED, np.int64)])
        yield inputs, targets


def text_bytes(dataset: IndexedDataset, documents: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text of the first `documents` documents, without end-of-document tokens."""
    total = 0
    for document in range(documents):
        tokens = _document(dataset, document)
        text = tokenizer.decode([token for token in tokens.tolist() if token != tokenizer.eod_id])
        total += len(text.encode("utf-8", errors="surrogatepass"))
    return total


def _document(dataset: IndexedDataset, document: int) -> np.ndarray:
    """All tokens of one document, [n] int64. Raises DataError if they differ from their checksums."""
    first, end = dataset.first_token_of_document(document), dataset.first_token_of_document(document + 1)
    return dataset.read(first, end - first)[0]


def evaluate(
    model: GPT,
    dataset: IndexedDataset,
    *,
    seq_length: int,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 8,
    max_documents: int | None = None,
    on_batch: OnBatch | None = None,
) -> Perplexity:
    """Read the documents consecutively in windows of seq_length tokens and predict every token once.

    Args:
        model: the model, any device and dtype.
        dataset: the documents.
        seq_length: tokens of a window; a token sees those before it in its window.
        tokenizer: gives bytes and the end-of-document token. Without it bits per byte are not computed.
        batch_size: windows of one forward pass.
        max_documents: read at most this many documents; None: all of them.
        on_batch: called with (windows done, windows in all).

    Raises:
        DataError: no token to predict, a token outside the model's vocabulary, or the dataset is damaged.
        ConfigError: windows longer than the model has positions.
    """
    config = model.config
    if config.position_embedding in ("rotary", "learned") and seq_length > config.max_position_embeddings:
        raise ConfigError(
            "window longer than the model has positions",
            where="seq_length",
            got=seq_length,
            want=f"<= {config.max_position_embeddings}",
        )
    documents = dataset.num_documents
    documents = documents if max_documents is None else min(documents, max_documents)
    tokens, _ = dataset.read(0, dataset.first_token_of_document(documents))
    _check_tokens(tokens, config.vocab_size, dataset)
    eod = tokenizer.eod_id if tokenizer is not None and tokenizer.eod_id is not None else int(tokens[-1])
    total = _total_loss(model, tokens, seq_length, eod, batch_size, on_batch)
    size = text_bytes(dataset, documents, tokenizer) if tokenizer is not None else None
    loss = total / len(tokens)
    bits_per_byte = total / math.log(2) / size if size else None
    return Perplexity(loss, math.exp(min(loss, 700.0)), bits_per_byte, len(tokens), size, documents)


def _check_tokens(tokens: np.ndarray, vocab_size: int, dataset: IndexedDataset) -> None:
    if len(tokens) == 0:
        raise DataError("nothing to evaluate", where=dataset.prefix, got="0 tokens", want="at least 1")
    largest, smallest = int(tokens.max()), int(tokens.min())
    if largest >= vocab_size or smallest < 0:
        raise DataError(
            "token outside the model's vocabulary",
            where=dataset.prefix,
            got=smallest if smallest < 0 else largest,
            want=f"0 <= id < {vocab_size}",
            do="preprocess with the model's tokenizer",
        )


def _total_loss(
    model: GPT, tokens: np.ndarray, seq_length: int, eod: int, batch_size: int, on_batch: OnBatch | None
) -> float:
    """Sum of the negative log-likelihoods of all tokens in nats, accumulated in fp64."""
    device = next(model.parameters()).device
    num_windows = -(-len(tokens) // seq_length)
    pairs = windows(tokens, seq_length, eod)
    total, done = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            while done < num_windows:
                rows = [next(pairs) for _ in range(min(batch_size, num_windows - done))]
                inputs = torch.from_numpy(np.stack([row[0] for row in rows])).to(device)  # [b, s]
                targets = torch.from_numpy(np.stack([row[1] for row in rows])).to(device)  # [b, s]
                total += token_losses(model, inputs, targets).double().sum().item()
                done += len(rows)
                if on_batch is not None:
                    on_batch(done, num_windows)
    finally:
        model.train(was_training)
    return total
