"""Where the compiled operations and their sources lie, and whether the two belong together. No torch, no compiler.

`kernels/build.py` builds, `dsmoe.ops.native.library` loads, `python -m dsmoe doctor` reports; all three ask here.
"""

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
PRODUCT = _PACKAGE / "ops" / "native" / "libdsmoe_kernels.so.1"
# Beside the package in a checkout; a wheel has none.
SOURCES = _PACKAGE.parent / "kernels" / "csrc"
COMMAND = "make kernels"
# Stands in the product, followed by "HASH|ARCH ARCH ..." and a zero byte.
MARK = "dsmoe kernels built of "


def source_files(folder: Path = SOURCES) -> list[Path]:
    """All that the product is made of, sorted; empty where there are no sources."""
    wanted = (".cpp", ".h", ".cu", ".cuh")
    return sorted(path for path in folder.rglob("*") if path.suffix in wanted and "emulation" not in path.parts)


def source_hash(folder: Path = SOURCES) -> str | None:
    """16 hexadecimal digits over names and contents of the sources; None where there are none."""
    files = source_files(folder)
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def built_of(product: Path = PRODUCT) -> tuple[str, tuple[str, ...]] | None:
    """Source hash and GPU architectures of a product, read from the file without loading it; None where it is missing
    or does not say."""
    try:
        content = product.read_bytes()
    except OSError:
        return None
    start = content.find(MARK.encode())
    if start < 0:
        return None
    text = content[start + len(MARK) : content.index(b"\0", start)].decode()
    digest, _, archs = text.partition("|")
    return digest, tuple(archs.split())
