"""Reading and checking weight files."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsmoe.base.errors import CheckpointError
from dsmoe.codec.files import file_sha256, load_strict, read_safetensors, tensor_sha256


def test_file_sha256_is_that_of_the_bytes_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * (1 << 20) + b"tail")
    second.write_bytes(b"other")
    assert file_sha256(first) == hashlib.sha256(first.read_bytes()).hexdigest()
    assert file_sha256(first, second) == hashlib.sha256(first.read_bytes() + b"other").hexdigest()
    assert file_sha256(second, first) != file_sha256(first, second)


def test_tensor_sha256_sees_values_names_and_shapes_but_not_order_or_storage() -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}
    reference = tensor_sha256(state)
    assert tensor_sha256(dict(reversed(state.items()))) == reference
    strided = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert tensor_sha256({"b": torch.ones(1, dtype=torch.float16), "a": strided}) == reference
    assert tensor_sha256({"a": state["a"].view(3, 2), "b": state["b"]}) != reference
    assert tensor_sha256({"c": state["a"], "b": state["b"]}) != reference
    assert tensor_sha256({"a": state["a"], "b": state["b"] + 1e-6}) != reference


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors are damaged"):
        read_safetensors(file)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    save_file({"w": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        read_safetensors(file)


def test_round_trip_with_metadata(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"w": torch.arange(3.0)}, file, {"scale": "2.0"})
    tensors, metadata = read_safetensors(file)
    assert torch.equal(tensors["w"], torch.arange(3.0))
    assert metadata == {"scale": "2.0"}


def test_missing_extra_and_misshapen_keys_are_all_named() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    tensors = {key: value.clone() for key, value in module.state_dict().items()}
    del tensors["0.bias"]
    tensors["2.weight"] = torch.zeros(1)
    tensors["1.weight"] = torch.zeros(1, 4)
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, tensors, "FILE")
    message = str(caught.value)
    assert message.startswith("FILE ")
    assert "missing 0.bias" in message
    assert "unexpected 2.weight" in message
    assert "1.weight [1, 4] (expected [1, 3])" in message


def test_long_lists_are_cut() -> None:
    module = nn.Sequential(*[nn.Linear(1, 1) for _ in range(5)])
    with pytest.raises(CheckpointError, match=r"0\.weight, 0\.bias, 1\.weight, 1\.bias and 6 more"):
        load_strict(module, {}, "FILE")


def test_weights_are_computed_with_in_fp32() -> None:
    module = nn.Linear(2, 1)
    load_strict(module, {key: value.to(torch.bfloat16) for key, value in module.state_dict().items()}, "FILE")
    assert module.weight.dtype == torch.float32
