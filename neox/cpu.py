"""What Linux reports of the CPU in /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path


def cpuinfo(key: str) -> list[str]:
    """Values of a key such as "model name", one per logical CPU; empty on other systems and for unknown keys."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return [value.strip() for name, value in pairs if name.strip() == key]


def cpu_flags() -> set[str]:
    """Instruction set extensions of an x86 CPU; empty elsewhere, where only the "portable" operators are built."""
    return set(next(iter(cpuinfo("flags")), "").split())
