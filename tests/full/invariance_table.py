"""The invariance table: one run, whatever the ranks, ZeRO stage, accumulation and kind of model.

    python tests/full/invariance_table.py [--results DIR] [--write docs/invariance.md]

{1, 2, 4 processes} x {ZeRO 0-3} x {dense, SwiGLU MoE} x {accumulation 1, 2}, N = 20 steps in fp32, AdamW, clipping on,
against one plain torch process (tests/training/layout_cells.py). Too long for every change, so it stands apart;
started again it goes on where it was. Exit code 1 when a cell is outside the design's invariance statement.
"""

import json
import sys

from evidence import CELLS, circumstances, figure, finished, options, outside, write_section

STEPS = 20
LEARNING_RATE = 3e-3
WORLDS, STAGES, ACCUMULATIONS = (1, 2, 4), (0, 1, 2, 3), (1, 2)
KINDS = (("dense", "none"), ("moe", "sample"))
BOUNDS = {"loss": 1e-6, "norm": 1e-5, "weights": 1e-5, "average": 1e-5, "key_bias": STEPS * LEARNING_RATE}
HEAD = """
# The invariance table

A run is the same run on any layout, up to floating-point order: the design's invariance statement, measured. Tiny
models (depth 2, dim 32; MoE: 4 experts of which 2), 20 AdamW steps of 8 images, clipping on. Every cell is compared
with one bare torch process that sees the whole batch at once and shares the model class and the drawing by index with
the code under test. Figures are the largest relative difference over the steps, or over the parameters. Each section is
written by its script; `make test-full` runs them all.
"""
TITLE = "1. Under DeepSpeed, fp32"


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every cell holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    rows = []
    for world in WORLDS:
        for stage in STAGES:
            cells = [[kind, scope, stage, count] for kind, scope in KINDS for count in ACCUMULATIONS]
            file = given.results / f"invariance-{world}-{stage}.json"
            rows += finished(file, [CELLS, json.dumps(cells)], world, STEPS, len(cells))
    broken = outside(rows, BOUNDS)
    decisions, flips, forbidden = (sum(row[name] for row in rows) for name in ("decisions", "flips", "forbidden"))
    narrowest = min(row["narrowest"] for row in rows if row["decisions"])
    summary = (
        f"{len(rows)} cells, {len(broken)} outside the bounds. Routers: {decisions:,} top-k choices compared with the\n"
        f"reference's, {flips} flipped, {forbidden} of them where there was no tie; the smallest gap between the k-th\n"
        f"and the (k+1)-th probability in the reference is {narrowest:.1e}."
    )
    text = table(rows)
    print(f"{text}\n{summary}")
    if given.write:
        write_section(given.write, HEAD, TITLE, section(text, summary, rows))
    return 1 if broken else 0


def table(rows: list[dict]) -> str:
    """Markdown, one line a cell."""
    lines = [
        "| processes | ZeRO | model | accumulation | loss | gradient norm | weights | EMA | K bias | choices | flips |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, _, stage, accumulation, *_ = row["cell"]
        figures = " | ".join(figure(row[name]) for name in BOUNDS)
        chosen = f"{row['decisions']:,} | {row['flips']}" if row["decisions"] else "- | -"
        lines.append(f"| {row['world']} | {stage} | {kind} | {accumulation} | {figures} | {chosen} |")
    return "\n".join(lines)


def section(text: str, summary: str, rows: list[dict]) -> str:
    """The table with what it was made of."""
    return f"""
`python tests/full/invariance_table.py` on {circumstances(rows)}

{summary}

Bounds: loss 1e-6; gradient norm, weights and EMA (two averages, decays 0.9 and 0.5) 1e-5. K bias is the K third of
`qkv.bias`, whose true gradient is zero, so that AdamW turns rounding into steps there: left out of weights and EMA, its
largest absolute difference must stay below steps x learning rate = {STEPS * LEARNING_RATE:g}; that it does not change
the output is `tests/models/test_attention.py`. A flip is a token whose set of k experts is not the reference's: allowed
where the k-th and the (k+1)-th probability differ by less than 1e-6 in both runs, and then the cell's parameters are
not compared (`-`). That the counter counts is `tests/training/test_layouts.py`. Balance scope of the MoE: `sample`.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
