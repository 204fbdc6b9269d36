"""The invariance table grown by expert parallelism.

    python tests/full/expert_parallel.py [--results DIR] [--write docs/invariance.md]

4 processes x {1, 2, 4 ranks a set of experts} x {ZeRO 0-3} x {SwiGLU with a shared expert, GELU with biases and
renormalised gates} x {plain, recomputation, accumulation of 2, selection bias, optimizer offloaded (ZeRO 1-3 alone
can)}, 20 steps in fp32, AdamW, clipping on, against one plain torch process (tests/training/layout_cells.py).
Started again it goes on where it was. Exit code 1 when a cell is outside the design's invariance statement.
"""

import json
import sys
from typing import NamedTuple

from evidence import CELLS, circumstances, figure, finished, options, outside, write_section
from invariance_table import BOUNDS as FIGURES
from invariance_table import HEAD, STAGES, STEPS

WORLD, SIZES = 4, (1, 2, 4)
KINDS = {"moe": "SwiGLU", "gelu": "GELU"}
BOUNDS = {**FIGURES, "bias": 0.0}
TITLE = "4. Expert parallelism, fp32"


class Variant(NamedTuple):
    """What of a cell changes beside its layout and model."""

    scope: str = "sample"
    accumulation: int = 1
    recompute: bool = False
    bias_rate: float = 0.0
    offload: bool = False


VARIANTS = {
    "plain": Variant(),
    "recompute": Variant(scope="step", recompute=True),
    "accumulation": Variant(accumulation=2),
    "selection bias": Variant(scope="none", accumulation=2, recompute=True, bias_rate=0.002),
    "offload": Variant(scope="step", offload=True),
}


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every cell holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    rows = []
    for size in SIZES:
        for stage in STAGES:
            cells = [
                [kind, v.scope, stage, v.accumulation, v.recompute, "fp32", 3, size, v.bias_rate, v.offload]
                for kind in KINDS
                for v in VARIANTS.values()
                if stage or not v.offload
            ]
            file = given.results / f"expert-parallel-{size}-{stage}.json"
            rows += finished(file, [CELLS, json.dumps(cells)], WORLD, STEPS, len(cells))
    broken = outside(rows, BOUNDS)
    decisions, flips, forbidden = (sum(row[name] for row in rows) for name in ("decisions", "flips", "forbidden"))
    steered = [row["steered"] for row in rows if row["steered"]]
    summary = (
        f"{len(rows)} cells, {len(broken)} outside the bounds of section 1. {decisions:,} top-k choices compared, "
        f"{flips} flipped,\n{forbidden} of them where there was no tie. `bias`: largest difference of a selection bias "
        f"after the {STEPS} steps, 0 allowed; the\nbiases themselves reach {min(steered):.3f} to {max(steered):.3f}."
    )
    text = table(rows)
    print(f"{text}\n{summary}")
    if given.write:
        about = "`python tests/full/expert_parallel.py` on "
        write_section(given.write, HEAD, TITLE, f"\n{about}{circumstances(rows)}\n\n{summary}\n\n{text}\n")
    return 1 if broken else 0


def table(rows: list[dict]) -> str:
    """Markdown, one line a cell."""
    names = {variant: name for name, variant in VARIANTS.items()}
    lines = [
        "| ranks a set of experts | ZeRO | experts | variant | loss | gradient norm | weights | EMA | K bias | bias "
        "| flips |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, scope, stage, accumulation, recompute, _, _, size, rate, offload = row["cell"]
        shown = [figure(row[name]) for name in FIGURES] + [figure(row["bias"]) if rate else "-"]
        variant = names[Variant(scope, accumulation, recompute, rate, offload)]
        lines.append(f"| {size} | {stage} | {KINDS[kind]} | {variant} | {' | '.join(shown)} | {row['flips']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
