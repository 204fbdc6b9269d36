"""Recommends how to lay a model out over a cluster, and says what stands in the way.

The rule, in this order: what fits the memory; without offload; without recompute, or of the experts alone; fewest
bytes between nodes; the
largest micro-batch; the lowest ZeRO stage (fewer, larger messages); fewest bytes inside a node; least memory. No step
times: those are measured, not computed.
"""

from dataclasses import dataclass

from dsmoe.base.activations import EXPERTS, RECOMPUTE
from dsmoe.base.errors import ConfigError
from dsmoe.base.memory import ModelShape
from dsmoe.ds_config import write_policy
from dsmoe.scaling.layouts import Candidate, Fixed, candidates
from dsmoe.scaling.links import Cluster

GIB = 1 << 30
_STATES = ("parameters", "master weights", "moments", "averages", "gradients", "gradients in fp32", "flat copy")
_REMEDIES = {
    "activations": "recompute, a smaller micro-batch, or a lower resolution",
    "temporaries": "a smaller micro-batch, or a lower resolution",
    "whole fp32 model": "stage 3, which shards the model as it is made, or GPUs with more memory",
    "buckets": "smaller buckets",
    "gathered parameters": "smaller buckets",
    **dict.fromkeys(_STATES, "more GPUs, or whichever of a higher ZeRO stage and offload it does not have yet"),
}


@dataclass(frozen=True)
class Ranking:
    """All candidates, best first, and the best that this version trains."""

    cluster: Cluster
    candidates: list[Candidate]
    best: Candidate

    def by_stage(self) -> list[Candidate]:
        """The best candidate of each ZeRO stage, lowest stage first; of those that train if the best of all does."""
        first: dict[int, Candidate] = {}
        for candidate in self.candidates:
            if bool(candidate.refused) == bool(self.best.refused):
                first.setdefault(candidate.layout.zero_stage, candidate)
        return [first[stage] for stage in sorted(first)]

    def binds(self, candidate: Candidate) -> str:
        """What limits a candidate: the largest component of memory, and the link with most to carry."""
        component = candidate.memory.binds
        if not candidate.fits:
            return f"{component}: {(candidate.memory.device_bytes - candidate.budget) / GIB:.1f} GiB short"
        link = candidate.links.busiest(self.cluster)
        return f"{component}; {link}" if link else component


def rank_layouts(
    shape: ModelShape,
    cluster: Cluster,
    *,
    global_batch: int,
    precision: str = "bf16",
    averages: int = 1,
    fixed: Fixed | None = None,
    compiled_ops: bool = False,
) -> Ranking:
    """Rank every valid layout; ConfigError says what is short by how much when none fits. compiled_ops: see Layout."""
    found = candidates(
        shape,
        cluster,
        global_batch=global_batch,
        precision=precision,
        averages=averages,
        fixed=fixed or Fixed(),
        compiled_ops=compiled_ops,
    )
    found.sort(key=_order)
    # Layouts that are planned only are shown where they rank, but recommended only when asked for.
    trainable = [c for c in found if not c.refused] or found
    if not found[0].fits:
        raise ConfigError(_shortfall(min(found, key=lambda c: c.memory.device_bytes), cluster))
    best = trainable[0] if trainable[0].fits else found[0]
    return Ranking(cluster, found, best)


def write_best(ranking: Ranking, path: str) -> None:
    """The recommended layout as a ds_config; ConfigError for one that this version does not train."""
    layout = ranking.best.layout
    if ranking.best.refused:
        raise ConfigError(f"nothing is written to {path}; {ranking.best.refused}")
    cluster = ranking.cluster
    write_policy(
        path, layout, f"planned for {cluster.nodes} x {cluster.gpus_per_node} GPUs: {short_name(ranking.best)}"
    )


def short_name(candidate: Candidate) -> str:
    """A layout in a few words."""
    at = candidate.layout
    words = [f"ZeRO-{at.zero_stage}", f"micro-batch {at.micro_batch} x {at.accumulation}", at.precision]
    words += [f"expert parallel {at.expert_parallel_size}"] * (at.expert_parallel_size > 1)
    recompute = {False: [], EXPERTS: ["experts recomputed"], True: ["recompute"]}[at.activation_checkpointing]
    words += recompute + ["offload"] * at.offload_optimizer
    return ", ".join(words)


def _order(candidate: Candidate) -> tuple:
    at, links = candidate.layout, candidate.links
    return (
        not candidate.fits,
        at.offload_optimizer,
        RECOMPUTE.index(at.activation_checkpointing),
        links.network,
        -at.micro_batch,
        at.zero_stage,
        links.node,
        candidate.memory.device_bytes,
    )


def _shortfall(least: Candidate, cluster: Cluster) -> str:
    needed, component = least.memory.device_bytes, least.memory.binds
    return (
        f"nothing fits {cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory / GIB:.0f} GiB: the "
        f"smallest layout ({short_name(least)}) needs {needed / GIB:.1f} GiB a GPU of {least.budget / GIB:.1f} GiB "
        f"free, {(needed - least.budget) / GIB:.1f} GiB short; most is {component} "
        f"({least.memory.peak[component] / GIB:.1f} GiB, {least.memory.peak_phase}), so "
        f"{_REMEDIES.get(component, 'more GPUs')} would help."
    )
