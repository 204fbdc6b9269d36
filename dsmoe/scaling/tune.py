"""Measures the implementations of each operation on the device at hand and files the winners for dispatch.

An implementation is timed only where its results and gradients are right: against float64, their error is at most twice
that of plain torch in the same dtype. All run once a round, forward and backward, in an order that turns; ratios are
taken within a round. Not here: the file and its rules (dsmoe.ops.tuning).
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from dsmoe import ops
from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.presets import preset
from dsmoe.ops import tuning
from dsmoe.ops.dispatch import Implementation
from dsmoe.runtime.device import Device
from dsmoe.scaling.tune_cases import CHECKED_TOKENS, Case, cases
from dsmoe.scaling.tune_options import DTYPES

WORTH = 1.03  # a winner that is less than this much faster than the default is not worth the other bits
MOST_TOKENS = 1 << 22
_SAMPLE_SECONDS = 2e-3  # a sample shorter than this is several calls
_MOST_CALLS = 50


@dataclass(frozen=True)
class Finding:
    """One operation's measurement. seconds: implementation -> of every round, the default's first; refused:
    implementation -> why it was not timed."""

    op: str
    sizes: dict[str, int]
    seconds: dict[str, list[float]]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def default(self) -> str:
        """The first in the default order that is right."""
        return next(iter(self.seconds))

    def ratio(self, name: str) -> float:
        """Median of default / this one over the rounds: above 1 this one is faster."""
        pairs = zip(self.seconds[self.default], self.seconds[name], strict=True)
        return statistics.median(default / mine for default, mine in pairs)

    @property
    def choice(self) -> str:
        """The implementation with the best ratio where that is worth it, else the default."""
        best = max(self.seconds, key=self.ratio)
        return best if self.ratio(best) >= WORTH else self.default


def run(arguments: argparse.Namespace) -> int:
    """`python -m dsmoe tune`: measure, print as it goes, write. ConfigError for bad arguments."""
    device, dtype = Device.pick(prefer=arguments.device), getattr(torch, DTYPES[arguments.dtype])
    path = Path(arguments.out) if arguments.out else tuning.default_path()
    _check(arguments, device, dtype)
    if path.exists():
        tuning.read(path)  # a damaged file is told before minutes are spent
    print(f"{device.name}, {arguments.preset}, {arguments.tokens} tokens, {arguments.dtype}; {ops.kernels()}")
    findings = []
    for finding in measure(arguments.preset, arguments.tokens, device, dtype, arguments.rounds, arguments.ops):
        print("\n".join(describe(finding)), flush=True)
        findings.append(finding)
    tuning.write(path, [entry(finding, device, dtype) for finding in findings if finding.seconds])
    tuning.forget()
    print(f"written to {path}: {len(findings)} operations")
    return 0


def measure(
    name: str, tokens: int, device: Device, dtype: torch.dtype, rounds: int, only: list[str] | None = None
) -> Iterator[Finding]:
    """Findings for a preset's operations as they come. only: names of operations, default all."""
    spec = preset(name)
    every = cases(spec, tokens, device.torch_device, dtype)
    checked = cases(spec, min(tokens, CHECKED_TOKENS), device.torch_device, dtype)
    wanted = [name for name in every if only is None or name.split(",")[0] in only]
    return (_finding(every[name], checked[name](), device, rounds) for name in wanted)


def entry(finding: Finding, device: Device, dtype: torch.dtype) -> tuning.Entry:
    """What goes into the file."""
    return tuning.Entry(
        op=finding.op,
        device=device.name,
        dtype=str(dtype),
        sizes=finding.sizes,
        choice=finding.choice,
        measured=True,
        about=f"{date.today()}, python -m dsmoe tune, Python {platform.python_version()}",
        versions=tuning.current_versions(),
        ratios={name: round(finding.ratio(name), 4) for name in finding.seconds},
    )


def describe(finding: Finding) -> list[str]:
    """Lines for people: the operation, then each implementation's median, quartiles and ratio."""
    sizes = " ".join(f"{name} {size}" for name, size in finding.sizes.items())
    lines = [f"{finding.op}  {sizes}: " + (f"{finding.choice}" if finding.seconds else "nothing could be timed")]
    for name, seconds in finding.seconds.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
        note = "default" if name == finding.default else f"{finding.ratio(name):.3f}x the default's speed"
        lines.append(f"    {name:<12} {middle:9.3f} ms ({low:.3f} to {high:.3f})  {note}")
    return lines + [f"    {name:<12} not timed: {why}" for name, why in finding.refused.items()]


