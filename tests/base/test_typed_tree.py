"""Strict reading of YAML into dataclasses: what passes, with which type, and what is refused in which words."""

from dataclasses import dataclass, field

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.base.presets import PRESETS, ModelSpec
from dsmoe.base.typed_tree import from_mapping, read_yaml, set_by_path


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int = 1
    name: str = "n"


@dataclass(frozen=True, kw_only=True)
class Outer:
    needed: int
    rate: float = 0.5
    on: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    several: tuple[int, ...] = ()
    limit: int | None = None
    share: float | None = None
    channels: int | str = 3
    path: str | None = None
    inner: Inner = field(default_factory=Inner)


def outer(**values):
    return from_mapping(Outer, {"needed": 1, **values}, "recipe")


def yaml_file(tmp_path, text):
    file = tmp_path / "file.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("key", "given", "taken"),
    [
        ("needed", 3, 3),
        ("needed", 3.0, 3),
        ("needed", "4e5", 400000),  # YAML 1.1 reads 4e5 as text
        ("needed", 2**62 + 1, 2**62 + 1),  # a detour through float would lose the last bit
        ("rate", 1, 1.0),
        ("rate", "1e-4", 1e-4),
        ("rate", -0.0, 0.0),
        ("on", True, True),
        ("pair", [1, "1e-2"], (1.0, 0.01)),
        ("pair", (1, 2), (1.0, 2.0)),
        ("several", 3, (3,)),
        ("several", [3, "4e1"], (3, 40)),
        ("several", None, ()),
        ("limit", None, None),
        ("limit", 7, 7),
        ("limit", "1e3", 1000),
        ("share", 1, 1.0),
        ("share", "5e-1", 0.5),
        ("share", None, None),
        ("channels", "all", "all"),
        ("channels", 4, 4),
        ("path", "a b", "a b"),
        ("path", None, None),
        ("inner", {"count": 5}, Inner(count=5)),
    ],
)
def test_values_get_the_type_of_their_field(key, given, taken):
    value = getattr(outer(**{key: given}), key)
    assert value == taken
    assert type(value) is type(taken)


@pytest.mark.parametrize(
    ("key", "given", "words"),
    [
        ("needed", 1.5, ("needed", "1.5", "whole number")),
        ("needed", True, ("needed", "True", "whole number")),
        ("needed", None, ("needed", "None", "whole number")),
        ("needed", "many", ("'many'", "whole number")),
        ("needed", [1], ("[1]", "whole number")),
        ("needed", 10**400, ("whole number",)),
        ("rate", False, ("rate", "False", "finite number")),
        ("rate", float("nan"), ("rate", "nan", "finite")),
        ("rate", float("inf"), ("rate", "inf", "finite")),
        ("rate", "1e999", ("rate", "1e999", "finite")),
        ("on", 1, ("on is 1", "true or false")),
        ("on", "yes please", ("on", "'yes please'", "true or false")),
        ("pair", 3, ("pair", "3", "list of 2")),
        ("pair", [1.0], ("pair", "[1.0]", "list of 2")),
        ("pair", [1.0, "x"], ("pair", "'x'", "finite number")),
        ("several", [1, 2.5], ("several", "2.5", "whole number")),
        ("several", {"a": 1}, ("several", "'a'", "whole number")),
        ("limit", "x", ("limit", "'x'", "whole number")),
        ("channels", None, ("channels", "None")),
        ("path", 7, ("path", "7", "text", "quotes")),
        ("inner", 5, ("inner", "5", "count, name")),
        ("inner", None, ("inner", "None", "count, name")),
        ("inner", {"cuont": 5}, ("'inner.cuont'", "Did you mean 'inner.count'")),
        ("inner", {"name": 5}, ("inner.name is 5", "text")),
        ("pahr", 1, ("'pahr'", "'path'")),
        (3, 1, ("'3'", "needed")),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(key, given, words):
    with pytest.raises(ConfigError) as error:
        from_mapping(Outer, {"needed": 1, key: given}, "recipe")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_keys_are_named_all_at_once():
    with pytest.raises(ConfigError, match=r"recipe lacks needed; add it"):
        from_mapping(Outer, {}, "recipe")
    with pytest.raises(ConfigError, match=r"model lacks model.depth, model.dim, model.heads; .*model.preset"):
        from_mapping(ModelSpec, {}, "model")


def test_a_preset_stands_for_its_fields_which_others_replace():
    assert from_mapping(ModelSpec, {"preset": "S/2"}, "model") == PRESETS["S/2"]
    changed = from_mapping(ModelSpec, {"preset": "S/2", "mlp_ratio": "2e0", "patch": 8}, "model")
    assert (changed.depth, changed.mlp_ratio, changed.patch) == (12, 2.0, 8)
    with pytest.raises(ConfigError, match=r"'S/3'.*Did you mean.*'S/2'"):
        from_mapping(ModelSpec, {"preset": "S/3"}, "model")
    for tree in ({"preset": "S/2", "detph": 1}, {"detph": 1}):
        with pytest.raises(ConfigError, match=r"'model.detph'.*Did you mean 'model.depth'"):
            from_mapping(ModelSpec, tree, "model")


def test_yaml_reads_as_written(tmp_path):
    tree = read_yaml(yaml_file(tmp_path, "a: 1\nb: {c: [x, 2.5], d: }\n# end\n"))
    assert tree == {"a": 1, "b": {"c": ["x", 2.5], "d": None}}
    assert read_yaml(yaml_file(tmp_path, "lr: 1e-4\n")) == {"lr": "1e-4"}, "the reason for numbers in text form"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ("'a' stands twice", "line 3", "keep one")),
        ("a:\n  b: 1\n  b: 2\n", ("'b' stands twice", "line 3")),
        ("a: [{b: 1, b: 2}]\n", ("'b' stands twice",)),
        ("a: [1\n", ("not valid YAML", 'in "the text", line 1')),
        ("a: 1\n\tb: 2\n", ("not valid YAML",)),
        ("a: !!python/object:os.system {}\n", ("not valid YAML",)),
        ("a: *nobody\n", ("not valid YAML", "nobody")),
        ("a: &x [*x]\n", ("not valid YAML",)),
        ("a: 2020-13-01\n", ("not valid YAML", "month")),
        ("a: 1\n---\nb: 2\n", ("not valid YAML",)),
        ("? [1, 2]\n: 3\n", ("line 1", "key")),
        (b"a: \xff\xfe\n", ("not valid YAML",)),
        ("a: " + "[" * 4000, ("not valid YAML",)),
        ("- a\n- b\n", ("holds list",)),
        ("", ("holds nothing", "mapping")),
        ("just words\n", ("holds str",)),
    ],
)
def test_what_is_no_clean_mapping_is_refused_with_the_file_name(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        read_yaml(yaml_file(tmp_path, text))
    message = str(error.value)
    assert "\n" not in message
    for word in ("file.yaml", *words):
        assert word in message, message


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: No such file"):
        read_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        read_yaml(tmp_path)


def test_set_by_path_makes_the_way_and_keeps_the_rest():
    tree = {"a": {"b": 1}, "e": 5}
    set_by_path(tree, "a.c.d", "[1, x]")
    set_by_path(tree, "e", "null")
    set_by_path(tree, "f", "")
    assert tree == {"a": {"b": 1, "c": {"d": [1, "x"]}}, "e": None, "f": None}


def test_set_by_path_refuses_to_go_below_a_value():
    with pytest.raises(ConfigError, match=r"override e\.x\.y=1: 'e' holds a plain value"):
        set_by_path({"e": 5}, "e.x.y", "1")
