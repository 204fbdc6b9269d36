"""The targets (one H200) against the results of all sections: met, missed, or not measured."""

from dataclasses import dataclass

from moe_gpu_rivals import AUTOEP, LOOP

from gpu_sections import layer, op_floors
from gpu_sections.rates import COPY, PRODUCT, rate

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
_ALL_TOKENS = len(layer.TOKENS)


@dataclass(frozen=True)
class Verdict:
    """target: in words; verdict: one of the three; seen: the worst figure, or what is missing."""

    target: str
    verdict: str
    seen: str


def evaluate(every: dict) -> list[Verdict]:
    """every: section -> {"rows": [...]}, as in the JSON file. A CPU's figures measure no target."""
    if not on_gpu(every):
        every = {}
    cells = [row for row in _rows(every, "layer") if row["shape"] == "L/2"]
    plain, product = [row for row in cells if not row["compiled"]], rate(every, PRODUCT)
    shares = [share for row in plain if (share := layer.product_share(row, product)) is not None]
    return [
        _floors(every),
        _least("L/2 layer at most T_matmul / 0.60 (must)", shares, 0.60),
        _least("L/2 layer at most T_matmul / 0.74 (goal)", shares, 0.74),
        *(
            _least(f"L/2 layer at least {least}x as fast as {rival}", _speedups(plain, rival), least)
            for rival, least in ((AUTOEP, 1.3), (LOOP, 2.0))
        ),
        _memory(cells),
        _repeat(every),
    ]


def on_gpu(every: dict) -> bool:
    """Whether the figures are a GPU's."""
    return every.get("settings", {}).get("device") == "cuda"


def table(verdicts: list[Verdict]) -> list[str]:
    """Markdown."""
    return [
        "| target | | seen |",
        "|---|---|---|",
        *(f"| {v.target} | {v.verdict} | {v.seen} |" for v in verdicts),
    ]


def _rows(every: dict, section: str) -> list[dict]:
    return every.get(section, {}).get("rows", [])


def _least(target: str, found: list[float], least: float, complete: int = _ALL_TOKENS) -> Verdict:
    """Met where the worst of all that were to be measured is; missed as soon as one is."""
    seen = f"{', '.join(f'{x:.2f}' for x in found)} ({len(found)} of {complete} cells)" if found else "no figure"
    if any(x < least for x in found):
        return Verdict(target, MISSED, seen)
    return Verdict(target, MET if len(found) >= complete else NOT_MEASURED, seen)


def _speedups(cells: list[dict], rival: str) -> list[float]:
    return [ratio for row in cells if (ratio := layer.speedup(row, rival)) is not None]


def _floors(every: dict) -> Verdict:
    rows, copy = _rows(every, "op_floors"), rate(every, COPY)
    target = "memory-bound operations at 80 % of the copy's rate"
    shares = {(r["op"], r["preset"], r["backward"]): s for r in rows if (s := op_floors.share(r, copy)) is not None}
    failed = [row["op"] for row in rows if "error" in row]
    if not shares:
        return Verdict(target, NOT_MEASURED, "no figure")
    low = {place: share for place, share in shares.items() if share < 0.8}
    if not low and not failed and {op for op, _, _ in shares} == set(op_floors.OPS):
        return Verdict(target, MET, f"all {len(shares)}, the lowest {100 * min(shares.values()):.0f} %")
    words = [f"{op} {name} {'both' if both else 'forward'} {100 * s:.0f} %" for (op, name, both), s in low.items()]
    words += [f"{op} failed" for op in failed]
    return Verdict(target, MISSED if words else NOT_MEASURED, "; ".join(words) or f"{len(shares)} figures, not all")


def _memory(cells: list[dict]) -> Verdict:
    target = "L/2 layer: the lowest peak memory of all that were measured"
    worst, measured = [], set()
    for row in cells:
        others = {name: size for name, size in row["peak_bytes"].items() if size is not None and name != layer.OURS}
        ours = row["peak_bytes"].get(layer.OURS)
        if ours is None or not others:
            continue
        best = min(others, key=others.get)
        worst.append((ours / others[best], best))
        measured.add(row["tokens"])
    if not worst:
        return Verdict(target, NOT_MEASURED, "no figure")
    ratio, rival = max(worst)
    seen = f"at worst {ratio:.2f} of {rival}'s ({len(measured)} of {_ALL_TOKENS} cells)"
    if ratio > 1:
        return Verdict(target, MISSED, seen)
    return Verdict(target, MET if len(measured) == _ALL_TOKENS else NOT_MEASURED, seen)


def _repeat(every: dict) -> Verdict:
    target = "moe_ffn: same bits on every run, no host wait, one CUDA graph"
    rows = [row for row in _rows(every, "repeat") if row["holds"] is not None]
    if not rows:
        return Verdict(target, NOT_MEASURED, "no figure")
    bad = [f"{row['preset']} {row['question']}: {row['seen']}" for row in rows if not row["holds"]]
    return Verdict(target, MISSED if bad else MET, "; ".join(bad) or f"{len(rows)} checks")
