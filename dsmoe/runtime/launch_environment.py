"""Reading a process's place among the ranks from the environment that its launcher left. No torch, no MPI.

torchrun, the deepspeed launcher and hand-made scripts set RANK and friends; mpirun and srun start the script
with names of their own and without RANK. DeepSpeed reads only the first kind (and falls back to mpi4py), so
`discover` reads every kind and `export` writes the names that torch and DeepSpeed read. Nothing is started
here.
"""

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dsmoe.base.errors import ConfigError

DEFAULT_MASTER_PORT = 29500
LOOPBACK = "127.0.0.1"
# Slurm numbers the batch script, the interactive shell and the like as steps from here up; no task runs in
# them.
_SLURM_SPECIAL_STEPS = 0xFFFFFFF0


@dataclass(frozen=True)
class LaunchPlace:
    """One process's place in a run.

    rank in [0, world_size), local_rank in [0, local_world_size): index among all processes and on this host.
    local_world_size: processes on this host; when the launcher does not say, local_rank + 1, a lower bound.
    master_addr, master_port: where rank 0 listens; port 0 (a single process) means that any free one will do.
    launcher: "env" (RANK was set: torchrun, deepspeed, a script), "slurm", "openmpi", "pmi" (MPICH, Intel
    MPI) or "single".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigError(
                f"the {self.launcher} launcher gives world size {self.world_size}; it must be at least 1."
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"the {self.launcher} launcher gives rank {self.rank} of world size {self.world_size}; "
                f"it must lie in 0..{self.world_size - 1}: check RANK and WORLD_SIZE (or the launcher's)."
            )
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise ConfigError(
                f"the {self.launcher} launcher gives local rank {self.local_rank} of {self.local_world_size} "
                f"on this host, world size {self.world_size}; need local rank < local size <= world size."
            )
        if not 0 <= self.master_port < 65536:
            raise ConfigError(f"MASTER_PORT is {self.master_port}; it must lie in 1..65535.")


def discover(environ: Mapping[str, str]) -> LaunchPlace:
    """This process's place, from the environment alone.

    Order: RANK; OMPI_COMM_WORLD_RANK; a Slurm step of several tasks; PMI_RANK; else a single process. MPI
    comes before Slurm because mpirun inside a Slurm job starts its daemons with srun, one a host, and the
    ranks below them inherit the daemon's SLURM_PROCID. SLURM_* counts only inside a step (SLURM_STEP_ID): the
    shell of an interactive allocation has SLURM_PROCID=0 and SLURM_NTASKS=8 as well, and is one process.

    Raises ConfigError on a half-set or contradictory environment.
    """
    if "RANK" in environ:
        return _from_rank(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_mpi(environ, "openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                         "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")  # fmt: skip
    if _in_slurm_step(environ) and not _pmi_contradicts_slurm(environ):
        return _from_slurm(environ)
    if "PMI_RANK" in environ:
        return _from_mpi(environ, "pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    stated = _integer(environ, "WORLD_SIZE", default=1)
    if stated != 1:
        raise ConfigError(
            f"WORLD_SIZE is {stated} but RANK is not set and no launcher was recognised; "
            "set RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too, or unset WORLD_SIZE for a single process."
        )
    return LaunchPlace(0, 1, 0, 1, LOOPBACK, 0, "single")


def stated_rank(environ: Mapping[str, str]) -> int:
    """The rank an environment claims, for who speaks when `discover` refuses it: 0 does.

    0 also when it claims none, or one beyond its own world size: then no other rank meets the fault.
    """
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    text = next((environ[name] for name in names if name in environ), "").strip()
    world = environ.get("WORLD_SIZE", "").strip()
    rank = int(text) if text.isdecimal() else 0
    return 0 if world.isdecimal() and 0 < int(world) <= rank else rank


def export(place: LaunchPlace, environ: MutableMapping[str, str]) -> None:
    """Write the names that torch.distributed and DeepSpeed read; a port of 0 becomes a free one."""
    port = place.master_port or free_port()
    environ["RANK"] = str(place.rank)
    environ["WORLD_SIZE"] = str(place.world_size)
    environ["LOCAL_RANK"] = str(place.local_rank)
    environ["LOCAL_WORLD_SIZE"] = environ["LOCAL_SIZE"] = str(place.local_world_size)
    environ["MASTER_ADDR"] = place.master_addr
    environ["MASTER_PORT"] = str(port)


def free_port() -> int:
    """A TCP port that was free on the loopback a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def first_slurm_host(node_list: str) -> str:
    """First host of a Slurm host list: "gpu[03-05,7],login1" -> "gpu03" (what `scontrol show hostnames`
    prints first).

    Done here because scontrol is often absent inside a container.
    """
    depth, end = 0, len(node_list)
    for i, character in enumerate(node_list):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            end = i
            break
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", node_list[:end].strip())
    if not host or depth < 0 or "[" in host or "]" in host:
        raise ConfigError(
            f"the Slurm node list {node_list!r} cannot be read; set MASTER_ADDR to the first host's name."
        )
    return host


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ConfigError(f"{name} is not set though the other launch variables are; set it or use a launcher.")
        return default
    if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
        raise ConfigError(f"{name} is {text!r}; it must be an integer.")
    return int(text)


