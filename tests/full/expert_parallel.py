"""The invariance table grown by expert parallelism.

    python tests/full/expert_parallel.py [--results DIR] [--write docs/invariance.md]

4 processes x {1, 2, 4 ranks a set of experts} x {ZeRO 0-3} x {SwiGLU with a shared expert, GELU with biases and
renormalised gates} x {plain, recomputation, accumulation of 2}, 20 steps in fp32, AdamW, clipping on, against one plain
torch process (tests/training/layout_cells.py). Started again it goes on where it was. Exit code 1 when a cell is
outside the design's invariance statement.
"""

import json
import sys

from evidence import CELLS, circumstances, figure, finished, options, outside, write_section
from invariance_table import BOUNDS, HEAD, STAGES, STEPS

WORLD, SIZES = 4, (1, 2, 4)
KINDS = {"moe": "SwiGLU", "gelu": "GELU"}
# name: balance scope, accumulation, recomputation
VARIANTS = {"plain": ("sample", 1, False), "recompute": ("step", 1, True), "accumulation": ("sample", 2, False)}
TITLE = "4. Expert parallelism, fp32"


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every cell holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    rows = []
    for size in SIZES:
        cells = [
            [kind, scope, stage, accumulation, recompute, "fp32", 3, size]
            for stage in STAGES
            for kind in KINDS
            for scope, accumulation, recompute in VARIANTS.values()
        ]
        file = given.results / f"expert-parallel-{size}.json"
        rows += finished(file, [CELLS, json.dumps(cells)], WORLD, STEPS, len(cells))
    broken = outside(rows, BOUNDS)
    decisions, flips, forbidden = (sum(row[name] for row in rows) for name in ("decisions", "flips", "forbidden"))
    summary = (
        f"{len(rows)} cells, {len(broken)} outside the bounds of section 1. {decisions:,} top-k choices compared, "
        f"{flips} flipped,\n{forbidden} of them where there was no tie."
    )
    text = table(rows)
    print(f"{text}\n{summary}")
    if given.write:
        about = "`python tests/full/expert_parallel.py` on "
        write_section(given.write, HEAD, TITLE, f"\n{about}{circumstances(rows)}\n\n{summary}\n\n{text}\n")
    return 1 if broken else 0


def table(rows: list[dict]) -> str:
    """Markdown, one line a cell."""
    names = {variant[1:]: name for name, variant in VARIANTS.items()}
    lines = [
        "| ranks a set of experts | ZeRO | experts | variant | loss | gradient norm | weights | EMA | K bias | flips |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, _, stage, accumulation, recompute, _, _, size, *_ = row["cell"]
        figures = " | ".join(figure(row[name]) for name in BOUNDS)
        variant = names[accumulation, recompute]
        lines.append(f"| {size} | {stage} | {KINDS[kind]} | {variant} | {figures} | {row['flips']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
