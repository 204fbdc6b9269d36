"""A small Plan, put together by hand, for tests that need one without data, codec or engine."""

from dsmoe.base.plan import DataFacts, EngineFacts, ModelFacts, Plan
from dsmoe.base.recipe import Recipe, recipe_from_dict

SCIENCE = {
    "name": "tiny",
    "description": "for tests",
    "model": {"depth": 2, "dim": 32, "heads": 2, "patch": 2, "num_experts": 4, "shared_ratio": 2.0},
    "data": {"resolution": 32, "size": 64},
    "codec": {"name": "none"},
    "train": {"images": 160, "global_batch": 8, "seed": 3},
    "report": {"log_every": 32},
}

# A recipe file with every section, whose numbers tests may rely on (those of shipped recipes get tuned).
RECIPE_FILE = """\
model: {preset: nano-4E2A, patch: 4}
data: {source: scenes, resolution: 32, size: 64}
codec: {name: none, cache: memory}
diffusion: {prediction: epsilon, learn_sigma: true, schedule: linear, timesteps: 1000}
optimizer: {lr: 1e-3, betas: [0.9, 0.99], clip: 1.0, schedule: exponential, warmup_images: 5000, final_ratio: 0.05}
balance: {scope: sample, coefficient: 0.01}
ema: {half_life_images: 5000}
train: {images: 80000, global_batch: 128, label_dropout: 0.1, seed: 0}
report: {log_every: 1280, samples: 64, sample_steps: 50, guidance: 3.0, cfg_channels: all}
"""


def made_recipe(**sections: dict) -> Recipe:
    """The recipe above with keys of its sections replaced: made_recipe(train={"seed": 1})."""
    tree = dict(SCIENCE)
    for section, changes in sections.items():
        tree[section] = {**tree.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return recipe_from_dict(tree)


def made_plan(recipe: Recipe | None = None, *, world_size: int = 2, precision: str = "fp32") -> Plan:
    recipe = recipe or made_recipe()
    return Plan(
        recipe=recipe,
        engine=EngineFacts(
            ds_config="made.json",
            about="made by hand",
            zero_stage=1,
            precision=precision,
            world_size=world_size,
            micro_batch=recipe.train.global_batch // world_size,
            accumulation=1,
            expert_parallel_size=1,
            activation_checkpointing=False,
            optimizer="AdamW (torch)",
            offload=False,
        ),
        data=DataFacts(items=64, class_names=("cone", "sphere")),
        model=ModelFacts(
            input_size=32,
            in_channels=3,
            num_classes=2,
            learn_sigma=True,
            null_class=True,
            parameters=1000,
            active_parameters=600,
            macs=5_000_000,
        ),
        codec={"name": "none", "sha256": "none", "scale": "1.0", "factor": "1"},
        schedule={"learning rate": "0 -> 0.0001"},
        memory={"averages": 1 << 20, "parameters": 2 << 20, "host moments": 4 << 20},
        warnings=("the EMA is short.",),
    )
