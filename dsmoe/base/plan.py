"""The Plan: one resolved, frozen description of a run, in its folder and inside every weight file.

Lives here: the record, its JSON form and its printed form. It is put together by training.prepare, which knows
data, codec and engine policy.
"""

import dataclasses
import json
from dataclasses import dataclass, field

from dsmoe.base.activations import EXPERTS
from dsmoe.base.errors import CheckpointError
from dsmoe.base.recipe import Recipe, recipe_from_dict, recipe_to_dict, science_hash

PLAN_FORMAT = 1
UNKNOWN_SHA = "unknown"  # the codec's sha256 in the plan of weights that came without it
HOST = "host"  # begins the name of a memory component that lies in host memory


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """Engine policy as resolved for this job; may change between a run and its resumption.

    world_size ranks, each with micro_batch images a micro-step and accumulation micro-steps an optimizer step.
    activation_checkpointing: one of base.activations.RECOMPUTE. ops: operation -> the implementation that the ds_config
    prefers to the default one.
    """

    ds_config: str
    about: str
    zero_stage: int
    precision: str
    world_size: int
    micro_batch: int
    accumulation: int
    expert_parallel_size: int
    activation_checkpointing: bool | str
    optimizer: str
    offload: bool
    ops: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the data set turned out to hold."""

    items: int
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of the model: latent side and channels, parameters (total, active a token), forward MACs an image."""

    input_size: int
    in_channels: int
    num_classes: int
    learn_sigma: bool
    null_class: bool
    parameters: int
    active_parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, resolved. `schedule` holds the end points that people compare (alpha_bar, learning rates).

    memory: bytes of a rank in the fullest moment of a step, by component (base.memory).
    """

    recipe: Recipe
    engine: EngineFacts
    data: DataFacts
    model: ModelFacts
    codec: dict
    schedule: dict
    memory: dict
    warnings: tuple[str, ...] = ()

    @property
    def science_hash(self) -> str:
        return science_hash(self.recipe)

    def to_dict(self) -> dict:
        """Plain mappings; `from_dict` reads them back to an equal Plan."""
        tree = json.loads(json.dumps(dataclasses.asdict(self)))
        tree["recipe"] = recipe_to_dict(self.recipe)
        return {"format": PLAN_FORMAT, "science_hash": self.science_hash, **tree}

    @staticmethod
    def from_dict(tree: dict) -> "Plan":
        """The Plan in a plan.json or in a weight file's metadata; CheckpointError when it is not one of ours."""
        if not isinstance(tree, dict):
            raise CheckpointError(f"the plan holds {type(tree).__name__}, not an object; the file is not a dsmoe plan.")
        if tree.get("format") != PLAN_FORMAT:
            raise CheckpointError(
                f"plan format is {tree.get('format')!r}; this dsmoe reads format {PLAN_FORMAT}. Use a matching dsmoe."
            )
        try:
            data = {**tree["data"], "class_names": tuple(tree["data"]["class_names"])}
            return Plan(
                recipe=recipe_from_dict(tree["recipe"]),
                engine=EngineFacts(**tree["engine"]),
                data=DataFacts(**data),
                model=ModelFacts(**tree["model"]),
                codec=tree["codec"],
                schedule=tree["schedule"],
                memory=tree["memory"],
                warnings=tuple(tree["warnings"]),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"plan lacks or misnames an entry ({error}); the file is not a dsmoe plan."
            ) from error


_RECOMPUTED = {False: "", True: ", activation checkpointing", EXPERTS: ", experts recomputed"}


def describe(plan: Plan) -> str:
    """The plan as people read it: one aligned line a fact, warnings last."""
    recipe, engine, model = plan.recipe, plan.engine, plan.model
    spec = recipe.model
    kind = f"DiT-MoE {spec.num_experts}E{spec.top_k}A {spec.expert_kind}" if spec.is_moe else "DiT"
    data, train, side = recipe.data, recipe.train, model.input_size
    shape = f"{model.in_channels}x{side}x{side}"
    epochs = train.images / max(plan.data.items, 1)
    extras = [_RECOMPUTED[engine.activation_checkpointing], ", offload" * engine.offload]
    rows = [
        ("recipe", f"{recipe.name} ({recipe.description})" if recipe.description else recipe.name),
        ("science hash", plan.science_hash),
        ("model", f"{kind}, depth {spec.depth}, dim {spec.dim}, heads {spec.heads}, patch {spec.patch}"),
        ("parameters", f"{model.parameters:,} total, {model.active_parameters:,} active a token"),
        ("forward MACs", f"{model.macs / 1e9:.4g} G an image ({shape} input)"),
        (
            "data",
            f"{data.source}{f' {data.path}' * bool(data.path)}, {plan.data.items:,} images, {plan.data.num_classes} "
            f"classes, {data.resolution} px{f', in blocks of {data.shuffle_block}' * bool(data.shuffle_block)}",
        ),
        (
            "codec",
            f"{plan.codec['name']}, factor {plan.codec['factor']}, scale {float(plan.codec['scale']):.5g}, "
            f"cache {recipe.codec.cache}",
        ),
        (
            "batch",
            f"{train.global_batch} = {engine.micro_batch} a rank x {engine.accumulation} accumulated x "
            f"{engine.world_size} ranks",
        ),
        ("length", f"{train.images:,} images = {train.steps:,} steps = {epochs:.2f} epochs"),
        (
            "engine",
            f"ZeRO-{engine.zero_stage}, {engine.precision}, {engine.optimizer}, expert parallel "
            f"{engine.expert_parallel_size}{''.join(extras)}",
        ),
        ("ds_config", f"{engine.ds_config} ({engine.about})"),
    ]
    if engine.ops:
        rows.append(("preferred operations", ", ".join(f"{op}: {name}" for op, name in engine.ops.items())))
    rows += [(key, str(value)) for key, value in plan.schedule.items()]
    rows += _memory_rows(plan.memory)
    lines = [f"{key:<28}{value}" for key, value in rows]
    lines += [f"{'warning':<28}{text}" for text in plan.warnings]
    return "\n".join(lines)


def _memory_rows(memory: dict[str, int]) -> list[tuple[str, str]]:
    """The total of the device, then every component, largest first."""
    total = sum(size for name, size in memory.items() if not name.startswith(HOST))
    rows = [("memory", f"{total / 2**20:,.1f} MiB a rank at its fullest, without codec and libraries")]
    rows += [
        (f"memory: {name}", f"{size / 2**20:,.1f} MiB")
        for name, size in sorted(memory.items(), key=lambda item: -item[1])
    ]
    return rows
