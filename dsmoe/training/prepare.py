"""From a command line to a checked Plan, before any process group or model exists.

Everything a user can get wrong is found here or in the rooms called from here, as one UserError.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe import ops
from dsmoe.base.accounting import count_macs, count_parameters
from dsmoe.base.command_line import Parser
from dsmoe.base.errors import ConfigError, UserError, choose_from
from dsmoe.base.memory import Layout, ModelShape, rank_memory
from dsmoe.base.plan import HOST, DataFacts, EngineFacts, ModelFacts, Plan
from dsmoe.base.recipe import DEFAULT_RECIPE, EMA, Recipe, load_recipe
from dsmoe.base.run_folder import RunFolder, default_run_folder
from dsmoe.checkpoint.saver import require_space
from dsmoe.checkpoint.store import Store
from dsmoe.codec import build as build_codec
from dsmoe.codec.protocol import Codec
from dsmoe.data.dataset import ImageDataset
from dsmoe.data.latent_cache import LatentCache
from dsmoe.diffusion import make_objective
from dsmoe.ds_config import Batch, EnginePolicy, check_policy, layout_of, load_policy, resolve_batch
from dsmoe.preprocess.disk import images_are_here, open_cache, training_images
from dsmoe.preprocess.memory import check_budget
from dsmoe.runtime.device import Device
from dsmoe.runtime.distributed import LaunchPlace
from dsmoe.training.optimizer import choose_implementation, learning_rate
from dsmoe.training.state import total_bytes

EMA_START_SHARE = 0.05


@dataclass(frozen=True)
class Command:
    """The command line of a training launcher."""

    deepspeed_config: str
    recipe: str
    run: str | None
    plan_only: bool
    overrides: list[str]


@dataclass(frozen=True)
class Prepared:
    """Everything checked and ready: what training needs besides process groups and the model.

    dataset: the images, or with codec.cache disk the latents that stand for them.
    """

    plan: Plan
    policy: EnginePolicy
    batch: Batch
    dataset: ImageDataset | LatentCache
    codec: Codec
    device: Device
    folder: RunFolder


def parse_command(argv: list[str], description: str) -> Command:
    """The launcher's arguments; ConfigError (never argparse's own exit) on a mistake."""
    parser = Parser(description)
    parser.add_argument("--deepspeed_config", metavar="FILE", help="engine policy, such as ds_configs/quickstart.json")
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME|FILE",
        help="the science (python -m dsmoe recipes lists names)",
    )
    parser.add_argument("--run", metavar="DIR", help="run folder (default runs/<recipe>-<science hash>)")
    parser.add_argument("--plan", action="store_true", help="print the resolved plan and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as train.images=100000")
    # Intermixed: overrides may stand before, between and after the options.
    given, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flags = ("--deepspeed_config", "--recipe", "--run", "--plan", "--help", "key=value")
        raise ConfigError(choose_from("argument", unknown[0], flags))
    if not given.deepspeed_config:
        raise ConfigError("--deepspeed_config is missing; give a file such as ds_configs/quickstart.json.")
    return Command(given.deepspeed_config, given.recipe, given.run, given.plan, given.overrides)


def prepare(command: Command, place: LaunchPlace) -> Prepared:
    """Resolve the command into a plan and its parts; UserError on the first thing that does not fit.

    place: where this process stands among all. Every rank checks everything, so that all stop on the same fault.
    """
    recipe = load_recipe(command.recipe, command.overrides)
    policy = load_policy(command.deepspeed_config)
    Device.pick(place.local_world_size - 1)  # all ranks of a host meet a missing GPU, so that rank 0 can say so
    device = Device.pick(place.local_rank)
    check_policy(policy, device_type=device.kind, num_experts=recipe.model.num_experts, world_size=place.world_size)
    _check_device(policy, device)
    _check_ops(policy, device)
    batch = resolve_batch(policy, recipe.train.global_batch, place.world_size)
    implementation = choose_implementation(
        policy.block.optimizer, device_type=device.kind, offload=policy.offload_optimizer
    )
    codec = build_codec(recipe.codec.name, recipe.codec.path)
    dataset = _open_data(command, recipe, codec)
    model = _model_facts(recipe, codec, dataset)
    if recipe.codec.cache == "memory":
        check_budget(len(dataset), recipe.data.resolution, codec, recipe.data.flip)
    plan = Plan(
        recipe=recipe,
        engine=EngineFacts(
            ds_config=Path(command.deepspeed_config).name,
            about=policy.block.about or "no description",
            zero_stage=policy.stage,
            precision=policy.precision,
            world_size=place.world_size,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
            expert_parallel_size=policy.block.expert_parallel_size,
            activation_checkpointing=policy.block.activation_checkpointing,
            optimizer=f"AdamW ({implementation})",
            offload=policy.offload_optimizer,
            ops=policy.block.ops,
        ),
        data=DataFacts(items=len(dataset), class_names=tuple(dataset.class_names)),
        model=model,
        codec=dict(codec.provenance),
        schedule=_end_points(recipe),
        memory=_memory(recipe, model, _layout(recipe, policy, batch, device), device),
        warnings=tuple(_warnings(recipe, policy, dataset, _cache_command(command))),
    )
    folder = RunFolder(Path(command.run)) if command.run else default_run_folder(plan)
    folder.check(plan)
    if not folder.done.exists():
        require_space(Store(folder.checkpoints), total_bytes(model.parameters, len(recipe.ema_decays)))
    return Prepared(plan, policy, batch, dataset, codec, device, folder)


def _open_data(command: Command, recipe: Recipe, codec: Codec) -> ImageDataset | LatentCache:
    """The images; with codec.cache disk the cache, held against the images where they are on this machine."""
    if recipe.codec.cache != "disk":
        return training_images(recipe)
    images = training_images(recipe) if images_are_here(recipe) else None
    return open_cache(recipe, codec, images, _cache_command(command))


def _cache_command(command: Command) -> str:
    """The line that builds the latent cache of this command."""
    own = [text for text in command.overrides if text.startswith(("data.", "codec.")) and ".cache" not in text]
    return shlex.join(["python", "launchers/cache_latents.py", "--out", "DIR", "--recipe", command.recipe, *own])


def _check_device(policy: EnginePolicy, device: Device) -> None:
    if not device.supports(storage_dtype(policy.precision)):
        raise ConfigError(
            f"{policy.path}: {policy.precision} is not supported by {device.name}; use fp16, or fp32 (leave both out)."
        )


def _check_ops(policy: EnginePolicy, device: Device) -> None:
    """ConfigError naming the file when an operation or implementation that it prefers is not to be had."""
    try:
        ops.check_preferences(policy.block.ops, device.kind)
    except ConfigError as error:
        raise ConfigError(f"{policy.path}: 'dsmoe.ops': {error}") from error


def _model_facts(recipe: Recipe, codec: Codec, dataset: ImageDataset | LatentCache) -> ModelFacts:
    """The model's sizes."""
    if recipe.model.conditions or recipe.model.tasks:
        raise ConfigError(
            f"model.conditions is {recipe.model.conditions} and model.tasks {recipe.model.tasks}; they belong to "
            "perception, and a model that draws images from classes has 0 of both."
        )
    resolution, patch = recipe.data.resolution, recipe.model.patch
    unit = codec.factor * patch
    if resolution % unit or resolution % codec.image_multiple:
        raise ConfigError(
            f"data.resolution {resolution} is not a multiple of {unit} (codec {codec.name} factor {codec.factor} x "
            f"model.patch {patch}); choose such as {max(unit, round(resolution / unit) * unit)}."
        )
    facts = {
        "input_size": resolution // codec.factor,
        "num_classes": dataset.num_classes,
        "learn_sigma": recipe.diffusion.learn_sigma,
        "null_class": recipe.train.label_dropout > 0,
    }
    count = count_parameters(recipe.model, channels=codec.channels, **facts)
    macs = count_macs(
        recipe.model, channels=codec.channels, input_size=facts["input_size"], learn_sigma=facts["learn_sigma"]
    )
    return ModelFacts(
        in_channels=codec.channels,
        parameters=count.total,
        active_parameters=count.active,
        macs=macs.total,
        **facts,
    )


