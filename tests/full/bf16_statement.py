"""The bf16 part of the invariance statement: what DeepSpeed adds to the rounding of a plain bf16 run.

    python tests/full/bf16_statement.py [--results DIR] [--write docs/invariance.md]

ZeRO 1-3 in bf16 x {1, 2, 4 processes} x {dense, SwiGLU MoE} x {accumulation 1, 2}, 5 seeds each: RMS over the N = 20
losses of the difference from the fp32 run of the same seed, mean over seeds, at most 2 x that of one bare torch process
with a bf16 model and fp32 masters and moments (tests/training/plain_loop.py). Exit code 1 when a layout is above.
Started again it goes on where it was. Every stage has launches of its own: ZeRO-3 puts another F.linear, which rounds
bf16 differently, into the process for good.
"""

import json
import statistics
import sys

from evidence import CELLS, circumstances, finished, options, write_section
from invariance_table import ACCUMULATIONS, HEAD, KINDS, STEPS, WORLDS

STAGES, SEEDS = (1, 2, 3), (3, 4, 5, 6, 7)
LIMIT = 2.0
TITLE = "3. Under DeepSpeed, bf16"


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every layout holds."""
    given = options(__doc__, argv, "docs/invariance.md")
    plain = measured(given.results, "bf16-plain", 1, None, (1,))
    rows = [
        row
        for world in WORLDS
        for stage in STAGES
        for row in measured(given.results, f"bf16-{world}-{stage}", world, stage, ACCUMULATIONS)
    ]
    base = {kind: mean(plain, kind, 1)[0] for kind, _ in KINDS}
    text, worst = table(rows, base, plain)
    layouts = len(WORLDS) * len(STAGES) * len(KINDS) * len(ACCUMULATIONS)
    summary = f"{layouts} layouts, largest ratio {worst:.2f}, allowed {LIMIT:g}."
    print(f"{text}\n{summary}")
    if given.write:
        write_section(given.write, HEAD, TITLE, section(text, summary, plain + rows))
    return 1 if worst > LIMIT else 0


def measured(results, name: str, world: int, stage: int | None, accumulations: tuple[int, ...]) -> list[dict]:
    """The cells of one launch: both models, these accumulations, all seeds."""
    cells = [
        [kind, scope, stage, count, False, "bf16", seed]
        for kind, scope in KINDS
        for count in accumulations
        for seed in SEEDS
    ]
    return finished(results / f"{name}.json", [CELLS, json.dumps(cells)], world, STEPS, len(cells))


def mean(rows: list[dict], kind: str, accumulation: int) -> tuple[float, float, float]:
    """Mean over the seeds of the RMS, the smallest and the largest of them."""
    found = [row["rms"] for row in rows if (row["cell"][0], row["cell"][3]) == (kind, accumulation)]
    assert len(found) == len(SEEDS), found
    return statistics.mean(found), min(found), max(found)


def table(rows: list[dict], base: dict[str, float], plain: list[dict]) -> tuple[str, float]:
    """(Markdown, one line a layout and one for the bare loop; the largest ratio)."""
    lines = [
        "| processes | ZeRO | model | accumulation | RMS, mean of 5 seeds | smallest | largest | ratio to the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in base:
        figures = " | ".join(f"{value:.2e}" for value in mean(plain, kind, 1))
        lines.append(f"| 1 | none | {kind} | 1 | {figures} | 1 |")
    worst = 0.0
    for world in WORLDS:
        for stage in STAGES:
            here = [row for row in rows if (row["world"], row["cell"][2]) == (world, stage)]
            for kind in base:
                for accumulation in ACCUMULATIONS:
                    found = mean(here, kind, accumulation)
                    figures, ratio = " | ".join(f"{value:.2e}" for value in found), found[0] / base[kind]
                    worst = max(worst, ratio)
                    lines.append(f"| {world} | {stage} | {kind} | {accumulation} | {figures} | {ratio:.2f} |")
    return "\n".join(lines), worst


def section(text: str, summary: str, rows: list[dict]) -> str:
    """The table with what it was made of."""
    return f"""
`python tests/full/bf16_statement.py` on {circumstances(rows)}

{summary}

RMS over the {STEPS} losses (from about 1.2 down to 0.7) of the difference from the fp32 run of the same seed. The first
two lines are one bare torch process: bf16 model, fp32 masters (which begin, as DeepSpeed's do, at the rounded weights),
fp32 moments. The statement allows a layout 2 x that. Routers choose differently from the fp32 run now and then; that is
part of the difference.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
