"""Mappings (YAML, JSON) into frozen dataclass trees, strictly: unknown keys, wrong types and duplicates are errors."""

import dataclasses
import math
import types
import typing
from pathlib import Path

import yaml

from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.presets import ModelSpec, preset


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which plain YAML silently overwrites."""


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {key_node.start_mark.line + 1} has a list or mapping as a key; keys are names.")
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"key {key!r} stands twice (line {key_node.start_mark.line + 1}); keep one of them.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
# Beside its own errors the loader lets out those of Python's constructors: a date 2020-13-01, deep nesting.
_MALFORMED = (yaml.YAMLError, ValueError, OverflowError, RecursionError)


def _parse(text: str) -> object:
    loader = _StrictLoader(text)
    loader.name = "the text"  # for messages, where it would be "<unicode string>"
    return loader.get_single_data()


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; ConfigError when it is unreadable, malformed or not a mapping."""
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; give a readable YAML file.") from error
    except _MALFORMED as error:
        raise ConfigError(f"{path} is not valid YAML: {error}; correct it there.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        kind = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"{path} holds {kind}, not a mapping of keys to values.")
    return tree


def set_by_path(tree: dict, dotted: str, text: str) -> None:
    """Set `a.b.c` in nested mappings to the YAML value of `text`; unknown keys are found later, when typed."""
    try:
        value = _parse(text)
    except _MALFORMED as error:
        raise ConfigError(
            f"override {dotted}={text!r}: the value is not valid YAML ({error}); quote it, as in {dotted}='\"...\"'."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"override {dotted}={text!r}: {error}") from error
    *parents, last = dotted.split(".")
    node = tree
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {dotted}={text}: {key!r} holds a plain value, not further keys.")
    node[last] = value


def from_mapping(cls: type, tree: object, where: str) -> object:
    """Build the dataclass `cls` from `tree`, recursively; `where` prefixes keys in messages."""
    label = "" if where == "recipe" else f"{where}."
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} is {tree!r}; it must hold keys ({', '.join(_names(cls))}).")
    if cls is ModelSpec and "preset" in tree:
        return _from_preset(tree)
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(choose_from("key", f"{label}{key}", [label + n for n in _names(cls)]))
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in tree and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        other = " or give model.preset" if cls is ModelSpec else ""
        raise ConfigError(f"{where} lacks {', '.join(label + m for m in missing)}; add it{other}.")
    return cls(**{key: _typed(hints[key], value, label + key) for key, value in tree.items()})


def _names(cls: type) -> list[str]:
    names = [f.name for f in dataclasses.fields(cls)]
    return ["preset", *names] if cls is ModelSpec else names


def _from_preset(tree: dict) -> ModelSpec:
    hints = typing.get_type_hints(ModelSpec)
    changes = {k: v for k, v in tree.items() if k != "preset"}
    for key in changes:
        if key not in hints:
            raise ConfigError(choose_from("key", f"model.{key}", [f"model.{n}" for n in _names(ModelSpec)]))
    return preset(str(tree["preset"]), **{k: _typed(hints[k], v, f"model.{k}") for k, v in changes.items()})


def _typed(hint: object, value: object, where: str) -> object:
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, where)
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if option is type(value) or (option is float and type(value) is int):
                return _typed(option, value, where)
        return _typed(next(o for o in options if o is not type(None)), value, where)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if parts[1:] == (Ellipsis,):
            # One is written as itself, none as null, several as a list.
            given = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
            return tuple(_typed(parts[0], v, where) for v in given)
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            raise ConfigError(f"{where} is {value!r}; it must be a list of {len(parts)} numbers.")
        return tuple(_typed(p, v, where) for p, v in zip(parts, value, strict=True))
    return _scalar(hint, value, where)


def _scalar(hint: object, value: object, where: str) -> object:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4 as a string and 4e5 as one too; both are numbers to everyone else.
        try:
            number = float(value) if isinstance(value, (int, float, str)) else None
        except (ValueError, OverflowError):
            number = None
        if number is not None and math.isfinite(number):
            if hint is float:
                return number
            if number.is_integer():
                return value if isinstance(value, int) else int(number)
    text = "text" if value is None else "text (in quotes, where YAML reads it as something else)"
    kind = {bool: "true or false", str: text, int: "a whole number", float: "a finite number"}[hint]
    raise ConfigError(f"{where} is {value!r}; it must be {kind}.")
