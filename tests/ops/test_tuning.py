"""The tuning file: what is read, what is refused, and that dispatch takes what it names."""

import dataclasses
import json

import pytest
import torch

from dsmoe import ops
from dsmoe.base.errors import ConfigError
from dsmoe.ops import dispatch, sizes, tuning
from dsmoe.ops.dispatch import Implementation, Op
from dsmoe.runtime.device import Device

ENTRY = tuning.Entry(
    op="modulate",
    device="A processor",
    dtype="torch.float32",
    sizes={"tokens": 64, "dim": 8},
    choice="reference",
    measured=True,
    about="2026-11-28",
    versions={"torch": "1", "cuda": "none", "kernels": "ab"},
    ratios={"native": 1.0, "reference": 1.5},
)


def here(**changes):
    """An entry for this processor and these versions."""
    fields = {"device": Device("cpu").name, "versions": tuning.current_versions()}
    return dataclasses.replace(ENTRY, **(fields | changes))


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The tuning file of this test, read by the next call."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.forget()
    yield path
    tuning.forget()


@pytest.fixture
def op(monkeypatch):
    """An op with two implementations that say who they are."""
    made = Op(
        "modulate",
        (Implementation("native", lambda x: x + 1), Implementation("reference", lambda x: x + 2)),
        lambda x: (("tokens", tuning.bucket(x.shape[0])), ("dim", x.shape[1])),
    )
    yield lambda tokens, dtype=torch.float32: ["native", "reference"][
        int(made(torch.zeros(tokens, 8, dtype=dtype))[0, 0]) - 1
    ]
    dispatch.set_preferred({})


def test_what_is_written_is_read_and_entries_of_one_key_replace_each_other(file):
    tuning.write(file, [ENTRY])
    other = dataclasses.replace(ENTRY, dtype="torch.bfloat16")
    newer = dataclasses.replace(ENTRY, choice="native")
    torch_2 = dataclasses.replace(ENTRY, versions=ENTRY.versions | {"torch": "2"})
    tuning.write(file, [other, newer, torch_2])
    found = tuning.read(file)
    assert len(found) == 3
    assert all(e in found for e in (other, newer, torch_2))
    assert [p.name for p in file.parent.iterdir()] == [file.name], "no temporary file stays behind"


def test_buckets_are_powers_of_two():
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 64, 65, 16384)] == [1, 1, 2, 4, 64, 128, 16384]


def test_dispatch_takes_what_was_measured_for_these_sizes_alone(file, op):
    assert op(64) == "native"
    tuning.write(file, [here()])
    tuning.forget()
    assert op(64) == op(33) == "reference"
    assert op(65) == op(32) == "native", "another bucket"
    assert op(64, torch.float64) == "native", "another dtype"


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "Another processor"},
        *({"versions": tuning.current_versions() | {name: "other"}} for name in ("torch", "cuda", "kernels")),
        {"choice": "gone"},
        {"op": "route"},
    ],
    ids=str,
)
def test_entries_of_other_circumstances_are_not_used(file, op, changes):
    tuning.write(file, [here(**changes)])
    tuning.forget()
    assert op(64) == "native"


def test_use_and_prefer_come_before_a_measurement(file, op):
    tuning.write(file, [here()])
    tuning.forget()
    dispatch.set_preferred({"modulate": "native"})
    assert op(64) == "native"
    dispatch.set_preferred({"modulate": "gone"})
    assert op(64) == "reference", "a preference that does not serve leaves the measurement"
    with ops.use("native"):
        assert op(64) == "native"


def test_a_file_is_read_once(file, op):
    tuning.write(file, [here()])
    assert op(64) == "reference"
    file.unlink()
    assert op(64) == "reference"


def damage(**changes):
    content = {"format": tuning.FORMAT, "entries": [dataclasses.asdict(ENTRY)]}
    content["entries"][0] |= changes
    return json.dumps(content)


DAMAGED = {
    "": "Expecting value",
    "[]": "not a mapping of `format`",
    '{"format": 9, "entries": []}': "format is 9, this dsmoe reads 1",
    '{"format": 1, "format": 1, "entries": []}': "a key stands twice",
    '{"format": 1, "entries": [3]}': "entry 0 does not have exactly the keys op, device",
    damage(more=1): "exactly the keys",
    damage(choice=None): "choice is None",
    damage(sizes={"tokens": "64"}): "sizes is {'tokens': '64'}",
    damage(sizes={"tokens": True}): "sizes is",
    damage(versions={}): "measured is True, which its versions",
    damage(measured=False): "measured is False, which its versions",
    damage()[:-40]: "",
    '{"format": 1, "entries": [' + ",".join([json.dumps(dataclasses.asdict(ENTRY))] * 2) + "]}": "about the same",
}


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_one_line_that_names_it_and_is_never_overwritten(file, text):
    file.write_text(text)
    for call in (lambda: tuning.read(file), lambda: tuning.write(file, [ENTRY])):
        with pytest.raises(ConfigError) as error:
            call()
        assert str(file) in str(error.value)
        assert "delete it" in str(error.value)
        assert DAMAGED[text] in str(error.value)
    assert file.read_text() == text


