"""The process group on real processes, and every helper in a process without one."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from distributed_harness import assert_succeeded, launch

from dsmoe.base.errors import ConfigError
from dsmoe.runtime import distributed
from dsmoe.runtime.device import Device

PREAMBLE = """
import os, sys, time
from datetime import timedelta
import torch
from dsmoe.runtime import distributed as d
from dsmoe.runtime.device import Device
place = d.discover(os.environ)
"""

COLLECTIVES = """
d.initialize(place, Device.pick(place.local_rank), timedelta(seconds=60))
r, w = d.rank(), d.world_size()
assert (r, w, d.is_main()) == (place.rank, 3, r == 0)
base = torch.arange(4.0) + 10 * r
for op, expected in {"sum": 3 * torch.arange(4.0) + 30, "mean": torch.arange(4.0) + 10,
                     "max": torch.arange(4.0) + 20, "min": torch.arange(4.0)}.items():
    got = base.clone()
    assert d.all_reduce_(got, op) is got and torch.equal(got, expected), (op, got)
strided = torch.zeros(2, 3)
d.all_reduce_(strided[:, 1].add_(r), "sum")
assert strided.tolist() == [[0, 3, 0], [0, 3, 0]], strided
parts = d.all_gather_tensor(torch.tensor([[r, -r]]))
assert [p.tolist() for p in parts] == [[[0, 0]], [[1, -1]], [[2, -2]]], parts
told = d.broadcast_object({"from": r, "text": "\\u00fc", "pair": (1, 2.5, None)})
assert told == {"from": 0, "text": "\\u00fc", "pair": [1, 2.5, None]}, told
assert d.broadcast_object([r], source=2) == [2]
assert d.on_main(lambda: "main")() == ("main" if r == 0 else None)
board = d.Board("test")
mine = [board.add("claimed") for _ in range(5)]
board.post(f"rank {r}", f"h\u00e9llo {mine}")
while board.count("claimed") < 15 or any(board.line(f"rank {i}") is None for i in range(3)):
    time.sleep(0.01)
claims = [int(n) for i in range(3) for n in board.line(f"rank {i}").partition("[")[2][:-1].split(",")]
assert sorted(claims) == list(range(1, 16)), claims
assert d.Board("other").count("claimed") == 0
d.barrier()
assert os.environ["TORCH_EXTENSIONS_DIR"]
c10d = torch.distributed.distributed_c10d
assert c10d._get_default_timeout(c10d.Backend("gloo")) == timedelta(seconds=60)
d.shutdown()
d.shutdown()
assert d.world_size() == 1
print("done", r)
"""

# The group is made as DeepSpeed makes its own: without a time limit. The limit is lowered after the start, which may
# take longer than it on a loaded machine.
LATE_PEER = """
d.initialize(place, Device.pick(place.local_rank), timedelta(seconds=60))
d._limit_every_group(timedelta(seconds=2))
d.barrier()
group = torch.distributed.new_group([0, 1])
if place.rank == 1:
    time.sleep(6)
    d.shutdown(failed=True)
    sys.exit(0)
started = time.monotonic()
try:
    d.all_reduce_(torch.ones(1), group=group)
except RuntimeError as error:
    waited = time.monotonic() - started
    d.shutdown(failed=True)
    print("waited", waited, error)
    assert 1.5 < waited < 5.5, waited
else:
    raise SystemExit("the late peer was waited for")
"""

LEAVING = """
d.initialize(place, Device.pick(place.local_rank))
d.barrier()
if place.rank == 0:
    started = time.monotonic()
    d.shutdown(failed=True)
    assert time.monotonic() - started < 2
else:
    time.sleep(5)
    d.shutdown(failed=True)
"""

KEEPER_GONE = """
from dsmoe.base.errors import TrainingFailure
d.initialize(place, Device.pick(place.local_rank))
board = d.Board("test")
board.add("here")
if place.rank == 0:
    while board.count("here") < 2:
        time.sleep(0.01)
    os._exit(0)
try:
    while True:
        board.count("here")
        time.sleep(0.01)
except TrainingFailure as error:
    print(error)
    os._exit(0)
