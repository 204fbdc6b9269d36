"""All that one GPU can say about this code, in one command and under nine minutes.

    python benchmarks/gpu_suite.py [--device cuda|cpu] [--quick] [--sections NAME ...] [--folder DIR]

Builds the compiled operations for this GPU, runs the GPU tests, measures what the device can do, each operation against
its floor, the layer beside its rivals, a training step, repeatability, and tunes. Each section is a process of its own
with a time of its own; one that fails or is stopped leaves its reason and the rows it had, and the rest goes on. The
report (gpu_suite_DATE.json and .md) is written after every section, also to $OUT where that is set.

Needs torch, numpy, PyYAML and pytest; no DeepSpeed and no network. `--device cpu --quick` goes through every section in
tiny sizes: what it prints says that the script works, and measures nothing. docs/tuning.md says how to run it.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [entry for entry in (str(ROOT), str(ROOT / "benchmarks")) if entry not in sys.path]

# In this order, each with the seconds it may take; the first import of torch on a fresh machine is slow.
SECTIONS = {
    "environment": 60,
    "build": 75,
    "gpu_tests": 90,
    "rates": 30,
    "op_floors": 60,
    "layer": 130,
    "train": 50,
    "repeat": 30,
    "tune": 60,
}
TOTAL_SECONDS = 525
# A dry run may share a slow CPU with other work; nothing is measured.
DRY_RUN_PATIENCE = 4


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script work?")
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--folder", type=Path, help="of the report (default benchmarks/results; on a CPU .test-full)")
    parser.add_argument("--section", choices=tuple(SECTIONS), help="run one section here: what its process does")
    parser.add_argument("--rows", type=Path, help="with --section: the file that gets a line for each row")
    parser.add_argument("--seconds", type=float, help="with --section: its budget")
    given = parser.parse_args(argv)
    if given.device == "cpu" and not given.quick:
        parser.error("on a CPU only --quick makes sense: the sizes are a GPU's")
    folder = given.folder or ROOT / ("benchmarks/results" if given.device == "cuda" else ".test-full/gpu_suite")
    folder.mkdir(parents=True, exist_ok=True)
    if given.section:
        return run_section(given.section, given, folder)
    return run_all(given, folder)


def run_section(name: str, given: argparse.Namespace, folder: Path) -> int:
    """In this process: append each row to the file as it comes."""
    from gpu_sections.settings import Settings

    settings = Settings(given.device, given.quick, given.seconds or SECTIONS[name], folder)
    with open(given.rows, "a", encoding="utf-8") as file:
        for row in module(name).run(settings):
            file.write(json.dumps(row) + "\n")
            file.flush()
    return 0


def module(name: str) -> ModuleType:
    """A section's code."""
    return importlib.import_module(f"gpu_sections.{name}")


def run_all(given: argparse.Namespace, folder: Path) -> int:
    """Every section, the report after each; exit code 1 when one did not end well."""
    begun, report = time.monotonic(), folder / f"gpu_suite_{date.today()}"
    every: dict = {"settings": {"device": given.device, "quick": given.quick, "date": str(date.today())}}
    for name in given.sections:
        patience = 1 if given.device == "cuda" else DRY_RUN_PATIENCE
        left = patience * TOTAL_SECONDS - (time.monotonic() - begun)
        every[name] = launch(name, given, folder, min(patience * SECTIONS[name], left))
        found = every[name]
        print(
            f"{name}: {found['state']}, {len(found['rows'])} rows, {found['seconds']:.0f} s {found['error']}",
            flush=True,
        )
        write(report, every, folder)
    print(report.with_suffix(".md").read_text(encoding="utf-8"))
    return int(any(every[name]["state"] != "done" for name in given.sections))


def launch(name: str, given: argparse.Namespace, folder: Path, seconds: float) -> dict:
    """A section in a process of its own: its rows, how it ended, its last words where it did not end well."""
    if seconds < 5:
        return {"state": "not run", "rows": [], "seconds": 0.0, "error": "no time was left"}
    with tempfile.TemporaryDirectory() as scratch:
        rows, words = Path(scratch, "rows"), Path(scratch, "words")
        command = [sys.executable, __file__, "--section", name, "--rows", str(rows), "--device", given.device]
        command += ["--seconds", str(seconds), "--folder", str(folder), *(["--quick"] if given.quick else [])]
        # No tuning file: the default order is what is measured.
        environment = {k: v for k, v in os.environ.items() if k != "DSMOE_TUNING"} | {"XDG_CACHE_HOME": scratch}
        begun = time.monotonic()
        with open(words, "w", encoding="utf-8") as file:
            # A session of its own, so that what it started ends with it.
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
            try:
                code = process.wait(seconds)
                state = "done" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                state = "stopped: its time was over"
            finally:
                _end(process)
        text = rows.read_text(encoding="utf-8") if rows.exists() else ""
        kept = [row for line in text.splitlines() if (row := _parsed(line)) is not None]
        error = "" if state == "done" else words.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
    return {"state": state, "rows": kept, "seconds": time.monotonic() - begun, "error": error}


def _parsed(line: str) -> dict | None:
    """A row; None for the last one of a process that was stopped while it wrote."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _table(name: str, every: dict) -> list[str]:
    """A section's rows as markdown; a table that cannot be made must not cost the others."""
    rows = every[name]["rows"]
    if not rows:
        return ["nothing was measured"]
    try:
        return module(name).table(rows, every)
    except Exception as error:
        return [f"the table failed ({type(error).__name__}: {error}); the rows are in the JSON file"]


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(report: Path, every: dict, folder: Path) -> None:
    """The report as it stands, beside it nothing else; copied to $OUT."""
    from gpu_sections import targets

    verdicts = targets.evaluate(every)
    content = {**every, "targets": [asdict(verdict) for verdict in verdicts]}
    report.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [f"# One GPU, {date.today()}", "", "`python benchmarks/gpu_suite.py`", ""]
    if not targets.on_gpu(every):
        lines += ["**A dry run on a CPU: it shows that the script works, and measures nothing.**", ""]
    lines += ["## Targets", "", *targets.table(verdicts), ""]
    for name in (section for section in SECTIONS if section in every):
        found = every[name]
        lines += [f"## {name}", "", f"{found['state']}, {found['seconds']:.0f} s", ""]
        if found["error"]:
            lines += ["```", found["error"], "```", ""]
        lines += [*_table(name, every), ""]
    report.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        for file in (report.with_suffix(".json"), report.with_suffix(".md"), folder / "tuning.json"):
            if file.exists():
                shutil.copy(file, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
