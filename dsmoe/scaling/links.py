"""Bytes that one GPU sends in an optimizer step over each class of link: inside its node, between nodes, to its host.

What DeepSpeed 0.19.8 exchanges, under the ring algorithm: in a group of q ranks each sends (q - 1) / q of a buffer to
gather or reduce-scatter it and twice that to all-reduce it (Patarasuk & Yuan 2009; ZeRO, Rajbhandari et al. 2020,
section 7). Ranks are numbered node by node and rings follow that order, so of p neighbours on a node p - 1 send inside
it and one leaves it. Stages 1 and 2 all-reduce their buckets (stage_1_and_2.py, allreduce_and_scatter) where the paper
reduce-scatters. Not here: seconds.
"""

from dataclasses import dataclass, fields

from dsmoe.base.memory import ITEMSIZE, Layout, ModelShape

MASTER = 4  # bytes of an fp32 number


@dataclass(frozen=True)
class Cluster:
    """Equal nodes. gpu_memory in bytes; bandwidths in bytes a second that one GPU can send at, inputs of the plan.

    The defaults are those of an H100 or H200 node's data sheet: NVLink 4 (450 GB/s each way), one 400 Gb/s adapter a
    GPU, PCIe 5 x16.
    """

    nodes: int
    gpus_per_node: int
    gpu_memory: int
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    host_bandwidth: float = 64e9

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class LinkBytes:
    """Bytes one GPU sends a step (the mean over the GPUs of a node): node inside it, network between nodes, host."""

    node: float = 0.0
    network: float = 0.0
    host: float = 0.0

    def __add__(self, other: "LinkBytes") -> "LinkBytes":
        return LinkBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def busiest(self, cluster: Cluster) -> str:
        """The link class whose bytes take most of its bandwidth, "" when nothing is sent."""
        shares = {
            "node": self.node / cluster.node_bandwidth,
            "network": self.network / cluster.network_bandwidth,
            "host": self.host / cluster.host_bandwidth,
        }
        name = max(shares, key=shares.__getitem__)
        return name if shares[name] else ""


@dataclass(frozen=True)
class _Group:
    """`size` ranks that exchange something, `neighbours` of them on each node."""

    size: int
    neighbours: int

    def ring(self, sent: float) -> LinkBytes:
        """`sent` bytes passed from each rank to the next."""
        if self.neighbours >= self.size:
            return LinkBytes(node=sent)
        inside = (self.neighbours - 1) / self.neighbours
        return LinkBytes(node=sent * inside, network=sent * (1 - inside))

    def gather(self, size: float) -> LinkBytes:
        """All-gather or reduce-scatter of `size` bytes."""
        return self.ring(size * (self.size - 1) / self.size)

    def all_to_all(self, size: float) -> LinkBytes:
        """Each rank sends an equal share of its `size` bytes to every rank."""
        each = size / self.size
        return LinkBytes(node=each * (self.neighbours - 1), network=each * (self.size - self.neighbours))


def link_bytes(shape: ModelShape, layout: Layout, cluster: Cluster) -> LinkBytes:
    """Bytes one GPU sends in an optimizer step of `layout`, whose world is that of `cluster`.

    Expert-parallel groups are consecutive ranks; routing is taken as balanced.
    """
    assert layout.world_size == cluster.world_size, (layout.world_size, cluster.world_size)
    ep, on_node = layout.expert_parallel_size, cluster.gpus_per_node
    everyone = _Group(cluster.world_size, on_node)
    same_experts = _Group(cluster.world_size // ep, max(1, on_node // ep))
    routed = shape.count.routed // ep
    total = _parameters_and_gradients(shape.count.trained - shape.count.routed, everyone, layout)
    if routed:
        total += _parameters_and_gradients(routed, same_experts, layout)
    if ep > 1:
        total += _Group(ep, min(ep, on_node)).all_to_all(_routed_bytes(shape, layout))
    return total + LinkBytes(host=_host_bytes(shape, layout))


def _parameters_and_gradients(elements: int, group: _Group, layout: Layout) -> LinkBytes:
    """Exchange of `elements` parameters, of which every rank of the group holds or shards the same."""
    size, micro_steps = elements * ITEMSIZE[layout.precision], layout.accumulation
    once = group.gather(size)
    if layout.zero_stage == 3:
        # Gathered for the forward and again for the backward pass, but for what stayed between the two.
        kept = min(1.0, layout.buckets.live / 2 / max(elements, 1))
        return group.gather(size * micro_steps * (2 - kept)) + group.gather(size * micro_steps)
    reduced = {0: 1, 1: 1, 2: micro_steps}[layout.zero_stage]
    gradients = group.gather(2 * size * reduced)
    return gradients + once if layout.zero_stage else gradients


def _routed_bytes(shape: ModelShape, layout: Layout) -> int:
    """Token rows that a rank dispatches and combines in a step, forward and backward; recomputing a whole block
    dispatches again."""
    spec = shape.spec
    rows = layout.micro_batch * layout.accumulation * shape.tokens * spec.top_k
    passes = 6 if layout.activation_checkpointing is True else 4
    return passes * spec.depth * rows * spec.dim * ITEMSIZE[layout.precision]


def _host_bytes(shape: ModelShape, layout: Layout) -> int:
    """Gradients to the host and updated weights back, both of the own shard; earlier micro-steps' sums both ways."""
    if not layout.offload_optimizer:
        return 0
    shard, size = shape.count.trained // layout.world_size, ITEMSIZE[layout.precision]
    sums = 2 * size * (layout.accumulation - (0 if layout.zero_stage == 3 else 1))
    return shard * (MASTER + size + max(sums, 0))
