"""`python -m dsmoe routing` on made run folders: its numbers against plain sums, its picture, its refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from made_plan import made_plan, made_recipe
from PIL import Image

from dsmoe import __main__ as command
from dsmoe.evaluation import routing, routing_maps
from dsmoe.training.routing_log import Routed, RoutingLog

LAYERS, EXPERTS, BINS, CLASSES = 3, 4, 10, ("0", "1", "none")
SPEC = made_recipe(model={"depth": LAYERS}).model


def made_row(rng, seen, images):
    """One log interval: shares that sum to 1, and images that fall into bins and classes by chance."""

    def shares(*rows):
        return rng.dirichlet(np.full(EXPERTS, 2.0), size=(*rows, LAYERS)).round(4).tolist()

    return {
        "step": seen // 8, "images_seen": seen, "images": images, "load": shares(),
        "timestep_images": rng.multinomial(images, [1 / BINS] * BINS).tolist(), "by_timestep": shares(BINS),
        "classes": list(CLASSES), "class_images": rng.multinomial(images, [0.5, 0.4, 0.1]).tolist(),
        "by_class": shares(len(CLASSES)),
    }  # fmt: skip


def made_rows(seed=0):
    """Intervals of unequal length; the last three end within the last tenth of the images."""
    rng = np.random.default_rng(seed)
    seen = [8, *range(160, 1441, 160), 1520, 1544, 1600]
    return [made_row(rng, n, n - before) for before, n in zip([0, *seen], seen, strict=False)]


def make_run(folder, rows, *, moe=True):
    folder.mkdir()
    model = {"depth": LAYERS} if moe else {"num_experts": 0, "shared_ratio": 0.0}
    (folder / "plan.json").write_text(json.dumps(made_plan(made_recipe(model=model)).to_dict()))
    if rows is not None:
        (folder / "routing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", made_rows())


def test_the_end_is_the_last_tenth_weighted_by_images(run):
    rows = made_rows()
    found = routing_maps.read(run / "routing.jsonl", SPEC)
    tail = rows[-3:]
    assert [r["images_seen"] for r in tail] == [1520, 1544, 1600]
    assert found.end_images == 1600 - 1440
    np.testing.assert_allclose(found.end, sum(np.array(r["load"]) * r["images"] for r in tail) / 160, rtol=1e-12)
    for name, images in (("by_timestep", "timestep_images"), ("by_class", "class_images")):
        for row in range(len(tail[0][images])):
            seen = sum(r[images][row] for r in tail)
            expected = sum(np.array(r[name][row]) * r[images][row] for r in tail) / seen
            np.testing.assert_allclose(getattr(found, name)[row], expected, rtol=1e-12)
    assert found.images_seen.tolist() == [r["images_seen"] for r in rows]
    np.testing.assert_array_equal(found.load, [r["load"] for r in rows])
    assert found.classes == CLASSES


def test_change_is_the_share_of_choices_that_moves():
    """Two rows of 30 and 10 images: layer 0 the same in both, layer 1 wholly elsewhere, layer 2 a tenth moved."""
    one = [[0.5, 0.5, 0], [1, 0, 0], [0.6, 0.4, 0]]
    other = [[0.5, 0.5, 0], [0, 0, 1], [0.5, 0.4, 0.1]]
    found = routing_maps.change(np.array([one, other, np.full((3, 3), np.nan)]), np.array([30, 10, 0]))
    # Against the mean (3/4 one + 1/4 other) the first row moves 1/4 of their distance, the second 3/4.
    np.testing.assert_allclose(found, np.array([0, 1, 0.1]) * (0.75 * 0.25 + 0.25 * 0.75), atol=1e-15)


def test_what_training_writes_is_what_is_read(tmp_path):
    plan = made_plan(made_recipe(model={"depth": LAYERS}))
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, num_classes=100))
    rng, choices = np.random.default_rng(0), 512
    counts = rng.multinomial(choices, rng.dirichlet(np.ones(EXPERTS), size=(40, LAYERS)))
    t, y = rng.integers(0, 500, 40), rng.integers(0, 101, 40)
    log, share = RoutingLog(plan, torch.device("cpu")), torch.tensor(counts / choices, dtype=torch.float32)
    log.add(Routed(share.mean(0), share, torch.tensor(t), torch.tensor(y)))
    (tmp_path / "routing.jsonl").write_text(json.dumps({"step": 5, "images_seen": 40, **log.take().maps()}) + "\n")
    found = routing_maps.read(tmp_path / "routing.jsonl", SPEC)
    np.testing.assert_allclose(found.end, counts.mean(0) / choices, atol=0.5e-6)
    np.testing.assert_allclose(found.by_timestep[3], counts[t // 100 == 3].mean(0) / choices, atol=0.5e-4)
    assert np.isnan(found.by_timestep[5:]).all(), "no image was so noisy"
    assert found.class_images.sum() == 40
    assert len(found.classes) == 65


def panels(path):
    """The picture in a grid of 2 x 3, RGB."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return [panel for half in np.array_split(pixels, 2, 0) for panel in np.array_split(half, 3, 1)]


