"""The costs in docs/paper.md, recomputed from the recipes and the accounting; every figure and table has its row."""

import re
from pathlib import Path

import pytest

from dsmoe.base.accounting import count_macs
from dsmoe.base.presets import preset
from dsmoe.base.recipe import list_recipes, load_recipe

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
PEAK, SHARE = 989e12, 0.40  # the document's assumption


def tables():
    """Cells of every row of every table, by the table's header."""
    for block in re.findall(r"(?:^\|.*\n)+", DOCUMENT, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        yield header, rows


COSTS = [dict(zip(header, row, strict=True)) for header, rows in tables() if "EFLOP" in header for row in rows]
RECIPES = [row for row in COSTS if "recipe" in row]
LATER = [row for row in COSTS if "what" in row]


def shown(value):
    """As the document rounds."""
    return f"{value:.3g}"


@pytest.mark.parametrize("row", COSTS, ids=lambda row: row.get("recipe") or row["what"])
def test_costs_follow_from_images_and_macs(row):
    images = int(row["images"].replace(",", ""))
    macs = count_macs(preset(row["model"]), channels=4, input_size=int(row["px"]) // 8, learn_sigma=True).total
    operations = 6 * macs * images
    assert row["forward GMACs"] == f"{macs / 1e9:.4g}"
    assert row["EFLOP"] == shown(operations / 1e18)
    assert row["GPU-hours (assumed)"] == shown(operations / (SHARE * PEAK) / 3600)


@pytest.mark.parametrize("row", RECIPES, ids=lambda row: row["recipe"])
def test_a_cost_is_that_of_the_recipe(row):
    recipe = load_recipe(row["recipe"].strip("`"))
    assert recipe.train.images == int(row["images"].replace(",", ""))
    assert recipe.data.resolution == int(row["px"])
    assert recipe.model == preset(row["model"])
    for name in re.findall(r"`(\w+)`", row["ds_config"]):
        assert (ROOT / "ds_configs" / f"{name}.json").is_file(), name


@pytest.mark.parametrize("row", LATER, ids=lambda row: row["what"])
def test_images_of_a_later_run_are_its_iterations_times_its_batch(row):
    thousands, batch = re.search(r"(\d+)K x (\d+)", row["what"]).groups()
    assert int(row["images"].replace(",", "")) == int(thousands) * 1000 * int(batch)


def test_every_paper_recipe_has_a_cost():
    of_paper = {name for name, description in list_recipes() if description.startswith("paper ")}
    assert {row["recipe"].strip("`") for row in RECIPES} == of_paper


def test_every_figure_and_table_of_the_paper_has_a_row():
    named = next(" ".join(row[0] for row in rows) for header, rows in tables() if header[0] == "in the paper")
    figures = {int(n) for group in re.findall(r"Figures? ([\d, ]+)", named) for n in re.findall(r"\d+", group)}
    assert figures == set(range(1, 12))
    assert {int(n) for n in re.findall(r"Table (\d)", named)} == set(range(1, 6))


def test_costs_in_the_prose():
    """Autoencoder: contracts, section 3 (TFLOP an image, forward)."""
    images = 400_000 * 256
    assert f"adds {0.272 * images / 1e6:.0f} EFLOP to 102.4 M images at 256 px and {1.116 * images / 1e6:.0f}" in (
        " ".join(DOCUMENT.split())
    )
    for name, said in (("XL-8E2A", "4.98"), ("a4", "2.17"), ("a1", "0.0967")):
        macs = count_macs(preset(name), channels=4, input_size=64, learn_sigma=True).total
        assert shown(6 * macs / 1e12) == said
        assert re.search(rf"{re.escape(name)}\b[^.]*? {re.escape(said)}", DOCUMENT), name
