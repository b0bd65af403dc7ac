"""The `data` and `tokenizer` sections."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from neox.config.schema.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class DataSource(Section, frozen=True):
    """One indexed dataset of a blend."""

    path: str = Field(description="prefix of PREFIX.bin and PREFIX.idx")
    weight: NonNegativeFloat = Field(default=1.0, description="share of the samples; weights are normalised")
    labels: str | None = Field(
        default=None,
        description="prefix of a dataset of labels: -100 where a token is masked out of the loss, else the token; "
        "null: every token counts",
    )
    rejected: str | None = Field(
        default=None, description="prefix of the rejected answers; `path` then has the chosen ones, in the same order"
    )
    rejected_labels: str | None = Field(
        default=None, description="labels of `rejected`; with objective: dpo, given if and only if `labels` is"
    )


class FimConfig(Section, frozen=True):
    """Fill in the middle (arXiv 2207.14255): the middle part of a training document is moved to its end."""

    rate: Fraction = Field(default=0.0, description="fraction of the documents that are transformed; 0: none")
    spm_rate: Fraction = Field(
        default=0.5,
        description="fraction of the transformed documents in the order suffix, prefix, middle; "
        "the others are prefix, suffix, middle",
    )
    split_sample: str | None = Field(
        default=None,
        description="token that separates fragments of a document, such as files of a repository; "
        "each fragment is transformed separately; null: documents are not split",
    )
    fragment_rate: Fraction = Field(
        default=0.5,
        description="with split_sample: fraction of the fragments of a selected document that are transformed",
    )
    no_prefix: str | None = Field(
        default=None,
        description="documents and fragments that start with this text are not transformed; null: no exception",
    )
    prefix_token: str = Field(
        default="<|fim_prefix|>", description="token before the prefix; it must be in tokenizer.file"
    )
    middle_token: str = Field(default="<|fim_middle|>", description="token before the middle")
    suffix_token: str = Field(default="<|fim_suffix|>", description="token before the suffix")


def parse_split(text: str) -> tuple[float, float, float]:
    """Parse a split such as "969,30,1".

    Args:
        text: one to three numbers, separated by commas or slashes. Missing numbers are 0.

    Returns:
        the shares of training, validation and test, normalised to a sum of 1.

    Raises:
        ValueError: the text has another form, a share is negative, or their sum is not positive and finite.
    """
    want = "one to three shares such as 969,30,1, none negative, not all 0"
    try:
        shares = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        raise ValueError(want) from None
    total = sum(shares)
    if len(shares) > 3 or not all(share >= 0 for share in shares) or not 0 < total < math.inf:
        raise ValueError(want)
    train, validation, test = (share / total for share in (*shares, 0.0, 0.0)[:3])
    return train, validation, test


class DataConfig(Section, frozen=True):
    """The datasets: lists of sources for training, validation and test, or one path or text that `split` divides."""

    train: tuple[DataSource, ...] = Field(default=(), description="training datasets: prefixes, or {path, weight}")
    validation: tuple[DataSource, ...] = Field(default=(), description="validation datasets")
    test: tuple[DataSource, ...] = Field(default=(), description="test datasets")
    path: str | None = Field(
        default=None, description="prefix of one dataset, which `split` divides into training, validation and test"
    )
    text: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="text and JSON-lines files, or folders of them; the run tokenizes them once, "
        "and `split` divides the result as it does for `path`",
    )
    text_cache: str | None = Field(
        default=None, description="folder of the datasets built from `text`; runs may share it; null: run.dir/text"
    )
    split: str = Field(
        default="969,30,1", description="shares of training, validation and test when data.path or data.text is used"
    )
    seq_length: PositiveInt = Field(
        default=2048, description="tokens of a sample that the model reads (one more is the last target)"
    )
    order: Literal["epoch", "neox"] = Field(
        default="epoch",
        description="epoch: a pure function of seed and sample index; neox: the shuffle of GPT-NeoX, bit for bit",
    )
    packing: Literal["concatenate", "best_fit", "document"] = Field(
        default="concatenate",
        description="concatenate: samples are cut from the stream of documents; best_fit: complete documents are "
        "packed into samples, and only documents longer than a sample are cut (arXiv 2404.10830); document: "
        "a sample is one document, truncated or padded to seq_length",
    )
    fim: FimConfig = Field(default=FimConfig(), description="fill in the middle")
    document_mask: bool = Field(default=False, description="attention and positions restart at document boundaries")
    prefetch: NonNegativeInt = Field(
        default=2, description="batches that a background thread reads ahead; 0: no thread"
    )
    index_cache: str | None = Field(
        default=None, description="folder of the index arrays of order: neox; null: next to the data, else in run.dir"
    )

    @field_validator("split")
    @classmethod
    def is_parsed(cls, text: str) -> str:
        """Refuse a split that cannot be parsed, whether or not it applies to the data."""
        parse_split(text)
        return text

    @model_validator(mode="before")
    @classmethod
    def accept_short_forms(cls, values: object) -> object:
        """Read `train: a` and `train: [a, {path: b, weight: 2}]` as lists of sources."""
        if not isinstance(values, dict):
            return values
        expanded: dict[str, object] = dict(values)
        for key in ("train", "validation", "test"):
            sources = expanded.get(key)
            if isinstance(sources, str):
                sources = (sources,)
            if isinstance(sources, (list, tuple)):
                expanded[key] = tuple({"path": item} if isinstance(item, str) else item for item in sources)
        if isinstance(expanded.get("text"), str):
            expanded["text"] = (expanded["text"],)
        return expanded


class SpecialIds(Section, frozen=True):
    """Ids of special tokens as the files of an imported model give them.

    An export writes them back, and generation stops at `eos` and `stop`.
    """

    bos: int | None = Field(default=None, description="bos_token_id of its config.json")
    eos: int | Annotated[tuple[int, ...], Field(strict=False)] | None = Field(
        default=None, description="eos_token_id of its config.json: an id, or a list of ids"
    )
    pad: int | None = Field(default=None, description="pad_token_id of its config.json")
    stop: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        default=(), description="additional ids that stop generation: eos_token_id of its generation_config.json"
    )

    def ends(self) -> frozenset[int]:
        """Every id that stops generation."""
        eos = () if self.eos is None else (self.eos,) if isinstance(self.eos, int) else self.eos
        return frozenset(eos) | frozenset(self.stop)


class TokenizerConfig(Section, frozen=True):
    """The tokenizer that the data was built with."""

    file: str | None = Field(
        default=None,
        description="path of a `tokenizers` JSON file; required for generation from text, for evaluation, "
        "and for the default of vocab_size",
    )
    eod_token: str | None = Field(
        default=None,
        description="end-of-document token; null: the first of <|endoftext|>, </s>, <|end_of_text|>, <eos> "
        "that the tokenizer has",
    )
    special_ids: SpecialIds | None = Field(
        default=None,
        description="ids of an imported model, set by neox import; null: the ids of the end-of-document token",
    )