def _check(arguments: argparse.Namespace, device: Device, dtype: torch.dtype) -> None:
    if not 1 <= arguments.tokens <= MOST_TOKENS:
        raise ConfigError(f"--tokens is {arguments.tokens}; give a number from 1 to {MOST_TOKENS}.")
    if arguments.rounds < 3:
        raise ConfigError(f"--rounds is {arguments.rounds}; a median with quartiles needs at least 3.")
    if not device.supports(dtype):
        raise ConfigError(f"--dtype {arguments.dtype} does not work on {device.name}; choose bf16 or fp32.")
    spec = preset(arguments.preset)
    for op in arguments.ops or ():
        known = ops.tunable() if spec.is_moe else ("modulate",)
        if op not in known:
            raise ConfigError(choose_from("op to tune", op, known))


def _finding(make: Callable[[], Case], small: Case, device: Device, rounds: int) -> Finding:
    """Check every implementation on the small case, then time those that are right on the one to make."""
    op = ops.operation(small.op)
    right, refused = [], {}
    for name in op.available(device.kind):
        why = _wrong(op.named(name, device.kind), small)
        if why:
            refused[name] = why
        else:
            right.append(op.named(name, device.kind))
    case = make()
    seconds = _time(right, case, device, rounds, refused)
    return Finding(small.op, case.sizes, seconds, refused)


def _wrong(implementation: Implementation, case: Case) -> str:
    """Why an implementation may not be used, "" when it is right."""
    try:
        implementation.load()
        found = _outcome(implementation.function, case)
    except Exception as error:  # whatever a library throws, the others can still be measured
        return _first_line(error)
    op = ops.operation(case.op)
    with ops.use("reference"):
        plain, truth = _outcome(op, case), _outcome(op, case, torch.float64)
    for mine, theirs, exact in zip(found, plain, truth, strict=True):
        error, allowed = (float((t.double() - exact).square().mean().sqrt()) for t in (mine, theirs))
        floor = torch.finfo(mine.dtype).eps / 2 * float(exact.square().mean().sqrt())
        if not error <= 2 * max(allowed, floor):
            return f"its error against float64 is {error:.3g}, plain torch's {allowed:.3g}"
    return ""


def _outcome(function: Callable, case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and gradients; dtype: of all inputs, for the truth."""
    inputs = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in case.inputs.items()}
    outputs = case.outputs(function(*case.arguments(inputs)))
    return [*(t.detach() for t in outputs), *_gradients(outputs, inputs)]


def _gradients(outputs: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    upstream = [torch.cos(torch.arange(t.numel(), device=t.device)).view_as(t).to(t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, list(inputs.values()), upstream)


def _time(
    implementations: list[Implementation], case: Case, device: Device, rounds: int, refused: dict[str, str]
) -> dict[str, list[float]]:
    """implementation -> seconds of a forward and backward pass in every round; what fails moves to `refused`."""
    inputs = {name: t.detach().requires_grad_() for name, t in case.inputs.items()}
    arguments = case.arguments(inputs)
    upstream: list[Tensor] = []

    def once(implementation: Implementation) -> None:
        outputs = case.outputs(implementation.function(*arguments))
        if not upstream:
            upstream.extend(torch.ones_like(t) for t in outputs)
        torch.autograd.grad(outputs, list(inputs.values()), upstream)

    def sample(implementation: Implementation, calls: int) -> float:
        device.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            once(implementation)
        device.synchronize()
        return (time.perf_counter() - begun) / calls

    ready, longest = [], 0.0
    for implementation in implementations:
        try:
            sample(implementation, 1)
            longest = max(longest, sample(implementation, 1))
            ready.append(implementation)
        except RuntimeError as error:  # out of memory, or a shape that its kernels do not take
            refused[implementation.name] = _first_line(error)
    calls = min(_MOST_CALLS, max(1, round(_SAMPLE_SECONDS / max(longest, 1e-6))))
    seconds: dict[str, list[float]] = {implementation.name: [] for implementation in ready}
    for turn in range(rounds if ready else 0):
        place = turn % len(ready)
        for implementation in ready[place:] + ready[:place]:
            seconds[implementation.name].append(sample(implementation, calls))
    return seconds


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
