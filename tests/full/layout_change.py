"""Layout changes: one injected state through 12 layouts, and 12 runs moved from one layout to another.

    python tests/full/layout_change.py [--results DIR] [--write docs/layout_change.md]

A made-up state (random tensors by name and kind) is loaded into each layout, saved by it, and must come out in the same
bits; each layout then trains 20 steps on. 12 pairs of layouts, drawn with a fixed seed, train 10 steps in the first,
save, load in the second and train 10 more. Every curve is compared with a bare torch loop, not with an engine
(tests/training/injected_cells.py). Exit code 1 when bits are lost or a curve leaves the design's bounds. Started again
it goes on where it was.
"""

import itertools
import json
import random
import sys
from pathlib import Path

from evidence import ROOT, circumstances, figure, finished, options, outside, write_section
from invariance_table import BOUNDS

CELLS = ROOT / "tests/training/injected_cells.py"
STEPS, PAIRS, SEED = 20, 12, 2026
# name: processes, ZeRO stage, accumulation, setting of state_cells.py
LAYOUTS = {
    "1a": (1, 0, 1, "fp32"),
    "1b": (1, 1, 2, "fp32"),
    "1c": (1, 2, 4, "fp32"),
    "1d": (1, 3, 1, "sub_groups"),
    "2a": (2, 0, 2, "fp32"),
    "2b": (2, 1, 1, "fp32"),
    "2c": (2, 2, 2, "fp32"),
    "2d": (2, 3, 4, "persistent"),
    "4a": (4, 0, 1, "fp32"),
    "4b": (4, 1, 2, "fp32"),
    "4c": (4, 2, 1, "fp32"),
    "4d": (4, 3, 2, "persistent_sub_groups"),
}
WORLDS = (1, 2, 4)
NOTES = {
    "fp32": "",
    "sub_groups": ", sub-groups of 3,000 elements",
    "persistent": ", parameters below 500 elements kept whole",
    "persistent_sub_groups": ", sub-groups of 3,000 elements, parameters below 500 kept whole",
}
HEAD = """
# Layout changes

What a checkpoint of any layout is worth in any other. Tiny MoE (depth 2, dim 32, 4 SwiGLU experts of which 2, a shared
one, balance scope `step`), fp32, 8 images a step, clipping on, two averages (decays 0.9 and 0.5); sections 3 and 4 say
where they differ.
"""


def main(argv: list[str]) -> int:
    """Run what is missing, print the tables, say whether everything holds."""
    given = options(__doc__, argv, "docs/layout_change.md")
    pairs = random.Random(SEED).sample(list(itertools.permutations(LAYOUTS, 2)), PAIRS)
    sources = sorted({one for one, _ in pairs})
    made = [["inject", f"inject-{n}", "", *LAYOUTS[n][1:]] for n in LAYOUTS]
    firsts = [["first", f"first-{n}", "", *LAYOUTS[n][1:]] for n in sources]
    seconds = [["second", f"{one}-to-{other}", f"first-{one}", *LAYOUTS[other][1:]] for one, other in pairs]
    rows = launched(given.results, "before", made + firsts, lambda name: name.split("-")[1])
    rows += launched(given.results, "after", seconds, lambda name: name.split("-")[2])
    bad = outside(rows, BOUNDS) + [row for row in rows if row["bad"]]
    found = {row["cell"][1]: row for row in rows}
    one, other = injected_table(found), pairs_table(found, pairs)
    decisions, flips = (sum(row[name] for row in rows) for name in ("decisions", "flips"))
    summary = (
        f"{len(LAYOUTS)} layouts and {len(pairs)} pairs, {len(bad)} with a fault; {decisions:,} top-k choices "
        f"compared, {flips} flips."
    )
    print(f"{one}\n\n{other}\n{summary}")
    if given.write:
        write_section(given.write, HEAD, "1. One injected state", injected_section(one, summary, rows))
        write_section(given.write, HEAD, "2. From layout to layout, end to end", pairs_section(other))
    return 1 if bad else 0


def launched(results: Path, phase: str, cells: list[list], layout_of) -> list[dict]:
    """The cells of a phase, those of one number of processes in one launch."""
    rows = []
    for world in WORLDS:
        here = [cell for cell in cells if LAYOUTS[layout_of(cell[1])][0] == world]
        argv = [CELLS, results / "layout-change", json.dumps(here)]
        if here:
            rows += finished(results / f"layout-change-{phase}-{world}.json", argv, world, STEPS, len(here))
    return rows


def described(name: str) -> str:
    """A layout in words."""
    world, stage, accumulation, setting = LAYOUTS[name]
    return f"{world} x ZeRO-{stage}, accumulation {accumulation}{NOTES[setting]}"


def figures(row: dict) -> str:
    """The columns of a curve."""
    return f"{' | '.join(figure(row[name]) for name in ('loss', 'norm', 'weights', 'average'))} | {row['flips']}"


def injected_table(found: dict[str, dict]) -> str:
    """Markdown, one line a layout."""
    lines = [
        "| layout | processes x stage | states with other bits | loss | gradient norm | weights | EMA | flips |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in LAYOUTS:
        row = found[f"inject-{name}"]
        lines.append(f"| {name} | {described(name)} | {len(row['bad'])} | {figures(row)} |")
    return "\n".join(lines)


def pairs_table(found: dict[str, dict], pairs: list[tuple[str, str]]) -> str:
    """Markdown, one line a pair: the bits of the second layout's copy, and its half of the curve."""
    lines = [
        "| from | to | states with other bits | loss | gradient norm | weights | EMA | flips | loss before the move |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one, other in pairs:
        row, before = found[f"{one}-to-{other}"], found[f"first-{one}"]
        lines.append(f"| {one} | {other} | {len(row['bad'])} | {figures(row)} | {figure(before['loss'])} |")
    return "\n".join(lines)


def injected_section(text: str, summary: str, rows: list[dict]) -> str:
    """The first table with what it was made of."""
    return f"""
`python tests/full/layout_change.py` on {circumstances(rows)}

{summary}

A state that no training made (masters, both moments and both averages drawn by kind and name, 137 optimizer steps, a
random previous load of every router) is written as a checkpoint of whole tensors without an engine, loaded into each
layout, and saved by it: the tensors put together again must be the drawn ones, bit by bit, in every kind, and so must
the counters and loads. Each layout then trains {STEPS} steps; a bare torch loop does so from the same tensors. Figures
are the largest relative differences from that loop; bounds: loss 1e-6; gradient norm, weights and averages 1e-5.

{text}
"""


def pairs_section(text: str) -> str:
    """The second table."""
    return f"""
{PAIRS} ordered pairs of different layouts, drawn with seed {SEED}: {STEPS // 2} steps in the first, a checkpoint, the
second loads it, saves it again (same bits of every state), and trains {STEPS // 2} more. Compared with an unbroken bare
torch loop of {STEPS} steps: the second half's losses and norms, and the final weights and averages. The last column is
the first half's loss.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
