"""The bf16 part of the invariance statement with experts spread over ranks.

    python tests/full/expert_parallel_bf16.py [--results DIR] [--write docs/invariance.md]

ZeRO 1-3 in bf16 x {2 processes with 2, 4 with 2, 4 with 4 ranks a set of experts} x {SwiGLU with a shared expert, GELU
with biases and renormalised gates}, 5 seeds each, judged as tests/full/bf16_statement.py judges other layouts: RMS over
the 20 losses of the difference from the fp32 run of the same seed, mean over seeds, at most 2 x that of one bare torch
process in bf16. Exit code 1 when a layout is above. Started again it goes on where it was.
"""

import json
import sys
from pathlib import Path

from bf16_statement import LIMIT, SEEDS, STAGES, mean
from evidence import CELLS, circumstances, finished, options, write_section
from expert_parallel import KINDS
from invariance_table import HEAD, STEPS

SPREADS = ((2, 2), (4, 2), (4, 4))  # processes, ranks a set of experts
TITLE = "5. Expert parallelism, bf16"


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every layout holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    plain = measured(given.results, 1, 1, None)
    rows = {
        (world, size, stage): measured(given.results, world, size, stage) for world, size in SPREADS for stage in STAGES
    }
    text, worst = table(rows, plain)
    summary = f"{len(rows) * len(KINDS)} layouts, largest ratio {worst:.2f}, allowed {LIMIT:g}."
    print(f"{text}\n{summary}")
    if given.write:
        everything = [*plain, *(row for found in rows.values() for row in found)]
        write_section(given.write, HEAD, TITLE, section(text, summary, everything))
    return 1 if worst > LIMIT else 0


def measured(results: Path, world: int, size: int, stage: int | None) -> list[dict]:
    """The cells of one launch: both models, all seeds. ZeRO-3 puts another F.linear into a process, so it is alone."""
    cells = [[kind, "sample", stage, 1, False, "bf16", seed, size] for kind in KINDS for seed in SEEDS]
    file = results / f"expert-parallel-bf16-{world}-{size}-{stage}.json"
    return finished(file, [CELLS, json.dumps(cells)], world, STEPS, len(cells))


def table(rows: dict[tuple, list[dict]], plain: list[dict]) -> tuple[str, float]:
    """(Markdown, one line a layout and one for the bare loop; the largest ratio)."""
    lines = [
        "| processes | ranks a set of experts | ZeRO | experts | RMS, mean of 5 seeds | smallest | largest "
        "| ratio to the bare loop |",
        "|---|---|---|---|---|---|---|---|",
    ]
    worst, base = 0.0, {kind: mean(plain, kind, 1) for kind in KINDS}
    for kind, figures in base.items():
        lines.append(f"| 1 | 1 | none | {KINDS[kind]} | {' | '.join(f'{value:.2e}' for value in figures)} | 1 |")
    for (world, size, stage), found in rows.items():
        for kind in KINDS:
            figures = mean(found, kind, 1)
            ratio = figures[0] / base[kind][0]
            worst = max(worst, ratio)
            shown = " | ".join(f"{value:.2e}" for value in figures)
            lines.append(f"| {world} | {size} | {stage} | {KINDS[kind]} | {shown} | {ratio:.2f} |")
    return "\n".join(lines), worst


def section(text: str, summary: str, rows: list[dict]) -> str:
    """The table with what it was made of."""
    return f"""
`python tests/full/expert_parallel_bf16.py` on {circumstances(rows)}

{summary}

As section 3, with experts spread over ranks. `none` is one bare torch process in bf16 with fp32 masters and moments.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
