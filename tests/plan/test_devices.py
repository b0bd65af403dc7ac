from __future__ import annotations

import os

import pytest

from neox.errors import ConfigError
from neox.plan.devices import DEVICES, Device, cpu, device_of_cuda_name, find_device, from_keys


def test_every_device_is_complete_and_found_by_its_name():
    for device in DEVICES:
        assert find_device(device.name) is device
        assert device.source and device.usable < device.memory and device.peak("bf16") >= device.peak("fp32") > 0


@pytest.mark.parametrize(
    ("cuda", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_cuda_names_are_known(cuda, name):
    assert device_of_cuda_name(cuda).name == name


@pytest.mark.parametrize(
    "cuda", ["Quadro", "NVIDIA H100 64GB HBM2", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", ""]
)
def test_other_variants_and_parts_of_a_chip_are_not_taken_for_it(cuda):
    assert device_of_cuda_name(cuda) is None


def test_processes_share_the_cpu():
    assert cpu(4).memory == pytest.approx(cpu(1).memory / 4)
    assert find_device("cpu", 2).flops == pytest.approx(find_device("cpu").flops / 2)


def test_a_device_file_that_is_none(tmp_path):
    """A FIFO without a writer is refused, and not waited for."""
    os.mkfifo(tmp_path / "fifo.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xb5\xff")
    for name, reason in (
        ("fifo.yml", "a FIFO, not a regular file"),
        ("no.yml", "No such file"),
        ("binary.yml", "0xb5"),
    ):
        with pytest.raises(ConfigError, match="cannot read the device file") as caught:
            find_device(str(tmp_path / name))
        assert reason in str(caught.value.got)


def test_a_file_gives_a_device(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(
        "memory: 24e9\nflops: 1e14\nflops_fp32: 2e13\nbandwidth: 1e12\nlink: 1e10\nnetwork: 1e9\nper_node: 2\n"
    )
    device = find_device(str(path))
    assert (device.name, device.memory, device.per_node, device.kind) == ("mine", 24e9, 2, "cuda")
    path.write_text("base: h100\nmemory: 94e9\nname: h100-nvl\n")
    assert (find_device(str(path)).name, find_device(str(path)).memory, find_device(str(path)).flops) == (
        "h100-nvl",
        94e9,
        989e12,
    )
    assert find_device(str(path)).source.startswith(f"{path}; other values: NVIDIA H100 data sheet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: h1000", "unknown device.*did you mean h100"),
        ("base: h100\nmemry: 1e9", "unknown key of a device.*did you mean memory"),
        ("base: h100\nmemory: lots", "bad value.*lots"),
        ("base: h100\nmemory: 0", "bad value"),
        ("base: h100\nkind: tpu", "bad value.*tpu"),
        ("memory: 1e9", "incomplete.*flops"),
        ("base: h100\nbase: h200", "twice"),
    ],
)
def test_a_wrong_file_is_refused(text, message, tmp_path):
    path = tmp_path / "device.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_device(str(path))


def test_unknown_names_and_absent_files_are_refused():
    for name, close in (("a100-40g", "a100-40gb"), ("H100-80GB", "h100"), ("H200", "h200")):
        with pytest.raises(ConfigError, match=rf"did you mean {close}\?"):
            find_device(name)
    with pytest.raises(ConfigError, match="cannot read the device"):
        find_device("absent.yml")


# GB, TFLOP/s of bf16 and fp32, TB/s of memory, GB/s of link and network, devices per node, efficiency
FIGURES = {
    "a100-40gb": (40, 312, 19.5, 1.555, 300, 25, 8, 0.6),
    "a100-80gb": (80, 312, 19.5, 2.039, 300, 25, 8, 0.6),
    "h100": (80, 989, 67, 3.35, 450, 50, 8, 0.55),
    "h200": (141, 989, 67, 4.8, 450, 50, 8, 0.55),
    "a100-40gb-pcie": (40, 312, 19.5, 1.555, 32, 25, 8, 0.6),
    "a100-80gb-pcie": (80, 312, 19.5, 1.935, 32, 25, 8, 0.6),
    "h100-pcie": (80, 756, 51, 2.0, 64, 25, 8, 0.55),
    "h100-nvl": (94, 835, 60, 3.9, 64, 25, 8, 0.55),
    "h200-nvl": (141, 835, 60, 4.8, 64, 25, 8, 0.55),
    "b200": (180, 2250, 80, 8.0, 900, 50, 8, 0.55),
    "l40s": (48, 362, 91.6, 0.864, 32, 25, 8, 0.6),
    "rtx-4090": (24, 165, 82.6, 1.008, 32, 1.25, 4, 0.6),
}


def test_figures_are_those_of_the_data_sheets():
    assert {
        device.name: pytest.approx(
            (
                device.memory / 1e9,
                device.flops / 1e12,
                device.flops_fp32 / 1e12,
                device.bandwidth / 1e12,
                device.link / 1e9,
                device.network / 1e9,
                device.per_node,
                device.efficiency,
            )
        )
        for device in DEVICES
    } == FIGURES
    assert all(device.kind == "cuda" and device.reserve == 2e9 for device in DEVICES)


def test_a_cpu_is_described_by_its_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}[name])
    device = cpu(2)
    assert (device.memory, device.flops, device.flops_fp32, device.bandwidth) == (2**31, 520e9, 520e9, 40e9)
    assert (device.link, device.network, device.per_node, device.kind) == (2e9, 1.25e9, 2, "cpu")
    assert (device.usable, device.efficiency) == (2**31 - 2.6e7, 0.85)
    assert cpu(1000).flops == pytest.approx(13e9)  # no less than a tenth of a core
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert cpu(1).flops == 130e9


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [
        ("reserve", 0, True),
        ("reserve", True, False),
        ("network", 0, False),
        ("network", float("inf"), False),
        ("network", "fast", False),
        ("per_node", 1, True),
        ("per_node", 4.5, False),
        ("name", 7, False),
        ("kind", "cpu", True),
    ],
)
def test_values_of_a_file(key, value, good):
    content = {"base": "h100", key: value}
    if good:
        assert getattr(from_keys(content, "a.yml"), key) == value
    else:
        with pytest.raises(ConfigError, match=f"bad value; where=a.yml {key}"):
            from_keys(content, "a.yml")


