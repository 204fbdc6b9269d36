"""benchmarks/gpu_suite.py: every section runs on a CPU in tiny sizes, floors by other formulas, verdicts, failures."""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_suite  # noqa: E402
import moe_layer  # noqa: E402
from gpu_sections import layer, op_floors, targets  # noqa: E402
from gpu_sections.settings import Settings  # noqa: E402
from moe_gpu_rivals import GPU_RIVALS, missing  # noqa: E402
from moe_rivals import Loop, agree  # noqa: E402


def settings(folder, seconds=30.0):
    return Settings("cpu", True, seconds, folder)


# environment, build and gpu_tests start other programs, which have tests of their own.
@pytest.mark.parametrize("name", ["rates", "op_floors", "layer", "train", "repeat", "tune"])
def test_a_section_runs_and_prints_its_rows(name, tmp_path):
    rows = [json.loads(json.dumps(row)) for row in gpu_suite.module(name).run(settings(tmp_path))]
    assert rows
    assert not [row for row in rows if "error" in row]
    every = {name: {"rows": rows}}
    lines = gpu_suite.module(name).table(rows, every)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1, lines
    if name == "op_floors":
        assert {row["op"] for row in rows} == set(op_floors.OPS)
        assert all(row["seconds"] > 0 for row in rows)
    if name == "layer":
        can = {n for n in GPU_RIVALS if not missing(n) and "compile" not in n}
        assert set(rows[0]["seconds"]) == can | {layer.OURS}, rows[0]["absent"]
        assert "Megatron-core permute" not in can or set(rows[1]["seconds"]) >= {"Megatron-core permute"}
    if name == "repeat":
        assert [row["holds"] for row in rows] == [True, None, None]
    if name == "tune":
        assert (tmp_path / "tuning.json").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rival_that_computes_something_else_is_found(dtype):
    """One wrong token among 256, renormalised gates, another expert's weights."""
    key = {"device": "cpu", "dtype": dtype, "dim": 64, "tokens": 256}
    ours, (x, _) = moe_layer.our_layer(64, dtype, "cpu"), moe_layer.inputs(key)
    truth = ours(x[None])[0][0].detach()

    def found(rival, x=x):
        return agree(rival(x).detach(), truth)

    class Renormalised(Loop):
        def routed(self, x, gates, indices):
            return super().routed(x, gates / gates.sum(-1, keepdim=True), indices)

    class Swapped(Loop):
        def expert(self, rows, i):
            return super().expert(rows, {0: 1, 1: 0}.get(i, i))

    assert found(Loop(ours))
    assert not found(Loop(ours), x.index_copy(0, torch.tensor([3]), x[4:5]))
    assert not found(Renormalised(ours))
    assert not found(Swapped(ours))


def test_the_floor_is_what_the_tensors_of_a_call_weigh():
    """Counted from real tensors: all that goes in and comes out, once."""
    from dsmoe.base.presets import preset
    from dsmoe.scaling.tune_cases import cases

    every = cases(preset("nano-4E2A"), 256, torch.device("cpu"), torch.bfloat16)
    for op in ("gather_rows", "sum_rows", "expert_act", "modulate"):
        case = every[op]()
        given = {k: t.requires_grad_() for k, t in case.inputs.items()}
        from dsmoe import ops

        out = ops.operation(op)(*case.arguments(given))
        gradients = torch.autograd.grad(out, list(given.values()), torch.ones_like(out))
        weights = {"shift", "scale"} if op == "modulate" else set()
        inputs = sum(t.nbytes for k, t in given.items() if k not in weights)
        position = case.arguments(given)[2].nbytes if op in ("gather_rows", "sum_rows") else 0
        statistics = 8 * 256 if op == "modulate" else 0
        forward = inputs + position + out.nbytes + statistics
        assert op_floors.floor_bytes(op, case.sizes, 2, backward=False) == forward, op
        back = sum(g.nbytes for g, k in zip(gradients, given, strict=True) if k not in weights)
        if op in ("expert_act", "modulate"):  # reads its inputs again
            back += inputs + out.nbytes + statistics
        elif op == "gather_rows":
            back += out.nbytes + position
        else:  # the added tensor's gradient is the incoming one
            back += out.nbytes + position - given["add"].nbytes
        assert op_floors.floor_bytes(op, case.sizes, 2, backward=True) == forward + back, op


def test_flops_are_those_of_the_facts():
    """docs/kernels.md, section 2: 60 T d^2 forward for SwiGLU with a shared expert, 32 for GELU without; three times
    with the backward pass."""
    tokens, dim = 16384, 1024
    router = 3 * 2 * tokens * dim * 8
    assert layer.flops(dim, "swiglu", tokens) == 3 * 60 * tokens * dim**2 + router
    assert layer.flops(dim, "gelu", tokens) == 3 * 32 * tokens * dim**2 + router


def cell(tokens, ours, loop, autoep, peaks=(100, 120)):
    seconds = {layer.OURS: [ours] * 3, "per-expert loop": [loop] * 3, "AutoEP": [autoep] * 3}
    peak = dict(zip((layer.OURS, "AutoEP"), peaks, strict=True))
    return {
        "shape": "L/2",
        "compiled": False,
        "tokens": tokens,
        "seconds": seconds,
        "peak_bytes": peak,
        "flops": 60e12 * tokens / 16384,
    }


