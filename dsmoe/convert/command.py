"""`python -m dsmoe convert SRC DST`: weights of any known origin into any known form, with a report."""

import argparse
from pathlib import Path

from dsmoe.base.plan import Plan
from dsmoe.codec.files import file_sha256
from dsmoe.convert import diffusers
from dsmoe.convert.incoming import Incoming, Request, take_in
from dsmoe.convert.outgoing import choose_target, write
from dsmoe.data.label_map import names_of
from dsmoe.diffusion import make_objective


def run(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Convert as the options of options.add_arguments say; the report's rows. UserError for the user's mistakes."""
    names = names_of(options.label_map) if options.label_map is not None else None
    incoming = take_in(options.source, Request.of(options, names))
    form = choose_target(incoming, options.target, options.to)
    said = write(incoming, options.target, form, dtype=options.dtype, drop_selection_bias=options.drop_selection_bias)
    incoming.state.close()
    return [
        ("read", str(incoming.opened.path)),
        *incoming.report,
        *_facts(incoming),
        *_written(options.target, form),
        *said,
    ]


def _facts(incoming: Incoming) -> list[tuple[str, str]]:
    """What the weights are and what rides with them."""
    plan, state = incoming.plan, incoming.state
    spec, facts, report = plan.recipe.model, plan.model, plan.recipe.report
    kind = f"MoE {spec.num_experts}E{spec.top_k}A {spec.expert_kind}" if spec.is_moe else "dense"
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in state.outline.values()})
    largest = max(tensor.nbytes for tensor in state.outline.values())
    null = f"null label {facts.num_classes}" if facts.null_class else "no null label"
    codec = plan.codec
    return [
        (
            "model",
            f"{plan.recipe.name}: {kind}, depth {spec.depth}, dim {spec.dim}, heads {spec.heads}, {_inputs(plan)}",
        ),
        ("weights", f"{incoming.opened.kind}, {incoming.opened.images_seen or 'unknown'} images seen"),
        ("parameters", f"{facts.parameters:,}, {facts.active_parameters:,} active"),
        ("tensors", f"{len(state)}, {', '.join(dtypes)}; the largest, held at a time, {largest / 2**20:,.1f} MiB"),
        *make_objective(plan.recipe.diffusion).describe().items(),
        (
            "sampling",
            f"{report.sampler}, {report.sample_steps} steps, guidance {report.guidance:g} on {_channels(plan)}",
        ),
        ("labels", f"{facts.num_classes}, {null}"),
        ("codec", f"{codec['name']}, scale {codec['scale']}, factor {codec['factor']}, sha256 {codec['sha256'][:16]}"),
    ]


def _inputs(plan: Plan) -> str:
    spec, facts = plan.recipe.model, plan.model
    channels = spec.input_channels(facts.in_channels)
    more = f" ({spec.conditions} conditions)" if spec.conditions else ""
    return f"patch {spec.patch}, input {channels}x{facts.input_size}x{facts.input_size}{more}"


def _channels(plan: Plan) -> str:
    channels = plan.recipe.report.cfg_channels
    return "all channels" if channels == "all" else f"{channels} channels"


def _written(target: Path, form: str) -> list[tuple[str, str]]:
    file = target / diffusers.WEIGHTS_FILE if form == "diffusers" else target
    size = file.stat().st_size / 2**20
    return [("written", f"{target} ({form}), {size:,.1f} MiB"), ("sha256", file_sha256(file))]
