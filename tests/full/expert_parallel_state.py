"""The invariance table with experts spread over ranks, for what a step keeps beside the weights.

    python tests/full/expert_parallel_state.py [--results DIR] [--write docs/invariance.md]

4 processes x {1, 2, 4 ranks a set of experts} x {ZeRO 0-3} x {SwiGLU with a shared expert, GELU with biases and
renormalised gates} balanced by a selection bias and no loss, and x {2, 4} x {ZeRO 1-3} x both kinds with the optimizer
offloaded to the CPU; 20 steps in fp32, AdamW, clipping on, against one plain torch process
(tests/training/layout_cells.py). Started again it goes on where it was. Exit code 1 when a cell is outside the design's
invariance statement, or a selection bias is not the reference's in the same bits.
"""

import json
import sys

from evidence import CELLS, circumstances, figure, finished, options, outside, write_section
from expert_parallel import KINDS, SIZES, WORLD
from invariance_table import BOUNDS as FIGURES
from invariance_table import HEAD, STAGES, STEPS

BOUNDS = {**FIGURES, "bias": 0.0}
RATE = 0.002
TITLE = "6. Expert parallelism: selection bias, offloaded optimizer"


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every cell holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    rows = []
    for size in SIZES:
        cells = [[kind, "none", stage, 2, True, "fp32", 3, size, RATE, False] for stage in STAGES for kind in KINDS]
        if size > 1:
            places = [(stage, kind) for stage in STAGES if stage for kind in KINDS]
            cells += [[kind, "step", stage, 1, False, "fp32", 3, size, 0.0, True] for stage, kind in places]
        file = given.results / f"expert-parallel-state-{size}.json"
        rows += finished(file, [CELLS, json.dumps(cells)], WORLD, STEPS, len(cells))
    broken = outside(rows, BOUNDS)
    decisions, flips, forbidden = (sum(row[name] for row in rows) for name in ("decisions", "flips", "forbidden"))
    steered = [row["steered"] for row in rows if row["steered"]]
    summary = (
        f"{len(rows)} cells, {len(broken)} outside the bounds of section 1. {decisions:,} top-k choices compared, "
        f"{flips} flipped,\n{forbidden} of them where there was no tie. `bias`: largest difference of a selection bias "
        f"after the {STEPS} steps, 0 allowed;\nthe biases themselves reach {min(steered):.3f} to {max(steered):.3f}."
    )
    text = table(rows)
    print(f"{text}\n{summary}")
    if given.write:
        about = "`python tests/full/expert_parallel_state.py` on "
        write_section(given.write, HEAD, TITLE, f"\n{about}{circumstances(rows)}\n\n{summary}\n\n{text}\n")
    return 1 if broken else 0


def table(rows: list[dict]) -> str:
    """Markdown, one line a cell."""
    lines = [
        "| variant | ranks a set of experts | ZeRO | experts | loss | gradient norm | weights | EMA | K bias | bias "
        "| flips |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, stage, size, rate = (row["cell"][place] for place in (0, 2, 7, 8))
        shown = [figure(row[name]) for name in FIGURES] + [figure(row["bias"]) if rate else "-"]
        variant = "selection bias, accumulation 2, recompute" if rate else "offload"
        lines.append(f"| {variant} | {size} | {stage} | {KINDS[kind]} | {' | '.join(shown)} | {row['flips']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
