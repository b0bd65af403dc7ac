"""Devices for plans: speed, memory and interconnect, from the data sheets of the vendors or from a YAML file."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from neox.config.parse import Reader, YamlValue
from neox.config.problems import raise_problems
from neox.errors import ConfigError
from neox.files import read_text

CONTEXT = 2e9  # bytes of CUDA context, NCCL and cuBLAS buffers, fragmentation: an assumption
RUNTIME = 2.6e7  # bytes that a process on a CPU uses in addition to its tensors (docs/log.md)
COMPILER = 3.4e7  # additional bytes with ZeRO 3, whose hooks import torch's compiler (docs/log.md)


@dataclass(frozen=True)
class Device:
    """Performance figures of a device, per device and per direction.

    Attributes:
        name: name for --device.
        memory: bytes of memory.
        flops: dense peak of bf16 and fp16 matrix products, FLOP/s.
        flops_fp32: peak of fp32 matrix products, FLOP/s.
        bandwidth: memory bandwidth, bytes/s.
        link: bandwidth to devices of the same node, bytes/s.
        network: bandwidth to other nodes, bytes/s.
        per_node: devices per node.
        reserve: bytes that are not available to the model.
        efficiency: fraction of the peak that matrix products reach; an assumption (docs/plan.md).
        kind: "cuda" or "cpu".
        cuda_name: name in CUDA, or its first words.
        source: source of the figures.
    """

    name: str
    memory: float
    flops: float
    flops_fp32: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    reserve: float = CONTEXT
    efficiency: float = 0.6
    kind: str = "cuda"
    cuda_name: str = ""
    source: str = ""

    def peak(self, dtype: str) -> float:
        """Return the peak of matrix products in "fp32", "bf16" or "fp16", FLOP/s."""
        return self.flops_fp32 if dtype == "fp32" else self.flops

    @property
    def usable(self) -> float:
        """Bytes that are available to the model."""
        return self.memory - self.reserve


A100 = "NVIDIA A100 data sheet (June 2021): SXM; NVLink 600 GB/s both ways; network of a DGX A100: 8 x 200 Gb/s"
A100_PCIE = (
    "NVIDIA A100 data sheet (June 2021): PCIe 4 x16, 64 GB/s both ways, without NVLink bridges; "
    "network assumed to be 200 Gb/s per device"
)
HOPPER_PCIE = (
    "NVIDIA {} data sheet: dense; PCIe 5 x16, 128 GB/s both ways, without NVLink bridges; "
    "network assumed to be 200 Gb/s per device"
)
HOPPER = "NVIDIA {} data sheet: SXM, dense; NVLink 900 GB/s both ways; network of a DGX H100: 8 x 400 Gb/s"
DEVICES = (
    Device("a100-40gb", 40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, cuda_name="NVIDIA A100-SXM4-40GB", source=A100),
    Device("a100-80gb", 80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, cuda_name="NVIDIA A100-SXM4-80GB", source=A100),
    Device(
        "h100",
        80e9,
        989e12,
        67e12,
        3.35e12,
        450e9,
        50e9,
        efficiency=0.55,
        cuda_name="NVIDIA H100 80GB HBM3",
        source=HOPPER.format("H100"),
    ),
    Device(
        "h200",
        141e9,
        989e12,
        67e12,
        4.8e12,
        450e9,
        50e9,
        efficiency=0.55,
        cuda_name="NVIDIA H200",
        source=HOPPER.format("H200"),
    ),
    Device(
        "a100-40gb-pcie",
        40e9,
        312e12,
        19.5e12,
        1.555e12,
        32e9,
        25e9,
        cuda_name="NVIDIA A100-PCIE-40GB",
        source=A100_PCIE,
    ),
    Device(
        "a100-80gb-pcie",
        80e9,
        312e12,
        19.5e12,
        1.935e12,
        32e9,
        25e9,
        cuda_name="NVIDIA A100 80GB PCIe",
        source=A100_PCIE,
    ),
    Device(
        "h100-pcie",
        80e9,
        756e12,
        51e12,
        2e12,
        64e9,
        25e9,
        efficiency=0.55,
        cuda_name="NVIDIA H100 PCIe",
        source=HOPPER_PCIE.format("H100 PCIe"),
    ),
    Device(
        "h100-nvl",
        94e9,
        835e12,
        60e12,
        3.9e12,
        64e9,
        25e9,
        efficiency=0.55,
        cuda_name="NVIDIA H100 NVL",
        source=HOPPER_PCIE.format("H100 NVL"),
    ),
    Device(
        "h200-nvl",
        141e9,
        835e12,
        60e12,
        4.8e12,
        64e9,
        25e9,
        efficiency=0.55,
        cuda_name="NVIDIA H200 NVL",
        source=HOPPER_PCIE.format("H200 NVL"),
    ),
    Device(
        "b200",
        180e9,
        2250e12,
        80e12,
        8e12,
        900e9,
        50e9,
        efficiency=0.55,
        cuda_name="NVIDIA B200",
        source="NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s over 8; NVLink 1.8 TB/s both ways; network 8 x 400 "
        "Gb/s",
    ),
    Device(
        "l40s",
        48e9,
        362e12,
        91.6e12,
        0.864e12,
        32e9,
        25e9,
        cuda_name="NVIDIA L40S",
        source="NVIDIA L40S data sheet: dense; PCIe 4 x16, 64 GB/s both ways; network assumed to be 200 Gb/s per "
        "device",
    ),
    Device(
        "rtx-4090",
        24e9,
        165e12,
        82.6e12,
        1.008e12,
        32e9,
        1.25e9,
        per_node=4,
        cuda_name="NVIDIA GeForce RTX 4090",
        source="NVIDIA Ada architecture white paper: products with fp32 accumulation; PCIe 4 x16; network assumed to "
        "be 10 Gb/s per device",
    ),
)
# FLOP/s of fp32 products and bytes/s of memory of one core (docs/log.md: Ice Lake class, AVX-512, 2.8 GHz)
CORE = (130e9, 10e9)


def cpu(processes: int) -> Device:
    """Return this machine as a device, divided by the number of processes. The speed of a core is from docs/log.md."""
    cores = max((os.cpu_count() or 1) / processes, 0.1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        "cpu",
        memory / processes,
        CORE[0] * cores,
        CORE[0] * cores,
        CORE[1] * cores,
        2e9,
        1.25e9,
        per_node=processes,
        reserve=RUNTIME,
        efficiency=0.85,
        kind="cpu",
        source="this machine's memory and cores; core speed from docs/log.md; gloo over loopback assumed to be 2 GB/s",
    )


def find_device(name: str, processes: int = 1) -> Device:
    """Return a device by name, or from a YAML file.

    Args:
        name: such as h100; "cpu" for this machine; or the path of a .yml or .yaml file.
        processes: number of processes that share a "cpu".

    Raises:
        ConfigError: the name is unknown, or the file is invalid.
    """
    if name.endswith((".yml", ".yaml")):
        return read_device(Path(name))
    if name == "cpu":
        return cpu(processes)
    known = {device.name: device for device in DEVICES}
    if name not in known:
        lower = name.lower()
        inside = [device for device in known if lower.startswith(device)]
        close = inside or difflib.get_close_matches(lower, [*known, "cpu"], 1)
        want = f"{', '.join(known)}, cpu, or a YAML file"
        raise ConfigError(
            "unknown device",
            where="--device",
            got=name,
            want=want,
            do=f"did you mean {close[0]}?" if close else "neox plan --help",
        )
    return known[name]


def read_device(path: Path) -> Device:
    """Read a device from a YAML file with the fields of Device. `base: NAME` gives defaults from a known device.

    Raises:
        ConfigError: the file cannot be read, or a key or value is invalid.
    """
    reader = Reader(str(path))
    try:
        leaves = reader.read(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        want = "a YAML file that describes a device (docs/plan.md)"
        raise ConfigError("cannot read the device file", where=path, got=reason, want=want) from error
    raise_problems(reader.problems)
    return from_keys({".".join(leaf.path): leaf.value for leaf in leaves}, str(path))


def from_keys(content: Mapping[str, object], where: str) -> Device:
    """Create a device from the keys of a file.

    Raises:
        ConfigError: a key is unknown or missing, or a value is invalid.
    """
    given: dict[str, YamlValue] = dict(content)
    base = given.pop("base", None)
    texts = ("name", "kind", "cuda_name", "source")
    names = [field.name for field in fields(Device)]
    for key, value in given.items():
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            raise ConfigError(
                "unknown key of a device",
                where=f"{where} {key}",
                want=", ".join(names),
                do=f"did you mean {close[0]}?" if close else None,
            )
        number = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (value > 0 or key == "reserve")
        )
        if not (isinstance(value, str) if key in texts else number):
            raise ConfigError(
                "bad value", where=f"{where} {key}", got=value, want="text" if key in texts else "a number above 0"
            )
        if key == "per_node" and not isinstance(value, int):
            raise ConfigError("bad value", where=f"{where} {key}", got=value, want="a whole number of devices")
    if given.get("kind", "cuda") not in ("cuda", "cpu"):
        raise ConfigError("bad value", where=f"{where} kind", got=given["kind"], want="cuda or cpu")
    given.setdefault("name", Path(where).stem)
    if base is not None:
        start = find_device(str(base))
        return replace(start, **{"source": f"{where}; other values: {start.source}"} | given)
    given.setdefault("source", where)
    missing = [name for name in ("memory", "flops", "flops_fp32", "bandwidth", "link", "network") if name not in given]
    if missing:
        raise ConfigError(
            "device is incomplete", where=where, got=f"missing: {', '.join(missing)}", do="add them, or base: h100"
        )
    return Device(**given)


def device_of_cuda_name(name: str) -> Device | None:
    """Return the device with this name in CUDA. None if it is unknown, another variant of a chip, or a MIG instance."""
    words = name.split()
    known = [
        device
        for device in DEVICES
        if words[: len(device.cuda_name.split())] == device.cuda_name.split() and "MIG" not in words
    ]
    return max(known, key=lambda device: len(device.cuda_name), default=None)
