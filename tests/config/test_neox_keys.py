"""The table of GPT-NeoX's keys: whole, and true to our schema."""

from __future__ import annotations

import pytest

from neox.config.deepspeed_keys import DEEPSPEED_KEYS
from neox.config.load import known_keys
from neox.config.neox_keys import IGNORED_BECAUSE, NEOX_KEYS, REQUIRED


def test_every_row_says_what_is_done():
    for name, row in NEOX_KEYS.items():
        assert row.to if row.kind == "renamed" else row.text, name
        assert (row.kind == "renamed") <= (len(row.to) == 1), name
    assert len(NEOX_KEYS) >= 318
    assert set(REQUIRED) <= set(NEOX_KEYS)


def test_native_keys_exist():
    known = set(known_keys()) | {f"deepspeed.{name}" for name in DEEPSPEED_KEYS}
    assert {target for row in NEOX_KEYS.values() for target in row.to} <= known


def test_no_key_is_ignored_for_two_reasons():
    names = [name for names in IGNORED_BECAUSE.values() for name in names.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["comet", "wandb", "comms_logger"])
def test_deepspeed_keys_are_handed_on(name):
    assert NEOX_KEYS[name].to == (f"deepspeed.{name}",)


def test_every_key_of_the_shipped_files_is_known(shared_data):
    unread = set()
    for path in sorted((shared_data / "upstream-configs").glob("**/*.yml")):
        for line in path.read_text().splitlines():
            text = line.split("#")[0].strip()
            depth = len(line) - len(line.lstrip())
            if text.startswith('"') and '":' in text and depth <= 3:
                unread.add(text.split('"')[1].replace("-", "_"))
    inside = {"stage", "type", "params", "enabled", "fp16", "lr", "betas", "eps", "bf16"}
    inside |= {"loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale", "device"}
    inside |= set(DEEPSPEED_KEYS["zero_optimization"])
    assert unread - set(NEOX_KEYS) - inside == set()
