"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; `path` appears, or is replaced, only after the block went well.

    The content is on the disk before the name is, and gets the permissions that a plain open() gives (safetensors
    writes files that only their owner can read). Raises OSError (disk full, read-only); nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Replace the file's text; readers see the old content or the new, never a part.

    What is not Unicode (a file name in a message) is written as an escape.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync_folder(path: Path) -> None:
    """Make names in a folder durable, so that a power cut does not undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait for the disk; not atomic by itself."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _umask() -> int:
    # The system offers no way to read it without setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