REQUIRED = {"memory": 1e9, "flops": 2e9, "flops_fp32": 3e9, "bandwidth": 4e9, "link": 5e9, "network": 6e9}


def test_a_device_of_its_own_has_the_defaults_of_a_gpu():
    device = from_keys(REQUIRED, "some/where/mine.yaml")
    assert vars(device) == {
        **REQUIRED,
        "name": "mine",
        "per_node": 8,
        "reserve": 2e9,
        "efficiency": 0.6,
        "kind": "cuda",
        "cuda_name": "",
        "source": "some/where/mine.yaml",
    }
    more = {"name": "n", "per_node": 2, "reserve": 0, "efficiency": 0.5, "kind": "cpu", "cuda_name": "c", "source": "s"}
    assert from_keys(REQUIRED | more, "a.yml") == Device(**(REQUIRED | more))


def test_a_base_gives_all_other_values():
    base, device = find_device("rtx-4090"), from_keys({"base": "rtx-4090", "link": 1e9}, "b/mine.yml")
    changed = {"name": "mine", "link": 1e9, "source": f"b/mine.yml; other values: {base.source}"}
    assert vars(device) == vars(base) | changed
    assert from_keys({"base": "h100", "source": "measured"}, "mine.yml").source == "measured"
    content = {"base": "h100", "link": 1e9}
    from_keys(content, "mine.yml")
    assert content == {"base": "h100", "link": 1e9}  # not changed


