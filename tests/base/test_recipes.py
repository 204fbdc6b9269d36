"""The paper's pretraining recipes resolve to plans with the paper's numbers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsmoe.base.errors import UserError
from dsmoe.base.recipe import load_recipe
from dsmoe.checkpoint.store import Store
from dsmoe.runtime.distributed import discover
from dsmoe.training.prepare import parse_command, prepare

ROOT = Path(__file__).resolve().parents[2]
ENGINE = str(ROOT / "ds_configs" / "zero1_bf16.json")

# Paper tables 1 and 2 (dimension, heads, layers; parameters and active ones in millions, and half of the last digit,
# or all of it where the table cuts digits off), sections 3.1 (iterations) and 4.3 (resolution).
PAPER = {
    # name: (dim, heads, layers, total, active, rounding), resolution, iterations
    "a1": ((256, 16, 12, 14.8, 14.8, 0.05), 256, 400_000),
    "a2": ((512, 16, 16, 77.2, 77.2, 0.05), 256, 400_000),
    "a3": ((768, 16, 20, 215, 215, 1), 256, 400_000),  # 215.5
    "a4": ((1024, 16, 24, 458, 458, 0.5), 256, 400_000),
    "a5": ((1536, 16, 28, 1200, 1200, 50), 256, 400_000),
    "a6": ((1792, 16, 32, 1900, 1900, 50), 256, 400_000),
    "a4_checkpoints": ((1024, 16, 24, 458, 458, 0.5), 256, 120_000),
    # 71.5 and 71.9
    "s2_8e2a": ((384, 6, 12, 199, 71, 1), 256, 400_000),
    "s2_16e2a": ((384, 6, 12, 369, 71, 1), 256, 400_000),
    "l2_8e2a_256": ((1024, 16, 24, 2800, 1000, 50), 256, 400_000),
    "l2_8e2a_512": ((1024, 16, 24, 2800, 1000, 50), 512, 400_000),
}
EXPERTS = {"s2_8e2a": 8, "s2_16e2a": 16, "l2_8e2a_256": 8, "l2_8e2a_512": 8}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What a user gives: a thousand class folders of one image each, and an autoencoder (a tiny one)."""
    diffusers = pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("user")
    picture = root / "one.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    for label in range(1000):
        (root / "train" / f"n{label:08d}").mkdir(parents=True)
        (root / "train" / f"n{label:08d}" / "one.png").symlink_to(picture)
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4, 4, 4, 4],
        norm_num_groups=2,
    )
    autoencoder.save_pretrained(root / "vae")
    return [f"data.path={root / 'train'}", f"codec.path={root / 'vae'}"]


def plan_of(name, *overrides):
    command = parse_command(["--deepspeed_config", ENGINE, "--recipe", name, "--plan", *overrides], "")
    return prepare(command, discover({})).plan


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_resolves_to_the_papers_numbers(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Store, "free", lambda store: 10**15)  # a checkpoint of the largest is 43 GiB
    plan = plan_of(name, *given)
    (dim, heads, layers, total, active, rounding), resolution, iterations = PAPER[name]
    spec, recipe = plan.recipe.model, plan.recipe
    assert (spec.dim, spec.heads, spec.depth, spec.patch) == (dim, heads, layers, 2)
    assert plan.model.parameters / 1e6 == pytest.approx(total, abs=rounding)
    assert plan.model.active_parameters / 1e6 == pytest.approx(active, abs=rounding)
    assert (recipe.train.steps, recipe.train.global_batch) == (iterations, 256)
    assert recipe.train.images == iterations * 256
    assert (recipe.data.resolution, plan.model.input_size) == (resolution, resolution // 8)
    assert (spec.num_experts, spec.shared_ratio) == ((EXPERTS[name], 2.0) if name in EXPERTS else (0, 0.0))
    (only,) = plan.warnings  # ImageNet through its codec many times
    assert "codec.cache=disk" in only


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_trains_as_dit_does(name):
    """Contracts 2.1.7, 2.1.10 to 2.1.12, and the paper's fixed rate (3.1)."""
    recipe = load_recipe(name)
    optimizer, diffusion = recipe.optimizer, recipe.diffusion
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_images) == (1e-4, "constant", 0)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip) == ((0.9, 0.999), 0.0, 0.0)
    assert (diffusion.prediction, diffusion.schedule, diffusion.timesteps) == ("epsilon", "linear", 1000)
    assert diffusion.learn_sigma
    assert recipe.ema_decays == {"ema": 0.9999}
    assert (recipe.train.label_dropout, recipe.data.flip, recipe.codec.name) == (0.1, True, "sd")
    assert (recipe.balance.coefficient, recipe.balance.z_coefficient) == (0.01, 0.0)


def test_paper_recipes_differ_in_nothing_but_what_the_paper_varies():
    """Otherwise the scaling laws would compare more than one thing."""
    base = load_recipe("a4")
    varied = {"name", "description", "model", "checkpoint"}
    for name in PAPER:
        recipe = load_recipe(name)
        other = {f.name for f in dataclasses.fields(recipe) if getattr(recipe, f.name) != getattr(base, f.name)}
        allowed = {"a4_checkpoints": {"train"}, "l2_8e2a_512": {"data"}}.get(name, set())
        assert other <= varied | allowed, name


def test_a4_checkpoints_keeps_those_of_figure_4(tmp_path):
    recipe = load_recipe("a4_checkpoints")
    every, batch = recipe.checkpoint.every, recipe.train.global_batch
    assert every % batch == 0
    store = Store(tmp_path)
    for images in range(every, recipe.train.images, every):  # as training saves: the end is exported as weights
        store.path(images).mkdir()
        store.prune(recipe.checkpoint.keep, recipe.checkpoint.keep_every)
    steps = [images // batch for images in store.committed()]
    assert steps[::-1] == [20_000, 40_000, 60_000, 80_000, 100_000, 110_000, 115_000]
    assert recipe.train.steps == 120_000


@pytest.mark.parametrize("name", ["a1", "l2_8e2a_512"])
def test_a_path_that_was_not_given_is_asked_for(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.path 'IMAGENET' does not exist; give a folder"):
        plan_of(name, given[1])
    with pytest.raises(UserError, match=r"SD_VAE"):
        plan_of(name, given[0])
