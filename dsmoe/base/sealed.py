"""Proof that files are whole: sizes and SHA-256 of any file, and JSON in which a changed byte shows."""

import hashlib
import json
from pathlib import Path

_CHUNK = 1 << 22


def seal(content: dict) -> str:
    """JSON text that `unseal` reads back and in which any changed byte shows; content has a `format` number."""
    body = json.dumps(content, indent=1, sort_keys=True)
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n"


def unseal(text: str, reads: int) -> dict:
    """What was sealed; ValueError when a byte differs or its format is another than the one that is read."""
    found, _, body = text.partition("\n")
    if not body.endswith("\n") or hashlib.sha256(body[:-1].encode()).hexdigest() != found:
        raise ValueError("its seal does not fit its content")
    content = json.loads(body)
    if content.get("format") != reads:
        raise ValueError(f"its format is {content.get('format')!r}, this dsmoe reads {reads}")
    return content


def digest(path: Path) -> dict:
    """Size and SHA-256 of a file: {"bytes": int, "sha256": hex}. Raises OSError."""
    found, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": found.hexdigest()}


def size_difference(path: Path, stated: dict) -> str:
    """What is wrong with a file that should have this size; "" when nothing is."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return "" if size == stated["bytes"] else f"{path.name} has {size} bytes instead of {stated['bytes']}"


def difference(path: Path, stated: dict) -> str:
    """What is wrong with a file that should have this size and SHA-256, both hashes named; "" when nothing is."""
    if wrong := size_difference(path, stated):
        return wrong
    try:
        found = digest(path)["sha256"]
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    if found == stated["sha256"]:
        return ""
    return f"{path.name} differs from its SHA-256: expected {stated['sha256']}, found {found}"
