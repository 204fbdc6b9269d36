"""Calls of the operations that have several implementations, at the shapes of a preset, for tune to measure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe import ops
from dsmoe.base.presets import ModelSpec

CHECKED_TOKENS = 1024
IMAGE_TOKENS = 256  # of a 256 px picture at patch 2, the papers' size


@dataclass(frozen=True)
class Case:
    """One operation's call. inputs: floating tensors that get gradients; arguments: from them to what an
    implementation takes, in order; outputs: from its result to the tensors with gradients."""

    op: str
    inputs: dict[str, Tensor]
    arguments: Callable[[Mapping[str, Tensor]], tuple]
    outputs: Callable[[object], tuple[Tensor, ...]] = lambda result: (result,)

    @property
    def sizes(self) -> dict[str, int]:
        """What the finding is filed under."""
        return dict(ops.operation(self.op).sizes(*self.arguments(self.inputs)))


def cases(spec: ModelSpec, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Case]]:
    """Name -> what makes a case; the name begins with the op's. A dense model has `modulate` alone.

    Made one by one, because each takes much memory.

    expert_act is that of the routed experts, and once more that of the shared one; sum_rows that
    of a block (the shared expert's output added, result in the narrow dtype).
    """

    def draw(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        generator = torch.Generator(device).manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(kind)

    images = max(tokens // IMAGE_TOKENS, 1)
    found = {"modulate": lambda: _modulate(draw, images, tokens // images, spec.dim)}
    if not spec.is_moe:
        return found

    def routing() -> ops.Routing:
        with torch.no_grad():
            return ops.route(draw(tokens, spec.dim), draw(spec.num_experts, spec.dim, scale=0.1), spec.top_k, False)

    found["route"] = lambda: Case(
        "route",
        {"x": draw(tokens, spec.dim), "weight": draw(spec.num_experts, spec.dim, scale=spec.dim**-0.5)},
        lambda given: (given["x"], given["weight"], spec.top_k, spec.renormalize, None),
        lambda result: (result.probs, result.logsumexp),  # gates jump where two experts are nearly equal
    )
    found["gather_rows"] = lambda: _gather_rows(draw, routing(), spec)
    found["sum_rows"] = lambda: _sum_rows(draw, routing(), spec)
    found["expert_act"] = lambda: _expert_act(draw, routing(), spec)
    if spec.shared_hidden:
        found["expert_act, shared expert"] = lambda: _shared_act(draw, tokens, spec)
    found["moe_ffn"] = lambda: _moe_ffn(draw, routing(), spec)
    return found


def _modulate(draw: Callable[..., Tensor], images: int, tokens: int, dim: int) -> Case:
    inputs = {"x": draw(images, tokens, dim), "shift": draw(images, dim), "scale": draw(images, dim)}
    return Case("modulate", inputs, lambda given: (given["x"], given["shift"], given["scale"]))


def _gather_rows(draw: Callable[..., Tensor], to: ops.Routing, spec: ModelSpec) -> Case:
    inputs = {"x": draw(len(to.position), spec.dim)}
    return Case("gather_rows", inputs, lambda given: (given["x"], to.order, to.position))


def _sum_rows(draw: Callable[..., Tensor], to: ops.Routing, spec: ModelSpec) -> Case:
    inputs = {"rows": draw(len(to.order), spec.dim), "add": draw(len(to.position), spec.dim)}
    return Case(
        "sum_rows",
        inputs,
        lambda given: (given["rows"], to.order, to.position, None, given["add"], None, None, True),
    )


def _expert_act(draw: Callable[..., Tensor], to: ops.Routing, spec: ModelSpec) -> Case:
    rows, hidden, swiglu = len(to.order), spec.mlp_hidden, spec.expert_kind == "swiglu"
    inputs = {"h": draw(rows, hidden), "gate": draw(rows, kind=torch.float32).sigmoid()}
    inputs |= {"up": draw(rows, hidden)} if swiglu else {"bias": draw(spec.num_experts, hidden)}
    return Case(
        "expert_act",
        inputs,
        lambda given: (
            given["h"], spec.expert_kind, given.get("up"), given.get("bias"), to.counts, given["gate"],
        ),
    )  # fmt: skip


def _shared_act(draw: Callable[..., Tensor], tokens: int, spec: ModelSpec) -> Case:
    inputs = {name: draw(tokens, spec.shared_hidden) for name in ("h", "up")}
    return Case("expert_act", inputs, lambda given: (given["h"], "swiglu", given["up"]))


def _moe_ffn(draw: Callable[..., Tensor], to: ops.Routing, spec: ModelSpec) -> Case:
    experts, dim, hidden = spec.num_experts, spec.dim, spec.mlp_hidden
    third = (experts, hidden, dim) if spec.expert_kind == "swiglu" else (experts, 1, hidden + dim)
    inputs = {"x": draw(len(to.position), dim), "gates": to.gates.clone()}
    shapes = {"w1": (experts, hidden, dim), "w2": (experts, dim, hidden), "w3": third}
    if wide := spec.shared_hidden:
        shapes |= {"s1": (wide, dim), "s2": (dim, wide), "s3": (wide, dim)}
    inputs |= {name: draw(*shape, scale=dim**-0.5) for name, shape in shapes.items()}

    def arguments(given: Mapping[str, Tensor]) -> tuple:
        weights = (given["w1"], given["w2"], given["w3"])
        shared = (given["s1"], given["s2"], given["s3"]) if spec.shared_hidden else None
        return (given["x"], to._replace(gates=given["gates"]), weights, spec.expert_kind, shared)

    return Case("moe_ffn", inputs, arguments)
