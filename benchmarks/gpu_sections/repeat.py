"""moe_ffn forward and backward: the same bits on every run, no wait of the host, one CUDA graph with the same bits."""

from collections.abc import Callable, Iterator

import torch

from dsmoe import ops
from dsmoe.base.presets import preset
from dsmoe.scaling.tune_cases import Case, cases
from gpu_sections.settings import Settings, captured, first_line

REPEATS = 20


def run(settings: Settings) -> Iterator[dict]:
    """A row a preset and question: holds (None where it cannot be asked here), and what was seen."""
    names, tokens = (("nano-4E2A",), 128) if settings.quick else (("L/2-8E2A", "XL-8E2A"), 16384)
    for name in names:
        make = cases(preset(name), tokens, settings.torch_device, torch.bfloat16)["moe_ffn"]
        for question, answer in (("same bits", _same_bits), ("no host wait", _no_wait), ("CUDA graph", _graph)):
            try:
                holds, seen = answer(make(), settings)
            except RuntimeError as error:
                holds, seen = False, first_line(error)
            yield {"preset": name, "tokens": tokens, "question": question, "holds": holds, "seen": seen}


def _call(case: Case) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A forward and backward pass, and the list that holds the output and gradients of the last."""
    given = {name: t.detach().requires_grad_() for name, t in case.inputs.items()}
    function, kept = ops.operation(case.op), []

    def call() -> None:
        outputs = case.outputs(function(*case.arguments(given)))
        gradients = torch.autograd.grad(outputs, list(given.values()), [torch.ones_like(t) for t in outputs])
        kept[:] = [*(t.detach() for t in outputs), *gradients]

    return call, kept


def _same_bits(case: Case, settings: Settings) -> tuple[bool, str]:
    call, kept = _call(case)
    call()
    first = [t.clone() for t in kept]
    equal = 0
    for _ in range(3 if settings.quick else REPEATS):
        call()
        equal += all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    return equal == (3 if settings.quick else REPEATS), f"{equal} repeats equal"


def _no_wait(case: Case, settings: Settings) -> tuple[bool | None, str]:
    if settings.device != "cuda":
        return None, "a CPU"
    call, _ = _call(case)
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True, "torch.cuda.set_sync_debug_mode('error') raised nothing"


def _graph(case: Case, settings: Settings) -> tuple[bool | None, str]:
    if settings.device != "cuda":
        return None, "a CPU"
    call, kept = _call(case)
    call()
    eager = [t.clone() for t in kept]
    replay = captured(call, settings)
    for t in kept:  # now the graph's own memory
        t.zero_()
    replay()
    settings.wait()
    equal = all(torch.equal(a, b) for a, b in zip(eager, kept, strict=True))
    return equal, "bits of the replay are those of the plain call" if equal else "the replay gives other bits"


def table(rows: list[dict], _: dict) -> list[str]:
    """Markdown."""
    words = {True: "yes", False: "NO", None: "not measured"}
    return [
        "| preset | tokens | question | holds | |",
        "|---" * 5 + "|",
        *(f"| {r['preset']} | {r['tokens']} | {r['question']} | {words[r['holds']]} | {r['seen']} |" for r in rows),
    ]
