# What type checkers and editors read in place of __init__.py, whose names are loaded when they are first used.

from neox import config as config
from neox import data as data
from neox import errors as errors
from neox import ops as ops
from neox.config.load import load_config as load_config
from neox.config.schema import Config as Config
from neox.config.schema import ModelConfig as ModelConfig
from neox.generate.generate import load_model as load_model
from neox.generate.sampling import SamplingParams as SamplingParams
from neox.model.gpt import GPT as GPT

__version__: str
__all__ = [
    "GPT",
    "Config",
    "ModelConfig",
    "SamplingParams",
    "__version__",
    "config",
    "data",
    "errors",
    "load_config",
    "load_model",
    "ops",
]
