"""The plan: it reads back as written, says what it is, and refuses what is no plan in one line."""

import json

import pytest
from made_plan import made_plan, made_recipe

from dsmoe.base.errors import UserError
from dsmoe.base.plan import PLAN_FORMAT, Plan, describe


def test_plan_reads_back_equal_through_json():
    plan = made_plan()
    tree = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(tree) == plan
    assert isinstance(Plan.from_dict(tree).data.class_names, tuple)
    assert tree["format"] == PLAN_FORMAT
    assert tree["science_hash"] == plan.science_hash


def test_hash_of_a_plan_does_not_depend_on_engine_policy():
    assert made_plan(world_size=1).science_hash == made_plan(world_size=4, precision="bf16").science_hash
    assert made_plan(made_recipe(train={"seed": 9})).science_hash != made_plan().science_hash


def test_plans_from_before_operations_could_be_preferred_are_read():
    tree = made_plan().to_dict()
    del tree["engine"]["ops"]
    assert Plan.from_dict(tree) == made_plan()


def without(key):
    tree = made_plan().to_dict()
    del tree[key]
    return tree


def replaced(key, value):
    return {**made_plan().to_dict(), key: value}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ([], ("list", "not a dsmoe plan")),
        ("text", ("str", "not a dsmoe plan")),
        ({}, ("format is None", f"format {PLAN_FORMAT}")),
        (replaced("format", 99), ("99", f"format {PLAN_FORMAT}", "matching dsmoe")),
        *((without(key), (key, "not a dsmoe plan")) for key in ("recipe", "engine", "data", "model", "memory")),
        (replaced("engine", {"stage": 1}), ("stage", "not a dsmoe plan")),
        (replaced("data", 5), ("not a dsmoe plan",)),
        (replaced("data", {"items": 1, "class_names": 3}), ("not a dsmoe plan",)),
        (replaced("model", None), ("not a dsmoe plan",)),
        (replaced("recipe", {"name": "x"}), ("recipe lacks model, train",)),
        (replaced("recipe", "x"), ("recipe is 'x'",)),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(tree, words):
    with pytest.raises(UserError) as error:
        Plan.from_dict(tree)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_printed_plan_holds_the_facts_people_compare():
    plan = made_plan()
    text = describe(plan)
    for fact in (
        "tiny (for tests)", plan.science_hash, "DiT-MoE 4E2A swiglu, depth 2, dim 32, heads 2, patch 2",
        "1,000 total, 600 active", "0.005 G", "3x32x32", "scenes, 64 images, 2 classes, 32 px", "none, factor 1",
        "8 = 4 a rank x 1 accumulated x 2 ranks", "160 images = 20 steps = 2.50 epochs", "ZeRO-1, fp32, AdamW (torch)",
        "made.json (made by hand)", "0 -> 0.0001", "3.0 MiB a rank at its fullest", "the EMA is short.",
    ):  # fmt: skip
        assert fact in text, fact
    assert text.splitlines()[-1].startswith("warning")
    components = [line.split()[1:] for line in text.splitlines() if line.startswith("memory: ")]
    assert components == [["host", "moments", "4.0", "MiB"], ["parameters", "2.0", "MiB"], ["averages", "1.0", "MiB"]]


def test_a_dense_model_is_printed_as_one():
    text = describe(made_plan(made_recipe(model={"num_experts": 0, "shared_ratio": 0.0})))
    assert "DiT, depth 2" in text
    assert "MoE" not in text
