"""The tables of DeepSpeed keys against the installed DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS, REMOVED_KEYS
from neox.config.values import known_keys

ALIASES = {"bfloat16"}  # DeepSpeed's second name for bf16

# Parses a minimal config from a mapping that records which keys are read; in a separate process, because
# DeepSpeed reads the environment and changes torch's defaults on import.
PROBE = """
import json
from deepspeed.runtime import config, precision_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

class Keys:
    def __init__(self, mapping):
        self.mapping = mapping
    def __contains__(self, key):
        return key in self.mapping
    def __iter__(self):
        return dict.__iter__(self.mapping)

class Recorder(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = set()
    def get(self, key, default=None):
        self.seen.add(key)
        return dict.get(self, key, default)
    def __contains__(self, key):
        self.seen.add(key)
        return dict.__contains__(self, key)
    def __getitem__(self, key):
        self.seen.add(key)
        return dict.__getitem__(self, key)
    def keys(self):
        return Keys(self)

recorder = Recorder(train_batch_size=1)
config.DeepSpeedConfig(recorder)

def fields(model):
    return sorted(field.alias or name for name, field in model.model_fields.items())

print(json.dumps({
    "top": sorted(recorder.seen),
    "removed": sorted([
        *config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        *("zero_optimization." + key for key in config._REMOVED_ZERO_CONFIG_KEYS),
    ]),
    "zero_optimization": fields(DeepSpeedZeroConfig),
    "bf16": fields(precision_config.DeepSpeedBF16Config),
    "fp16": fields(precision_config.DeepSpeedFP16Config),
}))
"""


@pytest.fixture(scope="module")
def installed() -> dict[str, list[str]]:
    """The keys that the installed DeepSpeed reads."""
    environment = {"PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_top_level_keys_are_exactly_those_that_deepspeed_reads(installed):
    assert set(DEEPSPEED_KEYS) | set(REMOVED_KEYS) | ALIASES >= set(installed["top"])
    assert set(DEEPSPEED_KEYS) <= set(installed["top"])


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "fp16"])
def test_keys_of_a_section_are_deepspeeds(installed, section):
    assert set(DEEPSPEED_KEYS[section]) == set(installed[section])


def test_removed_keys_are_deepspeeds(installed):
    assert sorted(REMOVED_KEYS) == installed["removed"]


def test_owned_keys_name_keys_of_both_sides():
    ours = known_keys()
    for theirs, owner in OWNED_KEYS.items():
        section, _, inner = theirs.partition(".")
        assert section in {*DEEPSPEED_KEYS, *ALIASES} and (not inner or inner in DEEPSPEED_KEYS[section])
        assert owner in ours
