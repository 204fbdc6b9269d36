"""Layout changes across expert parallelism: every (processes, ranks a set of experts, ZeRO stage) to any other.

    python tests/full/layout_change_experts.py [--results DIR] [--write docs/layout_change.md]

All 24 layouts of {1, 2, 4 processes} x {1, 2, 4 ranks a set of experts} x {ZeRO 0-3}, and 9 in bf16, are given a
made-up state, selection biases and previous loads included, which must come out in the same bits, and train 20 steps
on. 12 pairs of layouts, drawn with a fixed seed and each with a seed of its own, train 10 steps in the first, save,
load in the second and train 10 more. Every curve is compared with a bare torch loop (tests/training/injected_cells.py).
Exit code 1 when bits are lost or a curve leaves the design's bounds. Started again it goes on where it was.
"""

import json
import random
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from bf16_statement import LIMIT
from evidence import circumstances, figure, finished, options, outside, write_section
from invariance_table import BOUNDS as FIGURES
from layout_change import CELLS, HEAD, STEPS, WORLDS

PAIRS, SEED = 12, 2027
SPREADS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))  # processes, ranks a set of experts
BOUNDS = {**FIGURES, "bias": 0.0}
RATE = 0.002
# kind, balance scope, selection bias rate: SwiGLU balanced by loss, GELU with biases balanced by selection bias alone
RUNS = (("moe", "step", 0.0), ("gelu", "none", RATE))
NAMES = {"moe": "SwiGLU, loss", "gelu": "GELU, selection bias"}


class Layout(NamedTuple):
    """Where and how a run trains; `setting` of tests/training/state_cells.py."""

    world: int
    spread: int
    stage: int
    setting: str = "fp32"

    @property
    def words(self) -> str:
        return f"{self.world} x ep {self.spread} x ZeRO-{self.stage}"


LAYOUTS = [Layout(world, spread, stage) for world, spread in SPREADS for stage in range(4)]
LOW = [Layout(world, spread, stage, "bf16") for world, spread in SPREADS for stage in (1, 2, 3) if spread > 1]


def main(argv: list[str]) -> int:
    """Run what is missing, print the tables, say whether everything holds."""
    given = options(__doc__, argv, "docs/layout_change.md")
    drawn = random.Random(SEED)
    pairs = [drawn.sample(LAYOUTS, 2) for _ in range(PAIRS)]
    injected = [(layout, move("inject", n, layout, run_of(layout), 3)) for n, layout in enumerate(LAYOUTS)]
    low = [(layout, move("inject", f"bf16-{n}", layout, run_of(layout), 3)) for n, layout in enumerate(LOW)]
    firsts = [(one, move("first", n, one, RUNS[n % 2], 100 + n)) for n, (one, _) in enumerate(pairs)]
    seconds = [(other, move("second", n, other, RUNS[n % 2], 100 + n)) for n, (_, other) in enumerate(pairs)]
    # bf16 first: ZeRO-3 puts another F.linear, which rounds bf16 differently, into a process for good.
    begun = launched(given.results, "before", [*low, *injected, *firsts])
    narrow, wide, before = begun[: len(LOW)], begun[len(LOW) : -PAIRS], begun[-PAIRS:]
    after = launched(given.results, "after", seconds)
    rows = [*wide, *before, *after]
    ratio = statistics.mean(row["rms"] for row in narrow) / statistics.mean(row["plain_rms"] for row in narrow)
    bad = outside(rows, BOUNDS) + [row for row in (*rows, *narrow) if row["bad"]]
    decisions, flips = (sum(row[name] for row in rows) for name in ("decisions", "flips"))
    summary = (
        f"{len(LAYOUTS)} layouts, {len(LOW)} of them in bf16 too, {PAIRS} moves; {len(bad)} with a "
        f"fault.\n{decisions:,} top-k choices compared in fp32, {flips} flips. bf16: {ratio:.2f} times the distance of "
        f"the bare bf16 loop from\nthe fp32 one, mean over the layouts; allowed {LIMIT:g}."
    )
    tables = injected_table(wide), low_table(narrow), pairs_table(pairs, before, after)
    print("\n\n".join((*tables, summary)))
    if given.write:
        states = state_section(*tables[:2], summary, [*rows, *narrow])
        write_section(given.write, HEAD, "3. Experts: one injected state", states)
        write_section(given.write, HEAD, "4. Experts: from layout to layout, end to end", pairs_section(tables[2]))
    return 1 if bad or ratio > LIMIT else 0


