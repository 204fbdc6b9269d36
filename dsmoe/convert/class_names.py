"""Names of classes for the captions of samples, from a user's file (none is shipped: ImageNet's have their licence)."""

import json
from pathlib import Path

from dsmoe.base.errors import DataError


def read_class_names(file: str) -> tuple[str, ...]:
    """Names by class number: text with `CLASS [NAME...]` a line in the order of the numbers (synset lists), or JSON:
    [name, ...], {number: name}, {number: [class, name]} or {class: number}. Of synonyms the first stands. DataError.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if text.lstrip()[:1] in ("{", "[") else _lines(text)
    except OSError as error:
        raise DataError(f"--label-map {file} cannot be read ({error.strerror}); give a readable file.") from error
    except ValueError as error:
        raise DataError(f"--label-map {file} is neither text nor JSON ({error}).") from error
    if isinstance(content, dict) and all(type(value) is int for value in content.values()):
        content = {number: name for name, number in content.items()}
    if isinstance(content, dict):
        by_number = {str(number): name for number, name in content.items()}
        content = [by_number.get(str(number)) for number in range(len(by_number))]
    names = [str(entry[-1]) if isinstance(entry, list) and entry else entry for entry in content]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"--label-map {file} does not name every class from 0 on, each once.")
    return tuple(name.split(",")[0].strip() for name in names)


def _lines(text: str) -> list[str]:
    parts = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [name.strip() or label for label, _, name in parts]