"""


def _script(folder, body):
    file = folder / "ranks.py"
    file.write_text(PREAMBLE + body)
    return file


@pytest.mark.distributed
def test_collectives_on_three_processes(tmp_path):
    results = launch([_script(tmp_path, COLLECTIVES)], world_size=3, timeout=90, preloaded=True)
    assert_succeeded(results)
    assert [r.stdout for r in results] == [f"done {rank}\n" for rank in range(3)]


@pytest.mark.distributed
def test_peers_that_are_late_or_gone_are_not_waited_for(tmp_path, subtests):
    def ranks(body):
        results = launch([_script(tmp_path, body)], world_size=2, timeout=60, preloaded=True)
        assert_succeeded(results)
        return results

    with subtests.test("groups made without a limit have ours"):
        assert ranks(LATE_PEER)[0].stdout.startswith("waited")
    with subtests.test("leaving after a failure does not wait for peers"):
        ranks(LEAVING)
    with subtests.test("a board whose keeper has gone says so"):
        said = ranks(KEEPER_GONE)[1].stdout
        assert said.startswith("rank 0, which holds the ranks' board, has gone (Dist")


def test_a_plain_process_becomes_a_group_of_one(tmp_path):
    body = """
d.initialize(place, Device.pick())
import torch.distributed as dist
assert dist.is_initialized() and dist.get_backend() == "gloo" and d.world_size() == 1
assert d.all_reduce_(torch.full((2,), 3.0), "mean").tolist() == [3, 3]
assert [t.tolist() for t in d.all_gather_tensor(torch.ones(1))] == [[1]]
try:
    d.initialize(place, Device.pick())
except d.ConfigError as error:
    print("refused:", error)
assert os.environ["DS_ACCELERATOR"] == "cpu" and int(os.environ["MASTER_PORT"]) > 0
d.shutdown()
"""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TORCH_EXTENSIONS_DIR")}
    env["DS_ACCELERATOR"] = "cpu"
    env["PYTHONPATH"] = os.getcwd() if not env.get("PYTHONPATH") else os.getcwd() + os.pathsep + env["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, _script(tmp_path, body)], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "refused: the process group is initialised already" in done.stdout


def test_a_stale_lock_is_told_at_start(tmp_path, monkeypatch, caplog):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (1, 1))
    monkeypatch.setattr(os, "environ", {"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "_limit_every_group", lambda _: None)
    distributed.initialize(distributed.discover({}), Device("cpu"))
    assert f"rm {lock}" in caplog.text
    assert lock.exists()


def test_device_that_contradicts_the_users_accelerator(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(distributed, "export", lambda *_: None)
    with pytest.raises(ConfigError, match="DS_ACCELERATOR is 'cuda' but the run uses 'cpu'"):
        distributed.initialize(distributed.discover({}), Device("cpu"))


def test_a_torch_without_the_private_names_is_a_warning(monkeypatch, caplog):
    monkeypatch.delattr(distributed.distributed_c10d, "default_pg_timeout")
    monkeypatch.setattr(
        distributed.distributed_c10d, "default_pg_nccl_timeout", timedelta(1), raising=False
    )  # restored afterwards
    distributed._limit_every_group(timedelta(seconds=5))
    assert "default_pg_timeout" in caplog.text
    assert distributed.distributed_c10d.default_pg_nccl_timeout == timedelta(seconds=5)


def test_helpers_without_a_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.shutdown()
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_reduce_(tensor, "max") is tensor
    (gathered,) = distributed.all_gather_tensor(tensor)
    assert torch.equal(gathered, tensor)
    assert gathered.data_ptr() != tensor.data_ptr()
    assert distributed.broadcast_object({"a": (1,)}) == {"a": [1]}
    assert distributed.on_main(lambda x, *, y: x + y)(1, y=2) == 3
    board = distributed.Board("alone")
    assert [board.add("n"), board.add("n", 4), board.count("n"), board.count("m")] == [1, 5, 5, 0]
    assert board.line("x") is None
    board.post("x", "first")
    board.post("x", "second")
    assert board.line("x") == "second"


@pytest.mark.parametrize("value", [torch.ones(1), {1, 2}, object()])
def test_broadcast_takes_plain_data_only(value):
    with pytest.raises(TypeError):
        distributed.broadcast_object(value)