def run_of(layout: Layout) -> tuple:
    """Of the two runs the one that this layout is given: either kind meets every stage and every spread of experts."""
    return RUNS[(layout.stage + SPREADS.index((layout.world, layout.spread))) % 2]


def move(what: str, name: object, layout: Layout, run: tuple, seed: int) -> list:
    """A `Move` of injected_cells; half of the layouts accumulate over two micro-batches."""
    source = f"experts-first-{name}" if what == "second" else ""
    accumulation = 1 + (layout.stage // 2 + layout.spread // 2) % 2
    kind, scope, rate = run
    place = (layout.stage, accumulation, layout.setting, layout.spread)
    return [what, f"experts-{what}-{name}", source, *place, kind, scope, seed, rate]


def launched(results: Path, phase: str, cells: list[tuple[Layout, list]]) -> list[dict]:
    """The cells of a phase in the order given, those of one number of processes in one launch."""
    found = {}
    for world in WORLDS:
        here = [cell for layout, cell in cells if layout.world == world]
        argv = [CELLS, results / "layout-change", json.dumps(here)]
        if here:
            rows = finished(results / f"layout-change-experts-{phase}-{world}.json", argv, world, STEPS, len(here))
            found |= {row["cell"][1]: row for row in rows}
    return [found[cell[1]] for _, cell in cells]


def figures(row: dict) -> str:
    """The columns of a curve."""
    shown = [figure(row[name]) for name in ("loss", "norm", "weights", "average")]
    shown.append(figure(row["bias"]) if row["cell"][-1] else "-")
    return f"{len(row['bad'])} | {' | '.join(shown)} | {row['flips']}"


def injected_table(rows: list[dict]) -> str:
    """Markdown, one line a layout."""
    lines = [
        "| layout | run | accumulation | states with other bits | loss | gradient norm | weights | EMA | bias "
        "| flips |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for layout, row in zip(LAYOUTS, rows, strict=True):
        cell = row["cell"]
        lines.append(f"| {layout.words} | {NAMES[cell[7]]} | {cell[4]} | {figures(row)} |")
    return "\n".join(lines)


def low_table(rows: list[dict]) -> str:
    """Markdown, one line a bf16 layout: bits, and RMS of the losses from the fp32 loop beside the bare bf16 loop's."""
    lines = [
        "| layout, bf16 | run | accumulation | states with other bits | RMS of 20 losses | of the bare loop in bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for layout, row in zip(LOW, rows, strict=True):
        cell, distances = row["cell"], f"{row['rms']:.2e} | {row['plain_rms']:.2e}"
        lines.append(f"| {layout.words} | {NAMES[cell[7]]} | {cell[4]} | {len(row['bad'])} | {distances} |")
    return "\n".join(lines)


def pairs_table(pairs: list[list[Layout]], before: list[dict], after: list[dict]) -> str:
    """Markdown, one line a move: the bits of the second layout's copy, and its half of the curve."""
    lines = [
        "| from | to | run | seed | states with other bits | loss | gradient norm | weights | EMA | bias | flips | "
        "loss before the move |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (one, other), first, second in zip(pairs, before, after, strict=True):
        kind, _, seed, _ = second["cell"][7:]
        run = f"{NAMES[kind]} | {seed}"
        lines.append(f"| {one.words} | {other.words} | {run} | {figures(second)} | {figure(first['loss'])} |")
    return "\n".join(lines)


def state_section(text: str, low: str, summary: str, rows: list[dict]) -> str:
    """The first two tables with what they were made of."""
    return f"""
`python tests/full/layout_change_experts.py` on {circumstances(rows)}

{summary}

As section 1, in every layout that four processes allow ("4 x ep 2": 4 processes, 2 of which share a set of the 4
experts). The injected state also holds a selection bias of every router where the run balances by it, which moves at
every step by a fixed amount ({RATE:g}) against the load: it must be the bare loop's in the same bits after the {STEPS}
steps (`bias`, largest difference, 0 allowed). Two runs take turns: SwiGLU experts and a shared one, balance scope
`step`; GELU experts with biases, renormalised gates, selection bias and no balance loss. bf16 layouts must give the
state back in the same bits too; their curve is judged as in docs/invariance.md, section 3, against the bare loop that
goes on from the same state in bf16.

{text}

{low}
"""


def pairs_section(text: str) -> str:
    """The third table."""
    return f"""
{PAIRS} moves between layouts drawn with seed {SEED}, each run with a seed of its own: as section 2.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
