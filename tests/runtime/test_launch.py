"""Rank, size and address from the variables of launchers."""

import pytest

from neox.errors import EnvironmentProblem
from neox.runtime.launch import LaunchInfo, first_host, read_launch_info

GOOD = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}


def test_alone_without_a_launcher():
    assert read_launch_info({}) == LaunchInfo(0, 0, 1, "127.0.0.1", 29500)
    assert read_launch_info({"LOCAL_RANK": "3"}) == LaunchInfo()


def test_from_a_launcher():
    launch = read_launch_info(GOOD)
    assert (launch.rank, launch.local_rank, launch.world_size, launch.address, launch.port) == (1, 1, 2, "host", 1234)
    assert "RANK, LOCAL_RANK, WORLD_SIZE" in launch.source
    assert read_launch_info({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == LaunchInfo()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", None),
        ("RANK", "2"),
        ("RANK", "-1"),
        ("RANK", None),
        ("LOCAL_RANK", "1.0"),
        ("LOCAL_RANK", ""),
        ("MASTER_ADDR", ""),
        ("MASTER_ADDR", None),
        ("MASTER_PORT", "99999"),
        ("MASTER_PORT", None),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("LOCAL_RANK", "2"),
        ("WORLD_SIZE", str((1 << 20) + 1)),
        ("OMP_NUM_THREADS", "0"),
        ("OMP_NUM_THREADS", "65537"),
        ("OMP_NUM_THREADS", "2,"),
        ("OMP_NUM_THREADS", "2,0"),
        ("OMP_NUM_THREADS", "2;1"),
        ("RANK", "\u0661"),
    ],
)
def test_a_wrong_variable_is_named(name, value):
    broken = {key: text for key, text in {**GOOD, name: value}.items() if text is not None}
    with pytest.raises(EnvironmentProblem, match=rf"error\[14\].*where={name}") as problem:
        read_launch_info(broken)
    assert problem.value.exit_code == 14
    if name == "OMP_NUM_THREADS":  # which no launcher sets to such a value
        assert problem.value.do == "unset it, or export OMP_NUM_THREADS=1"


SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[03-04,9]"}


def test_from_slurm():
    launch = read_launch_info(SLURM)
    assert (launch.rank, launch.local_rank, launch.world_size, launch.address, launch.port) == (
        5,
        1,
        8,
        "node03",
        29500,
    )
    assert launch.source.startswith("srun: SLURM_PROCID")
    assert read_launch_info(SLURM | {"MASTER_ADDR": "other", "MASTER_PORT": "1"}).address == "other"
    batch_script = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert read_launch_info(batch_script) == LaunchInfo()


def test_from_mpi():
    variables = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    launch = read_launch_info(variables | {"MASTER_ADDR": "a"})
    assert (launch.rank, launch.local_rank, launch.world_size, launch.address) == (3, 1, 4, "a")
    with pytest.raises(EnvironmentProblem, match="where=MASTER_ADDR.*Open MPI"):
        read_launch_info(variables)
    launch = read_launch_info(
        {"PMI_RANK": "1", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "77"}
    )
    assert (launch.rank, launch.local_rank, launch.world_size, launch.port) == (1, 0, 2, 77)