def _from_rank(environ: Mapping[str, str]) -> LaunchPlace:
    rank = _integer(environ, "RANK")
    if "WORLD_SIZE" not in environ:
        raise ConfigError(f"RANK is {rank} but WORLD_SIZE is not set; set both, or neither for a single process.")
    world_size = _integer(environ, "WORLD_SIZE")
    if "LOCAL_RANK" not in environ and world_size > 1:
        raise ConfigError(
            f"RANK is {rank} of WORLD_SIZE {world_size} but LOCAL_RANK is not set; it chooses the GPU: "
            "start with torchrun or deepspeed, or set it (0 with one process a host)."
        )
    local_rank = _integer(environ, "LOCAL_RANK", default=0)
    size_name = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), "LOCAL_WORLD_SIZE")
    one_host = world_size == 1 or environ.get("MASTER_ADDR") in (LOOPBACK, "localhost", "::1")
    local_world_size = _integer(environ, size_name, default=world_size if one_host else local_rank + 1)
    address = environ.get("MASTER_ADDR") or (LOOPBACK if local_world_size == world_size else "")
    if not address:
        raise ConfigError(
            f"RANK is {rank} of WORLD_SIZE {world_size} but MASTER_ADDR is not set; set it to rank 0's host."
        )
    port = _integer(environ, "MASTER_PORT", default=DEFAULT_MASTER_PORT)
    return LaunchPlace(rank, world_size, local_rank, local_world_size, address, port, "env")


def _agree_with_world_size(environ: Mapping[str, str], launcher: str, world_size: int) -> None:
    """A WORLD_SIZE set beside an MPI or Slurm launch must say the same."""
    stated = _integer(environ, "WORLD_SIZE", default=world_size)
    if stated != world_size:
        raise ConfigError(f"WORLD_SIZE is {stated} but the {launcher} launcher started {world_size}; unset WORLD_SIZE.")


def _from_mpi(
    environ: Mapping[str, str],
    launcher: str,
    rank_name: str,
    size_name: str,
    local_name: str,
    local_size_name: str,
) -> LaunchPlace:
    rank, world_size = _integer(environ, rank_name), _integer(environ, size_name)
    _agree_with_world_size(environ, launcher, world_size)
    local_rank = _integer(environ, local_name, default=0 if world_size == 1 else None)
    local_world_size = _integer(environ, local_size_name, default=local_rank + 1)
    address = environ.get("MASTER_ADDR", "")
    if not address and local_world_size == world_size:
        address = LOOPBACK
    if not address and environ.get("SLURM_JOB_NODELIST"):
        address = first_slurm_host(environ["SLURM_JOB_NODELIST"])
    if not address:
        option = "-x MASTER_ADDR=HOST" if launcher == "openmpi" else "-genv MASTER_ADDR HOST"
        raise ConfigError(
            f"mpirun started {world_size} ranks on several hosts but MASTER_ADDR is not set: "
            f"pass the first host, mpirun {option} ... "
            "(with the deepspeed launcher: a line MASTER_ADDR=HOST in .deepspeed_env)."
        )
    port = _integer(environ, "MASTER_PORT", default=DEFAULT_MASTER_PORT)
    return LaunchPlace(rank, world_size, local_rank, local_world_size, address, port, launcher)


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _integer(environ, name, default=1)


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    real_step = step.isdigit() and int(step) < _SLURM_SPECIAL_STEPS
    return real_step and "SLURM_PROCID" in environ and _slurm_tasks(environ) > 1


def _pmi_contradicts_slurm(environ: Mapping[str, str]) -> bool:
    """True under MPICH's mpirun in a Slurm job (SLURM_* are its proxies'), not under `srun --mpi=pmi2`."""
    if "PMI_RANK" not in environ or "PMI_SIZE" not in environ:
        return False
    pmi = (_integer(environ, "PMI_RANK"), _integer(environ, "PMI_SIZE"))
    return pmi != (_integer(environ, "SLURM_PROCID"), _slurm_tasks(environ))


def _from_slurm(environ: Mapping[str, str]) -> LaunchPlace:
    rank, world_size = _integer(environ, "SLURM_PROCID"), _slurm_tasks(environ)
    _agree_with_world_size(environ, "slurm", world_size)
    local_rank = _integer(environ, "SLURM_LOCALID")
    local_world_size = _slurm_tasks_on_this_node(environ) or local_rank + 1
    address = environ.get("MASTER_ADDR", "")
    if not address:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        address = LOOPBACK if local_world_size == world_size else first_slurm_host(nodes)
    # One port a job and step, so that two jobs that share a host do not meet; below the ephemeral range.
    job = _integer(environ, "SLURM_JOB_ID", default=0)
    step = _integer(environ, "SLURM_STEP_ID", default=_integer(environ, "SLURM_STEPID", default=0))
    port = _integer(environ, "MASTER_PORT", default=20000 + (job * 7 + step) % 10000)
    return LaunchPlace(rank, world_size, local_rank, local_world_size, address, port, "slurm")


def _slurm_tasks_on_this_node(environ: Mapping[str, str]) -> int | None:
    """Entry SLURM_NODEID of SLURM_STEP_TASKS_PER_NODE ("2(x3),1" = 2, 2, 2, 1); None when it does not say."""
    per_node: list[int] = []
    for entry in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if not match:
            return None
        per_node += [int(match[1])] * int(match[2] or 1)
    node = _integer(environ, "SLURM_NODEID", default=0)
    return per_node[node] if 0 <= node < len(per_node) else None
