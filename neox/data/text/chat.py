"""Conversations to tokens and labels: a chat template renders the text; answers of the assistant are learned.

A line of input is {"messages": [{"role": ..., "content": ...}, ...]}, or for preferences {"chosen": [...], "rejected":
[...]}, each a list of messages. The complete text is encoded at once, as in generation. A token is learned if it holds
a character of an answer of the assistant.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neox.data.store.indexed import IndexedWriter, token_dtype
from neox.data.text.preprocess import DEFAULTS, Options, Summary, encoded_by_processes
from neox.data.text.quarantine import Quarantine
from neox.data.text.reading import (
    BLOCK_BYTES,
    BadLine,
    TextChunk,
    bad_line_error,
    is_unicode,
    parse_object,
    read_blocks,
)
from neox.data.text.template_process import Messages, RefusedConversation, TemplateProcess
from neox.data.text.tokenizer import Tokenizer
from neox.errors import ConfigError, DataError
from neox.files import JsonObject, JsonValue, read_json, read_text
from neox.targets import IGNORED

if TYPE_CHECKING:
    import numpy as np

MESSAGES, PAIR = ("messages",), ("chosen", "rejected")
TEMPLATES = {  # by name
    "chatml": "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "plain": "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token if message.role == "
    "'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
# next to the tokenizer in Hugging Face repositories
TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True)
class ChatEncoding:
    """How conversations become tokens.

    Attributes:
        tokenizer: `tokenizers` JSON file.
        eod_token: end-of-document token; see `Tokenizer`.
        template: text of the chat template (Jinja).
        keys: keys of a JSON line: `messages`, or `chosen` and `rejected`.
        append_eod: end each conversation with the end-of-document token, unless the template does.
        last_only: learn only the last answer of the assistant.
        form: how files are read; see `neox.data.text.input_files.read_as_lines`.
    """

    tokenizer: str
    eod_token: str | None
    template: str
    keys: tuple[str, ...] = MESSAGES
    append_eod: bool = True
    last_only: bool = False
    form: str = "auto"


@dataclass
class ChatSummary(Summary):
    """What a run read, wrote and left out. `learned` is the number of tokens with a label."""

    learned: int = 0


@dataclass(frozen=True)
class EncodedChats:
    """The conversations of one block: for every line, (tokens, labels) of each key, int64."""

    rows: list[list[tuple[np.ndarray, np.ndarray]]]
    bad: list[BadLine]
    blank: int
    text_bytes: int


def find_template(given: str | None, tokenizer: str) -> str:
    """The text of a chat template.

    Args:
        given: a file, or a name in TEMPLATES; None for the template next to the tokenizer.
        tokenizer: file of the tokenizer.

    Raises:
        ConfigError: there is no template, or it cannot be read.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    folder = Path(tokenizer).parent
    try:
        if given is not None:
            return read_text(given)
        if (folder / TEMPLATE_FILE).exists():
            return read_text(folder / TEMPLATE_FILE)
        if (folder / SETTINGS_FILE).exists():
            found = read_json(folder / SETTINGS_FILE).get("chat_template")
            if isinstance(found, list):  # several templates, by name
                found = {each.get("name"): each.get("template") for each in found}.get("default")
            if isinstance(found, str):
                return found
    except (OSError, ValueError, AttributeError) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            "cannot read the chat template",
            where=given or folder,
            got=got,
            want="a Jinja file",
            do="check --chat-template",
        ) from error
    names = ", ".join(TEMPLATES)
    raise ConfigError(
        "no chat template",
        where=f"{folder}: {TEMPLATE_FILE}, {SETTINGS_FILE}",
        do=f"give --chat-template FILE, or one of {names}",
    )


