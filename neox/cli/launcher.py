"""The earlier path of `neox.runtime.launch`, for programs that read a launcher's variables."""

from neox.runtime.launch import LaunchInfo, first_host, read_launch_info

__all__ = ["LaunchInfo", "first_host", "read_launch_info"]
