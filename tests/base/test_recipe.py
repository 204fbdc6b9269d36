"""Recipes: what ships loads, what is written reads back, and the science hash names the science and nothing else."""

import copy
import dataclasses
import json
import re

import pytest
import yaml
from made_plan import RECIPE_FILE, SCIENCE, made_recipe

from dsmoe.base.errors import ConfigError
from dsmoe.base.recipe import (
    DEFAULT_RECIPE,
    RECIPE_DIR,
    Recipe,
    list_recipes,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    science_hash,
    science_of,
)

# What may change without changing what the weights become (design decisions 1 and 2): fields, and whole sections.
POLICY = {"name", "description", "data.max_bad_fraction", "data.index_folder", "codec.cache", "codec.cache_path"}
POLICY_SECTIONS = {"report", "checkpoint"}


@pytest.fixture
def load(tmp_path):
    """The recipe file of the tests with overrides."""
    file = tmp_path / "base.yaml"
    file.write_text(RECIPE_FILE)
    return lambda *overrides: load_recipe(str(file), list(overrides))


def leaves(node, prefix=""):
    """Dotted names of all fields that hold no further fields."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


LEAVES = sorted(leaves(made_recipe()))


def with_changed(recipe, dotted):
    """A copy with one field set to something else, its own checks bypassed (some fields allow one value only)."""
    changed = copy.deepcopy(recipe)
    *parents, last = dotted.split(".")
    node = changed
    for name in parents:
        node = getattr(node, name)
    object.__setattr__(node, last, "something else")
    return changed


@pytest.mark.parametrize("dotted", LEAVES)
def test_hash_changes_with_every_science_field_and_with_no_other(dotted):
    recipe = made_recipe()
    changed = with_changed(recipe, dotted)
    is_policy = dotted in POLICY or dotted.split(".")[0] in POLICY_SECTIONS
    assert (science_hash(changed) == science_hash(recipe)) == is_policy
    assert (dotted in science_of(recipe)) == (not is_policy)


def test_policy_list_names_existing_fields():
    assert set(LEAVES) >= POLICY


def test_hash_is_ten_hex_digits_and_does_not_depend_on_spelling():
    recipe = made_recipe(optimizer={"lr": 1, "warmup_images": 16}, model={"mlp_ratio": 4})
    same = [
        made_recipe(optimizer={"lr": 1.0, "warmup_images": 16.0}, model={"mlp_ratio": 4.0}),
        made_recipe(optimizer={"warmup_images": "1.6e1", "lr": "1e0"}),
        recipe_from_dict({k: SCIENCE[k] for k in reversed(SCIENCE)} | {"optimizer": {"lr": 1, "warmup_images": 16}}),
    ]
    assert re.fullmatch("[0-9a-f]{10}", science_hash(recipe))
    assert {science_hash(r) for r in same} == {science_hash(recipe)}


def test_hash_of_a_preset_is_that_of_its_spelled_out_fields():
    rest = {"name": "x", "train": {"images": 1024}}
    spelled = {"depth": 4, "dim": 128, "heads": 4, "num_experts": 4, "shared_ratio": 2.0, "patch": 4}
    by_name = recipe_from_dict({**rest, "model": {"preset": "nano-4E2A", "patch": 4}})
    assert science_hash(by_name) == science_hash(recipe_from_dict({**rest, "model": spelled}))
    assert "preset" not in recipe_to_dict(by_name)["model"]


def test_to_dict_is_plain_json_and_reads_back_equal():
    for name, _ in list_recipes():
        recipe = load_recipe(name)
        tree = json.loads(json.dumps(recipe_to_dict(recipe)))
        assert recipe_from_dict(tree) == recipe
        assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(tree))) == recipe


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPE_DIR.glob("*.yaml")))
def test_every_shipped_recipe_loads_under_its_name_with_a_description(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert (name, recipe.description) in list_recipes()
    assert recipe.train.steps * recipe.train.global_batch <= recipe.train.images


def test_default_recipe_ships():
    assert DEFAULT_RECIPE in dict(list_recipes())
    assert load_recipe() == load_recipe(DEFAULT_RECIPE)


def test_recipe_file_takes_its_name_from_the_file(tmp_path):
    file = tmp_path / "my-run.yml"
    file.write_text("model: {preset: nano}\ntrain: {images: 4096}\n")
    assert load_recipe(str(file)).name == "my-run"
    file.write_text("name: other\nmodel: {preset: nano}\ntrain: {images: 4096}\n")
    assert load_recipe(str(file)).name == "other"


def test_overrides_reach_every_level_and_the_last_one_counts(load):
    recipe = load(
        "train.images=100000", "train.seed=1", "train.seed=2", "model.preset=nano", "optimizer.betas=[0.5, 0.75]",
        "optimizer.lr=2e-4", "ema.half_life_images=null", "ema.decay=0.5", "name=mine", "balance={scope: none}",
        "report.cfg_channels=3",
    )  # fmt: skip
    assert (recipe.train.images, recipe.train.seed, recipe.name) == (100000, 2, "mine")
    assert (recipe.model.depth, recipe.model.num_experts, recipe.model.patch) == (4, 0, 4)
    assert (recipe.optimizer.betas, recipe.optimizer.lr) == ((0.5, 0.75), 2e-4)
    assert (recipe.ema.decay, recipe.ema.half_life_images) == ((0.5,), ())
    assert recipe.balance.scope == "none"
    assert recipe.report.cfg_channels == 3
    assert recipe.train.global_batch == 128, "what is not named stays"


def test_overrides_do_not_leak_into_the_next_load(load):
    before = load()
    load("train.seed=77")
    assert load() == before


def test_an_override_with_an_equals_sign_in_its_value_keeps_it(load):
    recipe = load("data={source: image_folder, path: /photos/a=b, resolution: 64}")
    assert recipe.data.path == "/photos/a=b"


def test_steps_leave_out_a_last_partial_batch():
    assert made_recipe(train={"images": 167}).train.steps == 20
    assert made_recipe(train={"images": 168}).train.steps == 21


def test_half_life_halves_the_weight_of_the_start():
    decay = made_recipe(ema={"half_life_images": 1000}).ema_decays["ema"]
    assert decay ** (1000 / 8) == pytest.approx(0.5, rel=1e-12)
    assert made_recipe(ema={"decay": 0.99}).ema_decays == {"ema": 0.99}


def test_several_averages_have_a_name_each_and_the_first_is_the_runs_own():
    assert made_recipe(ema={"decay": [0.99, 0.5]}).ema_decays == {"ema": 0.99, "ema_0.5": 0.5}
    decays = made_recipe(ema={"half_life_images": [800, "1.6e3"]}).ema_decays
    assert list(decays) == ["ema", "ema_1600"]
    assert decays["ema"] == pytest.approx(decays["ema_1600"] ** 2, rel=1e-12)


FLOW = ["diffusion.schedule=rectified_flow", "diffusion.prediction=velocity"]


def test_rectified_flow_is_reached_by_overrides_and_counts_no_steps(load):
    recipe = load(*FLOW, "diffusion.time_density=logit_normal", "report.sample_steps=2000", "report.sampler=euler")
    assert recipe.diffusion.is_flow
    assert recipe.diffusion.time_density == "logit_normal"
    assert load(*FLOW).report.sampler == "auto"


# Overrides that contradict its other fields or leave the allowed range.
REFUSED = [
    (["data.source=photos"], ("data.source", "'photos'", "image_folder")),
    (["data.source=image_folder"], ("data.path",)),
    (["data.path=/x"], ("data.path", "'/x'", "data.path=null")),
    (["data.source=image_folder", "data.path=/x"], ("data.size", "64", "data.size=null")),
    (["data.resolution=4"], ("data.resolution", "4", "at least 8")),
    (["data.size=0"], ("data.size", "0", "at least 1")),
    (["data.max_bad_fraction=1.5"], ("data.max_bad_fraction", "1.5", "[0, 1]")),
    (["codec.cache=disc"], ("codec.cache", "'disc'", "memory, disk")),
    (["codec.cache=disk"], ("codec.cache_path is missing", "codec.cache_path=DIR", "launchers/cache_latents.py")),
    (["codec.cache_path=x"], ("codec.cache_path is 'x'", "codec.cache is memory", "codec.cache_path=null")),
    (["codec.cache_dtype=int8"], ("codec.cache_dtype", "'int8'", "float32, float16, bfloat16")),
    (["diffusion.prediction=noise"], ("diffusion.prediction", "'noise'", "epsilon, v, x0, velocity")),
    (["diffusion.time_density=normal"], ("diffusion.time_density", "'normal'", "logit_normal")),
    (["diffusion.noise=pyramid"], ("diffusion.noise", "'pyramid'", "multi_resolution")),
    (["diffusion.prediction=velocity"], ("prediction is velocity", "schedule is linear", "=rectified_flow")),
    (["diffusion.schedule=rectified_flow"], ("prediction is epsilon", "rectified_flow", "prediction=velocity")),
    (["diffusion.time_density=logit_normal"], ("logit_normal", "schedule linear", "=uniform", "=rectified_flow")),
    ([*FLOW, "diffusion.timesteps=500"], ("diffusion.timesteps is 500", "continuous", "leave timesteps out")),
    (["diffusion.noise_strength=0.5"], ("noise_strength is 0.5", "gaussian", "diffusion.noise=multi_resolution")),
    (["diffusion.noise=multi_resolution", "diffusion.noise_strength=0"], ("noise_strength is 0.0", "(0, 1]")),
    (["diffusion.noise=multi_resolution", "diffusion.noise_strength=1.5"], ("noise_strength is 1.5", "(0, 1]")),
    (["report.sampler=dim"], ("report.sampler", "'dim'", "Did you mean 'ddim'")),
    (["report.sampler=euler"], ("sampler euler", "schedule is linear", "take ddim")),
    ([*FLOW, "report.sampler=ddim"], ("sampler ddim", "rectified_flow", "take euler")),
    ([*FLOW, "report.sampler=ancestral"], ("sampler ancestral", "rectified_flow", "take euler")),
    (["report.spacing=even"], ("sampler spacing", "'even'", "leading, trailing, linspace")),
    (["report.eta=2"], ("eta is 2.0", "from 0")),
    (["report.sampler=ancestral", "report.eta=1"], ("eta is 1.0", "sampler ancestral", "leave eta out")),
    ([*FLOW, "report.spacing=leading"], ("spacing is leading", "sampler euler", "leave spacing out")),
    ([*FLOW, "report.sample_steps=20000"], ("report.sample_steps is 20000", "10000")),
    (["diffusion.schedule=liner"], ("'liner'", "Did you mean", "'linear'")),
    (["diffusion.timesteps=1"], ("diffusion.timesteps", "1", "from 2")),
    (["optimizer.lr=0"], ("optimizer.lr", "0.0", "above 0")),
    (["optimizer.lr=-1e-3"], ("optimizer.lr", "-0.001")),
    (["optimizer.betas=[0.9, 1.0]"], ("optimizer.betas", "1.0", "[0, 1)")),
    (["optimizer.eps=0"], ("optimizer.eps", "above 0")),
    (["optimizer.weight_decay=-1"], ("optimizer.weight_decay", "-1.0", "0 or more")),
    (["optimizer.clip=-1"], ("optimizer.clip", "-1.0", "0 (off)")),
    (["optimizer.schedule=cosine"], ("'cosine'", "constant", "exponential")),
    (["optimizer.warmup_images=-1"], ("optimizer.warmup_images", "-1")),
    (["optimizer.warmup_images=80000"], ("optimizer.warmup_images 80000", "train.images", "shorten")),
    (["optimizer.final_ratio=0"], ("optimizer.final_ratio", "(0, 1]")),
    (["balance.scope=global"], ("balance.scope", "'global'", "sample")),
    (["balance.coefficient=-0.1"], ("balance.coefficient", "-0.1")),
    (["balance.z_coefficient=-1"], ("balance.z_coefficient", "-1.0")),
    (["ema.decay=0.9"], ("ema.decay", "0.9", "half_life_images 5000", "exactly one", "null")),
    (["ema.half_life_images=null"], ("ema.decay is None", "exactly one")),
    (["ema.half_life_images=0"], ("ema.half_life_images", "0", "above 0")),
    (["ema={decay: 1.0}"], ("ema.decay", "1.0", "[0, 1)")),
    (["ema={decay: [0.9, 1.5]}"], ("ema.decay", "1.5", "[0, 1)")),
    (["ema={decay: [0.9, 0.99, 0.9]}"], ("ema.decay is [0.9, 0.99, 0.9]", "twice")),
    (["ema={decay: []}"], ("ema.decay is None", "exactly one")),
    (["ema={decay: [0.9, x]}"], ("ema.decay is 'x'", "finite number")),
    (["train.global_batch=0"], ("train.global_batch", "0", "at least 1")),
    (["train.images=100"], ("train.images", "100", "train.global_batch")),
    (["train.label_dropout=1"], ("train.label_dropout", "1.0", "[0, 1)")),
    (["train.label_dropout=0"], ("report.guidance", "3.0", "train.label_dropout=0.1")),
    (["train.seed=-1"], ("train.seed", "-1")),
    (["train.seed=9223372036854775808"], ("train.seed", "9223372036854775808", "2^63-1")),
    (["report.log_every=0"], ("report.log_every", "0", "at least 1")),
    (["report.sample_every=-1"], ("report.sample_every", "-1")),
    (["report.samples=5000"], ("report.samples", "5000", "4096")),
    (["report.sample_steps=2000"], ("report.sample_steps 2000", "diffusion.timesteps", "1000", "fewer")),
    (["report.guidance=0.5"], ("report.guidance", "0.5")),
    (["report.cfg_channels=4"], ("report.cfg_channels", "4", "3 or all")),
    (["name=a/b"], ("name", "'a/b'", "letters")),
    (["name=''"], ("name", "''")),
    (["model.mlp_ratio=0.001"], ("model.mlp_ratio 0.001", "hidden units", "raise")),
    (["model.shared_ratio=0.001"], ("model.shared_ratio 0.001", "hidden units")),
    (["model.top_k=9"], ("model.top_k 9", "model.num_experts 4")),
    (["=5"], ("'=5'", "key.path=value")),
    (["train.images"], ("'train.images'", "key.path=value")),
    (["train.imags=5"], ("'train.imags'", "'train.images'")),
    (["trian.images=5"], ("'trian'", "'train'")),
    (["model.presett=nano"], ("'model.presett'", "'model.preset'")),
    (["train.images.x=1"], ("train.images.x", "'images'", "plain value")),
    (["train.seed={a: 1, a: 2}"], ("train.seed", "'a' stands twice")),
    (["data.path=2020-13-01"], ("data.path", "not valid YAML", "quote")),
    (["train.images=[1"], ("train.images", "'[1'", "not valid YAML")),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_refused_overrides_are_named_in_one_line(load, overrides, words):
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_unknown_recipe_offers_close_names_and_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'quikstart'.*Did you mean.*'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(ConfigError, match=r"gone\.yaml.*does not exist.*give"):
        load_recipe(str(tmp_path / "gone.yaml"))


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        made_recipe().name = "x"
    assert isinstance(made_recipe(), Recipe)
