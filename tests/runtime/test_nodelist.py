"""Slurm's host lists: every form that `scontrol show hostlist` writes."""

import itertools
import time

import pytest

from neox.errors import EnvironmentProblem
from neox.runtime.nodelist import expand_hosts


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("n[1-4]", ["n1", "n2", "n3", "n4"]),
        ("n[007,9],m", ["n007", "n9", "m"]),
        ("gpu-3-[10-12]", ["gpu-3-10", "gpu-3-11", "gpu-3-12"]),
        ("n[3-3]", ["n3"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("x1000c0s0b[0-1]n0", ["x1000c0s0b0n0", "x1000c0s0b1n0"]),
        ("c[1-2]n[3-4]", ["c1n3", "c1n4", "c2n3", "c2n4"]),
        ("gpu[01-02]-ib,gpu09", ["gpu01-ib", "gpu02-ib", "gpu09"]),
        (
            "rack[1,3]-node[05-06].example.org,login",
            [f"rack{r}-node0{n}.example.org" for r in (1, 3) for n in (5, 6)] + ["login"],
        ),
        ("[10-11]", ["10", "11"]),
        ("a[1][2-3]b", ["a12b", "a13b"]),
        ("n[0[1-2],1[0-1]]", ["n01", "n02", "n10", "n11"]),
        (" a , b1 ", ["a", "b1"]),
        ("n[9-11,099-101]", ["n9", "n10", "n11", "n099", "n100", "n101"]),
        ("n[0-0,00]", ["n0", "n00"]),
        ("a[1-2]b[0[1-2],9]c", [f"a{i}b{j}c" for i in (1, 2) for j in ("01", "02", "9")]),
    ],
)
def test_hosts(nodes, hosts):
    assert list(expand_hosts(nodes)) == hosts


def test_a_long_list_is_not_expanded_for_its_first_host():
    begin = time.process_time()
    assert list(itertools.islice(expand_hosts("a[0-999999999]b[000000-999999]"), 2)) == ["a0b000000", "a0b000001"]
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "nodes",
    [
        *("n[1-", "n1]", "n[1-2]]", "n[]", "n[2-1]", "n[a-b]", "n[1-2-3]", "a,,b", "n[1,]", ",", "n[[1-2]"),
        *("n[\u0661-2]", "n]1[", "n[1],]2[", "n[1-2][", "n[-1]", "n[1-]", "n[0[1-a]]", "n[x[1-2]]", "[a[1-2]]"),
        *("n[1,,2]", "a,m[2-1]"),
    ],
)
def test_malformed_lists_are_refused(nodes):
    with pytest.raises(
        EnvironmentProblem, match=r"error\[14\] cannot read Slurm's host list; where=SLURM_STEP_NODELIST.*MASTER_ADDR"
    ) as problem:
        list(expand_hosts(nodes))
    assert problem.value.got == nodes  # all of it, not the part that is wrong