def test_torchrun_under_slurm_is_torchrun():
    launch = read_launch_info(SLURM | GOOD | {"TORCHELASTIC_RUN_ID": "x"})
    assert (launch.rank, launch.world_size) == (1, 2)
    assert launch.source.startswith("torchrun")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pod_of_one_process_has_no_local_rank(rank):
    alone = {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    assert read_launch_info({**alone, "RANK": "0"}) == read_launch_info(alone) == LaunchInfo()
    launch = read_launch_info({"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "1234"})
    assert (launch.rank, launch.local_rank) == (rank, 0)


@pytest.mark.parametrize("threads", ["1", "2,1", "4, 2, 1", " 8 "])
def test_threads_may_be_a_list(threads):
    assert read_launch_info({"OMP_NUM_THREADS": threads}) == LaunchInfo()


@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_an_address_of_ipv6(address):
    launch = read_launch_info({**GOOD, "MASTER_ADDR": address})
    assert (launch.address, launch.endpoint) == ("::1", "[::1]:1234")
    assert read_launch_info(GOOD).endpoint == "host:1234"


def test_who_serves_the_store():
    assert not read_launch_info(GOOD).agent_store
    assert read_launch_info({**GOOD, "TORCHELASTIC_USE_AGENT_STORE": "True"}).agent_store
    assert not read_launch_info({**GOOD, "TORCHELASTIC_USE_AGENT_STORE": "False"}).agent_store


def test_first_host():
    assert first_host("node[03-05,9],login") == "node03"
    assert first_host("") == ""


def test_the_default_is_alone():
    assert (LaunchInfo().rank, LaunchInfo().local_rank, LaunchInfo().world_size) == (0, 0, 1)


def test_the_largest_numbers_are_accepted():
    largest = {"RANK": "1048575", "LOCAL_RANK": "1048575", "WORLD_SIZE": "1048576", "OMP_NUM_THREADS": "65536"}
    launch = read_launch_info({**GOOD, **largest, "MASTER_PORT": "65535"})
    assert (launch.rank, launch.local_rank, launch.world_size, launch.port) == (1048575, 1048575, 1048576, 65535)
    assert read_launch_info({**GOOD, "MASTER_PORT": "1"}).port == 1


def test_the_hosts_of_a_step_come_before_those_of_the_job():
    old = {key: text for key, text in SLURM.items() if key != "SLURM_STEP_NODELIST"} | {"SLURM_NODELIST": "other[7-8]"}
    assert read_launch_info(old).address == "other7"
    assert read_launch_info(SLURM | old).address == "node03"
    assert read_launch_info(SLURM).source.endswith("first of SLURM_STEP_NODELIST")
    with pytest.raises(EnvironmentProblem, match="where=MASTER_ADDR"):
        read_launch_info({**old, "SLURM_NODELIST": ""})


def test_without_a_port_only_torchrun_and_hands_are_refused():
    mpi = {"PMI_RANK": "0", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2", "MASTER_ADDR": "a"}
    assert read_launch_info(mpi).port == 29500
    assert read_launch_info(SLURM | {"MASTER_PORT": "7"}).port == 7


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
MPICH = {"PMI_RANK": "1", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "source", "ranks"),
    [
        (SLURM | OPEN_MPI | MPICH, "srun: SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS", (5, 1, 8)),
        (OPEN_MPI | MPICH, f"mpirun (Open MPI): {', '.join(OPEN_MPI)}", (3, 2, 4)),
        (MPICH, "mpirun (MPICH, Intel MPI): PMI_RANK, MPI_LOCALRANKID, PMI_SIZE", (1, 0, 2)),
        (GOOD | OPEN_MPI, "deepspeed, or variables set by hand: RANK, LOCAL_RANK, WORLD_SIZE", (1, 1, 2)),
        (GOOD | {"TORCHELASTIC_RUN_ID": ""}, "torchrun: RANK, LOCAL_RANK, WORLD_SIZE", (1, 1, 2)),
    ],
)
def test_the_launcher_nearest_to_the_process_counts(variables, source, ranks):
    launch = read_launch_info({"MASTER_ADDR": "a", **variables})
    assert (launch.rank, launch.local_rank, launch.world_size) == ranks
    assert launch.source == source


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "MASTER_PORT"])
def test_a_wrong_variable_of_a_launcher_is_named_by_its_own_name(name):
    with pytest.raises(EnvironmentProblem, match=f"where={name}; got=x; want=a number from "):
        read_launch_info(SLURM | {name: "x"})


def test_one_process_needs_no_address():
    assert read_launch_info({"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "none"}) == LaunchInfo()
    assert read_launch_info({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == LaunchInfo()
    with pytest.raises(EnvironmentProblem, match="where=RANK; got=1; want=a number from 0 to 0"):
        read_launch_info({"WORLD_SIZE": "1", "RANK": "1"})
    with pytest.raises(
        EnvironmentProblem, match="where=WORLD_SIZE; got=not set; want=.*; do=.* unset RANK and WORLD_SIZE$"
    ):
        read_launch_info({"RANK": "0"})
