"""Converting and sampling MoE models never import deepspeed: shown in a process where that import raises."""

import subprocess
import sys

_SCRIPT = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "mpi4py"):
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Refuse())
import torch
import dsmoe
from dsmoe.base.presets import ModelSpec
from dsmoe.convert.keys import from_published, to_published
from dsmoe.models.dit import DiT

for kind in ("swiglu", "gelu"):
    spec = ModelSpec(depth=2, dim=32, heads=2, patch=2, num_experts=4, expert_kind=kind, shared_ratio=1.0)
    torch.manual_seed(0)
    model = DiT(spec, input_size=8, in_channels=4, num_classes=3, learn_sigma=True).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    published = to_published(model.state_dict(), spec, input_size=8)
    again = DiT(spec, input_size=8, in_channels=4, num_classes=3, learn_sigma=True).eval()
    again.load_state_dict(from_published(published, spec))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 2])
    assert torch.equal(model(x, t, y)[0], again(x, t, y)[0])
    assert model(x, t, y)[0].abs().max() > 0
try:
    import dsmoe.moe.deepspeed_layer
except ImportError as error:
    assert "not to be imported here" in str(error), error
else:
    raise AssertionError("the hook refuses nothing")
rest = [m.name for m in pkgutil.walk_packages(dsmoe.__path__, "dsmoe.") if m.name != "dsmoe.moe.deepspeed_layer"]
for name in rest:
    importlib.import_module(name)
print("IMPORTED", len(rest))
"""


def test_moe_models_convert_and_every_module_imports(repo_root):
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        cwd=repo_root,
        env={"PATH": "", "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("IMPORTED")[1]) > 80
