"""ds_configs/experts: one file for each model, ZeRO stage and expert-parallel size, named by them."""

import json
import re
from pathlib import Path

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import preset
from dsmoe.ds_config import check_policy, load_policy

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs" / "experts"
MODELS = {"s2_8e2a": "S/2-8E2A", "s2_16e2a": "S/2-16E2A", "l2_8e2a": "L/2-8E2A"}
FILES = {
    f"{model}_zero{stage}_ep{size}": (name, stage, size)
    for model, name in MODELS.items()
    for stage in (1, 2, 3)
    for size in (1, 2, 4, 8)
}


def test_every_combination_is_there_and_nothing_else():
    assert {path.stem for path in FOLDER.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_its_name_says(name):
    model, stage, size = FILES[name]
    experts = preset(model).num_experts
    path = str(FOLDER / f"{name}.json")
    policy = load_policy(path)
    assert (policy.stage, policy.block.expert_parallel_size, policy.precision) == (stage, size, "bf16")
    for world in (8, 16):
        check_policy(policy, device_type="cuda", num_experts=experts, world_size=world)
    about = json.loads(Path(path).read_text())["dsmoe"]["about"]
    assert about.startswith(f"{model} on ")
    assert ("weights, " in about, "gradients" in about) == (stage == 3, stage >= 2)
    if size == 1:
        assert f"all {experts} experts" in about
    else:
        shared = re.search(r"(\d+) of (\d+) experts a rank, (\d+) neighbouring", about)
        assert [int(n) for n in shared.groups()] == [experts // size, experts, size]
        with pytest.raises(ConfigError, match="must divide"):
            check_policy(policy, device_type="cuda", num_experts=experts, world_size=size + 1)