def _end_points(recipe: Recipe) -> dict[str, str]:
    """The numbers people compare first: where the noise and learning-rate schedules begin and end."""
    spec, optimizer, images = recipe.diffusion, recipe.optimizer, recipe.train.images
    rates = [learning_rate(optimizer, n, images) for n in (0, optimizer.warmup_images, images)]
    noise = f"{spec.noise} of strength {spec.noise_strength:g} t/T" if spec.noise == "multi_resolution" else spec.noise
    return {
        **make_objective(spec).describe(),
        "noising": f"{spec.time_density} times, {noise} noise",
        "learning rate": f"{rates[0]:g} -> {rates[1]:g} at {optimizer.warmup_images:,} images -> {rates[2]:g} "
        f"({optimizer.schedule})",
        **{
            f"{_shown(name)} decay": f"{decay:.6f} a step, {decay**recipe.train.steps:.2g} of the start left at the end"
            for name, decay in recipe.ema_decays.items()
        },
    }


def _shown(average: str) -> str:
    return average.replace(EMA, "EMA", 1)


def _layout(recipe: Recipe, policy: EnginePolicy, batch: Batch, device: Device) -> Layout:
    compiled = ops.compiled_block(device.kind, policy.block.ops)
    return layout_of(policy, batch, len(recipe.ema_decays), compiled_ops=compiled)


