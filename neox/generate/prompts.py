"""Prompts as token ids, and the text of what follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neox.data.text.tokenizer import Tokenizer

UNDECODED = "\ufffd"  # what a tokenizer shows for a character whose last bytes are not there yet
CONTEXT = 8  # tokens of the prompt that an answer is decoded behind


def encode_prompt(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> list[int]:
    """Token ids of a prompt, with the tokens that transformers' tokenizer puts around a text (a leading `<s>` where it has one).

    They are left out with `bos=False`, and where the text begins with the leading ones already, as `neox evaluate --tasks` does.
    """
    plain = tokenizer.encode(text)
    before = tokenizer.template_tokens[0]
    if not bos or (before and plain[: len(before)] == before):
        return plain
    return tokenizer.encode(text, template=True)


class AnswerText:
    """The text of generated tokens as it follows its prompt.

    Decoders of SentencePiece form drop the space before the first word of what they are given, so an answer decoded alone would lose it.
    It is decoded behind the end of the prompt, whose text is then taken off.

    Args:
        tokenizer: of the model.
        prompt: token ids, leading special tokens included.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        before = tokenizer.template_tokens[0]
        tokens = list(prompt)
        if before and tokens[: len(before)] == before:
            tokens = tokens[len(before) :]
        size = CONTEXT
        self._context = tokens[-size:]
        while size < len(tokens) and UNDECODED in tokenizer.decode(self._context):  # it begins within a character
            size *= 2
            self._context = tokens[-size:]
        self._shown = tokenizer.decode(self._context)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens."""
        text = self._tokenizer.decode([*self._context, *tokens])
        return text[len(self._shown) :] if text.startswith(self._shown) else self._tokenizer.decode(tokens)


class TextStream:
    """Turns tokens into text as they come, whole characters only.

    Args:
        tokenizer: of the model.
        write: called with each new piece of text.
        prompt: token ids that the text follows.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object], prompt: Sequence[int] = ()):
        self._text = AnswerText(tokenizer, prompt)
        self._write = write
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> None:
        """Take in one more token."""
        self._tokens.append(token)
        text = self._text.decode(self._tokens)
        if not text.endswith(UNDECODED):
            self._write(text[self._shown :])
            self._shown = len(text)

    def finish(self) -> None:
        """Write what is left, a character cut short included."""
        self._write(self._text.decode(self._tokens)[self._shown :])
