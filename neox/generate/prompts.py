"""Prompts as token ids, and generated tokens as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neox.data.text.reading import is_unicode
from neox.data.text.tokenizer import Tokenizer
from neox.errors import ConfigError
from neox.printing import printable

UNDECODED = "\ufffd"  # decoded in place of a character whose last bytes are still missing
CONTEXT = 8  # last tokens of the prompt that an answer is decoded with


def encode_prompt(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: of the model.
        text: the prompt.
        bos: add the tokens of the tokenizer's template, such as a leading `<s>`, unless the text begins with them. This
            is what transformers and `neox evaluate --tasks` do.

    Raises:
        ConfigError: the text has bytes that are not UTF-8.
    """
    if not is_unicode(text):
        got = printable(text[:80])
        raise ConfigError("prompt is not UTF-8", where="--prompt", got=got, want="text that UTF-8 can encode")
    tokens = tokenizer.encode(text)
    prefix = tokenizer.template_tokens[0]
    if not bos or (prefix and tokens[: len(prefix)] == prefix):
        return tokens
    return tokenizer.encode(text, template=True)


class AnswerText:
    """The text of generated tokens, as the continuation of their prompt.

    SentencePiece decoders drop the space before the first word of a text, so that an answer decoded alone would lose
    it. The answer is therefore decoded together with the end of the prompt, whose text is then removed.

    Args:
        tokenizer: of the model.
        prompt: token ids, with leading special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        prefix = tokenizer.template_tokens[0]
        tokens = list(prompt)
        if prefix and tokens[: len(prefix)] == prefix:
            tokens = tokens[len(prefix) :]
        size = CONTEXT
        self._context = tokens[-size:]
        # the context begins within a character
        while size < len(tokens) and UNDECODED in tokenizer.decode(self._context):
            size *= 2
            self._context = tokens[-size:]
        self._shown = tokenizer.decode(self._context)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens."""
        text = self._tokenizer.decode([*self._context, *tokens])
        return text[len(self._shown) :] if text.startswith(self._shown) else self._tokenizer.decode(tokens)


class TextStream:
    """Writes generated tokens as text as they arrive, in complete characters.

    Args:
        tokenizer: of the model.
        write: called with each new part of the text.
        prompt: token ids that the text continues.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object], prompt: Sequence[int] = ()):
        self._text = AnswerText(tokenizer, prompt)
        self._write = write
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> None:
        """Append a token and write the characters that it completes."""
        self._tokens.append(token)
        text = self._text.decode(self._tokens)
        if not text.endswith(UNDECODED):
            self._write(text[self._shown :])
            self._shown = len(text)

    def finish(self) -> None:
        """Write the rest, which may be an incomplete character."""
        self._write(self._text.decode(self._tokens)[self._shown :])
