"""The invariance table in fp64 without an engine: rounding out of the way, so that what is left is logic.

    python tests/full/invariance_fp64.py [--results DIR] [--write docs/invariance.md]

Plain data parallel on gloo with our model, dispatch and balance losses in fp64 (tests/training/plain_loop.py):
{1, 2, 4 processes} x {accumulation 1, 2} x {dense, SwiGLU MoE with balance scope sample and step, GELU+bias experts
renormalised}, gradients averaged by hand, torch AdamW, clipping, N = 20 steps. Exit code 1 when a cell differs from one
process by more than 1e-12. Started again it goes on where it was.
"""

import json
import sys

from evidence import CELLS, circumstances, figure, finished, options, outside, write_section
from invariance_table import ACCUMULATIONS, HEAD, STEPS, WORLDS

KINDS = (("dense", "none"), ("moe", "sample"), ("moe", "step"), ("gelu", "sample"))
BOUNDS = {"loss": 1e-12, "norm": 1e-12, "weights": 1e-12, "average": 1e-12}
TITLE = "2. Without an engine, fp64"


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every cell holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    cells = [[kind, scope, None, count, False, "fp64"] for kind, scope in KINDS for count in ACCUMULATIONS]
    rows = []
    for world in WORLDS:
        file = given.results / f"fp64-{world}.json"
        rows += finished(file, [CELLS, json.dumps(cells)], world, STEPS, len(cells))
    broken = outside(rows, BOUNDS)
    summary = (
        f"{len(rows)} cells, {len(broken)} outside 1e-12; {sum(row['decisions'] for row in rows):,} top-k choices, "
        f"{sum(row['flips'] for row in rows)} flips."
    )
    text = table(rows)
    print(f"{text}\n{summary}")
    if given.write:
        write_section(given.write, HEAD, TITLE, section(text, summary, rows))
    return 1 if broken else 0


def table(rows: list[dict]) -> str:
    """Markdown, one line a cell."""
    lines = [
        "| processes | model | balance scope | accumulation | loss | gradient norm | weights | EMA | K bias | flips |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, scope, _, accumulation, *_ = row["cell"]
        figures = " | ".join(figure(row[name]) for name in (*BOUNDS, "key_bias"))
        flips = row["flips"] if row["decisions"] else "-"
        lines.append(f"| {row['world']} | {kind} | {scope} | {accumulation} | {figures} | {flips} |")
    return "\n".join(lines)


def section(text: str, summary: str, rows: list[dict]) -> str:
    """The table with what it was made of."""
    return f"""
`python tests/full/invariance_fp64.py` on {circumstances(rows)}

{summary}

Plain data parallel on gloo, no DeepSpeed: our model, dispatch and balance losses in fp64, gradients averaged by hand,
torch AdamW, clipping. `moe`: SwiGLU experts and a shared one; `gelu`: GELU experts with biases, gates renormalised.
Random numbers are drawn in fp32 and cast, the same on all ranks. The load that balance scope `step` remembers is fp32
by design; here it is a multiple of 1/64, so exact. Bound: 1e-12 on every figure but K bias (see above; absolute). One
process without accumulation is the reference itself.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
