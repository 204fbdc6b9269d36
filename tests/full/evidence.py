"""What the scripts of this folder share: launches whose results are kept, and documents put together from sections.

Started again, a script goes on where it was: a launch that has finished is read back from its file. A document is
one file with a section a script (`## title`), each of which replaces its own and leaves the others alone.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/training")]

from distributed_harness import assert_succeeded, launch  # noqa: E402

CELLS = ROOT / "tests/training/layout_cells.py"


def options(description: str, argv: list[str], document: str) -> argparse.Namespace:
    """results (made if need be): where finished launches lie; write: the document, or None."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / ".test-full", help="where finished launches are kept")
    parser.add_argument("--write", type=Path, help=f"also write what was found into this document ({document})")
    found = parser.parse_args(argv)
    found.results.mkdir(parents=True, exist_ok=True)
    return found


def finished(file: Path, argv: list, world: int, steps: int, expected: int) -> list[dict]:
    """The lines of one launch of `argv` by `world` processes, run now unless `file` holds them already.

    Each line gets `world` and `commit`. AssertionError when a rank fails or `expected` lines did not come.
    """
    if not file.exists():
        ranks = launch(argv, world, timeout=1800, env={"LAYOUT_STEPS": str(steps)})
        assert_succeeded(ranks)
        found = [json.loads(line[5:]) for line in ranks[0].stdout.splitlines() if line.startswith("CELL ")]
        assert len(found) == expected, found
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps([{"world": world, "commit": commit(), **cell} for cell in found]))
        os.replace(partial, file)
        print(f"{file.stem}: done", flush=True)
    return json.loads(file.read_text())


def commit() -> str:
    """The checkout's commit, and whether dsmoe/ differs from it."""
    name, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "dsmoe"])
    )
    return name + ("-dirty" if changed else "")


def circumstances(rows: list[dict]) -> str:
    """When, what and where, for the head of a section."""
    return (
        f"{date.today()}, dsmoe at commit {', '.join(sorted({row['commit'] for row in rows}))}, "
        f"Python {platform.python_version()},\ntorch {version('torch')}, DeepSpeed {version('deepspeed')}, "
        f"{os.cpu_count()} CPU cores."
    )


def write_section(path: Path, head: str, title: str, text: str) -> None:
    """Put `text` under `## title` in the document at path, whose head it renews; the other sections stay, in order."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"^## (.*?)\n\n(.*?)(?=^## |\Z)", old, flags=re.MULTILINE | re.DOTALL))
    sections[title] = text.strip() + "\n\n"
    body = "".join(f"## {name}\n\n{sections[name].strip()}\n\n" for name in sorted(sections))
    path.write_text(f"{head.strip()}\n\n{body}".rstrip() + "\n", encoding="utf-8")


def figure(value: float | None) -> str:
    """A figure of a table; a dash for what was not compared."""
    return "-" if value is None else f"{value:.1e}"


def outside(rows: list[dict], bounds: dict[str, float]) -> list[dict]:
    """The rows that break a bound, or have a flip that was no tie; a figure that ended at a tie (None) breaks none."""
    return [
        row
        for row in rows
        if row["forbidden"] or any(row[name] is not None and not row[name] <= b for name, b in bounds.items())
    ]
