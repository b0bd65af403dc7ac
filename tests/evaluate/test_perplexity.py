"""Loss and bits per byte: every token predicted once, independent of batch and window where it must be."""

import math

import numpy as np
import pytest
import torch

from neox.config.schema import ModelConfig
from neox.data.store.indexed import IndexedDataset, IndexedWriter
from neox.errors import ConfigError, DataError
from neox.evaluate.perplexity import evaluate, windows
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.targets import IGNORED

DOCUMENTS = [[5, 6, 7, 0], [0], [9, 9, 3, 4, 1, 1, 2, 8, 30, 0], [11, 0]]


@pytest.mark.parametrize("length", [1, 7, 16, 17])
@pytest.mark.parametrize("seq_length", [1, 4, 16, 100])
def test_windows_predict_every_token_once(length, seq_length):
    tokens = np.arange(1, length + 1)
    pairs = list(windows(tokens, seq_length, first_context=0))
    targets = np.concatenate([target for _, target in pairs])
    inputs = np.concatenate([source for source, _ in pairs])
    assert targets[targets != IGNORED].tolist() == tokens.tolist()
    assert inputs[targets != IGNORED].tolist() == [0, *tokens[:-1].tolist()]
    assert all(len(target) == seq_length for _, target in pairs)


@pytest.fixture
def dataset(tmp_path):
    with IndexedWriter(tmp_path / "text", "uint16") as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return IndexedDataset(tmp_path / "text")


@pytest.fixture
def model():
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=31, max_position_embeddings=32, init_std=0.3
    )
    return GPT(config, Mesh.single()).eval()


class Letters:
    """A tokenizer of one two-byte character per token; id 0 ends a document."""

    eod_id = 0

    def decode(self, tokens: list[int]) -> str:
        return "é" * len(tokens)


def test_loss_equals_a_direct_computation(model, dataset):
    stream = [token for document in DOCUMENTS for token in document]
    with torch.no_grad():
        logits = model(torch.tensor([[0, *stream[:-1]]])).double().log_softmax(-1)[0]
    nll = -sum(logits[position, token].item() for position, token in enumerate(stream))
    result = evaluate(model, dataset, seq_length=32, tokenizer=Letters())
    letters = sum(token != 0 for token in stream)
    assert result.tokens == len(stream) and result.documents == 4 and result.bytes == 2 * letters
    assert result.loss == pytest.approx(nll / len(stream), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / len(stream)), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / (2 * letters), rel=1e-6)


def test_batch_size_changes_nothing(model, dataset):
    losses = [evaluate(model, dataset, seq_length=3, batch_size=size).loss for size in (1, 2, 50)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(model, dataset, training):
    model.train(training)
    evaluate(model, dataset, seq_length=8)
    assert model.training == training and all(module.training == training for module in model.modules())

    def interrupt(*_: int) -> None:
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, dataset, seq_length=8, on_batch=interrupt)
    assert model.training == training


def test_document_limit(model, dataset):
    result = evaluate(model, dataset, seq_length=8, max_documents=2)
    assert (result.documents, result.tokens, result.bytes, result.bits_per_byte) == (2, 5, None, None)


def test_wrong_data_is_named(model, tmp_path):
    for token in (31, 40):
        with IndexedWriter(tmp_path / f"wide{token}", "uint16") as writer:
            writer.add_document([1, token, 0])
        with pytest.raises(DataError, match=rf"token outside the model's vocabulary.*got={token}; want=0 <= id < 31"):
            evaluate(model, IndexedDataset(tmp_path / f"wide{token}"), seq_length=8)
    with IndexedWriter(tmp_path / "negative", "int32") as writer:
        writer.add_document([1, -100, 0])
    with pytest.raises(DataError, match="got=-100; want=0 <= id < 31"):
        evaluate(model, IndexedDataset(tmp_path / "negative"), seq_length=8)
    with IndexedWriter(tmp_path / "none", "uint16") as writer:
        writer.add_document([])
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(model, IndexedDataset(tmp_path / "none"), seq_length=8)


def test_a_damaged_dataset_is_not_evaluated(model, tmp_path):
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1, 2, 0])
    (tmp_path / "d.bin").write_bytes(bytes([3, 0, 2, 0, 0, 0]))
    with pytest.raises(DataError, match="checksum differs"):
        evaluate(model, IndexedDataset(tmp_path / "d"), seq_length=8)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_windows_longer_than_the_positions_are_refused(dataset, positions):
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=31,
        max_position_embeddings=16,
        position_embedding=positions,
    )
    with pytest.raises(ConfigError, match="window longer than the model has positions"):
        evaluate(GPT(config, Mesh.single()), dataset, seq_length=17)
    assert evaluate(GPT(config, Mesh.single()), dataset, seq_length=16).tokens == sum(map(len, DOCUMENTS))


