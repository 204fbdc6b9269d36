"""What all sources of encoded photos share: decode, crop, stand in for damaged items and judge how many there are.

Not here: where the bytes come from (image_folder, webdataset, parquet) and which item is wanted (order).
"""

import io
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image

from dsmoe.base.errors import DataError
from dsmoe.data.dataset import Fault, fingerprint_of
from dsmoe.data.item_index import NO_LABEL, ItemIndex
from dsmoe.data.label_map import Classes
from dsmoe.data.transforms import centre_crop_adm

# By content, not by name: ImageNet has a PNG named .JPEG, scraped sets have GIFs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Fewer damaged items than this are too few to judge a share by.
MIN_BAD = 10
# So many damaged items in a row are not damage but a wrong folder (pointer files, an encrypted copy).
MAX_RUN = 2000
NAMES_SHOWN = 5


class DamagedItem(Exception):
    """An item's bytes cannot be had, for a reason that lies in the item; its neighbours may be fine."""


class EncodedImages:
    """Photos in an index, as an `ImageDataset` and `FaultReporter`; a source adds `content` and `name`.

    where: what the user gave, for messages. Images become RGB by PIL's convert("RGB"), torchvision's convention: alpha
    is dropped, not composited, EXIF orientation is not applied, colour profiles are ignored. 16-bit greyscale keeps its
    high byte (convert would saturate it). Then ADM's centre crop to resolution x resolution.

    An undecodable item (damaged, without label, a decompression bomb by PIL's limit, an extreme side ratio) is replaced
    by the next decodable one in item order, with its label, whichever rank or worker asks. `account` raises DataError
    when more than max_bad_fraction of the distinct items asked for were damaged and they number at least MIN_BAD or
    over half of the set; a max_bad_fraction of 0 tolerates none.
    """

    def __init__(
        self, where: str, index: ItemIndex, classes: Classes, resolution: int, max_bad_fraction: float = 0.01
    ) -> None:
        self.where, self.index = where, index
        self.resolution, self.max_bad_fraction = resolution, max_bad_fraction
        self.class_names = classes.names
        self.num_classes = len(classes.names)
        self._class_of = classes.numbers
        self.fingerprint = fingerprint_of(index.fingerprint, classes.numbers)
        self._damaged: dict[int, str] = {}  # item -> reason, as far as this process knows
        self._undrained: list[Fault] = []
        self._faults: dict[int, Fault] = {}
        self._reads = 0

    def content(self, item: int) -> bytes:
        """The item's bytes; DamagedItem when they are lost, DataError when the disk or mount is."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Item i as "shard/item"."""
        return f"{self.index.shards[self.index.shard_of(i)]}/{self.index.name_of(i)}"

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """(image uint8 [resolution, resolution, 3], label) of item i or, where damaged, of the next."""
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        limit = min(len(self), MAX_RUN)
        for step in range(limit):
            item = (i + step) % len(self)
            image = self._decode(item)
            if image is not None:
                return image, int(self._class_of[self.index.arrays["labels"][item]])
            if step == 0:
                self._undrained.append(Fault(item, self.name(item), self._damaged[item]))
        raise DataError(
            f"none of {limit} consecutive items of {self.where!r} from {self.name(i)!r} on is a readable "
            f"image (the first: {self._damaged[i]}); check that it was copied whole."
        )

    def drain_faults(self) -> tuple[Fault, ...]:
        """See `FaultReporter`."""
        faults, self._undrained = tuple(self._undrained), []
        return faults

    def account(self, reads: int, faults: Iterable[Fault]) -> None:
        """See `FaultReporter`; the share is of distinct items, so it does not grow with epochs."""
        self._reads += reads
        for fault in faults:
            self._faults.setdefault(fault.item, fault)
        bad, seen = len(self._faults), min(self._reads, len(self))
        enough = bad >= MIN_BAD or 2 * bad > len(self) or (bad and self.max_bad_fraction == 0)
        if not enough or bad <= self.max_bad_fraction * seen:
            return
        first = ", ".join(f"{fault.name} ({fault.reason})" for fault in self.faults[:NAMES_SHOWN])
        raise DataError(
            f"{bad} of {seen} images read from {self.where!r} are damaged ({100 * bad / seen:.3g} %, "
            f"data.max_bad_fraction allows {100 * self.max_bad_fraction:.3g} %), the first: {first}. "
            "Repair or delete them, or raise data.max_bad_fraction."
        )

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Distinct damaged items accounted so far, in the order they were met."""
        return tuple(self._faults.values())

    def _decode(self, item: int) -> np.ndarray | None:
        """Pixels of one item, None when damaged (the reason is kept, the item not read again)."""
        if item in self._damaged:
            return None
        content = b""
        try:
            content = self.content(item)
            if self.index.arrays["labels"][item] == NO_LABEL:
                raise DamagedItem("no label")
            return centre_crop_adm(_to_rgb(content), self.resolution)
        except (MemoryError, DataError):
            raise
        except DamagedItem as damage:
            self._damaged[item] = str(damage)
        except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            self._damaged[item] = _reason(content, error)
        return None


def _to_rgb(content: bytes) -> Image.Image:
    """Decode to mode RGB; raises whatever PIL raises, and on both of PIL's levels of decompression bomb."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__
