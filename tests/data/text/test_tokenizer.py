"""Tokenizers: training, lossless encoding, the end-of-document token, the hash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers

from neox.config.vocabulary import tokenizer_ids, tokenizer_vocab_size
from neox.data.store.indexed import IndexedDataset
from neox.data.text.encoding import Encoding
from neox.data.text.preprocess import preprocess
from neox.data.text.tokenizer import Tokenizer, TokenizerFile, file_hash, train_tokenizer
from neox.errors import ConfigError, DataError, DiskError
from tests.gpt_neox_tokenizer import write_gpt_neox_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "the quick brown fox jumps over the lazy dog " * 20, "données 日本語 😀"]


@pytest.fixture
def trained(tmp_path):
    return train_tokenizer(TEXTS, 300, tmp_path / "t.json")


def test_training_gives_a_lossless_byte_level_tokenizer(trained):
    assert trained.vocab_size == 300 and trained.eod_token == "<|endoftext|>" and trained.eod_id == 0
    for text in (*TEXTS, "unseen ñ \x00 \t\r\n Ω", " leading", ""):
        assert trained.decode(trained.encode(text)) == text
    assert len(trained.encode(TEXTS[1])) < len(TEXTS[1]) / 2
    assert trained.encode_batch(TEXTS) == [trained.encode(text) for text in TEXTS]


def test_training_is_reproducible(trained, tmp_path):
    assert train_tokenizer(iter(TEXTS), 300, tmp_path / "again.json").hash == trained.hash


def test_a_small_corpus_gives_a_small_vocabulary(tmp_path):
    assert train_tokenizer(["abab"], 1000, tmp_path / "t.json").vocab_size == 259


def test_special_tokens_in_text_follow_the_policy(trained):
    text = "a<|endoftext|>b"
    assert trained.encode(text).count(trained.eod_id) == 1
    plain = Tokenizer(trained.file, specials_as_text=True)
    assert plain.encode(text).count(plain.eod_id) == 0 and plain.decode(plain.encode(text)) == text
    assert plain.encode_batch([text]) == [plain.encode(text)]


def test_tokenizer_of_the_form_of_gpt_neox(tmp_path):
    file = write_gpt_neox_tokenizer(tmp_path / "t.json", 300)
    tokenizer = Tokenizer(file)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.eod_token) == (323, 0, "<|endoftext|>")
    assert tokenizer_vocab_size(str(file)) == 323
    reference = tokenizers.Tokenizer.from_file(str(file))
    for text in (*TEXTS, "if x:\n        e\u0301"):
        assert tokenizer.encode(text) == reference.encode(text).ids
    assert tokenizer.decode([322, 500, -3, *tokenizer.encode("x")]) == "  x"


def test_largest_id_counts_added_tokens(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 65_543}, unk_token="a"))
    plain.save(str(tmp_path / "gap.json"))
    assert Tokenizer(tmp_path / "gap.json").vocab_size == 65_544
    assert Tokenizer(tmp_path / "gap.json").eod_id is None


def test_eod_can_be_named(trained):
    assert Tokenizer(trained.file, "a").eod_id == trained.encode("a")[0]
    with pytest.raises(
        ConfigError, match=r"end-of-document token is not in the vocabulary; where=tokenizer\.eod_token.*got=<none>"
    ):
        Tokenizer(trained.file, "<none>")


def test_hash_follows_the_content_and_not_the_layout(trained, tmp_path):
    (tmp_path / "compact.json").write_text(tokenizers.Tokenizer.from_file(trained.file).to_str(pretty=False))
    assert file_hash(tmp_path / "compact.json") == trained.hash
    assert train_tokenizer(TEXTS, 299, tmp_path / "other.json").hash != trained.hash


def test_bad_files_and_arguments(tmp_path):
    with pytest.raises(DataError, match="cannot read tokenizer; where=nowhere; got=No such file"):
        Tokenizer("nowhere")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="not a tokenizer file"):
        Tokenizer(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="not a tokenizer file"):
        Tokenizer(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"too small for byte-level BPE; .*got=256; want=at least 257"):
        train_tokenizer(TEXTS, 256, tmp_path / "t.json")
    with pytest.raises(DataError, match="no text to train"):
        train_tokenizer([], 300, tmp_path / "t.json")
    with pytest.raises(DiskError, match="cannot write"):
        train_tokenizer(TEXTS, 300, tmp_path / "nowhere" / "t.json")


def test_a_folder_or_a_model_of_the_hub_is_answered_with_the_file_to_name(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    hub = "if this is a model of the Hugging Face Hub, download its tokenizer.json and name that file"
    for name, expected in {"EleutherAI/pythia-14m": True, "gpt2": True, "model": False, "x.json": False}.items():
        with pytest.raises(DataError, match="do=name a `tokenizers` JSON file, such as") as error:
            Tokenizer(name)
        assert str(error.value).endswith(hub) == expected
    shutil.copy(trained.file, "model/tokenizer.json")
    with pytest.raises(DataError, match="got=a folder, not a regular file; do=name model/tokenizer.json$"):
        Tokenizer("model")


def test_a_tokenizer_that_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for read in (Tokenizer, TokenizerFile, file_hash):
        with pytest.raises(DataError, match="cannot read tokenizer; .*got=a FIFO, not a regular file"):
            read(tmp_path / "fifo")
        with pytest.raises(DataError, match="got=a device, not a regular file"):
            read("/dev/zero")
    with pytest.raises(OSError, match="a FIFO"):
        tokenizer_ids(str(tmp_path / "fifo"))


def edited(trained: Tokenizer, path: Path, ids: dict[str, int], added: list[tuple[str, int]]) -> str:
    """The tokenizer with some ids of its vocabulary changed or added (None: taken out), and with these added tokens."""
    content = json.loads(Path(trained.file).read_text())
    form = content["added_tokens"][0]
    content["added_tokens"] = [{**form, "content": token, "id": number} for token, number in added]
    vocabulary = {**content["model"]["vocab"], **ids}
    content["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number is not None}
    path.write_text(json.dumps(content))
    return str(path)


END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("ids", "added"),
    [
        ({}, [(END, 0), ("<a>", 300), ("<b>", 301)]),
        ({END: 600}, [(END, 600)]),  # a gap in the vocabulary
        ({END: 600, "<a>": 700}, [(END, 600), ("<a>", 700)]),
        ({END: 600}, [(END, 600), ("<a>", 300)]),  # counted on from the size of the vocabulary
    ],
)
def test_a_gap_in_the_ids_is_the_same_for_every_reader(trained, tmp_path, ids, added):
    transformers = pytest.importorskip("transformers")
    file = edited(trained, tmp_path / "gap.json", ids, added)
    ours, plain = Tokenizer(file), TokenizerFile(file)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END)
    assert ours.eod_id == plain.eod_id == theirs.eos_token_id == theirs.convert_tokens_to_ids(END) == dict(added)[END]
    assert ours.vocab_size == plain.vocab_size == tokenizer_vocab_size(file) == max(theirs.get_vocab().values()) + 1
    text = "the quick brown fox" + "".join(token for token, _ in added)
    (tmp_path / "in.txt").write_text(text)
    summary = preprocess([str(tmp_path / "in.txt")], tmp_path / "out", Encoding(file))
    assert summary.encoder == "native"
    assert (
        IndexedDataset(tmp_path / "out")[0].tolist()
        == [*ours.encode(text), ours.eod_id]
        == [*theirs.encode(text), theirs.eos_token_id]
    )


@pytest.mark.parametrize(
    ("ids", "added"),
    [
        ({END: None}, [(END, 600)]),
        ({}, [(END, 0), ("<a>", 301), ("<b>", 300)]),
        ({}, [(END, 5)]),
        ({END: 600}, [(END, 600), ("<a>", 601)]),
    ],
)
def test_ids_that_the_library_does_not_keep_are_refused(trained, tmp_path, ids, added):
    file = edited(trained, tmp_path / "gap.json", ids, added)
    for read in (Tokenizer, TokenizerFile):
        with pytest.raises(
            DataError,
            match=r"changes the id of a token of the file; where=.*gap.json: added token .*got=id \d+ in the file, "
            r"\d+ in the library .*do=add ",
        ):
            read(file)