@pytest.mark.parametrize(("eod", "first"), [(0, 0), (3, 3), (None, 7)])
def test_the_first_token_follows_the_end_of_a_document(model, tmp_path, eod, first):
    """Without such a token, the last of the data."""
    with IndexedWriter(tmp_path / "open", "uint16") as writer:
        writer.add_document([5, 6, 7])
    tokenizer = Letters()
    tokenizer.eod_id = eod
    with torch.no_grad():
        scores = model(torch.tensor([[first, 5, 6]])).double().log_softmax(-1)[0]
    seen = []
    found = evaluate(
        model,
        IndexedDataset(tmp_path / "open"),
        seq_length=3,
        tokenizer=tokenizer,
        on_batch=lambda *done: seen.append(done),
    )
    assert found.loss == pytest.approx(-float(scores[range(3), [5, 6, 7]].mean()), rel=1e-6)
    assert seen == [(1, 1)]


def test_progress_counts_windows(model, dataset):
    seen = []
    evaluate(model, dataset, seq_length=3, batch_size=4, on_batch=lambda *done: seen.append(done))
    assert seen == [(4, 6), (6, 6)]  # 17 tokens


def test_bytes_are_of_the_documents_that_were_read(model, dataset):
    """And of more documents than there are, all; end-of-document tokens have none."""
    found = [evaluate(model, dataset, seq_length=32, tokenizer=Letters(), max_documents=n) for n in (1, 2, 3, 4, 99)]
    assert [(one.documents, one.tokens, one.bytes) for one in found] == [
        (1, 4, 6),
        (2, 5, 6),
        (3, 15, 24),
        (4, 17, 26),
        (4, 17, 26),
    ]
    assert all(one.bits_per_byte == pytest.approx(one.loss * one.tokens / math.log(2) / one.bytes) for one in found)


def test_documents_without_text_have_no_bits_per_byte(model, tmp_path):
    with IndexedWriter(tmp_path / "ends", "uint16") as writer:
        writer.add_document([0, 0])
    found = evaluate(model, IndexedDataset(tmp_path / "ends"), seq_length=4, tokenizer=Letters())
    assert (found.bytes, found.bits_per_byte, found.tokens) == (0, None, 2)


def test_only_the_tokens_that_are_read_must_be_in_the_vocabulary(model, tmp_path):
    with IndexedWriter(tmp_path / "d", "uint16") as writer:
        for document in ([30, 0], [31, 0]):
            writer.add_document(document)
    data = IndexedDataset(tmp_path / "d")
    assert evaluate(model, data, seq_length=4, max_documents=1).tokens == 2
    with pytest.raises(DataError, match="got=31; want=0 <= id < 31"):
        evaluate(model, data, seq_length=4)


def test_a_loss_beyond_the_floats_has_the_largest_perplexity(model, dataset, monkeypatch):
    monkeypatch.setattr(
        "neox.evaluate.perplexity.token_losses", lambda model, inputs, targets: torch.where(targets < 0, 0.0, 1000.0)
    )
    found = evaluate(model, dataset, seq_length=7)
    assert (found.loss, found.perplexity) == (1000.0, math.exp(700.0))


@pytest.mark.parametrize(
    ("seq_length", "batch_size", "wanted"),
    [(17, 8, [(1, 1)]), (16, 1, [(1, 2), (2, 2)]), (1, 17, [(17, 17)]), (9, 2, [(2, 2)])],
)
def test_full_windows_leave_no_empty_one(model, dataset, seq_length, batch_size, wanted):
    seen = []
    evaluate(model, dataset, seq_length=seq_length, batch_size=batch_size, on_batch=lambda *done: seen.append(done))
    assert seen == wanted


def test_a_last_window_is_padded_with_the_first_context():
    ((inputs, targets),) = windows(np.array([4, 5], dtype=np.uint16), 4, 7)
    assert inputs.tolist() == [7, 4, 7, 7] and targets.tolist() == [4, 5, IGNORED, IGNORED]
    assert inputs.dtype == targets.dtype == np.int64


def test_models_without_positions_read_longer_windows(dataset):
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 31}
    config = ModelConfig(**sizes, max_position_embeddings=4, position_embedding="alibi")
    assert evaluate(GPT(config, Mesh.single()), dataset, seq_length=17).tokens == 17


def test_losses_are_added_in_double_precision(model, dataset, monkeypatch):
    losses = torch.full((1, 40_000), 1.1)
    monkeypatch.setattr("neox.evaluate.perplexity.token_losses", lambda model, inputs, targets: losses)
    found = evaluate(model, dataset, seq_length=9, batch_size=1)  # two windows of 17 tokens
    assert found.loss == pytest.approx(2 * 40_000 * losses[0, 0].item() / 17, rel=1e-12)