def test_the_command_draws_six_panels_and_sums_up(run, capsys):
    assert command.main(["routing", str(run)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert list(lines) == ["run", "seen", "entropy", "busiest", "dead", "timestep", "class", "drawn"]
    assert lines["drawn"] == str(run / "routing.png")
    assert lines["seen"].startswith("1,600 images in 13 log intervals")
    assert "over the last 160" in lines["seen"]
    found = routing_maps.read(run / "routing.jsonl", SPEC)
    layer, expert = np.unravel_index(found.end.argmax(), found.end.shape)
    assert lines["busiest"] == f"layer {layer} expert {expert}: {found.end.max() * EXPERTS:.2f} times a fair share"
    # Axes, ticks and letters are grey. Measured: the five maps 0.35 to 0.59, the curves 0.011.
    coloured = [(np.ptp(panel.astype(int), axis=2) > 30).mean() for panel in panels(run / "routing.png")]
    assert min(coloured[:5]) > 0.2, coloured
    assert coloured[5] > 0.005, coloured


def test_dead_experts_and_the_least_even_layer_are_named(tmp_path, capsys):
    rows = made_rows()
    for row in rows:
        row["load"] = [[0.25] * 4, [0.5, 0.01, 0.49, 0.0], [0.3, 0.2, 0.3, 0.2]]
    run = make_run(tmp_path / "run", rows)
    assert command.main(["routing", str(run), "--out", str(tmp_path / "new" / "heat.png")]) == 0
    out = capsys.readouterr().out
    assert "layer 1 expert 1 (4.0% of a fair share), layer 1 expert 3 (0.0% of a fair share)" in out
    entropy = -(0.5 * np.log(0.5) + 0.01 * np.log(0.01) + 0.49 * np.log(0.49)) / np.log(4)
    assert f"lowest in layer 1: {entropy:.4f}" in out
    assert (tmp_path / "new" / "heat.png").stat().st_size > 10_000
    assert not (run / "routing.png").exists()


def test_one_interval_is_enough_and_a_line_still_being_written_is_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "run", made_rows()[:1])
    with open(run / "routing.jsonl", "a") as file:
        file.write('{"step": 20, "images_se')
    assert command.main(["routing", str(run)]) == 0
    assert "8 images in 1 log intervals" in capsys.readouterr().out


def damaged(row, **changes):
    return {name: value for name, value in {**row, **changes}.items() if value is not None}


GOOD = made_rows()[0]
REFUSED = {
    "no folder": (lambda p: p / "nowhere", "is not a run folder (it has no plan.json)"),
    "a file": (lambda p: make_run(p / "r", [GOOD]) / "plan.json", "is not a run folder"),
    "dense": (lambda p: make_run(p / "r", None, moe=False), "trains a dense model"),
    "no routing.jsonl": (lambda p: make_run(p / "r", None), "routing.jsonl does not exist"),
    "empty": (lambda p: make_run(p / "r", []), "holds no interval yet"),
    "no object": (lambda p: make_run(p / "r", [GOOD, 7, GOOD]), "line 2 is damaged"),
    "lacks a map": (lambda p: make_run(p / "r", [damaged(GOOD, by_class=None)]), "line 1 is damaged"),
    "another model": (lambda p: make_run(p / "r", [damaged(GOOD, load=[[0.5, 0.5]])]), "line 1 is damaged"),
    "not a number": (lambda p: make_run(p / "r", [GOOD, damaged(GOOD, images=float("nan"))]), "line 2 is damaged"),
    "no images": (lambda p: make_run(p / "r", [damaged(GOOD, images=0)]), "without images"),
    "other rows": (lambda p: make_run(p / "r", [damaged(GOOD, classes=["0", "1", "2"]), GOOD]), "other classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_one_line_and_exit_code_2(case, tmp_path, capsys):
    make, reason = REFUSED[case]
    assert command.main(["routing", str(make(tmp_path))]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert reason in shown.err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("out", ["heat.jpg", "folder.png", "plan.json/heat.png"])
def test_a_bad_out_is_refused(out, run, capsys):
    (run / "folder.png").mkdir()
    assert command.main(["routing", str(run), "--out", str(run / out)]) == 2
    assert capsys.readouterr().err.startswith("error: --out ")


def test_a_plan_that_is_no_plan_is_refused(run, capsys):
    for text in ("{", "[]", '{"format": 1}'):
        (run / "plan.json").write_text(text)
        assert command.main(["routing", str(run)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_classes_are_shown_by_name_and_groups_by_ids():
    assert routing._class_name("1", ("cone", "a class name far too long")) == "a class name far too"
    assert [routing._class_name(row, ("cone",)) for row in ("0-15", "none", "7")] == ["0-15", "none", "7"]
