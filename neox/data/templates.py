"""Which chat template makes text of conversations, and under which keys of a JSON line these are."""

from __future__ import annotations

import json
from pathlib import Path

from neox.errors import ConfigError

MESSAGES, PAIR = ("messages",), ("chosen", "rejected")
TEMPLATES = {  # by name
    "chatml": "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "plain": "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token if message.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"  # where Hugging Face keeps one, beside the tokenizer


def find_template(given: str | None, tokenizer: str) -> str:
    """The text of a chat template.

    Args:
        given: a file, or a name in TEMPLATES; None: what lies beside the tokenizer.
        tokenizer: the tokenizer's file.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    folder = Path(tokenizer).parent
    try:
        if given is not None:
            return Path(given).read_text(encoding="utf-8")
        if (folder / TEMPLATE_FILE).is_file():
            return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        if (folder / SETTINGS_FILE).is_file():
            found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError("cannot read the chat template", where="--chat-template", got=error, want="a Jinja file") from error
    names = ", ".join(TEMPLATES)
    raise ConfigError("no chat template", where=f"{folder}: {TEMPLATE_FILE}, {SETTINGS_FILE}", do=f"give --chat-template FILE, or one of {names}")
