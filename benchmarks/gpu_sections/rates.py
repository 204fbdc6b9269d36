"""What the device can do: bytes a second of a copy, operations a second of a large dense and of a grouped product."""

from collections.abc import Callable, Iterator

import torch

from gpu_sections.settings import Settings, median_seconds

COPY, PRODUCT, GROUPED = "copy", "dense product", "grouped product"


def run(settings: Settings) -> Iterator[dict]:
    """A row each; rate in bytes/s (read and written) or FLOP/s. Random numbers: a product of ones runs faster."""
    yield from (measure(settings) for measure in (_copy, _dense, _grouped))


def _copy(settings: Settings) -> dict:
    count = 2**22 if settings.quick else 2**30
    a = torch.zeros(count, dtype=torch.uint8, device=settings.device)
    b = torch.zeros_like(a)
    seconds = _seconds(lambda: b.copy_(a), settings)
    return {"what": COPY, "size": f"{count / 2**20:.0f} MiB", "rate": 2 * count / seconds}


def _dense(settings: Settings) -> dict:
    side = 256 if settings.quick else 8192
    left, right = (_draw(settings, side, side) for _ in range(2))
    seconds = _seconds(lambda: torch.mm(left, right), settings)
    return {"what": PRODUCT, "size": f"{side}^3 bf16", "rate": 2 * side**3 / seconds}


def _grouped(settings: Settings) -> dict:
    rows, dim, hidden = (512, 64, 256) if settings.quick else (2 * 65536, 1024, 4096)
    x, weight = _draw(settings, rows, dim), _draw(settings, 8, dim, hidden)
    ends = torch.arange(1, 9, dtype=torch.int32, device=settings.device) * (rows // 8)
    seconds = _seconds(lambda: torch._grouped_mm(x, weight, offs=ends), settings)
    size = f"8 x [{rows // 8} x {dim} x {hidden}] bf16"
    return {"what": GROUPED, "size": size, "rate": 2 * rows * dim * hidden / seconds}


def rate(every: dict, what: str) -> float | None:
    """One of the three, from the results of all sections; None where it was not measured."""
    rows = every.get("rates", {}).get("rows", [])
    return next((row["rate"] for row in rows if row["what"] == what), None)


def table(rows: list[dict], _: dict) -> list[str]:
    """Markdown."""
    shown = ["| what | size | rate |", "|---|---|---|"]
    for row in rows:
        unit = (1e9, "GB/s read and written") if row["what"] == COPY else (1e12, "TFLOP/s")
        shown.append(f"| {row['what']} | {row['size']} | {row['rate'] / unit[0]:.4g} {unit[1]} |")
    return shown


def _draw(settings: Settings, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=settings.device).bfloat16()


def _seconds(call: Callable[[], object], settings: Settings) -> float:
    return median_seconds(call, settings, calls=2 if settings.quick else 20)
