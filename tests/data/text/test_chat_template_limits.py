"""What the process of a chat template may use, counted from what it has used, and by the size of a conversation."""

from __future__ import annotations

import io
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from neox.data.text import chat_template
from neox.data.text.chat_template import compiled, limit, serve
from neox.data.text.template_process import receive, send

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
FREE = resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch) -> list[tuple[float, float]]:
    """The calls of `limit` with (seconds, memory); the limits of this process stay."""
    calls: list[tuple[float, float]] = []
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    monkeypatch.setattr(chat_template, "limit", lambda seconds, memory: calls.append((seconds, memory)))
    return calls


@pytest.mark.parametrize(
    ("hard", "processor", "memory"),
    [
        ((FREE, FREE), (19, FREE), (1050, FREE)),
        ((100, 9000), (19, 100), (1050, 9000)),
        ((7, 1020), (7, 7), (1020, 1020)),
    ],
)
def test_limits_are_added_to_what_was_used(monkeypatch, hard, processor, memory):
    calls = {}
    of_kind = {resource.RLIMIT_CPU: hard[0], resource.RLIMIT_AS: hard[1]}
    monkeypatch.setattr("resource.setrlimit", lambda kind, value: calls.update({kind: value}))
    monkeypatch.setattr("resource.getrlimit", lambda kind: (0, of_kind[kind]))
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_utime=10.4, ru_stime=3.3))
    monkeypatch.setattr(chat_template, "address_space", lambda: 1000)
    limit(5, 50)
    assert calls == {resource.RLIMIT_CPU: processor, resource.RLIMIT_AS: memory}


def test_address_space_is_that_of_the_system():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    assert abs(chat_template.address_space() / resource.getpagesize() / pages - 1) < 0.1


def served(monkeypatch, *requests: object, cut: int = 0) -> tuple[list[object], list[int]]:
    """The answers of `serve`, and the bytes of each request."""
    stream, sizes = io.BytesIO(), []
    for request in requests:
        before = stream.tell()
        send(stream, request)
        sizes.append(stream.tell() - before - 8)
    answers = io.BytesIO()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(stream.getvalue()[: stream.tell() - cut])))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=answers))
    serve()
    answers.seek(0)
    found = []
    while (answer := receive(answers)) is not None:
        found.append(answer[0])
    return found, sizes


TEMPLATE = (
    "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    "{{ bos }}{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_each_conversation_has_limits_by_its_size(monkeypatch, limits):
    bad = [{"role": "user", "content": "bad"}]
    answers, sizes = served(monkeypatch, [TEMPLATE, {"bos": "<s>"}], [TALK, {}], [bad, {}], [TALK, {"tools": []}])
    good = {"text": "<s>hiyo", "spans": [[5, 7]]}
    assert answers == [None, good, {"refused": "chat template refuses the conversation: no"}, good]
    wanted = [(10, 1 << 29)]
    for size in sizes[1:]:
        wanted.append((5 + size / (1 << 24), (1 << 29) + 16 * size))
        wanted.append((10 + size / (1 << 24), (1 << 30) + 64 * size))
    assert limits == wanted


@pytest.mark.parametrize("extra", [0, 1])
def test_a_text_may_be_as_long_as_its_conversation_allows(monkeypatch, limits, extra):
    monkeypatch.setattr(chat_template, "OUTPUT", 10)
    monkeypatch.setattr(chat_template, "OUTPUT_PER_BYTE", 2)
    request = [TALK, {}]
    stream = io.BytesIO()
    send(stream, request)
    most = 10 + 2 * (stream.tell() - 8)
    (_, answer), _ = served(monkeypatch, ["{{ 'x' * " + str(most + extra) + " }}", {}], request)
    if extra:
        assert answer == {"refused": f"chat template writes more than {most} characters"}
    else:
        assert answer["text"] == "x" * most


def test_a_template_that_cannot_be_compiled_ends_the_process(monkeypatch, limits):
    answers, _ = served(monkeypatch, ["{% for %}", {}], [TALK, {}])
    assert len(answers) == 1 and "Expected" in answers[0] and len(limits) == 1
    assert compiled("{% for %}", {}) == (None, answers[0])
    template, problem = compiled("x", {})
    assert template is not None and problem is None
    assert served(monkeypatch) == ([], []) and len(limits) == 1  # the parent has ended
    answers, _ = served(monkeypatch, [TEMPLATE, {}], [TALK, {}], cut=1)
    assert answers == [None]


def test_memory_that_ends_is_a_refused_conversation(monkeypatch, limits):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(chat_template.Template, "render_with_answers", fail)
    answers, _ = served(monkeypatch, ["x", {}], [TALK, {}], [TALK, {}])
    assert answers[1:] == [{"refused": "chat template takes too much memory"}] * 2 and len(limits) == 5
    monkeypatch.setattr(chat_template.Template, "__init__", fail)
    assert compiled("x", {}) == (None, "takes too much memory to compile")