@pytest.mark.parametrize("content", [None, "{"])
def test_a_run_goes_on_with_the_default_order_after_one_warning(file, op, content, caplog):
    if content:
        file.write_text(content)
    assert op(64) == op(64) == "native"
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    assert record.levelname == "WARNING"
    assert "default order" in record.getMessage()


def test_no_file_named_and_none_in_the_cache_is_no_warning(monkeypatch, tmp_path, op, caplog):
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    assert tuning.default_path() == tmp_path / "dsmoe" / "tuning.json"
    assert op(64) == "native"
    assert not caplog.records
    tuning.forget()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be (written|read).*--out|DSMOE_TUNING"):
        tuning.write(tmp_path / "plain" / "tuning.json", [ENTRY])


def test_the_doctor_tells_what_is_used_and_what_is_stale(file):
    with pytest.raises(ConfigError, match="cannot be read"):
        tuning.describe("A processor")
    name = Device("cpu").name
    old = here(versions=tuning.current_versions() | {"torch": "1.0"})
    tuning.write(file, [here(), old, ENTRY])
    first, changed, second = tuning.describe(name)
    assert changed.startswith("modulate, float32, tokens 64 dim 8: reference, 1.50 times as fast as the default")
    assert f"{file}: 1 entries in use for {name}, 1 of other devices" in first
    assert f"1 not used because measured with other versions (torch 1.0, here {torch.__version__})" in first
    assert "some not measured: no GPU was at hand" in second


def test_what_ships_says_whether_it_was_measured_and_names_what_exists():
    shipped = tuning.read(tuning.DEFAULTS)
    assert shipped
    for entry in shipped:
        assert entry.op in ops.tunable()
        assert entry.choice in {i.name for i in ops.operation(entry.op).implementations}
        assert entry.measured or "no GPU" in entry.about


def test_sizes_are_those_of_the_calls():
    x, weight = torch.randn(40, 8), torch.randn(4, 8)
    r = ops.route(x, weight, 2, False)
    stacks = torch.zeros(4, 16, 8), torch.zeros(4, 8, 16), torch.zeros(4, 1, 24)
    assert sizes.route(x, weight, 2, False, None) == (("tokens", 64), ("dim", 8), ("experts", 4), ("k", 2))
    assert sizes.gather_rows(x, r.order, r.position) == (("tokens", 64), ("dim", 8), ("k", 2))
    rows = torch.zeros(80, 8)
    assert sizes.sum_rows(rows, r.order, r.position, None) == sizes.gather_rows(x, r.order, r.position)
    assert sizes.expert_act(rows, "gelu") == (("rows", 128), ("hidden", 8), ("matrices", 2))
    assert sizes.modulate(x.view(5, 8, 8), x[:5], x[:5]) == (("tokens", 64), ("dim", 8))
    shared = (torch.zeros(6, 8),) * 3
    assert dict(sizes.moe_ffn(x, r, stacks, "swiglu", shared))["shared"] == 6
    assert dict(sizes.moe_ffn(x, r, stacks, "swiglu")) == {
        "tokens": 64, "dim": 8, "hidden": 16, "shared": 0, "experts": 4, "k": 2, "matrices": 3,
    }  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_traces_through_a_tuning_file_without_a_break(file, dynamic):
    """The whole graph, with the implementation that the file names for the size at hand."""
    x, shift = torch.randn(2, 20, 8), torch.randn(2, 8)
    tuning.write(file, [here(sizes={"tokens": 64, "dim": 8})])
    tuning.forget()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ops.modulate, fullgraph=True, backend=backend, dynamic=dynamic)
    assert torch.equal(compiled(x, shift, shift), ops.modulate(x, shift, shift))
    assert "dsmoe.modulate" not in str(graphs[0].graph), "the reference is plain torch"
    if ops.operation("modulate").available("cpu")[0] == "native":
        compiled(x.repeat(1, 4, 1), shift, shift)
        assert "dsmoe.modulate" in str(graphs[-1].graph), "160 tokens are another bucket: the default"
    torch._dynamo.reset()
