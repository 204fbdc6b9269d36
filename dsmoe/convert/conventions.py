"""What a run needs beside weights, by published format: objective, sampler, guidance, autoencoder, null label.

Published files hold none of it. Here it is put into a Plan, which then rides in the weight file, so that sampling uses
what the weights were trained for. Sources: contracts 2.1.7-2.1.12, 2.2, 2.3.6, 6; peers.md 1.1-1.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe.base.accounting import count_macs, count_parameters
from dsmoe.base.errors import CheckpointError, ConfigError, choose_from
from dsmoe.base.plan import UNKNOWN_SHA, DataFacts, EngineFacts, ModelFacts, Plan
from dsmoe.base.recipe import recipe_from_dict
from dsmoe.codec.protocol import provenance
from dsmoe.convert.recognise import Recognised

SD_SCALE, SD_FACTOR = 0.18215, 8
_SELECTION_RATE = 1e-3  # any above 0 gives the model the biases that its weights hold

OBJECTIVES: dict[str, dict[str, object]] = {
    "ddpm": {"prediction": "epsilon", "schedule": "linear"},  # contracts 2.1.10
    "flow": {"prediction": "velocity", "schedule": "rectified_flow", "time_density": "logit_normal"},  # 2.2
    "sit": {"prediction": "velocity", "schedule": "rectified_flow", "flow_end": "image"},
    "v": {"prediction": "v", "schedule": "scaled_linear"},  # what the generalist's release samples with, 2.3.6
    "cosine": {"prediction": "epsilon", "schedule": "cosine"},  # what its paper says
}

_ANCESTRAL = {"sampler": "ancestral", "sample_steps": 250, "guidance": 4.0, "cfg_channels": 3}
_DRAWING: dict[str, dict[str, object]] = {
    "ddpm": _ANCESTRAL,
    "flow": {"sampler": "euler", "sample_steps": 50, "guidance": 7.0, "cfg_channels": "all"},
    "sit": {"sampler": "euler", "sample_steps": 250, "guidance": 4.0, "cfg_channels": 3},
    "v": {"sampler": "ddim", "sample_steps": 50, "spacing": "leading", "guidance": 1.0, "cfg_channels": "all"},
    "cosine": {"sampler": "ddim", "sample_steps": 50, "guidance": 1.0, "cfg_channels": "all"},
}
_DIFFUSERS_DRAWING = {
    "sampler": "ddim",
    "sample_steps": 50,
    "spacing": "leading",
    "guidance": 4.0,
    "cfg_channels": "all",
}


@dataclass(frozen=True)
class Format:
    """A published form of weights. layouts: of recognise.LAYOUTS that it may have; title for people."""

    name: str
    title: str
    layouts: tuple[str, ...]


FORMATS = {
    f.name: f
    for f in (
        Format("dit", "DiT or fast-DiT", ("timm",)),
        Format("sit", "SiT", ("timm",)),
        Format("dit-moe", "DiT-MoE", ("timm", "flash")),
        Format("generalist", "the paper authors' generalist", ("timm",)),
        Format("diffusers", "diffusers DiTTransformer2DModel", ("diffusers",)),
        Format("dsmoe", "dsmoe", ("dsmoe",)),
    )
}


@dataclass(frozen=True)
class Convention:
    """The form weights are in and the objective (of OBJECTIVES) they were trained for; why, for the report."""

    format: Format
    objective: str
    why: str


def check_names(stated: str | None, objective: str | None) -> None:
    """ConfigError unless --from and --objective are known, where given."""
    if stated is not None and stated not in FORMATS:
        raise ConfigError(choose_from("--from", stated, FORMATS))
    if objective is not None and objective not in OBJECTIVES:
        raise ConfigError(choose_from("--objective", objective, OBJECTIVES))


def settle(
    found: Recognised, arguments: Mapping[str, object] | None, stated: str | None, objective: str | None
) -> Convention:
    """Which published form this is, and its objective; CheckpointError with the choices where nothing decides.

    arguments: the training script's own, where a file holds them. stated, objective: what the user says (--from,
    --objective; see check_names).
    """
    name, why = (stated, "as --from says") if stated else _form(found, arguments or {}, objective)
    form = FORMATS[name]
    if found.layout not in form.layouts or (name in ("dit", "sit") and found.spec.is_moe):
        kind = f"the {found.layout} layout{' with experts' if found.spec.is_moe else ''}"
        raise CheckpointError(f"--from is {name}, but these weights are of {kind} ({found.why}).")
    if objective is not None:
        return Convention(form, objective, f"{why}; objective as --objective says")
    return Convention(form, *_objective(found, name, arguments or {}, why))


def _form(found: Recognised, arguments: Mapping[str, object], objective: str | None) -> tuple[str, str]:
    if found.layout in ("diffusers", "dsmoe"):
        return found.layout, found.why
    if found.spec.tasks:
        return "generalist", f"it holds {found.spec.tasks} patch convolutions"
    if found.spec.is_moe:
        return "dit-moe", f"{found.spec.num_experts} experts, attention of the {found.layout} layout"
    if "path_type" in arguments:
        return "sit", "its training arguments name a path_type"
    if "global_batch_size" in arguments:
        script = "fast-DiT" if "feature_path" in arguments else "DiT"
        return "dit", f"its training arguments are those of {script}"
    if objective is not None or found.spec.conditions:
        return ("sit" if objective == "sit" else "dit"), "dense weights with DiT's keys"
    raise CheckpointError(
        "these are DiT's keys, which DiT, fast-DiT and SiT share; what they predict does not show. Give --from dit "
        "(DiT and fast-DiT: noise, on the linear schedule) or --from sit (velocity)."
    )


def _objective(found: Recognised, form: str, arguments: Mapping[str, object], why: str) -> tuple[str, str]:
    if form == "sit":
        path, predicts = arguments.get("path_type", "Linear"), arguments.get("prediction", "velocity")
        if (path, predicts) != ("Linear", "velocity"):
            raise CheckpointError(
                f"this SiT was trained on path {path} to predict {predicts}; only Linear and velocity can be sampled."
            )
        return "sit", why
    if form == "dsmoe":
        raise CheckpointError(
            f"these are dsmoe's keys without a plan, so their objective is not known; give --objective "
            f"{', '.join(OBJECTIVES)}, or the run folder."
        )
    if form == "generalist" or (form == "dit" and found.spec.conditions):
        raise CheckpointError(
            "perception weights do not show their objective: the authors' release samples with v-prediction on the "
            "scaled-linear schedule (--objective v), their paper says noise on the cosine one (--objective cosine)."
        )
    if form == "dit-moe" and (found.layout == "flash" or arguments.get("rf") is True):
        return "flow", f"{why}: rectified flow"
    return "ddpm", why


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What else a plan says: image side in pixels, names of the classes, the codec with its provenance."""

    resolution: int
    class_names: tuple[str, ...]
    codec: str
    codec_path: str | None
    codec_facts: Mapping[str, str]
    precision: str
    selection_bias: bool


