"""The choice of implementations, with made-up ones."""

import pytest
import torch

from dsmoe import ops
from dsmoe.base.errors import ConfigError
from dsmoe.ops.dispatch import Implementation, Op, set_preferred, use

FAST = Implementation("fast", lambda x: x + 1, frozenset({"meta"}))
PLAIN = Implementation("reference", lambda x: x.clone())
OP = Op("double", (FAST, PLAIN))


def test_the_first_implementation_serving_the_device_runs():
    assert OP.choose("meta") is FAST
    assert OP.choose("cpu") is PLAIN
    assert OP.available("meta") == ("fast", "reference")
    assert OP.available("cpu") == ("reference",)
    assert OP(torch.ones(2)).tolist() == [1, 1]


def test_use_overrides_and_restores_even_after_an_error():
    with use("reference"):
        assert OP.choose("meta") is PLAIN
        with use("fast"):
            assert OP.choose("meta") is FAST
        with pytest.raises(ZeroDivisionError), use("fast"):
            _ = 1 / 0
        assert OP.choose("meta") is PLAIN
    assert OP.choose("meta") is FAST


@pytest.mark.parametrize("name", ["fast", "referenc"])
def test_an_implementation_that_does_not_serve_the_device_is_an_error(name):
    with use(name), pytest.raises(ConfigError, match=rf"ops.double on cpu '{name}'.*Choose from: reference"):
        OP.choose("cpu")


@pytest.fixture
def preferred():
    yield set_preferred
    set_preferred({})


def test_a_preference_comes_before_the_default_order_where_it_serves_and_after_use(preferred):
    preferred({"double": "reference", "other": "fast"})
    assert OP.choose("meta") is PLAIN
    preferred({"double": "fast"})
    assert OP.choose("meta") is FAST
    assert OP.choose("cpu") is PLAIN, "fast does not serve the CPU, so the default order does"
    with use("reference"):
        assert OP.choose("meta") is PLAIN
    preferred({})
    assert OP.choose("meta") is FAST


def test_what_is_not_installed_is_neither_listed_nor_chosen(preferred):
    absent = Implementation("absent", lambda x: x, present=lambda: False)
    op = Op("double", (absent, PLAIN))
    preferred({"double": "absent"})
    assert op.choose("cpu") is PLAIN
    assert op.available("cpu") == ("reference",)
    with pytest.raises(ConfigError, match=r"'absent'.*Choose from: reference"):
        op.named("absent", "cpu")


@pytest.mark.parametrize(
    ("preferences", "words"),
    [
        ({"gather_row": "reference"}, "unknown op 'gather_row'. Did you mean 'gather_rows'"),
        ({"route": "megatron"}, "unknown implementation of ops.route on cpu 'megatron'. Choose from:"),
        ({"route": "reference", "modulate": "fast"}, "ops.modulate on cpu 'fast'"),
    ],
)
def test_unknown_names_are_refused_with_the_choices_and_nothing_changes(preferences, words, preferred):
    before = ops.implementations("cpu")
    with pytest.raises(ConfigError) as error:
        ops.prefer(preferences, "cpu")
    assert words in str(error.value)
    assert "Choose from: " in str(error.value)
    assert ops.implementations("cpu") == before


def test_every_public_op_is_in_the_printable_table():
    table = ops.implementations("cpu")
    assert {name for name, _, _ in table} == set(ops.__all__) - {
        "Routing", "check_preferences", "compiled_block", "implementations", "kernels", "operation", "prefer",
        "tunable", "use",
    }  # fmt: skip
    assert all(chosen in available for _, chosen, available in table)


def test_the_face_goes_through_the_dispatch():
    with use("nonsense"), pytest.raises(ConfigError, match=r"ops\.modulate"):
        ops.modulate(torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.zeros(1, 4))
