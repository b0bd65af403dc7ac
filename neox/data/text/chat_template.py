"""Renders chat templates as transformers does, in a separate process with limited time and memory (`template_process`).

Templates come with downloaded tokenizers. Jinja's sandbox denies them access to the system, but does not stop endless
loops or allocations.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import ClassVar, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from neox.data.text.template_process import Messages, RefusedConversation, Span, receive, send
from neox.files import JsonObject

START_SECONDS = 10  # CPU time to compile a template
SECONDS, SECOND_PER_BYTES = 5, 1 << 24  # CPU time to render a conversation: 5 s, plus 1 s per 16 MiB of it
# address space to render a conversation: 512 MiB more than before, plus 16 bytes per byte of it
MEMORY, MEMORY_PER_BYTE = 1 << 29, 16
OUTPUT, OUTPUT_PER_BYTE = 1 << 24, 16  # characters of a rendered conversation
LONGEST_REASON = 300
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of the reasoning in a message, in order of preference


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the text of the assistant, which is learned."""

    tags: ClassVar[set[str]] = {"generation"}

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.written = 0  # characters so far
        self.spans: list[Span] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the block as a call of `_record` with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


class Template:
    """A chat template and the special tokens that it may use.

    Raises:
        jinja2.TemplateError, RecursionError, MemoryError: it cannot be compiled.
    """

    def __init__(self, text: str, special_tokens: dict[str, str]):
        extensions = ["jinja2.ext.loopcontrols", Generation]
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = to_json
        self._generation = cast(Generation, environment.extensions[Generation.identifier])
        self._tokens = special_tokens
        self._template = environment.from_string(text)
        self.marks_answers = any(
            is_generation(block) for block in environment.parse(text).find_all(jinja2.nodes.CallBlock)
        )

    def render(
        self, messages: Messages, more: JsonObject, *, ask: bool = False, most: int = sys.maxsize
    ) -> tuple[str, list[Span]]:
        """Render a conversation.

        Args:
            messages: the conversation.
            more: its `tools` and `documents`.
            ask: end with the generation prompt, after which the assistant answers.
            most: characters that the text may have.

        Returns:
            The text, and the spans of it that `{% generation %}` blocks wrote.

        Raises:
            RefusedConversation: the template fails, or writes too much.
        """
        parts: list[str] = []
        marks = self._generation
        marks.written, marks.spans = 0, []
        known = {"tools": None, "documents": None, **more, **self._tokens}
        try:
            for part in self._template.generate(messages=messages, add_generation_prompt=ask, **known):
                parts.append(part)
                marks.written += len(part)
                if marks.written > most:
                    raise RefusedConversation(f"chat template writes more than {most} characters")
        except RefusedConversation:
            raise
        except MemoryError:
            raise RefusedConversation("chat template takes too much memory") from None
        except Exception as error:  # templates call methods of strings and lists, which may raise any exception
            reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
            raise RefusedConversation(f"chat template refuses the conversation: {reason}") from error
        return "".join(parts), marks.spans

    def render_with_answers(
        self, messages: Messages, more: JsonObject, most: int = sys.maxsize
    ) -> tuple[str, list[Span]]:
        """Render a conversation and locate the answers of the assistant.

        Args:
            messages: the conversation.
            more: its `tools` and `documents`.
            most: characters that the text may have.

        Returns:
            The text, and the spans [start, end) of the answers: what `{% generation %}` blocks wrote, or without such
            blocks each answer and the end of its turn.

        Raises:
            RefusedConversation: as `render`, or the template has no such blocks and renders earlier messages
                differently when later ones follow.
        """
        messages = [normalised_message(message) for message in messages]
        text, spans = self.render(messages, more, most=most)
        if self.marks_answers:
            return text, spans
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            until = self.render(messages[: i + 1], more, most=most)[0]
            openings = [self.render(messages[:i], more, ask=ask, most=most)[0] for ask in (True, False)] if i else [""]
            before = next((opening for opening in openings if until.startswith(opening)), None)
            if before is None or not text.startswith(until):
                raise RefusedConversation(
                    "chat template does not only append: its text for earlier messages depends on later ones"
                )
            spans.append((len(before), len(until)))
        return text, spans


def is_generation(node: jinja2.nodes.CallBlock) -> bool:
    """Whether a call block was created by `Generation.parse`."""
    called = node.call.node
    return isinstance(called, jinja2.nodes.ExtensionAttribute) and called.identifier == Generation.identifier


def normalised_message(message: JsonObject) -> JsonObject:
    """The message as transformers 5 passes it to templates: without null values, its reasoning under each known key."""
    message = {key: value for key, value in message.items() if value is not None}
    found = next((message[key] for key in REASONING if key in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def refuse(reason: str) -> None:
    """`raise_exception` in templates."""
    raise jinja2.TemplateError(reason)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Unlike that of Jinja it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def limit(seconds: float, memory: int) -> None:
    """Limit this process to `seconds` more CPU time and `memory` more bytes of address space."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    for kind, value in (
        (resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1),
        (resource.RLIMIT_AS, address_space() + memory),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def address_space() -> int:
    """Bytes of address space of this process; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def compiled(text: str, special_tokens: dict[str, str]) -> tuple[Template | None, str | None]:
    """(template, None), or (None, reason)."""
    try:
        return Template(text, special_tokens), None
    except MemoryError:
        return None, "takes too much memory to compile"
    except Exception as error:  # Python's compiler raises SyntaxError and RecursionError for the code of some templates
        return None, " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


def serve() -> None:
    """Compile the template that is first on standard input, and answer with what is wrong with it or None.

    Then render conversations.

    A request is [messages, more]; the answer is {"text", "spans"} or {"refused"}. Ends at the end of the input.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump: a process that ends at a limit is not a bug
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    found = receive(requests)
    if found is None:
        return
    limit(START_SECONDS, MEMORY)
    template, problem = compiled(*found[0])
    send(answers, problem)
    if template is None:
        return
    while (found := receive(requests)) is not None:
        (messages, more), size = found
        limit(SECONDS + size / SECOND_PER_BYTES, MEMORY + MEMORY_PER_BYTE * size)
        try:
            text, spans = template.render_with_answers(messages, more, OUTPUT + OUTPUT_PER_BYTE * size)
            answer = {"text": text, "spans": spans}
        except RefusedConversation as reason:
            answer = {"refused": str(reason)}
        except MemoryError:
            answer = {"refused": "chat template takes too much memory"}
        limit(START_SECONDS + size / SECOND_PER_BYTES, 2 * MEMORY + 4 * MEMORY_PER_BYTE * size)
        send(answers, answer)