def sd_provenance() -> dict[str, str]:
    """Of Stable Diffusion's autoencoder, which published weights need, without having it."""
    return provenance("sd", UNKNOWN_SHA, SD_SCALE, SD_FACTOR)


def published_plan(found: Recognised, convention: Convention, setting: Setting) -> Plan:
    """A Plan for weights that came without one. What is not known of their training stands there as a placeholder:
    one global batch of images, items 0, path "unknown"; `engine.about` says so."""
    drawing = _DIFFUSERS_DRAWING if found.layout == "diffusers" else _DRAWING[convention.objective]
    if not found.null_class:
        drawing = {**drawing, "guidance": 1.0}
    form = convention.format
    size = found.preset.replace("/", "-") or "custom"
    tree = {
        "name": f"{form.name}-{size}-{setting.resolution}",
        "description": f"converted from {form.title}",
        "model": {f: getattr(found.spec, f) for f in found.spec.__dataclass_fields__},
        "data": {"source": "image_folder", "path": "unknown", "resolution": setting.resolution},
        "codec": {"name": setting.codec, "path": setting.codec_path},
        "diffusion": {**OBJECTIVES[convention.objective], "learn_sigma": found.learn_sigma},
        "balance": {"bias_rate": _SELECTION_RATE if setting.selection_bias else 0.0},
        "train": {"images": 256, "label_dropout": 0.1 if found.null_class else 0.0},
        "report": drawing,
    }
    facts = {
        "input_size": setting.resolution // int(setting.codec_facts["factor"]),
        "num_classes": found.num_classes,
        "learn_sigma": found.learn_sigma,
        "null_class": found.null_class,
    }
    count = count_parameters(found.spec, channels=found.channels, **facts)
    macs = count_macs(
        found.spec, channels=found.channels, input_size=facts["input_size"], learn_sigma=found.learn_sigma
    )
    return Plan(
        recipe=recipe_from_dict(tree),
        engine=EngineFacts(
            ds_config="none",
            about="converted weights: how they were trained is not known here",
            zero_stage=0,
            precision=setting.precision,
            world_size=1,
            micro_batch=256,
            accumulation=1,
            expert_parallel_size=1,
            activation_checkpointing=False,
            optimizer="unknown",
            offload=False,
        ),
        data=DataFacts(items=0, class_names=setting.class_names),
        model=ModelFacts(
            in_channels=found.channels,
            parameters=count.total,
            active_parameters=count.active,
            macs=macs.total,
            **facts,
        ),
        codec=dict(setting.codec_facts),
        schedule={},
        memory={},
    )
