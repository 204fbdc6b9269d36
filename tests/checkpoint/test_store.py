"""The checkpoint folder: what is committed is whole or named as damaged, and nothing half-made ever counts."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsmoe.base.errors import CheckpointError, TrainingFailure
from dsmoe.base.run_folder import Lease, RunFolder
from dsmoe.base.sealed import seal
from dsmoe.checkpoint.choice import newest_whole
from dsmoe.checkpoint.manifest import Piece, unseal
from dsmoe.checkpoint.reader import Reader
from dsmoe.checkpoint.saver import Saver
from dsmoe.checkpoint.store import Store
from dsmoe.checkpoint.writer import write_shard

SHAPES = {"a.weight": (3, 4), "b.bias": (5,)}
KINDS = ("master", "exp_avg")


def value(kind, name):
    """A state told apart from every other by its numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
    return torch.randn(SHAPES[name], generator=generator)


def pieces_of(rank, world):
    """Every state cut over the ranks at uneven places."""
    found = []
    for kind in KINDS:
        for name, shape in SHAPES.items():
            flat = value(kind, name).view(-1)
            cuts = [round(flat.numel() * (r / world) ** 1.5) for r in range(world + 1)]
            low, high = cuts[rank], cuts[rank + 1]
            if low < high:
                found.append(Piece(kind, name, shape, low, flat[low:high].clone()))
    return found


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "run" / "ckpt"
    root.mkdir(parents=True)
    return Store(root)


def lease_of(store):
    return Lease.take(RunFolder(store.root.parent))