class ChatEncoder:
    """Encodes blocks of JSON lines. Runs a process for the template until it is closed."""

    def __init__(self, encoding: ChatEncoding):
        self._encoding = encoding
        self.tokenizer = Tokenizer(encoding.tokenizer, encoding.eod_token)
        self._eod = self.tokenizer.eod_id if encoding.append_eod else None
        if encoding.append_eod and self._eod is None:
            do = "name it by --eod-token, or pass --no-append-eod"
            raise ConfigError("tokenizer has no end-of-document token", where=encoding.tokenizer, do=do)
        self._template = TemplateProcess(
            encoding.template, special_tokens(encoding.tokenizer, self.tokenizer.eod_token)
        )

    def close(self) -> None:
        """End the process that renders the template."""
        self._template.close()

    def __call__(self, block: list[TextChunk | BadLine]) -> EncodedChats:
        """Encode the lines of a block. A line that gives no conversation becomes a `BadLine`."""
        rows, bad, blank = [], [item for item in block if isinstance(item, BadLine)], 0
        for chunk in (item for item in block if isinstance(item, TextChunk)):
            if chunk.line == 0:
                bad.append(BadLine(chunk.path, 0, "not JSON lines: conversations are read from .jsonl files", None))
                continue
            for number, line in enumerate(chunk.content.removesuffix(b"\n").split(b"\n"), chunk.line):
                if not line.strip():
                    blank += 1
                    continue
                try:
                    found, more = conversations(line, self._encoding.keys)
                    rows.append([self.encode(messages, more) for messages in found])
                except RefusedConversation as reason:
                    bad.append(BadLine(chunk.path, number, str(reason), line))
        return EncodedChats(rows, bad, blank, sum(len(item.content) for item in block if isinstance(item, TextChunk)))

    def encode(self, messages: Messages, more: JsonObject | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of a conversation, int64; the label of a token that is not learned is -100.

        Args:
            messages: the conversation.
            more: `tools` and `documents` for the template.

        Raises:
            RefusedConversation: nothing in it would be learned, or the template refuses it.
        """
        if not messages:
            raise RefusedConversation("no messages")
        text, spans = self._template.render_with_answers(messages, more or {})
        if not is_unicode(text):
            raise RefusedConversation("not JSON: a lone surrogate in the text")
        import numpy as np

        ids, offsets = self.tokenizer.encode_with_offsets(text)
        learned = learned_tokens(offsets, spans[-1:] if self._encoding.last_only else spans)
        if self._eod is not None and ids[-1:] != [self._eod]:
            ids.append(self._eod)
            learned.append(messages[-1]["role"] == "assistant")
        if not any(learned):
            raise RefusedConversation("no answer of the assistant")
        tokens = np.array(ids, dtype=np.int64)
        return tokens, np.where(learned, tokens, IGNORED)


def learned_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token, which encodes characters [start, end), whether it overlaps one of the spans [start, end)."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    learned = [False] * len(offsets)
    for low, high in spans:
        first, last = bisect.bisect_right(ends, low), bisect.bisect_left(starts, high)
        if low < high and first < last:
            learned[first:last] = [True] * (last - first)
    return learned


def special_tokens(tokenizer: str, eod_token: str | None) -> dict[str, str]:
    """bos_token, eos_token, pad_token, ... for the template, from tokenizer_config.json."""
    named: JsonValue = {}
    with contextlib.suppress(OSError, ValueError):  # an optional file; without it there is no bos_token
        named = read_json(Path(tokenizer).parent / SETTINGS_FILE)
    found = {}
    for key, value in named.items() if isinstance(named, dict) else ():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found if "eos_token" in found or eod_token is None else {**found, "eos_token": eod_token}


def conversations(line: bytes, keys: Sequence[str]) -> tuple[list[Messages], JsonObject]:
    """The conversations under `keys` of a JSON line, each after its `prompt` if any, and its `tools` and `documents`.

    Raises:
        RefusedConversation: the line has a different form.
    """
    value, reason = parse_object(line)
    if reason is not None:
        raise RefusedConversation(reason)
    missing = [key for key in keys if key not in value]
    if missing:
        raise RefusedConversation(f"no key {missing[0]!r}")
    prompt = value.get("prompt", []) if len(keys) > 1 else []
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    found = [
        [*checked_messages(before, "prompt"), *checked_messages(as_messages(value[key], bool(before)), key)]
        for key in keys
    ]
    more = {key: value[key] for key in ("tools", "documents") if isinstance(value.get(key), list)}
    return [drop_repeated_prompt(messages, before) for messages in found], more


def as_messages(value: object, answers_prompt: bool) -> object:
    """A text that answers a prompt, as a message of the assistant; any other value as it is."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) and answers_prompt else value


def drop_repeated_prompt(messages: Messages, before: Messages) -> Messages:
    """The conversation without its prompt if `chosen` and `rejected` repeat it, as in common datasets."""
    count = len(before)
    return messages[count:] if count and messages[count : 2 * count] == before else messages


def checked_messages(value: object, key: str) -> Messages:
    """The value, checked to be a list of messages.

    Raises:
        RefusedConversation: it is not.
    """
    if not isinstance(value, list) or not all(map(is_message, value)):
        raise RefusedConversation(f"key {key!r} is not a list of messages with role and content")
    return value


def is_message(value: object) -> bool:
    """Whether a value is a message: a role and content, which may be missing if the assistant calls tools."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str) or (
        value.get("content") is None and isinstance(value.get("tool_calls"), list)
    )


def encode_chats(encoding: ChatEncoding, block: list[TextChunk | BadLine]) -> EncodedChats:
    """Encode one block, in a worker."""
    return chat_encoder_of(encoding)(block)


@functools.cache
def chat_encoder_of(encoding: ChatEncoding) -> ChatEncoder:
    """The encoder of this process, loaded once."""
    return ChatEncoder(encoding)


def prefixes(out: str, keys: Sequence[str]) -> list[tuple[str, str]]:
    """The prefixes of tokens and labels for each key."""
    names = [out] if len(keys) == 1 else [f"{out}_{key}" for key in keys]
    return [(name, f"{name}_labels") for name in names]


def preprocess_chat(
    files: Sequence[str],
    out: str | os.PathLike[str],
    encoding: ChatEncoding,
    options: Options = DEFAULTS,
    progress: Callable[[Summary], None] | None = None,
) -> ChatSummary:
    """Write OUT and OUT_labels; for pairs OUT_chosen, OUT_chosen_labels, OUT_rejected and OUT_rejected_labels.

    Arguments and errors are those of `preprocess`; `options.resume` is ignored.
    """
    started = time.monotonic()
    encoder = ChatEncoder(encoding)
    tokenizer = encoder.tokenizer
    dtype = token_dtype(tokenizer.vocab_size - 1)
    summary = ChatSummary(os.fspath(out), dtype, len(files))
    made_by = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id}
    read = read_blocks(files, BLOCK_BYTES, form=encoding.form)
    blocks = (
        (encoder(block) for block in read)
        if options.workers == 0
        else encoded_by_processes(read, encoding, options.workers, encode_chats)
    )
    quarantine = Quarantine(f"{summary.out}.quarantine.jsonl", options.bad_lines == "quarantine")
    with contextlib.closing(encoder), contextlib.closing(blocks), contextlib.ExitStack() as stack:

        def opened(prefix: str, kind: str) -> IndexedWriter:
            return stack.enter_context(IndexedWriter(prefix, kind, overwrite=options.overwrite, **made_by))

        writers = [
            (opened(tokens, dtype), opened(labels, "int32")) for tokens, labels in prefixes(summary.out, encoding.keys)
        ]
        stack.enter_context(quarantine)
        for block in blocks:
            for bad in block.bad:
                if options.bad_lines == "fail":
                    raise bad_line_error(bad)
                summary.add_bad(bad)
                quarantine.add(bad)
            write(block, writers, summary)
            summary.seconds = time.monotonic() - started
            if progress is not None:
                progress(summary)
        if summary.documents == 0:
            raise DataError(
                "input has no conversations",
                where=", ".join(files[:3]),
                got=f"{summary.bad_lines} bad, {summary.blank_lines} blank lines",
            )
    summary.quarantine = str(quarantine.path) if options.bad_lines == "quarantine" and summary.bad_lines else None
    summary.seconds = time.monotonic() - started
    return summary


def write(block: EncodedChats, writers: list[tuple[IndexedWriter, IndexedWriter]], summary: ChatSummary) -> None:
    """Append the conversations of a block, and count them."""
    for row in block.rows:
        for (tokens, labels), (token_writer, label_writer) in zip(row, writers, strict=True):
            token_writer.add_document(tokens)
            label_writer.add_document(labels)
            summary.tokens += tokens.size
            summary.learned += int((labels != IGNORED).sum())
    summary.documents += len(block.rows)
    summary.text_bytes += block.text_bytes
    summary.blank_lines += block.blank
