"""Places of every launcher, from environments written down from the launchers' documentation."""

import socket

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.runtime.launch_environment import LaunchPlace, discover, export, first_slurm_host, free_port

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "j",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09],login", "SLURM_JOB_NODELIST": "gpu[01-09],login",
}  # fmt: skip
SALLOC_SHELL = {
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "h1",
}  # fmt: skip
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "h1"}
SINGLE = LaunchPlace(0, 1, 0, 1, "127.0.0.1", 0, "single")


def without(environ: dict[str, str], *names: str, **changes: str) -> dict[str, str]:
    return {**{k: v for k, v in environ.items() if k not in names}, **changes}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        pytest.param({}, SINGLE, id="plain"),
        pytest.param({"WORLD_SIZE": "1"}, SINGLE, id="a world of one needs no rank"),
        pytest.param(TORCHRUN, LaunchPlace(5, 8, 1, 4, "node0", 29400, "env"), id="torchrun"),
        pytest.param(DEEPSPEED, LaunchPlace(1, 2, 1, 2, "127.0.0.1", 29500, "env"), id="deepspeed"),
        pytest.param(
            {"RANK": "0", "WORLD_SIZE": "1"}, LaunchPlace(0, 1, 0, 1, "127.0.0.1", 29500, "env"), id="rank of one"
        ),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"},
            LaunchPlace(1, 2, 1, 2, "localhost", 29500, "env"),
            id="own script on one host",
        ),
        pytest.param(
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h1"},
            LaunchPlace(5, 8, 1, 2, "h1", 29500, "env"),
            id="own script, local size unknown: the lower bound",
        ),
        # 20000 + (4711 * 7 + 2) % 10000
        pytest.param(SRUN, LaunchPlace(5, 7, 1, 2, "gpu07", 22979, "slurm"), id="srun"),
        pytest.param(
            without(SRUN, SLURM_PROCID="6", SLURM_LOCALID="0", SLURM_NODEID="3"),
            LaunchPlace(6, 7, 0, 1, "gpu07", 22979, "slurm"),
            id="srun, last host has fewer tasks",
        ),
        pytest.param(
            without(SRUN, MASTER_ADDR="10.0.0.1", MASTER_PORT="1234"),
            LaunchPlace(5, 7, 1, 2, "10.0.0.1", 1234, "slurm"),
            id="srun, address given by the job script",
        ),
        pytest.param(
            without(SRUN, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", SLURM_STEPID="2"),
            LaunchPlace(5, 7, 1, 2, "gpu07", 22979, "slurm"),
            id="srun of an old Slurm",
        ),
        pytest.param(
            {
                **SRUN,
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NODEID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "2",
            },
            LaunchPlace(1, 2, 1, 2, "127.0.0.1", 22979, "slurm"),
            id="srun on one host; a step smaller than the allocation",
        ),
        pytest.param(SALLOC_SHELL, SINGLE, id="shell of an interactive allocation"),
        pytest.param({**SALLOC_SHELL, "SLURM_STEP_ID": "4294967290"}, SINGLE, id="Slurm's interactive step"),
        pytest.param({**SALLOC_SHELL, "SLURM_STEP_ID": "4294967291"}, SINGLE, id="Slurm's batch step"),
        pytest.param(
            {**SALLOC_SHELL, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, SINGLE, id="srun --pty of one task"
        ),
        pytest.param(
            {**SALLOC_SHELL, **DEEPSPEED}, LaunchPlace(1, 2, 1, 2, "127.0.0.1", 29500, "env"), id="deepspeed in salloc"
        ),
        pytest.param(
            {**SRUN, **TORCHRUN},
            LaunchPlace(5, 8, 1, 4, "node0", 29400, "env"),
            id="torchrun, one task a host under srun",
        ),
        pytest.param(OPENMPI, LaunchPlace(3, 4, 1, 2, "h1", 29500, "openmpi"), id="mpirun, Open MPI"),
        pytest.param(
            without(OPENMPI, "MASTER_ADDR", OMPI_COMM_WORLD_LOCAL_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="3"),
            LaunchPlace(3, 4, 3, 4, "127.0.0.1", 29500, "openmpi"),
            id="mpirun on one host needs no address",
        ),
        pytest.param(
            # mpirun starts one daemon a host by srun; SLURM_* are the daemon's, not the rank's.
            without({**SRUN, **OPENMPI}, "MASTER_ADDR", SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0"),
            LaunchPlace(3, 4, 1, 2, "gpu01", 29500, "openmpi"),
            id="mpirun inside a Slurm job",
        ),
        pytest.param(MPICH, LaunchPlace(3, 4, 1, 2, "h1", 29500, "pmi"), id="mpirun, MPICH"),
        pytest.param(
            {"PMI_RANK": "0", "PMI_SIZE": "1"}, LaunchPlace(0, 1, 0, 1, "127.0.0.1", 29500, "pmi"), id="mpi -n 1"
        ),
        pytest.param(
            {**SRUN, **MPICH, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            LaunchPlace(3, 4, 1, 2, "h1", 29500, "pmi"),
            id="MPICH's mpirun inside a Slurm job",
        ),
        pytest.param(
            {**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"},
            LaunchPlace(5, 7, 1, 2, "gpu07", 22979, "slurm"),
            id="srun --mpi=pmi2",
        ),
    ],
)
def test_place(environ, place):
    assert discover(environ) == place


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (without(TORCHRUN, RANK="8"), "rank 8 of world size 8"),
        (without(TORCHRUN, RANK="-1"), "rank -1 of world size 8"),
        (without(TORCHRUN, RANK="two"), "RANK is 'two'; it must be an integer"),
        (without(TORCHRUN, RANK="1.0"), "RANK is '1.0'"),
        (without(TORCHRUN, WORLD_SIZE=""), "WORLD_SIZE is ''"),
        (without(TORCHRUN, WORLD_SIZE="0", RANK="0"), "world size 0"),
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
        (without(TORCHRUN, LOCAL_RANK="4"), "local rank 4 of 4"),
        (without(TORCHRUN, LOCAL_WORLD_SIZE="16"), "of 16"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set"),
        (without(TORCHRUN, MASTER_PORT="70000"), "MASTER_PORT is 70000"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 but RANK is not set"),
        (without(OPENMPI, "MASTER_ADDR"), "mpirun -x MASTER_ADDR=HOST"),
        (without(OPENMPI, WORLD_SIZE="2"), "WORLD_SIZE is 2 but the openmpi launcher started 4"),
        (without(OPENMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
        (without(MPICH, "MPI_LOCALRANKID"), "MPI_LOCALRANKID is not set"),
        (without(MPICH, "MASTER_ADDR"), "-genv MASTER_ADDR HOST"),
        (without(SRUN, WORLD_SIZE="8"), "WORLD_SIZE is 8 but the slurm launcher started 7"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(SRUN, SLURM_PROCID="9"), "rank 9 of world size 7"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "set MASTER_ADDR"),
    ],
)  # fmt: skip
def test_half_set_or_contradictory_environments_are_told_in_one_line(environ, told):
    with pytest.raises(ConfigError) as caught:
        discover(environ)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[3-5]", "gpu3"),
        ("gpu[003-005,009],login", "gpu003"),
        ("gpu[7]", "gpu7"),
        ("rack[2-3]node[01-16]-ib", "rack2node01-ib"),
        ("n[1,3].cluster.example", "n1.cluster.example"),
        ("a-b[10-12]", "a-b10"),
    ],
)
def test_first_slurm_host(node_list, host):
    assert first_slurm_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", "gpu[1-3", "gpu]1", ","])
def test_unreadable_slurm_host_list(node_list):
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        first_slurm_host(node_list)


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, SRUN, OPENMPI, MPICH])
def test_export_then_discover_gives_the_same_place(environ):
    place = discover(environ)
    written: dict[str, str] = {}
    export(place, written)
    again = discover(written)
    assert again == LaunchPlace(**{**vars(place), "launcher": "env"})


def test_export_of_a_single_process_chooses_a_port():
    written: dict[str, str] = {}
    export(SINGLE, written)
    assert 1024 <= int(written["MASTER_PORT"]) < 65536
    assert written["RANK"] == written["LOCAL_RANK"] == "0"
    assert written["WORLD_SIZE"] == "1"


def test_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
