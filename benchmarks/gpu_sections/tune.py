"""`python -m dsmoe tune` for the suite's shapes, into a tuning file beside the report."""

import statistics
from collections.abc import Iterator

import torch

from dsmoe.ops import tuning
from dsmoe.runtime.device import Device
from dsmoe.scaling import tune
from gpu_sections.settings import Settings

FILE = "tuning.json"


def run(settings: Settings) -> Iterator[dict]:
    """A row an operation and shape; the file grows with them."""
    presets = ("nano-4E2A",) if settings.quick else ("L/2-8E2A", "S/2-8E2A", "XL-8E2A")
    device, tokens = Device(settings.device), 256 if settings.quick else 16384
    for name in presets:
        for finding in tune.measure(name, tokens, device, torch.bfloat16, 3 if settings.quick else 9):
            if finding.seconds:
                tuning.write(settings.folder / FILE, [tune.entry(finding, device, torch.bfloat16)])
            yield {
                "preset": name,
                "op": finding.op,
                "sizes": finding.sizes,
                "choice": finding.choice if finding.seconds else None,
                "seconds": {n: statistics.median(s) for n, s in finding.seconds.items()},
                "ratios": {n: finding.ratio(n) for n in finding.seconds},
                "refused": finding.refused,
            }


def table(rows: list[dict], _: dict) -> list[str]:
    """Markdown."""
    shown = ["| op | preset | choice | us (speed beside the default) | not timed |", "|---" * 5 + "|"]
    for row in rows:
        times = ", ".join(f"{n} {1e6 * s:.1f} ({row['ratios'][n]:.2f})" for n, s in row["seconds"].items())
        refused = "; ".join(f"{n}: {why}" for n, why in row["refused"].items()) or "-"
        shown.append(f"| {row['op']} | {row['preset']} | {row['choice'] or '-'} | {times} | {refused} |")
    return shown