@pytest.mark.parametrize("missing", [["memory"], ["link", "network"], ["flops", "flops_fp32", "bandwidth"]])
def test_an_incomplete_device_names_what_it_lacks(missing):
    with pytest.raises(ConfigError) as caught:
        from_keys({key: value for key, value in REQUIRED.items() if key not in missing}, "a.yml")
    assert caught.value.line() == (
        f"error[2] device is incomplete; where=a.yml; got=missing: {', '.join(missing)}; do=add them, or base: h100"
    )


@pytest.mark.parametrize(
    ("content", "report"),
    [
        ({"memory": -1}, "bad value; where=a.yml memory; got=-1; want=a number above 0"),
        ({"memory": float("nan")}, "bad value; where=a.yml memory; got=nan; want=a number above 0"),
        ({"link": True}, "bad value; where=a.yml link; got=True; want=a number above 0"),
        ({"name": 3}, "bad value; where=a.yml name; got=3; want=text"),
        ({"source": None}, "bad value; where=a.yml source; want=text"),
        ({"per_node": 2.0}, "bad value; where=a.yml per_node; got=2.0; want=a whole number of devices"),
        ({"kind": "tpu"}, "bad value; where=a.yml kind; got=tpu; want=cuda or cpu"),
    ],
    ids=str,
)
def test_the_report_of_a_bad_value(content, report):
    with pytest.raises(ConfigError) as caught:
        from_keys({**REQUIRED, **content}, "a.yml")
    assert caught.value.line() == f"error[2] {report}"


def test_the_report_of_an_unknown_key():
    names = (
        "name, memory, flops, flops_fp32, bandwidth, link, network, per_node, reserve, efficiency, kind, cuda_name, "
    )
    for key, do in (("bandwith", "; do=did you mean bandwidth?"), ("qqq", "")):
        with pytest.raises(ConfigError) as caught:
            from_keys({key: 3}, "a.yml")
        assert caught.value.line() == f"error[2] unknown key of a device; where=a.yml {key}; want={names}source{do}"


def test_the_report_of_an_unknown_device():
    known = ", ".join(device.name for device in DEVICES)
    for name, do in (("cpus", "did you mean cpu?"), ("zzzz", "neox plan --help"), ("B200-SXM", "did you mean b200?")):
        with pytest.raises(ConfigError) as caught:
            find_device(name)
        assert caught.value.line() == (
            f"error[2] unknown device; where=--device; got={name}; want={known}, cpu, or a YAML file; do={do}"
        )


def test_both_suffixes_are_files_and_their_problems_are_reported(tmp_path):
    for suffix in ("yml", "yaml"):
        path = tmp_path / f"own.{suffix}"
        path.write_text("base: h200\nper-node: 4\n")
        assert (find_device(str(path)).name, find_device(str(path)).per_node) == ("own", 4)
    path.write_text("base: h200\nlink: [\n")
    with pytest.raises(ConfigError, match=f"not YAML; where={path}:3"):
        find_device(str(path))
    path.write_text("base: cpu\nmemory: 5e9\n")
    device = find_device(str(path))
    assert (device.kind, device.memory, device.per_node) == ("cpu", 5e9, 1)


def test_the_longest_name_in_cuda_wins():
    assert device_of_cuda_name("NVIDIA H200 NVL").name == "h200-nvl"
    assert device_of_cuda_name("NVIDIA H200 XYZ").name == "h200"
    for name in ("NVIDIA", "NVIDIA H2000", "H200", "NVIDIA H200 MIG 7g.141gb", "NVIDIA GeForce RTX 4090 D MIG"):
        assert device_of_cuda_name(name) is None
    assert device_of_cuda_name("NVIDIA B200").name == "b200"
    assert device_of_cuda_name("NVIDIA GeForce RTX 4090").name == "rtx-4090"


def test_the_peak_depends_on_the_format():
    device = from_keys(REQUIRED, "a.yml")
    assert [device.peak(dtype) for dtype in ("fp32", "bf16", "fp16")] == [3e9, 2e9, 2e9]
    assert from_keys(REQUIRED | {"reserve": 0.25e9}, "a.yml").usable == 0.75e9