def _memory(recipe: Recipe, model: ModelFacts, layout: Layout, device: Device) -> dict[str, int]:
    """Bytes a rank at its fullest, by component; what an offloaded optimizer holds on the host stands apart."""
    shape = ModelShape(
        spec=recipe.model,
        input_size=model.input_size,
        channels=model.in_channels,
        num_classes=model.num_classes,
        learn_sigma=model.learn_sigma,
        null_class=model.null_class,
    )
    memory = rank_memory(shape, layout, resident=device.kind == "cpu")
    return memory.peak | {f"{HOST} {name}": size for name, size in memory.host.items()}


def _warnings(
    recipe: Recipe, policy: EnginePolicy, dataset: ImageDataset | LatentCache, cache_command: str
) -> list[str]:
    found, items = [], len(dataset)
    for name, decay in recipe.ema_decays.items():
        left = decay**recipe.train.steps
        if left <= EMA_START_SHARE:
            continue
        found.append(
            f"{_shown(name)} still holds {left:.0%} of the initial weights at the end; set ema.half_life_images to "
            f"about {recipe.train.images // 20:,}."
        )
    if recipe.balance.scope == "micro" and recipe.model.is_moe:
        found.append("balance.scope micro depends on layout: results change with ranks and micro-batch.")
    if recipe.codec.cache == "none" and recipe.data.source == "scenes" and recipe.train.images > 4 * items:
        found.append(
            f"images are rendered and encoded {recipe.train.images // items} times; codec.cache=memory does it once."
        )
    if recipe.data.source == "parquet" and recipe.codec.cache == "none" and not recipe.data.shuffle_block:
        found.append(
            f"each image of a parquet file costs its whole row group, up to {dataset.group_rows} images; "
            f"data.shuffle_block={dataset.group_rows} reads groups about once (another order, so another run)."
        )
    if recipe.codec.cache == "none" and recipe.codec.name != "none" and recipe.train.images > items:
        found.append(
            f"each image is read and sent through codec {recipe.codec.name} {recipe.train.images / items:.3g} times; "
            f"once with {cache_command} and then codec.cache=disk codec.cache_path=DIR."
        )
    if recipe.codec.cache == "disk" and not images_are_here(recipe):
        found.append(f"data.path {recipe.data.path} is not here: that the cache holds its images is not checked.")
    if recipe.codec.cache == "disk" and recipe.codec.cache_dtype != "float32":
        found.append(f"latents are rounded to {recipe.codec.cache_dtype}: not the run that images give.")
    if policy.offload_parameters and policy.stage == 3:
        found.append("parameters are offloaded to the CPU: every layer's weights cross the host link each pass.")
    return found


def storage_dtype(precision: str) -> torch.dtype:
    """torch dtype of stored weights and activations for fp32, bf16, fp16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def one_line(error: UserError) -> str:
    """How a refused command is reported: on the console and in FAILED alike."""
    return f"dsmoe: {error}"
