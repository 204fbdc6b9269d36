"""torch files: nothing pickled is run, and what is written is what torch.save would have written."""

import argparse
import collections
import mmap
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dsmoe.base.errors import CheckpointError
from dsmoe.convert.pickled import load, pickled_source, write_pickled
from dsmoe.convert.source import outline


class Strange:
    def __init__(self):
        self.lr = 3


class Dangerous:
    """Unpickled the usual way, it would make a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Evaluating:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({self.path!r})",)


def saved(tmp_path, content, **options):
    path = tmp_path / "w.pt"
    torch.save(content, path, **options)
    return path


def test_a_namespace_of_arguments_is_let_in_and_other_classes_are_named(tmp_path):
    tree = {"ema": {"a": torch.ones(3)}, "args": argparse.Namespace(lr=1e-4)}
    found = load(saved(tmp_path, tree))
    assert torch.equal(found["ema"]["a"], torch.ones(3))
    assert vars(found["args"]) == {"lr": 1e-4}
    path = saved(tmp_path, tree | {"opt": Strange()})
    with pytest.raises(CheckpointError, match=r"holds pickled code.*Strange.*--trust-pickle") as error:
        load(path)
    assert "\n" not in str(error.value)
    inert = load(path, inert=True)
    assert type(inert["opt"]) is not Strange
    assert vars(inert["opt"]) == {"lr": 3}


@pytest.mark.parametrize("kind", [Dangerous, Evaluating])
@pytest.mark.parametrize("inert", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_code_is_never_run(tmp_path, kind, inert, old):
    made = tmp_path / "made"
    path = saved(tmp_path, {"a": torch.ones(3), "b": kind(made)}, _use_new_zipfile_serialization=not old)
    if kind is Evaluating and inert and not old:
        assert torch.equal(load(path, inert=True)["a"], torch.ones(3))  # an inert object stands in its place
    else:
        with pytest.raises(CheckpointError, match="pickled code") as error:
            load(path, inert=inert)
        assert "\n" not in str(error.value)
    assert not made.exists()


def test_a_file_that_memory_cannot_back_is_mapped_all_the_same(tmp_path, monkeypatch):
    """Private mappings of files larger than memory fail (seen on a 31 GiB file); the file must stay as it is."""
    path = saved(tmp_path, TENSORS)
    before, plain = path.read_bytes(), torch.load

    def short_of_memory(*words, **options):
        if torch.serialization.get_default_mmap_options() == mmap.MAP_PRIVATE:
            raise RuntimeError(f"unable to mmap 33008974469 bytes from file <{path}>: Cannot allocate memory (12)")
        return plain(*words, **options)

    monkeypatch.setattr(torch, "load", short_of_memory)
    source = pickled_source(path, ())
    assert all(torch.equal(source[name], tensor) for name, tensor in TENSORS.items())
    assert path.read_bytes() == before
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="write-protected"):
        load(path)


def test_old_torch_files_are_read(tmp_path):
    path = saved(tmp_path, {"a": torch.arange(5.0)}, _use_new_zipfile_serialization=False)
    assert torch.equal(load(path)["a"], torch.arange(5.0))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02garbage", b"text"])
def test_damaged_files_are_one_line(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or not a torch file"):
        load(tmp_path / "w.pt")


def test_a_cut_file_is_one_line(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match="damaged or not a torch file"):
        load(path)


TENSORS = {
    "a": torch.randn(5, 7),
    "scalar": torch.randn(()),
    "short": torch.randn(3).bfloat16(),
    "view": torch.randn(6, 6)[:, 2],
    "half": torch.randn(2, 2, 2).half(),
    "empty": torch.randn(0, 4),
}


def test_a_written_file_is_a_sound_archive_of_the_same_tensors(tmp_path):
    path = tmp_path / "w.pt"
    write_pickled(path, outline(TENSORS), iter(TENSORS.items()))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # every checksum
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert list(found) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert isinstance(found, dict)
    assert not isinstance(found, collections.OrderedDict)


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield "a", TENSORS["a"]
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_pickled(tmp_path / "w.pt", outline(TENSORS), broken())
    assert not list(tmp_path.iterdir())


def test_a_source_reads_nothing_until_asked(tmp_path):
    source = pickled_source(saved(tmp_path, {"ema": TENSORS}), ("ema",))
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in source.outline.items()} == {
        name: (t.shape, t.dtype, "meta") for name, t in TENSORS.items()
    }
    assert torch.equal(source["a"], TENSORS["a"])
    renamed = source.renamed({"b": "a"})
    assert list(renamed) == ["b"]
    assert torch.equal(renamed["b"], TENSORS["a"])


# Not ru_maxrss: it counts what the process was before it became this program, so the test's own memory.
MEASURE = """
import re, sys
from pathlib import Path
from dsmoe.__main__ import main
import torch, dsmoe.convert.command, dsmoe.convert.source
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
mapped, *words = sys.argv[1:]
dsmoe.convert.source.MAPPED_BYTES = int(mapped) << 20
before = peak()
assert main(["convert", *words]) == 0
print("GREW", peak() - before)
"""


def growth(folder, first, second, *options, mapped=64):
    """MiB that converting one file into another adds to a fresh process at its fullest."""
    command = [sys.executable, "-c", MEASURE, str(mapped), str(folder / first), str(folder / second), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split("GREW")[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_conversion_holds_a_fraction_of_the_model(big_files):
    """454 MiB in stacks of 32: one stack, 64 MiB of mapped pages, and what torch allocates. Unbounded: all of it."""
    there = growth(big_files, "in.pt", "out.safetensors", "--heads", "16", "--top-k", "2")
    back = growth(big_files, "out.safetensors", "back.pt")
    size = (big_files / "out.safetensors").stat().st_size / 2**20
    assert size > 450
    assert (big_files / "back.pt").stat().st_size > size * 2**20
    assert max(there, back) < 0.35 * size, (there, back)
