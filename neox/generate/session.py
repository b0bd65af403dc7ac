"""A dialogue with a model: each turn continues everything said so far, as much of it as the model can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neox.data.tokenizer import Tokenizer
from neox.generate.generate import generate
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT

UNDECODED = "\ufffd"  # what a tokenizer shows for a character whose last bytes are not there yet


class TextStream:
    """Turns tokens into text as they come, whole characters only.

    Args:
        tokenizer: of the model.
        write: called with each new piece of text.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]):
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> None:
        """Take in one more token."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith(UNDECODED):
            self._write(text[self._shown :])
            self._shown = len(text)

    def finish(self) -> None:
        """Write what is left, a character cut short included."""
        self._write(self._tokenizer.decode(self._tokens)[self._shown :])


class Session:
    """What was said, in tokens, and the model that goes on with it.

    Args:
        model: the model.
        tokenizer: of its training data.
        params: how to draw; the seed moves on by one each turn.
        stops: an answer ends after the first of these texts.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, params: SamplingParams, stops: Sequence[str] = ()):
        self.model = model
        self.tokenizer = tokenizer
        self.params = params
        self.stops = [stop for stop in stops if stop]
        self.history: list[int] = []
        self.turns = 0

    def reset(self) -> None:
        """Forget everything said."""
        self.history = []

    def say(self, text: str, write: Callable[[str], object]) -> str:
        """Add a text to the history and continue it.

        Args:
            text: what the person says.
            write: called with each piece of the answer as it comes.

        Returns:
            the answer.
        """
        self.history += self.tokenizer.encode(text)
        if not self.history and self.tokenizer.eod_id is not None:
            self.history = [self.tokenizer.eod_id]
        room = self.model.config.max_position_embeddings - self.params.max_new_tokens
        prompt = self.history[-max(room, 1) :]
        stream = TextStream(self.tokenizer, write)
        params = SamplingParams(self.params.max_new_tokens, self.params.temperature, self.params.top_k, self.params.top_p, self.params.seed + self.turns)
        answer = generate(
            self.model, [prompt], params, eod_id=self.tokenizer.eod_id, is_done=self._ends if self.stops else None, on_token=lambda _, token: stream.add(token)
        )[0]
        stream.finish()
        self.turns += 1
        self.history += answer
        return self.tokenizer.decode(answer)

    def _ends(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return any(stop in text for stop in self.stops)
