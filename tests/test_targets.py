"""The target without a loss is torch's."""

from __future__ import annotations

import torch

from neox.targets import IGNORED


def test_the_target_without_a_loss_is_that_of_torch():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED
