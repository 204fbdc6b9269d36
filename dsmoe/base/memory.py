"""Memory of a rank by component and phase of a step, by arithmetic (no torch): the one source for plans and planner.

Written from what DeepSpeed 0.19.8 allocates (stage_1_and_2.py, stage3.py, engine.py) and what `activations` counts.
Not counted: the codec, code and CUDA context, communication libraries' own buffers, the allocator's fragmentation.

Letters, all of one rank: n parameters it computes with (routed experts over the expert-parallel size), m the shard of
the optimizer it owns: all parameters / ranks, with expert parallelism too, since n_experts / ep elements are spread
over the ranks / ep that hold the same experts (expert_parallelism.md 3d).
"""

from dataclasses import dataclass, field
from functools import cached_property

from dsmoe.base import activations
from dsmoe.base.accounting import TIMESTEP_DIM, ParameterCount, count_parameters
from dsmoe.base.presets import ModelSpec

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT, DOUBLE = 4, 8
# DeepSpeed's own size for the gradient copy that stage 0 reduces (engine.py, MEMORY_OPT_ALLREDUCE_SIZE), elements.
STAGE_0_REDUCE = 500_000_000
GLOO, START = "gloo copy", "start"

Parts = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model as far as memory depends on it: the arguments of `DiT`, channels being in_channels."""

    spec: ModelSpec
    input_size: int
    channels: int
    num_classes: int
    learn_sigma: bool
    null_class: bool = True

    @property
    def tokens(self) -> int:
        return (self.input_size // self.spec.patch) ** 2

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    @cached_property
    def count(self) -> ParameterCount:
        return count_parameters(
            self.spec,
            channels=self.channels,
            num_classes=self.num_classes,
            input_size=self.input_size,
            learn_sigma=self.learn_sigma,
            null_class=self.null_class,
        )

    def tensors(self) -> list[int]:
        """Elements of every trained parameter that all ranks hold: everything but routed experts."""
        spec, dim = self.spec, self.spec.dim
        out = spec.patch**2 * self.out_channels
        patches = [dim * spec.input_channels(self.channels) * spec.patch**2, dim] * spec.patch_convolutions
        outside = [*patches, TIMESTEP_DIM * dim, dim, dim * dim, dim]
        outside += [(self.num_classes + int(self.null_class)) * dim, 2 * dim * dim, 2 * dim, out * dim, out]
        block = [3 * dim * dim, 3 * dim, dim * dim, dim, 6 * dim * dim, 6 * dim]
        block += [spec.head_dim] * 4 if spec.qk_norm else []
        if spec.is_moe:
            block += [spec.num_experts * dim, *[dim * spec.shared_hidden] * (3 if spec.shared_hidden else 0)]
        else:
            block += [dim * spec.mlp_hidden, spec.mlp_hidden, dim * spec.mlp_hidden, dim]
        return outside + block * spec.depth

    def expert_tensors(self) -> list[int]:
        """Elements of the routed experts' tensors of one block, all experts together."""
        spec = self.spec
        matrix = spec.num_experts * spec.dim * spec.mlp_hidden
        if not spec.is_moe:
            return []
        third = matrix if spec.expert_kind == "swiglu" else spec.num_experts * (spec.mlp_hidden + spec.dim)
        return [matrix, matrix, third]


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Sizes of communication buffers in elements; the defaults are those that the planner writes.

    reduce: gradients reduced at once. gather: parameters gathered at once after a step (stages 1, 2). prefetch, live,
    persistent, sub_group: stage 3's parameters fetched ahead, kept between two uses, never sharded when smaller, and
    updated at once. overlap: two reduce buckets, one filling while the other is reduced.
    """

    reduce: int = 50_000_000
    gather: int = 50_000_000
    prefetch: int = 20_000_000
    live: int = 100_000_000
    persistent: int = 100_000
    sub_group: int = 100_000_000
    overlap: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is laid out over ranks; averages: how many moving averages of the weights are kept.

    activation_checkpointing: one of activations.RECOMPUTE. compiled_ops: experts and modulation run as the compiled
    operations, which keep less than the reference ones.
    """

    zero_stage: int
    world_size: int
    precision: str
    micro_batch: int
    accumulation: int = 1
    expert_parallel_size: int = 1
    activation_checkpointing: bool | str = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    averages: int = 1
    compiled_ops: bool = False
    buckets: Buckets = field(default_factory=Buckets)


