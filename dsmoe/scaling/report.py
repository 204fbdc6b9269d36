"""The planner's command: from its options to the printed plan."""

import argparse
from collections.abc import Sequence

from dsmoe import ops
from dsmoe.base.accounting import count_macs
from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.memory import ModelShape
from dsmoe.base.presets import PRESETS
from dsmoe.base.recipe import load_recipe
from dsmoe.scaling.layouts import Candidate, Fixed, budget
from dsmoe.scaling.links import Cluster
from dsmoe.scaling.macs import sized_model
from dsmoe.scaling.planner import GIB, Ranking, rank_layouts, short_name, write_best

GLOBAL_BATCH = 256


def run(given: argparse.Namespace) -> str:
    """The plan as text, written to --write too; ConfigError on an impossible request."""
    for name in ("nodes", "gpus", "gpu_memory", "nvlink", "network", "top"):
        if not getattr(given, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(given, name):g}; it must be above 0.")
    if given.preset is not None and given.preset not in PRESETS:
        raise ConfigError(choose_from("preset", given.preset, PRESETS))
    sized = sized_model(given.preset or given.recipe, given.resolution)
    recipe = load_recipe(given.recipe) if given.recipe else None
    shape = ModelShape(
        spec=sized.spec,
        input_size=sized.input_size,
        channels=sized.channels,
        num_classes=sized.num_classes,
        learn_sigma=sized.learn_sigma,
        null_class=sized.null_class,
    )
    cluster = Cluster(
        given.nodes,
        given.gpus,
        int(given.gpu_memory * GIB),
        node_bandwidth=given.nvlink * 1e9,
        network_bandwidth=given.network * 1e9,
    )
    batch = given.global_batch
    if batch is None:
        batch = recipe.train.global_batch if recipe else GLOBAL_BATCH
    averages = len(recipe.ema_decays) if recipe else 1
    ranking = rank_layouts(
        shape,
        cluster,
        global_batch=batch,
        precision=given.precision,
        averages=averages,
        # The cluster's GPUs are taken to run what is installed here.
        compiled_ops=ops.compiled_block("cuda"),
        fixed=Fixed(
            zero_stage=given.zero,
            expert_parallel_size=given.expert_parallel,
            micro_batch=given.micro_batch,
            activation_checkpointing=True if given.recompute == "blocks" else given.recompute,
            offload_optimizer=given.offload,
        ),
    )
    head = _model_lines(sized.name, sized.resolution, shape, batch, averages)
    lines = [*_cluster_lines(cluster), _operations_line(ranking)]
    text = "\n".join([*head, *lines, "", *describe(ranking, given.top)])
    if given.write:
        write_best(ranking, given.write)
        text += f"\nwritten       {given.write}"
    return text


def _operations_line(ranking: Ranking) -> str:
    compiled = ranking.best.layout.compiled_ops
    how = (
        "compiled ones, as installed here" if compiled else "reference ones: none compiled for GPUs are installed here"
    )
    return f"operations    {how}"


def _model_lines(name: str, resolution: int, shape: ModelShape, batch: int, averages: int) -> list[str]:
    count = shape.count
    macs = count_macs(
        shape.spec, channels=shape.channels, input_size=shape.input_size, learn_sigma=shape.learn_sigma
    ).total
    side = shape.input_size
    return [
        f"model         {name}: {count.total:,} parameters, {count.active:,} active a token",
        f"input         {resolution} px, latents {shape.channels}x{side}x{side}, {shape.tokens:,} tokens",
        f"forward MACs  {macs / 1e9:.4g} G an image",
        f"a step        {batch:,} images; {averages} moving average{'s' * (averages > 1)} of the weights",
    ]


def _cluster_lines(cluster: Cluster) -> list[str]:
    reserve = (cluster.gpu_memory - budget(cluster)) / GIB
    return [
        f"cluster       {cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory / GIB:g} GiB, of which "
        f"{reserve:.1f} kept free; a GPU sends {cluster.node_bandwidth / 1e9:g} GB/s in its node, "
        f"{cluster.network_bandwidth / 1e9:g} out of it, {cluster.host_bandwidth / 1e9:g} to its host"
    ]


def describe(ranking: Ranking, top: int) -> list[str]:
    """Memory of the best layout of every stage, the ranked tables, the recommendation."""
    lines = ["GiB of a GPU in the fullest moment of a step, best layout of each ZeRO stage"]
    lines += _memory_table(ranking.by_stage())
    trained = [c for c in ranking.candidates if not c.refused]
    planned = [c for c in ranking.candidates if c.refused]
    for found, note in ((trained, ""), (planned, "; planned only: this version does not train them")):
        if found:
            fit = sum(c.fits for c in found)
            lines += [
                "",
                f"{len(found)} layouts, {fit} fit; the first {min(top, len(found))}, GB a GPU sends a step{note}",
            ]
            lines += _ranked_table(ranking, found[:top])
    best = ranking.best
    used = f"{best.memory.device_bytes / GIB:.1f} of {best.budget / GIB:.1f} GiB"
    note = f" (planned only: {best.refused})" if best.refused else ""
    lines += ["", f"recommended   {short_name(best)}: {used}; binds: {ranking.binds(best)}{note}"]
    if best.memory.host:
        lines.append(f"host memory   {best.memory.host_bytes / GIB:.1f} GiB for each GPU")
    return lines


def _memory_table(stages: Sequence[Candidate]) -> list[str]:
    moments = [c.memory.fullest_in_a_step for c in stages]
    parts = [c.memory.phases[moment] for c, moment in zip(stages, moments, strict=True)]
    names = dict.fromkeys(name for found in parts for name, size in found.items() if size)
    rows = [["", *(short_name(c) for c in stages)], ["fullest when", *moments]]
    rows += [[name, *(_gib(found.get(name, 0)) for found in parts)] for name in names]
    rows.append(["together", *(_gib(sum(found.values())) for found in parts)])
    rows.append(["at the start", *(_gib(c.memory.start_bytes) for c in stages)])
    rows.append(["fits", *("yes" if c.fits else "no" for c in stages)])
    if any(c.memory.host for c in stages):
        rows.append(["host memory", *(_gib(c.memory.host_bytes) for c in stages)])
    return _aligned(rows)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _ranked_table(ranking: Ranking, shown: Sequence[Candidate]) -> list[str]:
    rows = [["layout", "GiB", "node", "network", "host", "binds"]]
    for candidate in shown:
        links = candidate.links
        rows.append(
            [
                short_name(candidate),
                f"{candidate.memory.device_bytes / GIB:.1f}",
                *(f"{size / 1e9:.2f}" if size else "-" for size in (links.node, links.network, links.host)),
                ranking.binds(candidate),
            ]
        )
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
