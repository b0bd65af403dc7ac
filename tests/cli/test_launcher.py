"""What the variables of launchers say about a process's place."""

import pytest

from neox.cli.launcher import first_host, read_place
from neox.errors import EnvironmentProblem
from neox.train.place import Place

GOOD = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1234"}


def test_alone_without_a_launcher():
    assert read_place({}) == Place(0, 0, 1, "127.0.0.1", 29500)
    assert read_place({"LOCAL_RANK": "3"}) == Place()


def test_from_a_launcher():
    place = read_place(GOOD)
    assert (place.rank, place.local_rank, place.world_size, place.address, place.port) == (1, 1, 2, "host", 1234)
    assert "RANK, LOCAL_RANK, WORLD_SIZE" in place.source
    assert read_place({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == Place()


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
        ("OMP_NUM_THREADS", "0"),
        ("OMP_NUM_THREADS", "2,"),
        ("OMP_NUM_THREADS", "2,0"),
        ("OMP_NUM_THREADS", "2;1"),
        ("RANK", "\u0661"),
    ],
)
def test_a_wrong_variable_is_named(name, value):
    broken = {key: text for key, text in {**GOOD, name: value}.items() if text is not None}
    with pytest.raises(EnvironmentProblem, match=rf"error\[14\].*where={name}") as problem:
        read_place(broken)
    assert problem.value.exit_code == 14


SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[03-04,9]"}


def test_from_slurm():
    place = read_place(SLURM)
    assert (place.rank, place.local_rank, place.world_size, place.address, place.port) == (5, 1, 8, "node03", 29500)
    assert place.source.startswith("srun: SLURM_PROCID")
    assert read_place(SLURM | {"MASTER_ADDR": "other", "MASTER_PORT": "1"}).address == "other"
    batch_script = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert read_place(batch_script) == Place()


def test_from_mpi():
    variables = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    place = read_place(variables | {"MASTER_ADDR": "a"})
    assert (place.rank, place.local_rank, place.world_size, place.address) == (3, 1, 4, "a")
    with pytest.raises(EnvironmentProblem, match="where=MASTER_ADDR.*Open MPI"):
        read_place(variables)
    place = read_place({"PMI_RANK": "1", "MPI_LOCALRANKID": "0", "PMI_SIZE": "2", "MASTER_ADDR": "b", "MASTER_PORT": "77"})
    assert (place.rank, place.world_size, place.port) == (1, 2, 77)


def test_torchrun_under_slurm_is_torchrun():
    place = read_place(SLURM | GOOD | {"TORCHELASTIC_RUN_ID": "x"})
    assert (place.rank, place.world_size) == (1, 2)
    assert place.source.startswith("torchrun")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pod_of_one_process_has_no_local_rank(rank):
    alone = {"WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    assert read_place({**alone, "RANK": "0"}) == read_place(alone) == Place()
    place = read_place({"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "1234"})
    assert (place.rank, place.local_rank) == (rank, 0)


@pytest.mark.parametrize("threads", ["1", "2,1", "4, 2, 1", " 8 "])
def test_threads_may_be_a_list(threads):
    assert read_place({"OMP_NUM_THREADS": threads}) == Place()


@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_an_address_of_ipv6(address):
    place = read_place({**GOOD, "MASTER_ADDR": address})
    assert (place.address, place.endpoint) == ("::1", "[::1]:1234")
    assert read_place(GOOD).endpoint == "host:1234"


def test_who_serves_the_store():
    assert not read_place(GOOD).agent_store
    assert read_place({**GOOD, "TORCHELASTIC_USE_AGENT_STORE": "True"}).agent_store
    assert not read_place({**GOOD, "TORCHELASTIC_USE_AGENT_STORE": "False"}).agent_store


def test_first_host():
    assert first_host("node[03-05,9],login") == "node03"
    assert first_host("") == ""
