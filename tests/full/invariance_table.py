"""The invariance table: one run, whatever the ranks, ZeRO stage, accumulation and kind of model.

    python tests/full/invariance_table.py [--results DIR] [--write docs/invariance.md]

{1, 2, 4 processes} x {ZeRO 0-3} x {dense, SwiGLU MoE} x {accumulation 1, 2}, N = 20 steps in fp32, AdamW, clipping on,
against one plain torch process (tests/training/layout_cells.py). Too long for every change, so it stands apart;
started again it goes on where it was. Exit code 1 when a cell is outside the design's invariance statement.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from distributed_harness import assert_succeeded, launch  # noqa: E402

CELLS = ROOT / "tests/training/layout_cells.py"
STEPS = 20
WORLDS, STAGES, ACCUMULATIONS = (1, 2, 4), (0, 1, 2, 3), (1, 2)
KINDS = (("dense", "none"), ("moe", "sample"))
BOUNDS = {"loss": 1e-6, "norm": 1e-5, "weights": 1e-5, "average": 1e-5}


def main(argv: list[str]) -> int:
    """Run what is missing, print the table, say whether every cell holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / ".test-full", help="where finished launches are kept")
    parser.add_argument("--write", type=Path, help="also write the table, with its circumstances, to this file")
    options = parser.parse_args(argv)
    options.results.mkdir(parents=True, exist_ok=True)
    rows = [row for world in WORLDS for stage in STAGES for row in finished(options.results, world, stage)]
    text = table(rows)
    print(text)
    if options.write:
        options.write.write_text(document(text, sorted({row["commit"] for row in rows})), encoding="utf-8")
    outside = [row for row in rows if any(not row[name] <= bound for name, bound in BOUNDS.items())]
    print(f"{len(rows)} cells, {len(outside)} outside the bounds {BOUNDS}")
    return 1 if outside else 0


def finished(results: Path, world: int, stage: int) -> list[dict]:
    """The cells of one launch, run now unless an earlier start has finished them."""
    file = results / f"invariance-{world}-{stage}.json"
    if not file.exists():
        cells = [[kind, scope, stage, accumulation, False] for kind, scope in KINDS for accumulation in ACCUMULATIONS]
        ranks = launch([CELLS, json.dumps(cells)], world, timeout=300, env={"LAYOUT_STEPS": str(STEPS)})
        assert_succeeded(ranks)
        found = [json.loads(line[5:]) for line in ranks[0].stdout.splitlines() if line.startswith("CELL ")]
        assert len(found) == len(cells), found
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps([{"world": world, "commit": commit(), **cell} for cell in found]))
        os.replace(partial, file)
        print(f"{world} processes, ZeRO-{stage}: done", flush=True)
    return json.loads(file.read_text())


def table(rows: list[dict]) -> str:
    """Markdown, one line a cell: largest relative difference over the steps, or over the parameters."""
    lines = [
        "| processes | ZeRO | model | accumulation | loss | gradient norm | weights | EMA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kind, _, stage, accumulation, _ = row["cell"]
        figures = " | ".join(f"{row[name]:.1e}" for name in BOUNDS)
        lines.append(f"| {row['world']} | {stage} | {kind} | {accumulation} | {figures} |")
    return "\n".join(lines)


def commit() -> str:
    """The checkout's commit, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def document(text: str, commits: list[str]) -> str:
    """The table with what it was made of."""
    return f"""# The invariance table

`make test-full` on {date.today()}, commit {", ".join(commits)}, Python {platform.python_version()},
torch {torch.__version__}, {os.cpu_count()} CPU cores. Tiny models (depth 2, dim 32, 4 experts of which 2), fp32,
{STEPS} AdamW steps of 8 images, clipping on, balance scope `sample` for the MoE: largest relative difference from one
plain torch process that sees the whole batch at once. Bounds (design, invariance statement): loss 1e-6; gradient norm,
weights and EMA 1e-5. The K third of `qkv.bias`, whose true gradient is zero, is left out of weights and EMA.

Not in this table: bf16, expert parallelism, the fp64 table, and a count of top-k flips.

{text}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
