"""Two hosts, made of network namespaces joined by a veth pair: each has its own address and loopback, as two
machines have.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ROOT, Processes, environment
from tests.train.corpus import config_text, make_corpus, records

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def hosts():
    """Names of two namespaces; they and their link are removed at the end."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"neox{os.getpid()}{letter}" for letter in "ab"]
    links = [f"nx{os.getpid() % 10**6}{letter}" for letter in "ab"]
    try:
        made = [ip("netns", "add", name) for name in names] + [
            ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        ]
        if any(result.returncode for result in made):
            pytest.skip(
                f"network namespaces cannot be made here: "
                f"{[result.stderr.strip() for result in made if result.returncode]}"
            )
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, links, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)
        ip("link", "del", links[0])


@pytest.fixture
def conf(tmp_path) -> Path:
    make_corpus(tmp_path / "data")
    (tmp_path / "conf.yml").write_text(config_text(tmp_path / "data", tmp_path / "run"))
    return tmp_path / "conf.yml"


# pdsh -S -f N -w HOST,HOST COMMAND: %n in the command is the number of the host.
PDSH = """#!{python}
import os, subprocess, sys
table = {table}
flag = sys.argv.index("-w")
hosts, command = sys.argv[flag + 1].split(","), " ".join(sys.argv[flag + 2 :])
if command.startswith("pkill"):
    sys.exit("this stand-in ends no processes")
running = []
for number, host in enumerate(hosts):
    space, link = table[host]
    text = f"export GLOO_SOCKET_IFNAME={{link}}; " + command.replace("%n", str(number)).replace("%h", host)
    running.append(subprocess.Popen(["ip", "netns", "exec", space, "bash", "-c", text]))
sys.exit(max(process.wait() for process in running))
"""
OVERRIDES = ["--set", "parallel.pipeline=2", "train.train_iters=4", "zero.stage=1"]


@pytest.mark.distributed
@pytest.mark.parallel
def test_torchrun_over_two_hosts(hosts, conf, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        ADDRESSES[0],
    ]
    script = ["--master-port", "29511", str(ROOT / "train.py"), "--conf", str(conf), *OVERRIDES]
    commands = [
        ["ip", "netns", "exec", name, *torchrun, "--node-rank", str(rank), *script]
        for rank, (name, _) in enumerate(hosts)
    ]
    for result in Processes(commands, [environment(GLOO_SOCKET_IFNAME=link) for _, link in hosts], tmp_path).wait(
        150.0
    ):
        result.check()
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.skipif(
    " " in f"{sys.executable}{ROOT}",
    reason="DeepSpeed does not quote paths in the commands that it sends to other hosts",
)
@pytest.mark.distributed
@pytest.mark.parallel
def test_deepspeed_with_a_hostfile_over_two_hosts(hosts, conf, tmp_path):
    """DeepSpeed reaches the hosts of a hostfile by pdsh; the program of that name here enters the namespace that has
    the address.
    """
    table = dict(zip(ADDRESSES, hosts, strict=True))
    (tmp_path / "bin").mkdir()
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.write_text(PDSH.format(python=sys.executable, table=table))
    pdsh.chmod(0o755)
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    env = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    program = str(Path(sys.executable).with_name("deepspeed"))
    command = [
        sys.executable,
        program,
        "--hostfile",
        str(tmp_path / "hostfile"),
        "--master_addr",
        ADDRESSES[0],
        "--no_ssh_check",
    ]
    command += ["--master_port", "29512", str(ROOT / "train.py"), "--conf", str(conf), *OVERRIDES]
    Processes([command], [env], tmp_path).wait(150.0)[0].check()
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
