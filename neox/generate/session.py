"""A dialogue with a model: each turn continues the history, or as much of it as fits the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from neox.data.text.tokenizer import Tokenizer
from neox.generate.generate import generate
from neox.generate.prompts import AnswerText, TextStream, encode_prompt
from neox.generate.sampling import SamplingParams
from neox.model.gpt import GPT


class Session:
    """The history of a dialogue, in tokens, and the model that continues it.

    Args:
        model: the model.
        tokenizer: of its training data.
        params: how to sample; the seed increases by one each turn.
        stops: an answer ends after the first of these texts.
        bos: begin with the leading tokens of the tokenizer's template. They stay when a long history is truncated.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, params: SamplingParams, stops: Sequence[str] = (), *, bos: bool = True
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.params = params
        self.stops = [stop for stop in stops if stop]
        self.first = list(tokenizer.template_tokens[0]) if bos else []
        self.history: list[int] = []
        self.turns = 0

    def reset(self) -> None:
        """Clear the history."""
        self.history = []

    def respond(self, text: str, write: Callable[[str], object]) -> str:
        """Add a text to the history and continue it.

        Args:
            text: the user's message.
            write: called with each part of the answer as it arrives.

        Returns:
            the answer.
        """
        message = encode_prompt(self.tokenizer, text, bos=False)
        if not self.history and self.first and message[: len(self.first)] == self.first:
            message = message[len(self.first) :]  # the text itself begins with the template's tokens
        self.history += message
        if not self.first and not self.history and self.tokenizer.eod_id is not None:
            self.history = [self.tokenizer.eod_id]
        room = max(self.model.config.max_position_embeddings - self.params.max_new_tokens - len(self.first), 1)
        prompt = self.first + self.history[-room:]
        stream, answer_text = TextStream(self.tokenizer, write, prompt), AnswerText(self.tokenizer, prompt)
        params = replace(self.params, seed=self.params.seed + self.turns)
        answer = generate(
            self.model,
            [prompt],
            params,
            eod_id=self.tokenizer.end_ids,
            is_done=(lambda _, tokens: self._ends(answer_text.decode(tokens))) if self.stops else None,
            on_token=lambda _, token: stream.add(token),
        )[0]
        stream.finish()
        self.turns += 1
        self.history += answer
        return answer_text.decode(answer)

    def _ends(self, text: str) -> bool:
        return any(stop in text for stop in self.stops)
