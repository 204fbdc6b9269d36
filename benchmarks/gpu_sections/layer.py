"""One MoE layer, forward and backward, beside its rivals: seconds by round, peak memory, the time of its products."""

import statistics
from collections.abc import Iterator

import moe_layer
import torch
from moe_gpu_rivals import COMPILED, COMPILED_LOOP, GPU_RIVALS, missing
from moe_rivals import agree

from gpu_sections.rates import PRODUCT, rate
from gpu_sections.settings import Settings, first_line

OURS = moe_layer.OURS
SHAPES = {"L/2": (1024, "swiglu"), "S/2": (384, "swiglu"), "XL": (1152, "gelu")}
TOKENS = (16384, 32768, 65536)
ROUNDS = 7


def run(settings: Settings) -> Iterator[dict]:
    """A row a cell, the shape of the targets first; then the cells again beside what must be compiled, which may take
    all the time that is left."""
    shapes = {"quick": (64, "swiglu"), "quick GELU": (64, "gelu")} if settings.quick else SHAPES
    every = [(name, tokens) for name in shapes for tokens in ((256,) if settings.quick else TOKENS)]
    plain = [name for name in GPU_RIVALS if name not in (COMPILED, COMPILED_LOOP)]
    for name, tokens in every:
        yield {"shape": name, "compiled": False, **cell(*shapes[name], tokens, plain, settings)}
    if settings.quick:
        return
    for name, tokens in every:
        if tokens == TOKENS[0]:
            torch.compiler.reset()  # code for another width would count against the limit of recompilations
        yield {"shape": name, "compiled": True, **cell(*shapes[name], tokens, [COMPILED], settings)}
    name, tokens = every[0]
    yield {"shape": name, "compiled": True, **cell(*shapes[name], tokens, [COMPILED_LOOP], settings)}


def cell(dim: int, kind: str, tokens: int, names: list[str], settings: Settings) -> dict:
    """Ours and those rivals that can be had, in turn; a rival that fails leaves its reason."""
    key = {"dim": dim, "tokens": tokens, "dtype": "bfloat16", "device": settings.device}
    ours = moe_layer.our_layer(dim, "bfloat16", settings.device, kind)
    x, grad = moe_layer.inputs(key)
    layers, absent, memory = {OURS: ours}, {}, {}
    truth = ours(x[None])[0][0].detach()
    for name in names:
        made = missing(name) or _try(name, ours, x, truth, kind)
        if isinstance(made, str):
            absent[name] = made
        else:
            layers[name] = made
    for name in list(layers):
        try:
            moe_layer.step(layers[name], name, x, grad, settings.device)
            memory[name] = _peak(layers[name], name, x, grad, settings)
        except RuntimeError as error:
            absent[name] = first_line(error)
            del layers[name]
    seconds = {name: [] for name in layers}
    order = list(layers)
    for turn in range(3 if settings.quick else ROUNDS):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds[name].append(moe_layer.step(layers[name], name, x, grad, settings.device))
    found = {"kind": kind, "seconds": seconds, "absent": absent, "peak_bytes": memory}
    return {**key, **found, "flops": flops(dim, kind, tokens)}


def flops(dim: int, kind: str, tokens: int, k: int = 2, hidden_ratio: int = 4, experts: int = moe_layer.EXPERTS) -> int:
    """Of a layer's products, forward and backward: experts, shared expert (2D, SwiGLU layers alone), router."""
    matrices = 3 if kind == "swiglu" else 2
    routed = 2 * tokens * k * matrices * dim * hidden_ratio * dim
    shared = 2 * tokens * 3 * dim * 2 * dim if kind == "swiglu" else 0
    return 3 * (routed + shared + 2 * tokens * dim * experts)


def _try(name: str, ours: torch.nn.Module, x: torch.Tensor, truth: torch.Tensor, kind: str) -> object:
    """The rival, once its results are known to be ours; or why there is none."""
    rival = GPU_RIVALS[name]
    if kind not in rival.kinds:
        return f"has no {kind} experts"
    try:
        layer = rival(ours)
        y = layer(x).detach()
    except Exception as error:  # other people's packages may raise anything
        return first_line(error)
    if rival.same_numbers and not agree(y, truth):
        return "computes something else"
    return layer


def _peak(layer: torch.nn.Module, name: str, x: torch.Tensor, grad: torch.Tensor, settings: Settings) -> int | None:
    """Bytes of a forward and backward pass over those held before, gradients included; None on a CPU."""
    if settings.device != "cuda":
        return None
    layer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    moe_layer.step(layer, name, x, grad, settings.device)
    return torch.cuda.max_memory_allocated() - before


def speedup(row: dict, rival: str) -> float | None:
    """Median of rival / ours over the rounds; None where it was not measured."""
    if rival not in row["seconds"] or OURS not in row["seconds"]:
        return None
    pairs = zip(row["seconds"][rival], row["seconds"][OURS], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def product_share(row: dict, product: float | None) -> float | None:
    """Time of the layer's products at the dense rate, over its own: 1 where nothing else takes time."""
    if product is None or OURS not in row["seconds"]:
        return None
    return row["flops"] / product / statistics.median(row["seconds"][OURS])


def table(rows: list[dict], every: dict) -> list[str]:
    """Markdown."""
    product = rate(every, PRODUCT)
    shown = ["rival / ours in time (above 1 ours is faster), and MiB of a pass in brackets", ""]
    shown += [
        "| shape | tokens | ours, ms | T_matmul / ours | " + " | ".join(GPU_RIVALS) + " |",
        "|---" * (4 + len(GPU_RIVALS)) + "|",
    ]
    for row in (row for row in rows if not row["compiled"]):
        part = product_share(row, product)
        ours = f"{1e3 * statistics.median(row['seconds'][OURS]):.2f}" if OURS in row["seconds"] else "failed"
        cells = [row["shape"], str(row["tokens"]), ours + _mebibytes(row, OURS), "-" if part is None else f"{part:.2f}"]
        same = [other for other in rows if (other["shape"], other["tokens"]) == (row["shape"], row["tokens"])]
        for name in GPU_RIVALS:
            found = [f"{ratio:.2f}" + _mebibytes(r, name) for r in same if (ratio := speedup(r, name)) is not None]
            cells.append(found[0] if found else "-")
        shown.append("| " + " | ".join(cells) + " |")
    reasons = {f"{name}: {why}" for row in rows for name, why in row["absent"].items()}
    return shown + (["", "Not measured: " + "; ".join(sorted(reasons)) + "."] if reasons else [])


def _mebibytes(row: dict, name: str) -> str:
    size = row["peak_bytes"].get(name)
    return "" if size is None else f" ({size / 2**20:.0f})"
