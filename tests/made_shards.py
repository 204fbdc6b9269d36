"""Small tars and parquet files made on the spot, and sources that hold the same photos in each form."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from dsmoe.data.index_file import BESIDE


def tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write the members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def samples(photos: Iterable[tuple[str, bytes, object]]) -> list[tuple[str, bytes]]:
    """(key, image, label) -> the members `webdataset` writes: image, cls, json."""
    return [
        member
        for key, image, label in photos
        for member in (
            (f"{key}.jpg", image),
            (f"{key}.cls", str(label).encode()),
            (f"{key}.json", json.dumps({"filename": key}).encode()),
        )
    ]


def parquet(
    path: Path, images: Sequence[bytes | None], labels: Sequence[object], group: int = 4, **schema: dict
) -> Path:
    """Write ILSVRC/imagenet-1k's columns, `group` rows a row group; schema: metadata of the file."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    write_table = pytest.importorskip("pyarrow.parquet").write_table
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(
        {"image": [{"bytes": image, "path": "x"} for image in images], "label": list(labels)},
        metadata={key: json.dumps(value) for key, value in schema.items()},
    )
    write_table(table, path, row_group_size=group)
    return path


def three_forms(root: Path, photos: Sequence[tuple[str, bytes, int]], shard: int = 5) -> dict[str, tuple[str, Path]]:
    """The photos, sorted by (label, key), as folders, tars and parquet: {form: (source, data.path)}."""
    assert list(photos) == sorted(photos, key=lambda photo: (photo[2], photo[0]))
    folder = root / "folder"
    for key, image, label in photos:
        file = folder / f"{label:03d}" / f"{key}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    for number, first in enumerate(range(0, len(photos), shard)):
        part = photos[first : first + shard]
        tar(root / "tar" / f"photos-{number:04d}.tar", samples(part))
        parquet(root / "parquet" / f"photos-{number:05d}.parquet", [p[1] for p in part], [p[2] for p in part], group=2)
    return {
        "folder": ("image_folder", folder),
        "tar": ("webdataset", root / "tar"),
        "parquet": ("parquet", root / "parquet"),
    }


def index_files(root: Path) -> list[str]:
    """Names of what lies in the index folder beside the data."""
    return sorted(file.name for file in (root / BESIDE).glob("*")) if (root / BESIDE).exists() else []
