"""From a command to a plan: what the machine decides, and numbers people read off `--plan`."""

import json

import pytest
import torch
from made_plan import RECIPE_FILE

from dsmoe.base.errors import ConfigError
from dsmoe.ds_config import load_policy
from dsmoe.runtime.device import Device
from dsmoe.runtime.distributed import discover
from dsmoe.training.prepare import parse_command, prepare, state_memory


def config(tmp_path, **content):
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_precision_that_the_device_lacks_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE_FILE)
    engine = config(tmp_path, bf16={"enabled": True}, zero_optimization={"stage": 1})
    command = parse_command(["--deepspeed_config", engine, "--recipe", "r.yaml"], "")
    assert prepare(command, discover({})).plan.engine.precision == "bf16"
    monkeypatch.setattr(Device, "supports", lambda self, dtype: dtype != torch.bfloat16)
    with pytest.raises(ConfigError, match=r"bf16 is not supported by .*; use fp16"):
        prepare(command, discover({}))


@pytest.mark.parametrize(
    ("stage", "bf16", "expected"),
    [
        # Bytes a parameter on 4 ranks: weights, gradients, optimizer (two moments, and the master of bf16), EMA.
        (0, False, (4, 4, 8, 4)),
        (1, False, (4, 4, 2, 1)),
        (1, True, (2, 2, 3, 1)),
        (2, True, (2, 0.5, 3, 1)),
        (3, True, (0.5, 0.5, 3, 1)),
    ],
)
def test_state_memory_by_stage(tmp_path, stage, bf16, expected):
    policy = load_policy(config(tmp_path, zero_optimization={"stage": stage}, bf16={"enabled": bf16}))
    found = state_memory(1000, policy, 4)
    assert tuple(found.values()) == tuple(1000 * share for share in expected)
    assert list(found) == ["parameters", "gradients", "optimizer", "EMA"]
