"""`python -m dsmoe tune`: what it measures, what it refuses to time, what it chooses and writes."""

import dataclasses
import json

import pytest
import torch
from fp64_truth import needs_kernels

from dsmoe import __main__ as command
from dsmoe import ops
from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import preset
from dsmoe.ops import tuning
from dsmoe.ops.dispatch import Implementation
from dsmoe.runtime.device import Device
from dsmoe.scaling import tune
from dsmoe.scaling.tune_cases import cases

CPU = Device("cpu")


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    yield path
    tuning.forget()


def every_case(name):
    return cases(preset(name), 64, torch.device("cpu"), torch.float32)


def test_every_tunable_op_has_a_case_and_a_dense_model_modulation_alone():
    assert {name.split(",")[0] for name in every_case("nano-4E2A")} == set(ops.tunable())
    assert set(every_case("nano")) == {"modulate"}


@pytest.mark.parametrize("name", ["nano-4E2A", "gelu"])
def test_cases_are_filed_under_the_sizes_that_a_layers_own_calls_have(name, monkeypatch):
    """What a training layer calls is what was measured."""
    from dsmoe.moe import MoE

    spec = dataclasses.replace(preset("nano-4E2A"), **({"expert_kind": "gelu"} if name == "gelu" else {}))
    made = [make() for make in cases(spec, 64, torch.device("cpu"), torch.float32).values()]
    measured = [(case.op, case.sizes) for case in made if case.op != "modulate"]
    asked = []
    monkeypatch.setattr(tuning, "known", lambda op: True)
    monkeypatch.setattr(tuning, "choice", lambda op, *place: asked.append((op, dict(place[-1]))))
    ops.prefer({"moe_ffn": "reference"}, "cpu")  # whose pieces are calls of their own
    try:
        MoE(spec)(torch.randn(2, 32, spec.dim))
    finally:
        ops.prefer({}, "cpu")
    assert all(one in measured for one in asked)
    assert all(one in asked for one in measured)


def test_the_command_measures_writes_and_dispatch_reads_it(own_file, capsys):
    arguments = ["tune", "--preset", "nano-4E2A", "--tokens", "48", "--dtype", "fp32", "--device", "cpu"]
    assert command.main([*arguments, "--rounds", "3", "--ops", "modulate", "gather_rows"]) == 0
    shown = capsys.readouterr().out
    assert "modulate  tokens 64 dim 128: " in shown
    assert f"written to {own_file}: 2 operations" in shown
    entries = tuning.read(own_file)
    assert [(e.op, e.measured, e.device, e.dtype) for e in entries] == [
        ("gather_rows", True, CPU.name, "torch.float32"),
        ("modulate", True, CPU.name, "torch.float32"),
    ]
    assert entries[1].versions == tuning.current_versions()
    assert set(entries[1].ratios) == set(ops.operation("modulate").available("cpu"))
    assert tuning.known("modulate")
    assert not tuning.known("route")


def finding(**seconds):
    return tune.Finding("modulate", {"tokens": 64, "dim": 8}, seconds)


@pytest.mark.parametrize(
    ("other", "chosen"), [(0.5, "reference"), (0.96, "reference"), (0.98, "native"), (1.0, "native"), (2.0, "native")]
)
def test_a_winner_must_be_worth_three_percent_in_paired_rounds(other, chosen):
    base = [1.0, 5.0, 2.0, 1.0, 9.0]  # rounds on a busy machine: only ratios within a round say something
    assert finding(native=base, reference=[other * s for s in base]).choice == chosen


def test_what_computes_something_else_or_fails_is_not_timed(monkeypatch):
    op = ops.operation("modulate")

    def off_by_a_little(x, shift, scale):
        return op.named("reference", "cpu").function(x, shift, scale) * 1.001

    def broken(*_):
        raise ZeroDivisionError("no\nsuch luck")

    more = (Implementation("off", off_by_a_little), Implementation("broken", broken))
    changed = dataclasses.replace(op, implementations=(*more, *op.implementations))
    monkeypatch.setitem(ops._OPS, "modulate", changed)
    (found,) = tune.measure("nano", 32, CPU, torch.float32, 3)
    assert "error against float64" in found.refused["off"]
    assert found.refused["broken"] == "ZeroDivisionError: no"
    assert set(found.seconds) == set(op.available("cpu"))
    assert found.default == op.available("cpu")[0]
    text = "\n".join(tune.describe(found))
    assert "broken       not timed: ZeroDivisionError: no" in text


def test_only_a_gradient_that_is_wrong_is_noticed(monkeypatch):
    op = ops.operation("gather_rows")

    def right_forward(x, order, position):
        return op.named("reference", "cpu").function(x, order, position) + 0.01 * (x - x.detach()).sum()

    changed = dataclasses.replace(op, implementations=(Implementation("off", right_forward), *op.implementations))
    monkeypatch.setitem(ops._OPS, "gather_rows", changed)
    (found,) = tune.measure("nano-4E2A", 32, CPU, torch.float32, 3, ["gather_rows"])
    assert set(found.refused) >= {"off"}


@needs_kernels
@pytest.mark.parametrize("model", ["nano-4E2A", "XL-8E2A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_that_ships_passes_the_check(model, dtype):
    every = cases(dataclasses.replace(preset(model), dim=32, heads=2), 40, torch.device("cpu"), dtype)
    for name, make in every.items():
        case = make()
        for implementation in ops.operation(case.op).implementations:
            if implementation.serves("cpu"):
                assert tune._wrong(implementation, case) == "", (name, implementation.name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--preset", "nano-4E"], "unknown model.preset 'nano-4E'. Did you mean"),
        (["--tokens", "0"], "--tokens is 0; give a number from 1"),
        (["--rounds", "2"], "--rounds is 2"),
        (["--dtype", "fp16"], "--dtype fp16 does not work on"),
        (["--ops", "rout"], "unknown op to tune 'rout'. Did you mean 'route'"),
        (["--preset", "nano", "--ops", "route"], "Choose from: modulate"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(changes, words, capsys):
    arguments = {"--preset": ["nano-4E2A"], "--tokens": ["16"], "--device": ["cpu"], "--dtype": ["fp32"]}
    name = None
    for word in changes:
        name, arguments[name] = (word, []) if word.startswith("--") else (name, [*arguments[name], word])
    assert command.main(["tune", *(w for n, values in arguments.items() for w in (n, *values))]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_gpu_that_is_not_there_is_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["tune", "--preset", "nano", "--tokens", "16", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_a_damaged_file_is_told_before_anything_is_measured(own_file, capsys, monkeypatch):
    own_file.parent.mkdir()
    own_file.write_text(json.dumps({"format": 1}))
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured"))
    arguments = ["--preset", "nano", "--tokens", "16", "--device", "cpu", "--dtype", "fp32"]
    assert command.main(["tune", *arguments]) == 2
    assert f"tuning file {own_file} is damaged" in capsys.readouterr().err
    assert command.main(["doctor", "--no-measure"]) == 2
    assert "op modulate" in capsys.readouterr().out, "the rest of the report is still there"
    with pytest.raises(ConfigError):
        tuning.read(own_file)
