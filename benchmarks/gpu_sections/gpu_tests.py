"""The tests that need a GPU, and the operations' truth tests on it. On a CPU they are skipped, which is a row too."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

from gpu_sections.settings import ROOT, Settings

FILES = ("tests/ops/test_native*.py", "tests/ops/test_gpu.py")
OUTCOMES = ("passed", "failed", "error", "errors", "skipped")


def run(settings: Settings) -> Iterator[dict]:
    """One row: counts by outcome, and the last lines of pytest where something failed."""
    stop = max(10, int(settings.seconds) - 5)
    command = [
        "timeout",
        "-s",
        "INT",
        str(stop),
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Only the files that have such tests: collecting the others imports packages that take long.
    files = [str(path.relative_to(ROOT)) for name in FILES for path in sorted(ROOT.glob(name))]
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = lines[-1] if lines else done.stderr.strip()[-500:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", summary) if word in OUTCOMES}
    broken = done.returncode not in (0, 5)
    yield {"counts": counts, "code": done.returncode, "summary": summary, "tail": lines[-40:] if broken else []}


def table(rows: list[dict], _: dict) -> list[str]:
    """Markdown."""
    shown = []
    for row in rows:
        shown += [f"`pytest -m gpu`: {row['summary'].strip('= ')} (exit code {row['code']})"]
        shown += ["```", *row["tail"], "```"] if row["tail"] else []
    return shown
