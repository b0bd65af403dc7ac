"""Chat templates give the text and the mask that transformers gives."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from neox.data.text.chat import ChatEncoder, ChatEncoding, learned_tokens
from neox.data.text.chat_template import Template, normalised_message
from neox.data.text.template_process import RefusedConversation
from neox.data.text.tokenizer import Tokenizer, train_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
TALK = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "How é 😀?"},
    {"role": "assistant", "content": "Fine.\n\n", "thinking": "hm"},
    {"role": "user", "content": "And\tnow?"},
    {"role": "assistant", "content": "  Still 'fine' 日本."},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "é <b>", "parameters": {"z": 1, "a": [1.5, None, True]}},
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
}
TEMPLATES = {  # in the style of known families, each with what is particular to it
    "mistral": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
    "system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% "
    "endif %}"
    "{% if message['role'] == 'user' %}{% if loop.first and system is defined %}{{ ' [INST] ' + system + '\n\n' + "
    "message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% else %}{{ ' ' + "
    "message['content']|trim + eos_token }}{% endif %}{% endfor %}",
    "llama": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = '26 Jul 2024' %}\n{%- "
    "endif %}\n"
    "{%- if tools is not none %}\n    {{- 'Environment: ipython\n' }}\n    {%- for t in tools %}\n        {{- t | "
    "tojson(indent=4) }}\n"
    "        {{- '\n\n' }}\n    {%- endfor %}\n{%- endif %}\n{%- for message in messages %}\n"
    "    {%- if message.tool_calls %}\n        {{- message.tool_calls[0].function | tojson }}\n    {%- else %}\n"
    "        {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}\n    {%- "
    "endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant<|end|>\n\n' }}\n{%- endif %}\n",
    "generation": "{%- for m in messages %}{{ '<|' + m.role + '|>\n' }}{%- if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% else %}{{ m.content }}\n{% endif %}{% endfor %}",
    "generation in a macro": "{% macro text(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ text(m) }}{% else %}{{ m.content }}|{% endif %}{% endfor "
    "%}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = "
    "loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.reasoning_content is defined and loop.index0 > ns.last %}<think>{{ "
    "m.reasoning_content }}</think>{% endif %}"
    "{{ m.content.split('\n')[-1].lstrip('\n') }}{{ m.role.upper() }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.get('reasoning_content', '') }}{{ m.thinking }}{{ m.content }}{% endfor "
    "%}",
    "tojson": "{{ messages | tojson }}{{ tools | tojson }}{{ messages | tojson(sort_keys=True, separators=(',', ':'), "
    "ensure_ascii=True) }}",
    "undefined": "{{ unk_token }}{{ nothing }}{% if documents is none and tools is none %}none{% endif %}{{ "
    "messages[0].name }}",
    "white space": "  {% for m in messages %}\n  {{ m.content }}  \n  {%- endfor %}\n\n",
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    texts = [str(message["content"]) for message in TALK] * 3
    return train_tokenizer(
        [*texts, " [INST] [/INST] assistant user <|assistant|>\n"], 330, tmp_path_factory.mktemp("t") / "t.json"
    )


@pytest.fixture(scope="module")
def theirs(ours):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=ours.file, **TOKENS)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}], ids=["plain", "tools"])
def test_the_text_is_that_of_transformers(theirs, name, more):
    template = Template(TEMPLATES[name], TOKENS)
    for talk in (TALK, TALK[1:3], [*TALK[1:2], CALL]):
        try:
            want, why = theirs.apply_chat_template(talk, tokenize=False, chat_template=TEMPLATES[name], **more), None
        except Exception as error:  # a template that fails on this conversation, or refuses it
            want, why = None, str(error)
        if why is None:
            assert template.render(list(map(normalised_message, talk)), more)[0] == want
            asked = theirs.apply_chat_template(
                talk, tokenize=False, chat_template=TEMPLATES[name], add_generation_prompt=True, **more
            )
            assert template.render(list(map(normalised_message, talk)), more, ask=True)[0] == asked
        else:
            with pytest.raises(RefusedConversation) as found:
                template.render_with_answers(talk, more)
            assert " ".join(why.split()) in str(found.value)


@pytest.mark.parametrize("name", ["generation", "generation in a macro"])
def test_the_mask_is_that_of_transformers(ours, theirs, name):
    for talk in (TALK, TALK[:3], TALK[1:2]):
        want = theirs.apply_chat_template(
            talk, chat_template=TEMPLATES[name], return_assistant_tokens_mask=True, return_dict=True
        )
        text, spans = Template(TEMPLATES[name], TOKENS).render_with_answers(talk, {})
        ids, offsets = ours.encode_with_offsets(text)
        assert ids == want["input_ids"]
        assert [int(each) for each in learned_tokens(offsets, spans)] == want["assistant_masks"]


def test_what_generation_blocks_write_is_learned(ours):
    encoder = ChatEncoder(ChatEncoding(ours.file, None, TEMPLATES["generation"], append_eod=False))
    tokens, labels = encoder.encode(TALK)
    assert (
        ours.decode(label for label in labels if label != -100)
        == f"{TALK[2]['content']}<|endoftext|>{TALK[4]['content']}<|endoftext|>"
    )
    with pytest.raises(RefusedConversation, match="no answer of the assistant"):
        encoder.encode(TALK[:2])
    encoder.close()
    assert tokens.tolist() == ours.encode(
        Template(TEMPLATES["generation"], {"eos_token": "<|endoftext|>"}).render(TALK, {})[0]
    )


def test_the_time_is_that_of_the_clock():
    assert Template("{{ strftime_now('%Y-%m') }}", {}).render(TALK, {})[0][:2] == "20"


def test_values_that_json_has_no_word_for_are_rendered_as_python_writes_them():
    messages = [{"role": "user", "content": "x", "score": json.loads("NaN"), "n": 10**30}]
    assert Template("{{ messages[0].score }} {{ messages[0].n }}", {}).render(messages, {})[0] == f"nan {10**30}"


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x", "name": None},
        {"content": "x", "thinking": "t"},
        {"content": "x", "reasoning": "r"},
        {"content": "x", "reasoning_content": "c"},
        {"content": "x", "reasoning": "r", "thinking": "t"},
        {"content": "x", "thinking": "t", "reasoning_content": "c"},
        {"content": "x", "reasoning": "r", "thinking": None},
    ],
)
def test_messages_are_those_that_transformers_gives_to_a_template(theirs, message):
    message = {"role": "assistant", **message}
    template = "{{ messages[0].items() | list | sort }}"
    want = theirs.apply_chat_template([message], tokenize=False, chat_template=template)
    assert Template(template, {}).render([normalised_message(message)], {})[0] == want


def test_answers_are_located_by_what_they_append():
    """Also the first message, and after a prompt that the template writes for the next answer alone."""
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}%s{% endif %}"
    talk = [
        {"role": role, "content": content} for role, content in (("assistant", "hi"), ("user", "q"), ("assistant", "a"))
    ]
    for asked, before in (("<assistant>", "<assistant>"), ("<assistant><think>", ""), ("", "")):
        found, spans = Template(text.replace("%s", asked), {}).render_with_answers(talk, {})
        assert found == "<assistant>hi<user>q<assistant>a"
        assert [found[start:end] for start, end in spans] == ["<assistant>hi", "<assistant>a".removeprefix(before)]


def test_a_template_is_rendered_again_from_the_start():
    template = Template(
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", {}
    )
    for _ in range(2):
        assert template.render(TALK[1:3], {}) == ("userHow é 😀?assistantFine.\n\n", [(4, 12), (21, 28)])
    assert template.marks_answers and not Template("{% call(x) f() %}{% endcall %}", {}).marks_answers


def test_a_text_has_a_limit_of_characters():
    template = Template("ab{{ messages[0].role }}", {})
    assert template.render(TALK, {}, most=8)[0] == "absystem"
    for render in (template.render, template.render_with_answers):
        with pytest.raises(RefusedConversation, match="chat template writes more than 7 characters"):
            render(TALK, {}, most=7)


def test_reasons_are_short_and_one_line():
    for text, reason in (
        ("{{ raise_exception('a\n  b ' + 'x' * 999) }}", "a b " + "x" * 296),
        ("{{ raise_exception('') }}", "TemplateError"),
    ):
        with pytest.raises(RefusedConversation) as found:
            Template(text, {}).render(TALK, {})
        assert str(found.value) == f"chat template refuses the conversation: {reason}"


def test_special_tokens_come_before_what_the_conversation_names():
    template = Template("{{ bos_token }}|{{ tools }}|{{ documents }}|{{ add_generation_prompt }}", {"bos_token": "<s>"})
    assert template.render(TALK, {"bos_token": "x", "documents": [1]})[0] == "<s>|None|[1]|False"
    assert template.render(TALK, {}, ask=True)[0] == "<s>|None|None|True"


def test_strftime_now_is_the_local_time():
    before = datetime.now().replace(microsecond=0)
    found = datetime.fromisoformat(Template("{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}", {}).render(TALK, {})[0])
    assert before <= found <= datetime.now()
