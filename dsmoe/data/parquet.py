"""Images in parquet files as ILSVRC/imagenet-1k has them: columns image {bytes, path} and label. Not here: decoding.

pyarrow is needed, and only for this source.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.base.errors import ConfigError, DataError
from dsmoe.data.encoded_images import DamagedItem, EncodedImages
from dsmoe.data.index_file import Shard, kept_index
from dsmoe.data.item_index import NO_LABEL, ItemIndex, one_shard
from dsmoe.data.label_map import classes_of
from dsmoe.data.open_files import OpenFiles, unreadable
from dsmoe.data.shard_paths import shard_files

KIND = "parquet"
IMAGE, LABEL = "image", "label"
MAX_OPEN = 32  # files a process keeps open, each with its footer in memory
CACHE_BYTES = 512 << 20  # of decoded row groups in a process; one is always kept
_WANT = f"columns {IMAGE} (bytes, or a struct with bytes) and {LABEL} (whole number or text)"


class ParquetImages(EncodedImages):
    """Parquet files in the order of `shard_paths`; items by file, then by row.

    The smallest piece that can be read is a row group, so one image costs its whole group unless it is among those
    kept (CACHE_BYTES): see SampleOrder's blocks. A row without bytes or label and a group that does not decode are
    damaged items. Class names are those of the label map or, failing that, of the Hugging Face features in the file.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        max_bad_fraction: float = 0.01,
        label_map: str | None = None,
        index_folder: str | None = None,
    ) -> None:
        _pyarrow()
        where = str(path)
        self.root, shards = shard_files(where, ".parquet")
        self._paths = [shard.path for shard in shards]
        self._sizes = [shard.size for shard in shards]
        index = kept_index(KIND, self.root, shards, scan_parquet, index_folder)
        if not len(index):
            raise DataError(f"the parquet files of data.path {where!r} hold no rows; give {_WANT}.")
        if (unlabelled := int((index.arrays["labels"] == NO_LABEL).sum())) * 2 > len(index):
            raise DataError(
                f"{unlabelled} of the {len(index)} rows of data.path {where!r} have no label; give {_WANT}."
            )
        names = () if label_map else _feature_names(shards[0])
        classes = classes_of(index.classes, where, label_map, names)
        super().__init__(where, index, classes, resolution, max_bad_fraction)
        self.groups_decoded = 0  # by this process, for measurements
        self._files: OpenFiles[Any] = OpenFiles(MAX_OPEN, self._open, _close)
        self._groups: OrderedDict[int, Any] = OrderedDict()

    @property
    def group_rows(self) -> int:
        """Rows of the largest row group."""
        return int(np.diff(self.index.arrays["group_starts"].astype(np.int64)).max())

    def name(self, i: int) -> str:
        """Item i as "file:row"."""
        shard = self.index.shard_of(i)
        return f"{self.index.shards[shard]}:{i - int(self.index.arrays['shard_starts'][shard])}"

    def content(self, item: int) -> bytes:
        """See `EncodedImages`."""
        starts = self.index.arrays["group_starts"]
        group = int(np.searchsorted(starts, item, side="right")) - 1
        value = self._group(group)[item - int(starts[group])].as_py()
        if value is None:
            raise DamagedItem("no bytes in its row")
        return value

    def __getstate__(self) -> dict:
        """Neither open files nor cached rows travel to another process."""
        return self.__dict__ | {"_groups": OrderedDict()}

    def _group(self, group: int) -> Any:
        """The image bytes of a row group, a pyarrow array; the least recently used ones make room."""
        if group not in self._groups:
            kept = sum(array.nbytes for array in self._groups.values())
            array = self._decode_group(group)
            while self._groups and kept + array.nbytes > CACHE_BYTES:
                kept -= self._groups.popitem(last=False)[1].nbytes
            self._groups[group] = array
        self._groups.move_to_end(group)
        return self._groups[group]

    def _decode_group(self, group: int) -> Any:
        shard = self.index.shard_of(int(self.index.arrays["group_starts"][group]))
        number = int(self.index.arrays["group_numbers"][group])
        self.groups_decoded += 1
        try:
            file = self._files[shard]
            column = file.read_row_group(number, columns=[_column(file)], use_threads=False)[IMAGE]
        except OSError as error:
            if error.errno is not None:  # the disk; pyarrow reports a damaged page as an OSError without number
                raise unreadable(self._paths[shard], error) from error
            raise DamagedItem(f"row group {number}: {_short(error)}") from error
        except _pyarrow().ArrowException as error:
            raise DamagedItem(f"row group {number}: {_short(error)}") from error
        array = column.combine_chunks()
        return array.field("bytes") if _pyarrow().types.is_struct(array.type) else array

    def _open(self, shard: int) -> Any:
        path = self._paths[shard]
        if path.stat().st_size != self._sizes[shard]:
            raise DataError(f"{str(path)!r} has changed since the run began; start it again.")
        return _open_file(path)


def scan_parquet(shard: Shard) -> ItemIndex:
    """The rows of one file: labels and row groups. DataError on a damaged footer and on other columns."""
    file = _open_file(shard.path)
    try:
        _column(file)
        labels = file.read(columns=[LABEL], use_threads=False)[LABEL].to_pylist()
    except OSError as error:
        raise unreadable(shard.path, error) from error
    except _pyarrow().ArrowException as error:
        raise DataError(f"{str(shard.path)!r} is damaged in its labels ({_short(error)}); copy it again.") from error
    rows = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    filled = [n for n, count in enumerate(rows) if count]
    file.close()
    return one_shard(
        KIND,
        shard.name,
        [None if label is None else str(label) for label in labels],
        group_numbers=filled,
        group_starts=np.cumsum([0] + [rows[n] for n in filled]),
        shard_sizes=[shard.size],
    )


def _open_file(path: Path) -> Any:
    """A ParquetFile that reads only what it is asked for."""
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, memory_map=False)
    except OSError as error:
        raise unreadable(path, error) from error
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{str(path)!r} is no parquet file or was cut short ({_short(error)}); copy it again or leave it out."
        ) from error


def _close(file: Any) -> None:
    file.close()


def _column(file: Any) -> str:
    """What to read of the image column: its bytes, not its path. DataError when the columns are others."""
    types = _pyarrow().types
    schema = file.schema_arrow
    image = schema.field(IMAGE).type if IMAGE in schema.names else None
    label = schema.field(LABEL).type if LABEL in schema.names else None
    plain = image is not None and (types.is_binary(image) or types.is_large_binary(image))
    struct = image is not None and types.is_struct(image) and image.get_field_index("bytes") >= 0
    counted = label is not None and (types.is_integer(label) or types.is_string(label) or types.is_large_string(label))
    if not (plain or struct) or not counted:
        raise DataError(f"a parquet file of the data has columns {', '.join(schema.names)}; dsmoe reads {_WANT}.")
    return IMAGE if plain else f"{IMAGE}.bytes"


def _feature_names(shard: Shard) -> list[str]:
    """Class names by number, where the file carries Hugging Face's description of its features."""
    file = _open_file(shard.path)
    metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    file.close()
    try:
        names = json.loads(metadata)["info"]["features"][LABEL]["names"]
    except (ValueError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "data.source parquet needs pyarrow, which is not installed; pip install pyarrow, or take tars or folders."
        ) from error
    return pyarrow


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