def results(cells, device="cuda", share=0.85):
    rates = [{"what": "copy", "rate": 4e12}, {"what": "dense product", "rate": 800e12}]
    floors = [
        {"op": op, "preset": "L/2-8E2A", "backward": False, "floor_bytes": 4e9, "seconds": 1e-3 / share}
        for op in op_floors.OPS
    ]
    return {
        "settings": {"device": device},
        "rates": {"rows": rates},
        "op_floors": {"rows": floors},
        "layer": {"rows": cells},
        "repeat": {"rows": [{"preset": "L/2", "question": "same bits", "holds": True, "seen": ""}]},
    }


def verdicts(every):
    return [v.verdict for v in targets.evaluate(every)]


GOOD = [cell(n, 0.1 * n / 16384, 0.3 * n / 16384, 0.14 * n / 16384) for n in layer.TOKENS]
MET, MISSED, NOT = targets.MET, targets.MISSED, targets.NOT_MEASURED


def test_targets_are_met_missed_or_not_measured():
    # floors, 0.60, 0.74, AutoEP, loop, memory, repeat
    assert verdicts(results(GOOD)) == [MET, MET, MET, MET, MET, MET, MET]
    slow = [*GOOD[:2], cell(65536, 0.46, 0.9, 0.5, peaks=(130, 120))]
    assert verdicts(results(slow)) == [MET, MET, MISSED, MISSED, MISSED, MISSED, MET]
    assert verdicts(results(GOOD, share=0.79))[0] == MISSED
    assert verdicts(results(GOOD[:2])) == [MET, NOT, NOT, NOT, NOT, NOT, MET], "two of three cells are not all"
    no_autoep = [{**c, "seconds": {k: v for k, v in c["seconds"].items() if k != "AutoEP"}} for c in GOOD]
    assert verdicts(results(no_autoep))[3] == NOT


def test_nothing_and_a_cpus_figures_measure_no_target():
    assert set(verdicts({})) == {NOT}
    assert set(verdicts(results(GOOD, device="cpu"))) == {NOT}


SECTION = """
import sys, time, pathlib
from gpu_sections import settings
def run(settings):
    yield {{"row": 1}}
    {what}
    yield {{"row": 2}}
def table(rows, every):
    return [str(rows)]
"""


@pytest.mark.parametrize(
    ("what", "state", "rows", "words"),
    [
        ("pass", "done", 2, ""),
        ("raise ValueError('out of luck')", "failed", 1, "ValueError: out of luck"),
        ("time.sleep(60)", "stopped: its time was over", 1, ""),
        ("import os; os.kill(os.getpid(), 11)", "failed", 1, ""),
    ],
)
def test_a_section_that_fails_or_hangs_keeps_its_rows_and_the_rest_goes_on(what, state, rows, words, tmp_path):
    """A copy of the suite with a made section in the place of one."""
    copy = tmp_path / "benchmarks"
    (copy / "gpu_sections").mkdir(parents=True)
    (copy / "gpu_suite.py").write_text((ROOT / "benchmarks/gpu_suite.py").read_text())
    (copy / "gpu_sections/__init__.py").write_text("")
    (copy / "gpu_sections/settings.py").write_text("class Settings:\n    def __init__(self, *_): pass\n")
    (copy / "gpu_sections/rates.py").write_text(SECTION.format(what=what))
    spec = importlib.util.spec_from_file_location("copied_suite", copy / "gpu_suite.py")
    copied = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(copied)
    sys.path[:] = before
    given = argparse.Namespace(device="cpu", quick=True)
    begun = time.monotonic()
    found = copied.launch("rates", given, tmp_path, 8.0 if "sleep" in what else 60.0)
    assert time.monotonic() - begun < 60
    assert (found["state"], len(found["rows"])) == (state, rows), found
    assert words in found["error"]


def test_the_report_is_written_after_every_section_and_goes_to_out(tmp_path, monkeypatch, capsys):
    seen = []

    def launch(name, given, folder, seconds):
        seen.append((name, [p.name for p in folder.iterdir() if p.suffix == ".md"], seconds))
        if name == "rates":
            return {"state": "failed", "rows": [], "seconds": 1.0, "error": "no luck"}
        return {"state": "done", "rows": [{"fact": "device", "value": "x"}], "seconds": 1.0, "error": ""}

    out = tmp_path / "not" / "there yet"
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(gpu_suite, "launch", launch)
    arguments = ["--device", "cpu", "--quick", "--folder", str(tmp_path / "f"), "--sections", "environment", "rates"]
    assert gpu_suite.main(arguments) == 1
    assert [name for name, _, _ in seen] == ["environment", "rates"]
    assert seen[1][1], "after the first section there is a report"
    (report,) = out.glob("*.md")
    text = report.read_text()
    assert "dry run on a CPU" in text
    assert "no luck" in text
    assert "| L/2 layer at most T_matmul / 0.60 (must) | not measured |" in text
    assert json.loads(next(out.glob("*.json")).read_text())["rates"]["error"] == "no luck"
    assert "not measured" in capsys.readouterr().out


def test_the_whole_stays_under_nine_minutes():
    assert gpu_suite.TOTAL_SECONDS <= 530
    assert set(gpu_suite.SECTIONS) == {p.stem for p in (ROOT / "benchmarks/gpu_sections").glob("*.py")} - {
        "__init__", "settings", "targets",
    }  # fmt: skip


def test_on_a_cpu_the_large_sizes_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        gpu_suite.main(["--device", "cpu"])
    assert caught.value.code == 2
    assert "--quick" in capsys.readouterr().err
