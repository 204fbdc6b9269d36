"""A non-finite loss or gradient is noticed, and blamed on the rank and step where it arose."""

from pathlib import Path

import pytest
import torch
from distributed_harness import launch
from made_plan import RECIPE_FILE

from dsmoe.base.errors import TrainingFailure
from dsmoe.base.presets import ModelSpec
from dsmoe.models.dit import DiT
from dsmoe.training.health import GradientWatch, check_finite

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 3


def watched(checkpointing=False, experts=0):
    torch.manual_seed(0)
    spec = ModelSpec(depth=DEPTH, dim=16, heads=2, num_experts=experts)
    model = DiT(spec, input_size=4, in_channels=4, num_classes=3, learn_sigma=False)
    model.activation_checkpointing = checkpointing
    return model, GradientWatch(model.x_embedder, torch.device("cpu"))


def backward(model):
    x = torch.randn(2, 4, 4, 4)
    out, _ = model(x, torch.tensor([3.0, 500.0]), torch.tensor([0, 2]))
    (out - x).square().mean().backward()


def plant(module, value):
    """Put `value` in one element of the gradient of this module's output, until the handle is removed."""

    def replace(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value  # in the last sample: the others stay clean
        return gradient

    def attach(_, inputs, output):
        (output[0] if isinstance(output, tuple) else output).register_hook(replace)

    return module.register_forward_hook(attach)


@pytest.mark.parametrize(
    ("layer", "value", "checkpointing", "experts"),
    [(0, torch.nan, False, 0), (2, torch.nan, False, 0), (2, torch.inf, True, 0), (2, torch.nan, True, 4)],
)
def test_one_bad_element_in_any_layers_gradient_is_seen(layer, value, checkpointing, experts):
    model, watch = watched(checkpointing, experts)
    backward(model)
    assert watch.take() == 0
    handle = plant(model.blocks[layer], value)
    backward(model)
    assert watch.take() == 1
    handle.remove()
    backward(model)
    assert watch.take() == 0, "taking forgets"


def test_a_fault_in_any_micro_step_stays_until_taken():
    model, watch = watched()
    handle = plant(model.blocks[1], torch.nan)
    backward(model)
    handle.remove()
    backward(model)
    assert watch.take() == 1


def test_watch_does_not_change_gradients_and_ignores_forward_alone():
    gradients = []
    for closed in (True, False):
        model, watch = watched()
        if closed:
            watch.close()
        torch.manual_seed(1)
        backward(model)
        gradients.append([p.grad.clone() for p in model.parameters()])
        with torch.no_grad():
            model(torch.full((1, 4, 4, 4), torch.nan), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        assert watch.take() == 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_closed_watch_sees_nothing():
    model, watch = watched()
    watch.close()
    plant(model.blocks[0], torch.nan)
    backward(model)
    assert watch.take() == 0


def test_finite_figures_pass():
    check_finite(7, [0.5, 1e30], [0.0, 0.0], 3.0, allow_overflow=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_loss_names_its_ranks_and_the_step(bad):
    with pytest.raises(TrainingFailure, match=rf"non-finite loss {bad} at step 7 on rank 1, 3; lower optimizer\.lr"):
        check_finite(7, [0.5, bad, 0.5, bad], [1.0] * 4, float("nan"), allow_overflow=True)


def test_a_bad_gradient_names_its_ranks_and_the_step():
    with pytest.raises(TrainingFailure, match=r"non-finite gradient at step 9 on rank 0, 2; .*optimizer\.clip"):
        check_finite(9, [0.5] * 3, [1.0, 0.0, 1.0], float("nan"), allow_overflow=False)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_bad_norm_alone_says_that_no_rank_showed_it(norm):
    with pytest.raises(TrainingFailure, match=rf"gradient norm {norm} at step 9 \(no single rank"):
        check_finite(9, [0.5], [0.0], norm, allow_overflow=False)


def test_loss_scaling_skips_bad_gradients_by_itself():
    check_finite(9, [0.5], [1.0], float("inf"), allow_overflow=True)


TINY = [
    "model.depth=2", "model.dim=32", "model.heads=2", "data.size=32", "train.global_batch=8", "train.images=80",
    "optimizer.warmup_images=16", "report.log_every=8", "report.samples=2", "report.sample_steps=2",
]  # fmt: skip


FAULTS = [
    ("loss", "non-finite loss nan at step 3 on rank 1;", 2),
    ("gradient", "non-finite gradient at step 3 on rank 1;", 2),
    # Its peer only notices a lost connection, and must not write over the cause. Step 2 was not read yet.
    ("crash", "RuntimeError: planted crash", 1),
]


@pytest.mark.distributed
def test_a_fault_planted_on_one_rank_ends_all_with_its_name_in_failed(tmp_path, subtests):
    for kind, said, logged in FAULTS:
        with subtests.test(kind=kind):
            check_fault(tmp_path, kind, said, logged)


def check_fault(place, kind, said, logged):
    folder = place / kind
    script = Path(__file__).with_name("faulty_run.py")
    recipe = place / "base.yaml"
    recipe.write_text(RECIPE_FILE)
    argv = ["--deepspeed_config", ROOT / "ds_configs/quickstart.json", "--recipe", recipe, "--run", folder, *TINY]
    results = launch([script, kind, 1, 3, *argv], 2, timeout=150, preloaded=True)
    assert [(r.returncode, r.killed) for r in results] == [(1, False), (1, False)], results
    line = (folder / "FAILED").read_text()
    assert line.startswith("dsmoe: ")
    assert said in line
    assert line.count("\n") == 1
    assert not (folder / "DONE").exists()
    assert not list((folder / "ckpt").rglob("*.safetensors")), "weights made from a bad step must not be kept"
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == logged, "steps before the fault are logged, the faulty one is not"
    if kind != "crash":
        assert said in results[0].stderr, "rank 0 says it on the console"
