"""From the labels that stand in the data (folder names, wnids, numbers) to class numbers and names for people.

A label map is a text file, `CLASS [NAME...]` a line in the order of the class numbers (ImageNet's synset lists), or
JSON: [class, ...], {class: number} or {number: [class, name]}. For a flat folder it says the class of each file:
text, `FILE CLASS` a line, or JSON {file: class}. Not here: where the labels stand (the data sets).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsmoe.base.errors import DataError

MAX_CLASSES = 1_000_000
_SHOWN = 5
_WANT = (
    "a label map is text with a class and its name on each line, in the order of the class numbers, or JSON "
    '{"class": number} or {"number": ["class", "name"]}'
)
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Classes:
    """names: one a class, distinct. numbers: int32, class number of each label text of an index, in its order."""

    names: tuple[str, ...]
    numbers: np.ndarray


def classes_of(labels: Sequence[str], where: str, label_map: str | None = None, names: Sequence[str] = ()) -> Classes:
    """Number the label texts of an index.

    Texts that are all whole numbers are class numbers; others are numbered in sorted order. A label map overrules
    both for what it lists, and must list all. names: what the data itself calls its classes, by number. where: the
    data, for messages. DataError on labels that cannot be numbered.
    """
    counted = all(_NUMBER.fullmatch(label) for label in labels)
    if label_map is not None:
        keys, names = _read_classes(Path(label_map))
        number = {key: n for n, key in enumerate(keys)}
        known = [number.get(label) for label in labels]
        if counted and None in known:
            known = [int(label) if 0 <= int(label) < len(keys) else None for label in labels]
        if missing := [label for label, n in zip(labels, known, strict=True) if n is None]:
            raise DataError(
                f"data.label_map {label_map!r} has {len(keys)} classes and lacks {len(missing)} of the labels in "
                f"{where!r}: {_listed(missing)}; {_WANT}."
            )
        return Classes(_distinct(names, keys), np.array(known, dtype=np.int32))
    if not counted:
        return Classes(tuple(labels), np.arange(len(labels), dtype=np.int32))
    numbers = np.array([int(label) for label in labels], dtype=np.int64)
    if numbers.min() < 0:
        raise DataError(
            f"{where!r} holds label {numbers.min()}: test splits carry it in place of labels; give the training split."
        )
    total = max(int(numbers.max()) + 1, len(names))
    if total > MAX_CLASSES:
        raise DataError(
            f"{where!r} holds label {numbers.max()}, which would need as many classes; at most {MAX_CLASSES} are "
            "allowed. Number the classes from 0 with data.label_map=FILE."
        )
    keys = [str(n) for n in range(total)]
    return Classes(_distinct(names, keys) if len(names) == total else tuple(keys), numbers.astype(np.int32))


def names_of(label_map: str) -> tuple[str, ...]:
    """Names by class number of a label map of classes, distinct, the first of synonyms. DataError when it is none."""
    keys, names = _read_classes(Path(label_map))
    return _distinct(names, keys)


def read_file_map(path: str) -> dict[str, str]:
    """File name, with or without its ending, to class: the label map of a flat folder. DataError when it is none."""
    content = _load(Path(path))
    if isinstance(content, Mapping):
        return {str(file): str(label) for file, label in content.items()}
    return {file: rest.split()[0] for file, rest in content if rest}


def _read_classes(path: Path) -> tuple[list[str], list[str]]:
    """(class texts, names) by class number."""
    content = _load(path)
    if not isinstance(content, Mapping):
        keys = [key for key, _ in content]
        names = [rest or key for key, rest in content]
    elif all(isinstance(entry, list) and len(entry) == 2 for entry in content.values()):
        entries = [content.get(str(n)) for n in range(len(content))]
        if None in entries:
            raise DataError(f"label map {str(path)!r} lacks number {entries.index(None)}; {_WANT}.")
        keys, names = ([str(entry[side]) for entry in entries] for side in (0, 1))
    else:
        values = list(content.values())
        if any(type(n) is not int for n in values) or sorted(values) != list(range(len(values))):
            raise DataError(
                f"label map {str(path)!r} does not number its {len(values)} classes from 0 to {len(values) - 1}, "
                f"each once; {_WANT}."
            )
        keys = sorted(content, key=content.__getitem__)
        names = keys
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise DataError(f"label map {str(path)!r} lists {_listed(twice)} more than once; {_WANT}.")
    return keys, names


def _load(path: Path) -> dict | list[tuple[str, str]]:
    """The JSON object in the file or, of text, (first word, rest) of each line that is not blank."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        content = json.loads(text) if text.lstrip().startswith(("{", "[")) else None
    except OSError as error:
        raise DataError(f"cannot read label map {str(path)!r}: {error.strerror}; give a label map.") from error
    except ValueError as error:
        raise DataError(f"label map {str(path)!r} is neither text nor JSON ({error}); {_WANT}.") from error
    if isinstance(content, list) and all(isinstance(name, str) and name for name in content):
        content = [(name, name) for name in content]
    if content is None:
        words = [re.split(r"[\s,]+", line.strip(), maxsplit=1) for line in text.splitlines() if line.strip()]
        content = [(word[0], word[1] if len(word) > 1 else "") for word in words]
    if not content or (isinstance(content, list) and not isinstance(content[0], tuple)):
        raise DataError(f"label map {str(path)!r} lists no classes; {_WANT}.")
    return content


def _distinct(names: Sequence[str], keys: Sequence[str]) -> tuple[str, ...]:
    """The first of the synonyms of each name; where two classes share it (ImageNet's cranes), with the class text."""
    short = [name.split(",")[0].strip() or key for name, key in zip(names, keys, strict=True)]
    count = Counter(short)
    return tuple(name if count[name] == 1 else f"{name} {key}" for name, key in zip(short, keys, strict=True))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