@dataclass(frozen=True)
class RankMemory:
    """Bytes by component: on the device in each phase of a step, and on the host where the optimizer is offloaded.

    kept: what stays on the device from step to step, a part of every phase but the start.
    """

    phases: dict[str, Parts]
    host: Parts
    kept: Parts

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self._total)

    @property
    def fullest_in_a_step(self) -> str:
        """As peak_phase, once training has started."""
        return max((name for name in self.phases if name != START), key=self._total)

    @property
    def start_bytes(self) -> int:
        return self._total(START)

    def _total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> Parts:
        """Components of the fullest phase, without empty ones."""
        return {name: size for name, size in self.phases[self.peak_phase].items() if size}

    @property
    def device_bytes(self) -> int:
        return sum(self.peak.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def binds(self) -> str:
        """The largest component of the fullest phase."""
        return max(self.peak, key=self.peak.__getitem__)


def rank_memory(shape: ModelShape, layout: Layout, *, resident: bool = False) -> RankMemory:
    """Memory of one rank of `shape` under `layout`.

    resident: what the resident set of a CPU process under gloo shows instead: device and host are one, a page counts
    when it is first written (so a buffer that fills while its source is freed costs nothing), and gloo gathers and
    reduce-scatters through a copy of the whole buffer.
    """
    return _Rank(shape, layout, resident).memory()


class _Rank:
    """The quantities of one rank, and the phases made of them."""

    def __init__(self, shape: ModelShape, layout: Layout, resident: bool) -> None:
        self.layout, self.resident = layout, resident
        self.stage, self.itemsize = layout.zero_stage, ITEMSIZE[layout.precision]
        self.alone = layout.world_size == 1
        local = [size // layout.expert_parallel_size for size in shape.expert_tensors()]
        dense = shape.tensors()
        self.n = sum(dense) + shape.spec.depth * sum(local)
        self.m = -(-shape.count.trained // layout.world_size) if self.stage else self.n
        self.experts = sum(local)
        self.largest, self.largest_dense = max([*dense, *local]), max(dense)
        self.module = max([*dense, self.experts])
        self.block_parameters = self.n // shape.spec.depth
        self.persistent = sum(size for size in dense if size < layout.buckets.persistent)
        self._count_activations(shape)

    def _count_activations(self, shape: ModelShape) -> None:
        spec, layout = shape.spec, self.layout
        sizes = {"images": layout.micro_batch, "tokens": shape.tokens, "itemsize": self.itemsize}
        compiled, spread = layout.compiled_ops, layout.expert_parallel_size > 1
        # The whole block of experts as one operation, which runs them one by one on a CPU.
        self.one_operation = spec.is_moe and compiled and not spread
        self.temporaries = activations.backward_temporaries(
            spec, **sizes, compiled=self.one_operation, one_by_one=self.resident
        )
        self.block = kept = activations.saved_by_block(spec, **sizes, compiled=compiled, spread=spread)
        self.recomputed = 0
        if layout.activation_checkpointing == activations.EXPERTS:
            kept = activations.saved_by_block(spec, **sizes, compiled=compiled, spread=spread, lean=True)
            self.recomputed = self.block - kept
            if self.one_operation and self.resident:
                self.recomputed //= spec.num_experts
        elif layout.activation_checkpointing:
            kept = activations.block_input(spec, **sizes)
            self.recomputed = self.block
        self.activations = spec.depth * kept + activations.saved_outside_blocks(
            spec, channels=shape.channels, out_channels=shape.out_channels, **sizes, compiled=compiled
        )

    def memory(self) -> RankMemory:
        device, host = self.states()
        if self.resident:
            device, host = {**device, **{f"offloaded {name}": size for name, size in host.items()}}, {}
        steps = {
            "backward begins": self.backward_begins(),
            "first reduction": self.while_reducing(self.backward_begins()),
            "backward ends": self.backward_ends(),
            "last reduction": self.while_reducing(self.backward_ends()),
            "reduction": self.reduction(),
            "optimizer step": self.optimizer_step(),
            "weights gathered": {GLOO: self.n * self.itemsize} if self.gathers_by_copy else {},
        }
        phases = {name: _sum(device, extra) for name, extra in steps.items() if extra}
        return RankMemory({START: self.start(), **phases}, host, device)

    @property
    def gathers_by_copy(self) -> bool:
        return self.resident and not self.alone and self.stage in (1, 2)

    def start(self) -> Parts:
        """Stage 3 shards modules as they are made; the others make the whole fp32 model, and 1 and 2 copy it flat."""
        if self.stage == 3:
            drawn = FLOAT * self.largest_dense if self.resident else 0  # initial weights are drawn on the CPU
            return {"parameters": self.itemsize * self.m, "module being made": self.itemsize * self.module + drawn}
        flat = self.n * self.itemsize if self.stage in (1, 2) and self.itemsize == FLOAT else 0
        return {"whole fp32 model": FLOAT * self.n, "flat copy": flat}

    def states(self) -> tuple[Parts, Parts]:
        """What stays from step to step: (on the device, on the host)."""
        size, offload = self.itemsize, self.layout.offload_optimizer
        sharded = self.stage == 3
        weights = size * (self.m if sharded else self.n)
        optimizer = {
            # Stage 0 trains the weights themselves, as training.engine lets the other stages do in fp32.
            "master weights": 0 if self.stage == 0 or (size == FLOAT and not offload) else FLOAT * self.m,
            "moments": 2 * FLOAT * self.m,
            "averages": self.layout.averages * FLOAT * self.m,
        }
        gradient_shard = {"gradients": size * self.m} if sharded else {}
        device: Parts = {"parameters": 0 if self.layout.offload_parameters else weights}
        host: Parts = {"parameters": weights} if self.layout.offload_parameters else {}
        if sharded:
            device["gathered parameters"] = 0 if self.alone else size * self.persistent
            device["buckets"] = size * self._filled(self.layout.buckets.reduce)
        if not offload:
            return {**device, **optimizer, **gradient_shard}, host
        staging = size * self.m if not sharded else 0  # updated weights on their way back
        if not sharded:
            device["offload buffers"] = size * self.largest
            staging += size * self.largest + (size * self.m if self.layout.accumulation > 1 else 0)
        gradients = {"gradients": FLOAT * self.m + gradient_shard.get("gradients", 0)}
        return device, {**host, **optimizer, **gradients, "offload buffers": staging}

    def backward_begins(self) -> Parts:
        """All activations are there; gradients only of earlier micro-steps and of the layer at work, none reduced."""
        size, again = self.itemsize, self.layout.accumulation > 1
        held = 0
        if self.stage <= 1:
            held = size * self.n if again else 0
        elif self.stage == 2 and not self.layout.offload_optimizer:
            # The shard's buffer comes with the first bucket; with accumulation the sum so far stands beside it.
            held = size * self.m * (int(again) + int(not self.resident))
        return _sum(
            {"activations": self.activations + self.recomputed, "temporaries": self.temporaries},
            {"gradients": held + self._working_gradient()},
            self._live_parameters(),
            self._standing_buckets() if self.stage != 1 or not self.resident else {},
        )

    def while_reducing(self, moment: Parts) -> Parts:
        """Stages 2 and 3 reduce as soon as a bucket is full: of what its gradients were made from, nothing is left."""
        if self.stage < 2:
            return {}
        done = min(1.0, self._filled(self.layout.buckets.reduce) / self.block_parameters)
        if self.layout.buckets.overlap and self.layout.activation_checkpointing:
            done = 0.0  # the next block may be recomputed while the bucket is under way
        return _sum(moment, {"activations": -int(done * self.block)}, self._reduction_copies())

    def backward_ends(self) -> Parts:
        """All gradients are there, and the activations of one block."""
        size, again = self.itemsize, self.layout.accumulation > 1
        held = size * self.n if self.stage <= 1 else 0
        if self.stage == 2 and not self.layout.offload_optimizer:
            held = size * self.m * (1 + int(again))
        return _sum(
            {"activations": self.block, "temporaries": self.temporaries + self._offload_norm()},
            {"gradients": held + (self._working_gradient() if self.stage > 1 else 0)},
            self._live_parameters(),
            self._standing_buckets() if self.stage != 1 or not self.resident else {},
            self._reduction_copies() if self.stage == 1 and not self.resident else {},
        )

    def reduction(self) -> Parts:
        """Stages 0 and 1 reduce after the backward pass."""
        if self.stage > 1:
            return {}
        whole = self.itemsize * self.n
        if self.stage == 0:
            copied = self.n if self.n <= STAGE_0_REDUCE else min(self.n, STAGE_0_REDUCE + self.largest)
            # training.engine turns the reduction off for a rank alone.
            return {"gradients": whole, "buckets": 0 if self.alone else self.itemsize * copied}
        # The shard's buffer fills while the gradients that it takes are freed.
        shard = 0 if self.resident or self.layout.offload_optimizer else self.itemsize * self.m
        gradients = {"gradients": whole + shard, "temporaries": self._offload_norm()}
        return _sum(gradients, self._standing_buckets(), self._reduction_copies())

    def optimizer_step(self) -> Parts:
        """Stages 1 and 2 join the shard's gradients, in fp32 where they are not; stage 3 steps on their buffer."""
        if self.stage == 0:
            return {"gradients": FLOAT * self.n}
        if self.layout.offload_optimizer:
            return {}
        low = self.itemsize < FLOAT
        if self.stage == 3:
            part = min(self.m, self.layout.buckets.sub_group + self.largest // self.layout.world_size)
            return {"gradients in fp32": FLOAT * part if low else 0}
        return {"gradients": self.itemsize * self.m, "gradients in fp32": self.m * (self.itemsize + FLOAT * low)}

    def _working_gradient(self) -> int:
        """A tensor's gradient lives until it is copied into the bucket; one larger than that, until the next comes. The
        compiled block makes those of a layer's experts at once."""
        one_by_one = self.largest * (1 if self.largest <= self.layout.buckets.reduce else 2)
        return self.itemsize * max(one_by_one, self.experts if self.one_operation else 0)

    def _offload_norm(self) -> int:
        """Offload takes each gradient's norm in fp64 as it leaves the device."""
        if not self.layout.offload_optimizer:
            return 0
        return DOUBLE * (self.largest if self.stage < 3 else -(-self.largest // self.layout.world_size))

    def _standing_buckets(self) -> Parts:
        """What gradients are collected in during a backward pass; stage 3's bucket is one of the states."""
        if self.stage not in (1, 2):
            return {}
        return {"buckets": self.itemsize * self._filled(self.layout.buckets.reduce) * (1 + self.layout.buckets.overlap)}

    def _reduction_copies(self) -> Parts:
        """What a full bucket is put together in, by the rank that its parts go to."""
        if self.stage == 0 or self.alone:
            return {}
        bucket = self.itemsize * self._filled(self.layout.buckets.reduce)
        return {"buckets": bucket, GLOO: bucket if self.resident and self.stage == 3 else 0}

    def _live_parameters(self) -> Parts:
        """Stage 3: what is used now, what stays gathered up to its next use, and what is fetched ahead.

        A parameter stays when its next use is nearer than half of `live` (the reuse distance that the writer sets), so
        none stays across a module that is larger; and nothing is fetched ahead beyond `live`.
        """
        if self.stage < 3:
            return {}
        if self.alone:  # a shard is the whole, and is used in place, unless it lies on the host
            live, staged = (self.module if self.layout.offload_parameters else 0), 0
        else:
            buckets, all_of_it, near = self.layout.buckets, self.n - self.persistent, self.layout.buckets.live // 2
            held = near if self.module <= near else 0
            ahead = max(0, min(buckets.prefetch, buckets.live - held - self.module))
            elsewhere = min(buckets.live, near + buckets.prefetch)  # while small modules are at work
            live = min(all_of_it, max(held + self.module + ahead, elsewhere))
            staged = min(all_of_it, ahead)
        gloo = {GLOO: self.itemsize * staged} if self.resident else {}
        return {"gathered parameters": self.itemsize * (live + staged), **gloo}

    def _filled(self, elements: int) -> int:
        """A buffer's size, or what is ever written of it."""
        return min(elements, self.n) if self.resident else elements


def _sum(*parts: Parts) -> Parts:
    total: Parts = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size
    return total
