"""The earlier path of the launchers' variables."""

from __future__ import annotations

from neox.cli import launcher
from neox.runtime import launch


def test_the_earlier_path_leads_to_the_same_objects():
    assert launcher.__all__ == ["LaunchInfo", "first_host", "read_launch_info"]
    assert all(getattr(launcher, name) is getattr(launch, name) for name in launcher.__all__)
