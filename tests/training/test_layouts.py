"""Training under DeepSpeed equals a bare torch loop, whatever the ZeRO stage, ranks and accumulation."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from distributed_harness import assert_succeeded, launch
from router_choices import TIE, Choices, Decisions, compare_choices

from dsmoe.base.presets import ModelSpec
from dsmoe.models.dit import DiT

SCRIPT = Path(__file__).with_name("layout_cells.py")
CELLS = [
    # kind, balance scope, ZeRO stage, accumulation, activation checkpointing, precision
    ("moe", "sample", 0, 1, False, "fp32"),
    ("moe", "sample", 1, 1, False, "fp32"),
    ("moe", "sample", 2, 2, False, "fp32"),
    ("moe", "sample", 3, 1, True, "fp32"),
    ("moe", "step", 1, 2, True, "fp32"),
    ("moe", "sample", 3, 1, "experts", "fp32"),
    ("gelu", "sample", 3, 2, "experts", "fp32"),
    ("dense", "none", 1, 1, False, "fp32"),
    ("dense", "none", 2, 1, True, "fp32"),
    # The bare loop itself, data parallel in fp64 without an engine: rounding is out of the way, so logic shows.
    ("moe", "step", None, 2, False, "fp64"),
    ("gelu", "sample", None, 1, False, "fp64"),
]

EXPERT_PARALLEL = [
    # ..., seed, ranks a set of experts, rate of the selection bias, optimizer offloaded, step skipped by an overflow,
    # a ds_config that ships
    ("moe", "sample", 0, 1, False, "fp32", 3, 2),
    ("moe", "step", 1, 2, True, "fp32", 3, 2),
    ("gelu", "sample", 2, 1, False, "fp32", 3, 2, 0.002),
    ("moe", "none", 1, 2, False, "fp32", 3, 2, 0.002, True),
    ("moe", "step", 2, 2, False, "fp32", 3, 2, 0.002, False, 2),
    ("lone", "none", 3, 1, True, "fp32", 3, 2, 0.002, False, 3),
    ("gelu", "sample", 1, 2, False, "fp32", 3, 2, 0.0, False, None, "quickstart_ep2.json"),
    ("gelu", "sample", 3, 2, True, "fp32", 3, 2),
    ("moe", "sample", 3, 1, "experts", "fp32", 3, 2),
]

# Design, invariance statement: losses, gradient norms, weights, averages, and the zero-gradient direction N x lr; the
# selection bias moves by whole steps and must be the same bits.
BOUNDS = {
    "fp32": {"loss": 1e-6, "norm": 1e-5, "weights": 1e-5, "average": 1e-5, "key_bias": 6 * 3e-3, "bias": 0.0},
    "fp64": {"loss": 1e-12, "norm": 1e-12, "weights": 1e-12, "average": 1e-12, "key_bias": 6 * 3e-3, "bias": 0.0},
}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_every_layout_trains_as_one_process(world, subtests, monkeypatch):
    wanted = CELLS + EXPERT_PARALLEL * (world > 1)
    results = launch([SCRIPT, json.dumps(wanted)], world, timeout=240, preloaded=True)
    assert_succeeded(results)
    cells = [json.loads(line[5:]) for line in results[0].stdout.splitlines() if line.startswith("CELL ")]
    assert [tuple(c["cell"][: len(asked)]) for c, asked in zip(cells, wanted, strict=True)] == wanted
    for cell in cells:
        with subtests.test(world=world, cell=cell["cell"]):
            check_cell(cell, world)
    monkeypatch.syspath_prepend(SCRIPT.parents[1] / "full")
    from expert_parallel import KINDS, VARIANTS, table  # what make test-full shows of such cells

    ways = {variant[1:] for variant in VARIANTS.values()}
    shown = [c for c in cells if c["cell"][0] in KINDS and tuple(c["cell"][3:5]) in ways]
    with subtests.test("the long table reads these cells"):
        assert len(table(shown).splitlines()) == 2 + len(shown) > 2


def check_cell(cell, world):
    kind, _, stage, *_, precision = cell["cell"][:6]
    assert cell["forbidden"] == 0, f"a router chose otherwise where there was no tie: {cell}"
    # 6 steps of 8 images, 2 layers, 4 tokens
    assert cell["decisions"] == (0 if kind == "dense" else 6 * 8 * 2 * 4), cell
    for name, bound in BOUNDS[precision].items():
        if cell["flips"] and name not in ("loss", "norm"):
            continue  # the statement ends the comparison of parameters at a tie
        assert cell[name] <= bound, (name, cell)
    assert cell["moved"] > 1e-2, "the run did not move the average; the comparison would show nothing"
    assert (cell["steered"] > 0.004) == (cell["cell"][8] > 0), "two steps of the bias at least, where there is one"
    assert cell["clipped"] > 0, "no step was clipped; the comparison would not cover clipping"
    share = 1 if stage == 0 else world
    assert cell["own"] <= -(-cell["all"] // share) * 1.1 + 1000, "the average is not sharded as the parameters"


def planted(gap: float, *flips: tuple[int, int, int]) -> Decisions:
    """5 samples from number 40, 2 layers, 3 tokens, experts {0, 1} chosen; at `flips` {0, 2} with this gap."""
    found = Decisions(40, torch.tensor([0, 1]).repeat(5, 2, 3, 1), torch.full((5, 2, 3), 0.25, dtype=torch.float64))
    for place in flips:
        found.chosen[place] = torch.tensor([0, 2])
        found.gap[place] = gap
    return found


def test_planted_flips_are_counted_and_judged_by_both_gaps():
    assert compare_choices(planted(1), planted(1)) == {
        "decisions": 30, "flips": 0, "forbidden": 0, "first_flip": None, "narrowest": 0.25,
    }  # fmt: skip
    places = [(3, 0, 1), (1, 1, 2), (4, 0, 0)]
    # The truth had a gap of 0.25 at these places: no tie, whatever the other run says.
    found = compare_choices(planted(TIE / 2, *places), planted(1))
    assert (found["flips"], found["forbidden"], found["first_flip"]) == (3, 3, 41)
    # A tie in both runs: the truth chose {0, 1} with as small a gap.
    truth = planted(1)
    for place in places:
        truth.gap[place] = TIE / 2
    found = compare_choices(planted(TIE / 2, *places), truth)
    assert (found["flips"], found["forbidden"], found["narrowest"]) == (3, 0, TIE / 2)
    assert compare_choices(planted(TIE * 2, *places), truth)["forbidden"] == 3
    assert compare_choices(planted(math.nan, *places), truth)["forbidden"] == 3


def test_the_gap_of_a_choice_counts_the_selection_bias():
    torch.manual_seed(0)
    spec = ModelSpec(depth=1, dim=32, heads=2, patch=2, num_experts=4, top_k=1)
    model = DiT(spec, input_size=4, in_channels=4, num_classes=5, learn_sigma=True, selection_bias=True)
    moe, choices = model.blocks[0].moe, Choices(model)
    with torch.no_grad():
        moe.gate.weight.zero_()  # every probability is 1/4
        moe.selection_bias.copy_(torch.tensor([0.0, 0.5, 0.375, 0.0]))
    choices.begin(torch.tensor([0]))
    model(torch.randn(1, 4, 4, 4), torch.tensor([1]), torch.tensor([1]))
    found = choices.decisions(range(1), shared=False)
    assert found.chosen.unique().tolist() == [1]
    assert found.gap.unique().tolist() == [0.125]


def test_choices_of_a_model_are_recorded_by_sample_and_notice_another_router():
    torch.manual_seed(0)
    spec = ModelSpec(depth=2, dim=32, heads=2, patch=2, num_experts=4)
    model = DiT(spec, input_size=4, in_channels=4, num_classes=5, learn_sigma=True)
    x, t, y = torch.randn(6, 4, 4, 4), torch.arange(6), torch.arange(6) % 5

    def decide(batches, checkpointing=False):
        watched = copy.deepcopy(model)
        watched.activation_checkpointing = checkpointing
        choices = Choices(watched)
        for index in batches:
            choices.begin(index + 10)
            watched(x[index], t[index], y[index])[0].sum().backward()
        return choices.decisions(range(10, 16), shared=False)

    whole = decide([torch.arange(6)])
    cut = decide([torch.tensor([4, 5]), torch.tensor([1, 0]), torch.tensor([2, 3])], checkpointing=True)
    assert whole.chosen.shape == (6, 2, 4, 2)
    found = compare_choices(cut, whole)
    assert (found["decisions"], found["forbidden"]) == (48, 0)
    with torch.no_grad():
        model.blocks[1].moe.gate.weight.neg_()  # the opposite order: the last two of four become the first two
    found = compare_choices(decide([torch.arange(6)]), whole)
    assert found["flips"] == found["forbidden"] == 24
    with pytest.raises(AssertionError, match="by no rank"):
        decide([torch.arange(5)])
