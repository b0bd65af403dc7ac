"""Rank, world size and address of this process, from the variables of deepspeed, torchrun, srun or mpirun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neox.errors import EnvironmentProblem
from neox.runtime.nodelist import expand_hosts

MAX_PROCESSES = 1 << 20
MAX_THREADS = 1 << 16
DEFAULT_PORT = "29500"

# Launcher -> the names of its variables for RANK, LOCAL_RANK and WORLD_SIZE. The first launcher whose WORLD_SIZE is set
# is used. Only srun sets SLURM_STEP_NUM_TASKS; a batch script or a shell of salloc has SLURM_NTASKS too, but no sibling
# processes.
LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpirun (MPICH, Intel MPI)": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
}


@dataclass(frozen=True)
class LaunchInfo:
    """Rank of this process, number of processes, and address of the rendezvous store. The default is a single process.

    Attributes:
        rank: rank among all processes.
        local_rank: rank among the processes of this host; the index of its GPU.
        world_size: number of processes.
        address, port: where the first process, or the launcher's agent, serves the store.
        source: the launcher and the variables that were read, for messages.
        agent_store: whether torchrun's agent serves the store, not rank 0. It outlives the attempts of a job that is
            restarted.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    source: str = ""
    agent_store: bool = False

    @property
    def endpoint(self) -> str:
        """address:port, an IPv6 address in brackets."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def read_number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    """Read an integer variable of the launcher.

    Raises:
        EnvironmentProblem: it is missing, or not a number from low to high.
    """
    text = environment.get(name)
    if text is None or not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
        raise EnvironmentProblem(
            "a launcher's variable is wrong",
            where=name,
            got="not set" if text is None else text,
            want=f"a number from {low} to {high}",
            do="start with deepspeed, torchrun, srun or mpirun; for one process unset RANK and WORLD_SIZE",
        )
    return int(text)


def read_launch_info(environment: Mapping[str, str]) -> LaunchInfo:
    """Read the variables of a launcher; without any, this is a single process.

    RANK and WORLD_SIZE, which torchrun and deepspeed set, take precedence over those of Slurm and MPI, under which
    torchrun may run.

    Raises:
        EnvironmentProblem: names the variable that is missing or wrong.
    """
    check_threads(environment)
    names, launcher = (
        ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
        "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed, or variables set by hand",
    )
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        found = next((name for name, variables in LAUNCHERS.items() if variables[2] in environment), None)
        if found is None:
            return LaunchInfo()
        names, launcher = LAUNCHERS[found], found
    world_size = read_number(environment, names[2], 1, MAX_PROCESSES)
    if launcher not in LAUNCHERS:  # a pod of Kubeflow's PyTorchJob has one process and no LOCAL_RANK
        environment = {"LOCAL_RANK": "0", **({"RANK": "0"} if world_size == 1 else {}), **environment}
    rank = read_number(environment, names[0], 0, world_size - 1)
    local_rank = read_number(environment, names[1], 0, world_size - 1)
    if world_size == 1:
        return LaunchInfo(rank, local_rank, world_size)
    source = f"{launcher}: {names[0]}, {names[1]}, {names[2]}"
    # an IPv6 address may be in brackets
    address = environment.get("MASTER_ADDR", "").strip().removeprefix("[").removesuffix("]")
    if not address and launcher == "srun":
        address = first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "")
        source += ", first of SLURM_STEP_NODELIST"
    if not address:
        raise EnvironmentProblem(
            "a launcher's variable is wrong",
            where="MASTER_ADDR",
            got=environment.get("MASTER_ADDR"),
            want="host name of the first process",
            do="export MASTER_ADDR=HOST" + (f", which {launcher} does not set" if launcher in LAUNCHERS else ""),
        )
    port = environment if "MASTER_PORT" in environment or launcher not in LAUNCHERS else {"MASTER_PORT": DEFAULT_PORT}
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return LaunchInfo(rank, local_rank, world_size, address, read_number(port, "MASTER_PORT", 1, 65535), source, agent)


def check_threads(environment: Mapping[str, str]) -> None:
    """Check that OMP_NUM_THREADS is a number, or a list with one for each level of nested parallelism.

    Raises:
        EnvironmentProblem: it is neither.
    """
    text = environment.get("OMP_NUM_THREADS")
    if text is None:
        return
    for number in map(str.strip, text.split(",")):
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= MAX_THREADS:
            raise EnvironmentProblem(
                "number of threads is wrong",
                where="OMP_NUM_THREADS",
                got=text,
                want=f"a number from 1 to {MAX_THREADS}, or such numbers separated by commas",
                do="unset it, or export OMP_NUM_THREADS=1",
            )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `node[03-05,9],login` -> node03; empty for an empty list.

    Raises:
        EnvironmentProblem: the text is not such a list.
    """
    return next(expand_hosts(nodes), "")
