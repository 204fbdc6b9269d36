"""The choice of implementations, with made-up ones."""

import pytest
import torch

from dsmoe import ops
from dsmoe.base.errors import ConfigError
from dsmoe.ops.dispatch import Implementation, Op, use

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


def test_every_public_op_is_in_the_printable_table():
    table = ops.implementations("cpu")
    assert {name for name, _, _ in table} == set(ops.__all__) - {"Routing", "implementations", "kernels", "use"}
    assert all(chosen in available for _, chosen, available in table)


def test_the_face_goes_through_the_dispatch():
    with use("nonsense"), pytest.raises(ConfigError, match=r"ops\.modulate"):
        ops.modulate(torch.zeros(1, 1, 4), torch.zeros(1, 4), torch.zeros(1, 4))
