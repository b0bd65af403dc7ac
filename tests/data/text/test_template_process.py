"""A chat template takes bounded time and memory, whatever it does."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from neox.data.text import chat_template
from neox.data.text.template_process import RefusedConversation, TemplateProcess, how_it_ended, receive, send
from neox.errors import ConfigError, EnvironmentProblem

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
BODY = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
BAD = [{"role": "user", "content": "bad"}, GOOD[1]]

MEMORY = {
    "width": "{{ '%999999999d' % messages|length }}",
    "multiplied text": "{{ messages[0].content * 10 ** 10 }}",
    "padding": "{{ messages[0].content.ljust(10 ** 10) }}{{ messages[0].content | center(10 ** 10) }}",
    "format": "{{ '{:>9999999999}'.format(messages|length) }}",
    "doubled text": "{% set ns = namespace(t=messages[0].content) %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t "
    "%}{% endfor %}",
    "multiplied list": "{{ (messages * 10 ** 9)|length }}",
    "replaced": "{{ (messages[0].content * 20000).replace('', messages[0].content * 20000)|length }}",
    "written": "{% for i in range(99999) %}{{ messages[0].content * 10000 }}{% endfor %}",
}
TIME = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "powers": "{{ (messages|length + 1) ** (10 ** 9) }}",
}


@pytest.fixture
def short(monkeypatch) -> None:
    """Less processor time for each conversation, in the processes that are started."""
    start = (
        "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep)\n"
        "from neox.data.text import chat_template as c; c.SECONDS = c.START_SECONDS = 0.5; c.serve()"
    )
    monkeypatch.setattr("neox.data.text.template_process.START", start)


def test_a_conversation_that_takes_too_much_memory_is_refused_and_the_next_ones_are_rendered():
    branches = "".join(
        f"{{% if messages[0].content == {name!r} %}}{text}{{% endif %}}" for name, text in MEMORY.items()
    )
    with TemplateProcess(branches + BODY, {}) as process:
        for name in MEMORY:
            reasons = (
                r"takes too much memory|writes more than|refuses the conversation: (Field width|width too large|Too "
                r"many decimal)"
            )
            with pytest.raises(RefusedConversation, match=reasons) as found:
                process.render_with_answers([{"role": "user", "content": name}, GOOD[1]], {})
            assert "\n" not in str(found.value)
            assert process.render_with_answers(GOOD, {}) == ("user:hi\nassistant:yo\n", [(8, 21)])


@pytest.mark.parametrize("text", TIME.values(), ids=TIME)
def test_a_conversation_that_takes_too_long_is_refused_and_the_next_ones_are_rendered(short, text):
    with TemplateProcess("{% if messages[0].content == 'bad' %}" + text + "{% endif %}" + BODY, {}) as process:
        started = time.process_time()
        with pytest.raises(RefusedConversation, match="chat template takes too long"):
            process.render_with_answers(BAD, {})
        assert process.render_with_answers(GOOD, {})[0] == "user:hi\nassistant:yo\n"
        assert time.process_time() - started < 1  # of this process: the other one computes


def test_a_template_that_takes_too_long_again_and_again_is_refused_itself(short):
    with TemplateProcess(TIME["nested loops"], {}) as process:
        for _ in range(2):
            with pytest.raises(RefusedConversation, match="takes too long"):
                process.render_with_answers(GOOD, {})
        with pytest.raises(
            ConfigError, match="chat template cannot be used; .*takes too long, for 3 consecutive conversations"
        ):
            process.render_with_answers(GOOD, {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for %}", "Expected"),
        ("{{ x | nowhere }}", "No filter named 'nowhere'"),
        ("{% include 'other' %}{% macro %}", "expected token"),
        ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion|nested|signal"),
        ("{{ '%9999999999d' | format(1) }}{% endfor %}", "Encountered unknown tag"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_reported_once(text, reason):
    with pytest.raises(ConfigError, match=f"chat template cannot be used; where=--chat-template; got=.*({reason})"):
        TemplateProcess(text, {})


def test_constants_are_not_computed_without_limits_while_compiling(short):
    for text in ("{{ 10 ** (10 ** 10) }}", "{{ 'a' * 10 ** 10 }}", "{{ 'a' | center(10 ** 10) }}"):
        try:
            with (
                TemplateProcess(text, {}) as process,
                pytest.raises(RefusedConversation, match="too long|memory|refuses"),
            ):
                process.render_with_answers(GOOD, {})
        except ConfigError as error:
            assert "takes too" in error.line()


def test_a_process_that_is_killed_is_a_refused_conversation():
    with TemplateProcess(BODY, {}) as process:
        os.kill(process._process.pid, signal.SIGSEGV)
        with pytest.raises(RefusedConversation, match=r"ended its process \(signal 11\)"):
            process.render_with_answers(GOOD, {})
        assert process.render_with_answers(GOOD, {})[0] == "user:hi\nassistant:yo\n"


def test_a_conversation_may_be_large():
    long = [{"role": "user", "content": "日" * (1 << 22)}, GOOD[1]]
    with TemplateProcess(BODY, {}) as process:
        assert len(process.render_with_answers(long, {})[0]) == (1 << 22) + len("user:\nassistant:yo\n")


def test_nothing_of_a_template_reaches_the_machine():
    with (
        TemplateProcess("{{ messages.__class__.__mro__ }}{{ range.__globals__ }}" + BODY, {}) as process,
        pytest.raises(RefusedConversation, match="unsafe"),
    ):
        process.render_with_answers(GOOD, {})


def test_limits_count_from_now_on():
    assert chat_template.address_space() > 1 << 20


def test_only_consecutive_conversations_that_end_the_process_refuse_the_template(monkeypatch):
    monkeypatch.setattr("neox.data.text.template_process.MAX_ENDED", 2)
    with TemplateProcess(BODY, {}) as process:
        for _ in range(3):
            os.kill(process._process.pid, signal.SIGSEGV)
            with pytest.raises(RefusedConversation, match="signal 11"):
                process.render_with_answers(GOOD, {})
            assert process.render_with_answers(GOOD, {})[0] == "user:hi\nassistant:yo\n"


def test_what_a_template_gets_and_that_its_process_ends():
    text = "{{ bos_token }}{{ tools[0].name }}{{ documents[0] }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with TemplateProcess(text, {"bos_token": "<s>"}) as process:
        found = process.render_with_answers(GOOD, {"tools": [{"name": "t"}], "documents": ["d"]})
        assert found == ("<s>tdhiyo", [(7, 9)])
        started = process._process
        assert started.poll() is None and os.getsid(started.pid) == started.pid != os.getsid(0)
    assert started.poll() == -signal.SIGKILL and started.stdin.closed and started.stdout.closed


def test_messages_that_are_nested_too_deeply_do_not_end_the_process():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with TemplateProcess(BODY, {}) as process:
        started = process._process
        with pytest.raises(RefusedConversation, match="messages are nested too deeply"):
            process.render_with_answers([*GOOD, {"role": "user", "content": "x", "tool_calls": deep}], {})
        assert process.render_with_answers(GOOD, {})[0] == "user:hi\nassistant:yo\n" and process._process is started


def test_a_process_that_cannot_be_started_is_a_problem_of_the_environment(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EnvironmentProblem, match="cannot start a process for the chat template; .*got=No such file"):
        TemplateProcess(BODY, {})


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("exit 3", r"ended its process (exit code 3)"),
        ("kill -XCPU $$", "takes too long"),
        ("kill -KILL $$", "takes too long"),
        ("kill -ABRT $$", "ended its process (signal 6)"),
    ],
)
def test_how_a_process_ended(command, reason):
    assert how_it_ended(subprocess.Popen(["/bin/sh", "-c", f"ulimit -c 0; {command}"])) == reason


def test_messages_are_complete_or_the_end():
    stream = io.BytesIO()
    send(stream, {"text": "é\ud800"})
    content = stream.getvalue()
    assert receive(io.BytesIO(content + b"next")) == ({"text": "é\ud800"}, len(content) - 8)
    for length in range(len(content)):
        assert receive(io.BytesIO(content[:length])) is None
