"""The bf16 part of the invariance statement with experts spread over ranks.

    python tests/full/expert_parallel_bf16.py [--results DIR] [--write docs/invariance.md]

ZeRO 1-3 in bf16 x {2 processes with 2, 4 with 2, 4 with 4 ranks a set of experts}, SwiGLU experts and a shared one, 5
seeds each, judged as tests/full/bf16_statement.py judges other layouts: RMS over the 20 losses of the difference from
the fp32 run of the same seed, mean over seeds, at most 2 x that of one bare torch process in bf16. Exit code 1 when a
layout is above. Started again it goes on where it was.
"""

import json
import sys
from pathlib import Path

from bf16_statement import LIMIT, SEEDS, STAGES, mean
from evidence import CELLS, circumstances, finished, options, write_section
from invariance_table import HEAD, STEPS

SPREADS = ((2, 2), (4, 2), (4, 4))  # processes, ranks a set of experts
KIND = "moe"
TITLE = "5. Expert parallelism, bf16"


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every layout holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    plain = measured(given.results, 1, 1, (None,))
    rows = [
        row
        for world, size in SPREADS
        for stages in (STAGES[:2], STAGES[2:])
        for row in measured(given.results, world, size, stages)
    ]
    text, worst = table(rows, plain)
    summary = f"{len(SPREADS) * len(STAGES)} layouts, largest ratio {worst:.2f}, allowed {LIMIT:g}."
    print(f"{text}\n{summary}")
    if given.write:
        write_section(given.write, HEAD, TITLE, section(text, summary, plain + rows))
    return 1 if worst > LIMIT else 0


def measured(results: Path, world: int, size: int, stages: tuple) -> list[dict]:
    """The cells of one launch, all seeds. ZeRO-3 puts another F.linear into a process, so it comes alone."""
    cells = [[KIND, "sample", stage, 1, False, "bf16", seed, size] for stage in stages for seed in SEEDS]
    file = results / f"expert-parallel-bf16-{world}-{size}-{stages[-1]}.json"
    return finished(file, [CELLS, json.dumps(cells)], world, STEPS, len(cells))


def table(rows: list[dict], plain: list[dict]) -> tuple[str, float]:
    """(Markdown, one line a layout and one for the bare loop; the largest ratio)."""
    lines = [
        "| processes | ranks a set of experts | ZeRO | RMS, mean of 5 seeds | smallest | largest "
        "| ratio to the bare loop |",
        "|---|---|---|---|---|---|---|",
    ]
    base, worst = mean(plain, KIND, 1), 0.0
    lines.append(f"| 1 | 1 | none | {' | '.join(f'{value:.2e}' for value in base)} | 1 |")
    for world, size in SPREADS:
        for stage in STAGES:
            here = [r for r in rows if (r["world"], r["cell"][7], r["cell"][2]) == (world, size, stage)]
            found = mean(here, KIND, 1)
            worst = max(worst, found[0] / base[0])
            shown = " | ".join(f"{value:.2e}" for value in found)
            lines.append(f"| {world} | {size} | {stage} | {shown} | {found[0] / base[0]:.2f} |")
    return "\n".join(lines), worst


def section(text: str, summary: str, rows: list[dict]) -> str:
    """The table with what it was made of."""
    return f"""
`python tests/full/expert_parallel_bf16.py` on {circumstances(rows)}

{summary}

As section 3, with SwiGLU experts (`moe` there) spread over ranks.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
