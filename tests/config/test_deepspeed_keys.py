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
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
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

names = ("activation_checkpointing", "aio", "data_types", "flops_profiler", "torch_autocast")
sections = {name: Recorder() for name in names}
recorder = Recorder(train_batch_size=1, **sections)
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
    "comet": fields(CometConfig),
    "comms_logger": fields(CommsLoggerConfig),
    "csv_monitor": fields(CSVConfig),
    "tensorboard": fields(TensorBoardConfig),
    "wandb": fields(WandbConfig),
    **{name: sorted(section.seen) for name, section in sections.items()},
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


@pytest.mark.parametrize("section", [name for name, below in DEEPSPEED_KEYS.items() if below])
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


def test_the_owner_of_a_key_sets_the_same_thing():
    assert {
        "activation_checkpointing": "train.activation_checkpointing",
        **dict.fromkeys(("bf16", "bfloat16", "data_types", "fp16", "torch_autocast"), "precision.dtype"),
        "weight_quantization": "precision.dtype",
        "checkpoint": "checkpoint",
        "expert_parallel": "parallel",
        **dict.fromkeys(
            ("gradient_accumulation_steps", "managed_gradient_accumulation"), "train.gradient_accumulation"
        ),
        "gradient_clipping": "optimizer.gradient_clipping",
        "optimizer": "optimizer",
        "pipeline": "parallel.pipeline",
        "scheduler": "schedule",
        "tensor_parallel": "parallel.tensor",
        "tensorboard": "logging.tensorboard",
        "train_batch_size": "train.global_batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "vocabulary_size": "model.vocab_size",
        "zero_optimization.stage": "zero.stage",
    } == OWNED_KEYS
