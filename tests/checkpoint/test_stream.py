"""A streamed file against the library's reader and its own writer."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsmoe.checkpoint.stream import write_tensors

TENSORS = {
    "blocks.0.w": torch.arange(24, dtype=torch.float32).view(2, 3, 4) / 7,
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 5),
    "strided": torch.arange(12, dtype=torch.float32).view(3, 4).T,
    "narrow": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
}


def test_the_library_reads_what_was_streamed(tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    write_tensors(tmp_path / "ours.safetensors", shapes, iter(TENSORS.items()), {"kind": "ema", "ü": '"'})
    found = load_file(tmp_path / "ours.safetensors")
    save_file({n: t.float().contiguous() for n, t in TENSORS.items()}, tmp_path / "theirs.safetensors")
    truth = load_file(tmp_path / "theirs.safetensors")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"kind": "ema", "ü": '"'}
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ours.safetensors", "theirs.safetensors"]


def test_a_tensor_that_was_not_announced_is_a_mistake_of_ours(tmp_path):
    with pytest.raises(AssertionError, match="other"):
        write_tensors(tmp_path / "w.safetensors", {"name": (2,)}, [("other", torch.zeros(2))], {})
    assert not list(tmp_path.iterdir())
