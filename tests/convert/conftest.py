"""A model of some hundred MB, made once."""

from pathlib import Path

import pytest
import torch
from convert.published import Kind, shapes, table

BIG = Kind(depth=4, dim=512, heads=16, tokens=16, feed="swiglu", experts=8)


@pytest.fixture(scope="session")
def big_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with in.pt: a DiT-MoE of the published layout with stacks of 32 MiB."""
    folder = tmp_path_factory.mktemp("big")
    state = {key: torch.full(shape, 0.01) for key, shape in shapes(BIG).items()}
    torch.save(state | {"pos_embed": table(BIG)}, folder / "in.pt")
    return folder
