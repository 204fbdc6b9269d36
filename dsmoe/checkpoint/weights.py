"""Final and sampled-from weights: one safetensors file with the run's plan in its metadata.

Lives here: writing, reading and building the model from such a file. Resumable checkpoints are another matter.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dsmoe.base.errors import CheckpointError
from dsmoe.base.plan import Plan
from dsmoe.checkpoint.stream import write_tensors
from dsmoe.models.dit import DiT

MODEL = "model"  # kind of the weights that were trained, beside the averages of the recipe


@dataclass(frozen=True)
class Weights:
    """A weight file in memory: state (keys of dsmoe.models.DiT; fp32, or as converted), the plan, images seen, kind.

    kind: `model`, or the name of an average (recipe's EmaSpec.step_decays).
    """

    state: dict[str, torch.Tensor]
    plan: Plan
    images_seen: int
    kind: str


def save_weights(path: Path, weights: Weights) -> None:
    """Write atomically: the file appears whole or not at all. Raises OSError (disk full, read-only)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.state.items()}
    stream_weights(path, shapes, weights.state.items(), weights.plan, weights.images_seen, weights.kind)


def stream_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    plan: Plan,
    images_seen: int,
    kind: str,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """`save_weights` for a model that is never whole in memory: tensors come one by one, in the order of `shapes`.

    dtypes: what each is stored as, fp32 where it says nothing.
    """
    metadata = {"dsmoe_plan": json.dumps(plan.to_dict()), "images_seen": str(images_seen), "kind": kind}
    write_tensors(path, shapes, tensors, metadata, dtypes)


def load_weights(path: str | Path) -> Weights:
    """Read a weight file of ours; CheckpointError when it is missing, damaged or of another origin."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weight file {path} does not exist; give a .safetensors file that dsmoe wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weight file {path} is damaged or not safetensors ({error}).") from error
    if "dsmoe_plan" not in metadata:
        raise CheckpointError(f"weight file {path} carries no dsmoe plan; it was not written by dsmoe.")
    plan = Plan.from_dict(json.loads(metadata["dsmoe_plan"]))
    return Weights(state, plan, int(metadata["images_seen"]), metadata["kind"])


def new_model(plan: Plan, **extra: object) -> DiT:
    """A freshly initialised DiT of the plan's architecture; `extra` goes to DiT (such as moe_cls)."""
    facts = plan.model
    return DiT(
        plan.recipe.model,
        input_size=facts.input_size,
        in_channels=facts.in_channels,
        num_classes=facts.num_classes,
        learn_sigma=facts.learn_sigma,
        null_class=facts.null_class,
        balance_scope=plan.recipe.balance.scope,
        selection_bias=plan.recipe.balance.bias_rate > 0,
        **extra,
    )


def build_model(weights: Weights, device: torch.device | str = "cpu") -> DiT:
    """The model in evaluation mode with these weights (fp32); CheckpointError names keys that do not fit."""
    with torch.device("meta"):
        skeleton = new_model(weights.plan)
    expected = {name: tuple(p.shape) for name, p in skeleton.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.state.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        names = ", ".join(dict.fromkeys(name for name, _ in wrong[:6]))
        raise CheckpointError(f"weights do not fit their own plan: {len(wrong)} entries differ, first {names}.")
    model = new_model(weights.plan).to(device)
    model.load_state_dict(weights.state, strict=True)
    return model.eval().requires_grad_(False)