def make(store, images_seen, world=2):
    temporary = store.temporary(images_seen, "t")
    temporary.mkdir()
    for rank in range(world):
        write_shard(temporary, rank, pieces_of(rank, world))
    return store.commit(temporary, images_seen, world, {"steps": images_seen // 8, "metrics": {"bytes": 7}})


def save(store, images_seen, lease=None):
    saver = Saver(store, lease or lease_of(store), 3)
    saver.begin(images_seen, pieces_of(0, 1), {"steps": 1}, 1000)
    return saver, saver.finish()


def test_every_range_reads_back_from_any_cut(store):
    reader = Reader(make(store, 8, world=3))
    for kind in KINDS:
        for name, shape in SHAPES.items():
            flat = value(kind, name).view(-1)
            assert torch.equal(reader.whole(name, kind), value(kind, name))
            for low in range(flat.numel()):
                for high in range(low + 1, flat.numel() + 1):
                    out = torch.full((high - low,), float("nan"))
                    reader.fill(name, kind, shape, low, out)
                    assert torch.equal(out, flat[low:high])
    assert reader.kinds == set(KINDS)
    assert reader.state["steps"] == 1
    assert reader.state["images_seen"] == 8


def test_shards_are_plain_safetensors(store):
    tensors = load_file(make(store, 8, world=1) / "rank00000.safetensors")
    assert torch.equal(tensors["exp_avg|b.bias|0"], value("exp_avg", "b.bias"))


def test_unknown_shapes_and_holes_are_refused_by_name(store):
    reader = Reader(make(store, 8))
    with pytest.raises(CheckpointError, match=r"holds a\.weight as \(3, 4\), the model as \(4, 3\)"):
        reader.fill("a.weight", "master", (4, 3), 0, torch.empty(12))
    with pytest.raises(CheckpointError, match="holds c as nothing"):
        reader.fill("c", "master", (1,), 0, torch.empty(1))
    with pytest.raises(CheckpointError, match=r"holds 0 of the 5 elements of ema b\.bias"):
        reader.fill("b.bias", "ema", (5,), 0, torch.empty(5))


FILES = ["state.json", "rank00000.json", "rank00000.safetensors", "rank00001.json", "rank00001.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_named_and_the_one_before_taken(store, name, caplog):
    make(store, 8)
    path = make(store, 16) / name
    good = path.read_bytes()
    step = max(1, len(good) // 60)
    for at in [*range(0, len(good), step), len(good) - 1]:
        broken = bytearray(good)
        broken[at] ^= 1
        path.write_bytes(broken)
        assert name in store.damage(16), f"byte {at} of {name} was not missed"
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert newest_whole(store).state["images_seen"] == 8
    assert f"images-000000016 is damaged: {name}" in caplog.text
    assert store.committed() == [8]
    assert (store.root / "damaged-images-000000016").is_dir(), "nothing committed is deleted"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_named(store, name):
    path = make(store, 16) / name
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    assert name in store.damage(16)
    path.unlink()
    assert store.damage(16) == f"{name} is missing"


def test_the_ranks_share_the_hashing(store):
    (make(store, 16) / "rank00001.safetensors").write_bytes(b"")
    assert [bool(store.damage(16, part, 4)) for part in range(4)].count(True) == 1


def test_all_damaged_is_refused_not_started_over(store):
    (make(store, 8) / "rank00000.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged .*rank00000\.json is missing"):
        newest_whole(store)
    assert store.committed() == [8]


def test_no_checkpoint_at_all(store, tmp_path):
    assert newest_whole(store) is None
    assert Store(tmp_path / "nowhere").committed() == []


def test_a_seal_notices_any_byte_and_another_format():
    text = seal({"format": 1, "x": [1, 2]})
    assert unseal(text) == {"format": 1, "x": [1, 2]}
    for at in range(len(text)):
        with pytest.raises(ValueError, match="seal"):
            unseal(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
    with pytest.raises(ValueError, match="format is 2"):
        unseal(seal({"format": 2}))


def test_an_unfinished_folder_never_counts_and_is_removed(store):
    make(store, 8)
    left = store.temporary(16, "old")
    left.mkdir()
    write_shard(left, 0, pieces_of(0, 2))
    assert store.committed() == [8]
    assert store.remove_stale() == [left.name]
    assert sorted(p.name for p in store.root.iterdir()) == ["images-000000008", "latest"]


def test_commit_refuses_a_shard_that_is_not_what_its_rank_wrote(store):
    temporary = store.temporary(8, "t")
    temporary.mkdir()
    write_shard(temporary, 0, pieces_of(0, 2))
    with pytest.raises(CheckpointError, match="rank 1 left no whole shard"):
        store.commit(temporary, 8, 2, {})
    write_shard(temporary, 1, pieces_of(1, 2))
    with open(temporary / "rank00001.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        store.commit(temporary, 8, 2, {})
    assert store.committed() == []


@pytest.mark.parametrize(
    ("keep", "every", "stay"),
    [(1, 0, [80]), (3, 0, [64, 72, 80]), (1, 30, [32, 64, 80]), (2, 32, [32, 64, 72, 80]), (0, 0, [80])],
)
def test_retention_by_count_and_interval(store, keep, every, stay):
    for images_seen in range(8, 81, 8):
        make(store, images_seen, world=1)
        store.prune(keep, every)  # as a run does it: after each commit
    assert store.committed()[::-1] == stay
    assert all(store.damage(n) == "" for n in stay)
    assert not list(store.root.glob(".tmp-*"))


def test_saver_commits_and_moves_latest_last(store):
    _, made = save(store, 24)
    assert made
    assert (store.root / "latest").read_text() == "images-000000024\n"
    assert store.damage(24) == ""
    assert torch.equal(Reader(store.path(24)).whole("b.bias", "exp_avg"), value("exp_avg", "b.bias"))


def test_the_copy_is_taken_when_saving_begins(store):
    pieces = pieces_of(0, 1)
    saver = Saver(store, lease_of(store), 3)
    saver.begin(8, pieces, {}, 1000)
    for piece in pieces:
        piece.tensor.zero_()
    saver.finish()
    assert torch.equal(Reader(store.path(8)).whole("a.weight", "master"), value("master", "a.weight"))


def test_training_goes_on_while_a_slow_disk_is_written(store, monkeypatch):
    disk = threading.Event()

    def slow(*arguments):
        assert disk.wait(60)
        write_shard(*arguments)

    monkeypatch.setattr("dsmoe.checkpoint.saver.write_shard", slow)
    saver = Saver(store, lease_of(store), 3)
    saver.begin(8, pieces_of(0, 1), {}, 1000)
    assert saver.busy
    assert [saver.report(), saver.advance([0])] == [0, False], "nothing to agree on yet, and nobody waits"
    assert store.committed() == []
    disk.set()
    assert saver.finish()
    assert store.committed() == [8]


def test_reports_of_an_earlier_save_do_not_commit_a_later_one(store):
    saver, _ = save(store, 8)
    old = 1
    saver.begin(16, pieces_of(0, 1), {}, 1000)
    assert not saver.advance([old])
    assert saver.busy
    while not saver.report():
        time.sleep(0.01)
    assert saver.report() == 2
    assert saver.advance([2])
    assert store.committed() == [16, 8]


def test_one_rank_that_failed_makes_all_give_up(store, caplog):
    saver, _ = save(store, 8)
    saver.begin(16, pieces_of(0, 1), {}, 1000)
    saver._pending.thread.join()
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert not saver.advance([2, -2])
    assert "no checkpoint at 16 images: rank 1 could not write" in caplog.text
    assert store.committed() == [8]
    assert not list(store.root.glob(".tmp-*"))


def test_a_full_disk_costs_the_checkpoint_not_the_run(store, caplog, monkeypatch):
    save(store, 8)
    monkeypatch.setattr(Store, "free", lambda _: 1 << 20)
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert not save(store, 16)[1]
    assert "1.0 MiB are free" in caplog.text
    assert "training goes on" in caplog.text
    assert store.committed() == [8]
    assert store.damage(8) == ""


def test_a_write_that_fails_midway_leaves_nothing(store, caplog, monkeypatch):
    lease = lease_of(store)
    save(store, 8, lease=lease)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsmoe.checkpoint.writer.os.fsync", full)
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert not save(store, 16, lease=lease)[1]
    assert "No space left on device" in caplog.text
    assert [p.name for p in store.root.glob(".tmp-*")] == []
    assert store.committed() == [8]


def test_a_folder_that_cannot_be_written_is_one_warning(store, caplog):
    saver = Saver(store, lease_of(store), 1)
    store.root.rmdir()
    store.root.write_text("in the way")  # permission bits would not stop root
    saver.begin(8, pieces_of(0, 1), {}, 1000)
    with caplog.at_level(logging.WARNING, logger="dsmoe"):
        assert not saver.finish()
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_a_fault_that_is_not_the_disks_is_raised_on_the_main_thread(store, monkeypatch):
    monkeypatch.setattr("dsmoe.checkpoint.saver.write_shard", lambda *_: 1 / 0)
    saver = Saver(store, lease_of(store), 1)
    saver.begin(8, pieces_of(0, 1), {}, 1000)
    with pytest.raises(ZeroDivisionError):
        saver.finish()


def test_a_late_job_commits_nothing(store):
    saver = Saver(store, lease_of(store), 1)
    saver.begin(8, pieces_of(0, 1), {}, 1000)
    lease_of(store)
    with pytest.raises(TrainingFailure, match="taken over by a later job"):
        saver.finish()
    assert store.committed() == []


KILLED = """
    import sys, torch
    from pathlib import Path
    from dsmoe.base.run_folder import Lease, RunFolder
    from dsmoe.checkpoint.manifest import Piece
    from dsmoe.checkpoint.saver import Saver
    from dsmoe.checkpoint.store import Store
    run = Path(sys.argv[1])
    saver = Saver(Store(run / "ckpt"), Lease.take(RunFolder(run)), 3)
    for n in range(8, 10**6, 8):
        saver.begin(n, [Piece("master", "w", (1 << 20,), 0, torch.full((1 << 20,), float(n)))], {}, 1 << 22)
        saver.finish()
        print(n, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_kill_9_while_saving_loses_nothing_committed(tmp_path, delay):
    (tmp_path / "ckpt").mkdir()
    script = tmp_path / "save.py"
    script.write_text(textwrap.dedent(KILLED))
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = [int(child.stdout.readline()) for _ in range(3)]
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    said += [int(line) for line in child.stdout if line.endswith("\n")]
    child.wait()
    store = Store(tmp_path / "ckpt")
    assert store.committed()[0] >= said[-1], "what was said to be committed is there"
    for images_seen in store.committed():
        assert store.damage(images_seen) == ""
        assert Reader(store.path(images_seen)).whole("w", "master").eq(images_seen).all()
    store.remove_stale()
    names = {p.name for p in store.root.iterdir()} - {"latest"}
    assert names == {f"images-{n:09d}" for n in store.committed()}


def test_state_is_readable_json_below_its_seal(store):
    lines = (make(store, 8) / "state.json").read_text().splitlines()
    assert json.loads("\n".join(lines[1:]))["files"].keys() == {*FILES} - {"state.json"}
