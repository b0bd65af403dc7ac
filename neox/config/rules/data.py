"""Rules of the data and the objective."""

from __future__ import annotations

from collections.abc import Iterator

from neox.config.rules.conflict import Conflict, Environment
from neox.config.schema import Config, DataConfig, parse_split
from neox.config.vocabulary import tokenizer_ids

PARTS = ("train", "validation", "test")


def sources(config: Config, _: Environment) -> Iterator[Conflict]:
    """Training data must be given in exactly one way, and evaluation needs validation data."""
    data = config.data
    yield from source_lists(data)
    if data.text and config.tokenizer.file is None:
        keys = ("data.text", "tokenizer.file")
        yield Conflict("text without a tokenizer", keys, "tokenizer.file", "create one with neox tokenizer train")
    for part in PARTS:
        blend = getattr(data, part)
        if blend and not any(source.weight for source in blend):
            yield Conflict("all weights are 0", (f"data.{part}",), "at least one weight above 0")
        for source in blend:
            if not source.path.strip() or "\0" in source.path:
                yield Conflict("source path is empty or invalid", (f"data.{part}",), "a prefix of .bin and .idx files")
            if source.rejected_labels is not None and source.rejected is None:
                rule, do = "`rejected` next to `rejected_labels`", "add the prefix of the rejected answers"
                yield Conflict("labels of rejected answers without the answers", (f"data.{part}",), rule, do)
    yield from split(config)


def source_lists(data: DataConfig) -> Iterator[Conflict]:
    """Training data must be one of `path`, `text` and `train`, and lists exclude the others."""
    lists = [f"data.{part}" for part in PARTS if getattr(data, part)]
    single = [f"data.{name}" for name, value in (("path", data.path), ("text", data.text)) if value]
    if single and len(single) + bool(lists) > 1:
        rule = "data.path or data.text, with data.split, or lists of sources"
        yield Conflict("data is given twice", (*single, *lists), rule)
    if not single and not data.train:
        keys = ("data.train", "data.path", "data.text")
        do = "--set data.train=[PREFIX], where PREFIX.bin and PREFIX.idx exist"
        yield Conflict("no training data", keys, "one of them", do)


def split(config: Config) -> Iterator[Conflict]:
    """The split must leave training data, and validation data if the run evaluates."""
    applies = bool(config.data.path or config.data.text)
    shares = parse_split(config.data.split)
    if shares[0] == 0:
        yield Conflict("split leaves no training data", ("data.split",), "a first share above 0")
    if config.evaluate.interval and not config.data.validation and (not applies or shares[1] == 0):
        keys = ("evaluate.interval", "data.validation", *(("data.split",) if applies else ()))
        yield Conflict("evaluation without validation data", keys, "validation data, or evaluate.interval: 0")


def packing(config: Config, _: Environment) -> Iterator[Conflict]:
    """The packing of documents must fit the sample order and the objective."""
    if config.data.packing != "best_fit":
        return
    if config.data.order == "neox":
        keys, rule = ("data.packing", "data.order"), "order: epoch with best_fit"
        yield Conflict("the order of GPT-NeoX needs concatenated documents", keys, rule, "set data.order: epoch")
    if config.train.on_pairs:
        keys = ("data.packing", "train.objective")
        yield Conflict(
            "preference pairs cannot be packed", keys, "packing: document or concatenate with dpo and reward"
        )


def fill_in_the_middle(config: Config, _: Environment) -> Iterator[Conflict]:
    """Fill in the middle needs its tokens in the vocabulary, and plain pre-training."""
    fim = config.data.fim
    if not fim.rate:
        return
    file = config.tokenizer.file
    if file is None:
        keys = ("data.fim.rate", "tokenizer.file")
        yield Conflict("fill in the middle without a tokenizer", keys, "a tokenizer.file that has the three tokens")
    if config.train.objective != "pretrain":
        keys, rule = ("data.fim.rate", "train.objective"), "objective: pretrain with fim.rate above 0"
        yield Conflict("fill in the middle would separate tokens from their labels", keys, rule)
    names = {name: getattr(fim, name) for name in ("prefix_token", "middle_token", "suffix_token")}
    if len(set(names.values())) < len(names):
        keys = tuple(f"data.fim.{name}" for name in names)
        yield Conflict("tokens of fill in the middle are not distinct", keys, "three different tokens")
    try:
        known = tokenizer_ids(file) if file is not None else None
    except (OSError, ValueError):
        known = None  # the rule `vocabulary` reports it
    for name, token in {**names, "split_sample": fim.split_sample}.items():
        if known is not None and token is not None and token not in known:
            keys, rule = (f"data.fim.{name}", "tokenizer.file"), "a token of tokenizer.file"
            do = "use a token that it has, or train a tokenizer with neox tokenizer train --special-token"
            yield Conflict("token of fill in the middle is not in the vocabulary", keys, rule, do)


def objective(config: Config, _: Environment) -> Iterator[Conflict]:
    """The objective determines the data, the head and the layout."""
    kind, data, model = config.train.objective, config.data, config.model
    pairs = config.train.on_pairs
    for part in ("train", "validation"):
        for source in getattr(data, part):
            keys = ("train.objective", f"data.{part}")
            if pairs != (source.rejected is not None):
                rule = "`rejected` next to the chosen answers in `path`" if pairs else "sources without `rejected`"
                do = None if pairs else "set train.objective: dpo or reward"
                yield Conflict("data does not match the objective", keys, rule, do)
            elif (kind == "sft" and source.labels is None) or (kind == "pretrain" and source.labels is not None):
                rule = "`labels` in every source with objective: sft, in none with pretrain"
                yield Conflict("data does not match the objective", keys, rule)
            elif kind == "dpo" and (source.labels is None) != (source.rejected_labels is None):
                # the prompt would count in one of the two log-probabilities
                rule = "`labels` and `rejected_labels`, or neither, in every source with objective: dpo"
                yield Conflict("labels of one answer of the pairs only", keys, rule, "give the labels of both answers")
    for name in ("path", "text"):
        if kind != "pretrain" and getattr(data, name):
            keys, rule = ("train.objective", f"data.{name}"), "data.train, a list of {path, labels, ...}"
            yield Conflict(f"data.{name} has no labels or pairs", keys, rule)
    if (kind == "reward") != (model.output == "score"):
        keys = ("model.output", "train.objective")
        rule = "model.output: score if and only if objective: reward"
        yield Conflict("output head does not match the objective", keys, rule)
    if pairs and config.parallel.context > 1:
        keys = ("train.objective", "parallel.context")
        yield Conflict("context parallelism would split answers", keys, "context: 1 with dpo and reward")
