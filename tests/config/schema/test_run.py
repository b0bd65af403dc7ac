"""The sections that describe how a run is operated."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from neox.config.schema import CheckpointConfig, GuardConfig


def test_async_is_the_key_and_in_background_the_attribute():
    assert CheckpointConfig.model_validate({"async": False}).in_background is False
    assert CheckpointConfig().in_background is True
    with pytest.raises(ValidationError, match="in_background"):
        CheckpointConfig.model_validate({"in_background": False})
    assert list(dict(CheckpointConfig().entries()))[-1] == "async"


def test_a_spike_factor_of_one_would_make_every_step_a_spike():
    with pytest.raises(ValidationError, match="greater than 1"):
        GuardConfig(spike_factor=1.0)
