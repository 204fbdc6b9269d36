"""Each memory-bound operation against its floor: the bytes it cannot avoid, at the rate of a plain copy."""

from collections.abc import Callable, Iterator, Mapping

import torch

from dsmoe import ops
from dsmoe.base.presets import preset
from dsmoe.scaling.tune_cases import Case, cases
from gpu_sections.rates import COPY, rate
from gpu_sections.settings import Settings, captured, first_line, median_seconds

# Inputs of a call are drawn in turn from copies, together larger than any GPU's cache.
OPS = ("modulate", "route", "gather_rows", "sum_rows", "expert_act")
_UNCACHED_BYTES, _MOST_COPIES = 512 << 20, 8


def run(settings: Settings) -> Iterator[dict]:
    """A row for each op, shape and direction: floor in bytes, seconds, or the error. XL has the GELU experts."""
    names = ("nano-4E2A",) if settings.quick else ("L/2-8E2A", "S/2-8E2A", "XL-8E2A")
    tokens = 256 if settings.quick else 65536
    for name in names:
        every = cases(preset(name), tokens, settings.torch_device, torch.bfloat16)
        for op in OPS:
            try:
                yield from _measure(every[op](), name, settings)
            except RuntimeError as error:
                yield {"op": op, "preset": name, "tokens": tokens, "error": first_line(error)}


def floor_bytes(op: str, sizes: Mapping[str, int], item: int, *, backward: bool) -> int:
    """Bytes read and written once by an op's forward pass, or by forward and backward. item: bytes of an element.

    Vectors of a row or token (gates, positions) count; weights of the router and modulation vectors do not.
    """
    if op == "expert_act":
        rows, hidden = sizes["rows"], sizes["hidden"]
        two = sizes["matrices"] == 3  # h and up
        forward = rows * hidden * item * (3 if two else 2) + 4 * rows
        return forward + backward * (rows * hidden * item * (5 if two else 3) + 8 * rows)
    tokens, wide = sizes["tokens"], sizes["tokens"] * sizes["dim"] * item
    if op == "modulate":
        return 2 * wide + 8 * tokens + backward * (3 * wide + 8 * tokens)
    k = sizes["k"]
    if op == "route":
        table = 4 * tokens * sizes["experts"]
        forward = wide + table + tokens * (k * (4 + 3 * 8) + 4)
        return forward + backward * (2 * wide + 3 * table)
    if op == "gather_rows":
        return (wide + k * wide + 8 * k * tokens) * (1 + backward)
    assert op == "sum_rows", op
    # Back, the added tensor's gradient is the incoming one itself.
    return 2 * wide + k * wide + 8 * k * tokens + backward * (wide + k * wide + 8 * k * tokens)


def _measure(case: Case, name: str, settings: Settings) -> Iterator[dict]:
    op = ops.operation(case.op)
    function = op.choose(settings.device)
    size = sum(t.numel() * t.element_size() for t in case.inputs.values())
    copies = 1 if settings.quick else max(1, min(_MOST_COPIES, _UNCACHED_BYTES // size))
    sets = [{k: t.detach().clone().requires_grad_() for k, t in case.inputs.items()} for _ in range(copies)]
    upstream = [torch.ones_like(t) for t in case.outputs(function.function(*case.arguments(sets[0])))]

    def forward() -> None:
        with torch.no_grad():
            for given in sets:
                function.function(*case.arguments(given))

    def both() -> None:
        for given in sets:
            outputs = case.outputs(function.function(*case.arguments(given)))
            torch.autograd.grad(outputs, list(given.values()), upstream)

    item = next(iter(case.inputs.values())).element_size()
    for backward, call in ((False, forward), (True, both)):
        row = {
            "op": case.op, "implementation": function.name, "preset": name, "sizes": case.sizes, "backward": backward,
            "floor_bytes": floor_bytes(case.op, case.sizes, item, backward=backward),
        }  # fmt: skip
        yield {**row, "seconds": _seconds(call, settings) / copies}


def _seconds(call: Callable[[], object], settings: Settings) -> float:
    return median_seconds(captured(call, settings), settings, calls=1 if settings.quick else 5)


def share(row: dict, copy: float | None) -> float | None:
    """Of the copy's rate, 1 at the floor."""
    return None if copy is None or "error" in row else row["floor_bytes"] / row["seconds"] / copy


def table(rows: list[dict], every: dict) -> list[str]:
    """Markdown."""
    copy = rate(every, COPY)
    shown = ["| op | preset | sizes | pass | floor, MB | us | of the copy's rate |", "|---" * 7 + "|"]
    for row in rows:
        if "error" in row:
            shown.append(f"| {row['op']} | {row['preset']} | {row['tokens']} tokens | failed: {row['error']} | | | |")
            continue
        sizes = " ".join(f"{name} {size}" for name, size in row["sizes"].items())
        direction = "forward and backward" if row["backward"] else "forward"
        part = share(row, copy)
        shown.append(
            f"| {row['op']} ({row['implementation']}) | {row['preset']} | {sizes} | {direction} | "
            f"{row['floor_bytes'] / 1e6:.1f} | {row['seconds'] * 1e6:.1f} | "
            f"{'-' if part is None else f'{100 * part:.0f} %'} |"
        )
    return shown
