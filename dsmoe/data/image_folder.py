"""Images in one folder a class, as ImageNet lies on disk. Not here: order, flips, batches."""

import io
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dsmoe.base.errors import DataError
from dsmoe.data.dataset import Fault, fingerprint_of
from dsmoe.data.transforms import centre_crop_adm

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# By content, not by name: ImageNet has a PNG named .JPEG, scraped sets have GIFs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
# Fewer damaged files than this are too few to judge a share by.
MIN_BAD = 10
# So many damaged files in a row are not damage but a wrong folder (pointer files, an encrypted copy).
MAX_RUN = 2000
NAMES_SHOWN = 5


class ImageFolder:
    """PATH/<class>/<image>: class index by sorted folder name, items by class, then sorted file name.

    Only files directly in a class folder count, by extension in any case (EXTENSIONS); hidden files and
    folders are skipped. Images become RGB by PIL's convert("RGB"), torchvision's convention: alpha is
    dropped, not composited, EXIF orientation is not applied, colour profiles are ignored. 16-bit greyscale
    keeps its high byte (convert would saturate it). Then ADM's centre crop to resolution x resolution.

    An undecodable file (damaged, a decompression bomb by PIL's limit, an extreme side ratio) is replaced by
    the next decodable one in item order, with its label, whichever rank or worker asks. `account` raises
    DataError when more than max_bad_fraction of the distinct items asked for were damaged and they number at
    least MIN_BAD or over half of the folder; a max_bad_fraction of 0 tolerates none.
    """

    def __init__(self, path: str | Path, resolution: int, max_bad_fraction: float = 0.01) -> None:
        self.path = Path(path).expanduser()
        self.resolution = resolution
        self.max_bad_fraction = max_bad_fraction
        self.class_names, files = _scan(self.path)
        self.num_classes = len(self.class_names)
        # One byte string: a list of a million names would be copied into every loader process.
        names = [os.fsencode(name) for of_class in files for name in of_class]
        self._names = b"".join(names)
        self._ends = np.cumsum([0] + [len(name) for name in names])
        self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(of_class) for of_class in files])
        sizes = [(self.path / self.name(i)).stat().st_size for i in range(len(self._labels))]
        self.fingerprint = fingerprint_of("image_folder", self._names, self._ends, np.array(sizes), self._labels)
        self._damaged: dict[int, str] = {}  # item -> reason, as far as this process knows
        self._undrained: list[Fault] = []
        self._faults: dict[int, Fault] = {}
        self._reads = 0

    def __len__(self) -> int:
        return len(self._labels)

    def name(self, i: int) -> str:
        """Item i as "class/file"."""
        file = os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]])
        return f"{self.class_names[self._labels[i]]}/{file}"

    def read(self, i: int) -> tuple[np.ndarray, int]:
        """(image uint8 [resolution, resolution, 3], label) of item i or, where damaged, of the next."""
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        limit = min(len(self), MAX_RUN)
        for step in range(limit):
            item = (i + step) % len(self)
            image = self._decode(item)
            if image is not None:
                return image, int(self._labels[item])
            if step == 0:
                self._undrained.append(Fault(item, self.name(item), self._damaged[item]))
        raise DataError(
            f"none of {limit} consecutive files of {str(self.path)!r} from {self.name(i)!r} on is a readable "
            f"image (the first: {self._damaged[i]}); check that the folder was copied whole."
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
            f"{bad} of {seen} images read from {str(self.path)!r} are damaged ({100 * bad / seen:.3g} %, "
            f"data.max_bad_fraction allows {100 * self.max_bad_fraction:.3g} %), the first: {first}. "
            "Repair or delete them, or raise data.max_bad_fraction."
        )

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Distinct damaged items accounted so far, in the order they were met."""
        return tuple(self._faults.values())

    def _decode(self, item: int) -> np.ndarray | None:
        """Pixels of one file, None when damaged (the reason is kept, the file not opened again)."""
        if item in self._damaged:
            return None
        path = self.path / self.name(item)
        try:
            content = path.read_bytes()
        except OSError as error:
            # Not damage: a lost mount must stop the run, not shift it to other images.
            raise DataError(
                f"cannot read {str(path)!r}: {error.strerror}; check the disk, the mount and the permissions."
            ) from error
        try:
            return centre_crop_adm(_to_rgb(content), self.resolution)
        except MemoryError:
            raise
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


def _scan(root: Path) -> tuple[tuple[str, ...], list[list[str]]]:
    """Sorted class names and each one's sorted image file names; DataError where there are none."""
    want = "give a folder that holds one sub-folder of images for each class"
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.path {str(root)!r} {problem}; {want}.")
    folders, stray = _list(root)
    splits = [name for name in folders if name.lower() in SPLIT_NAMES]
    if splits and (len(splits) == len(folders) or "train" in splits):
        raise DataError(
            f"data.path {str(root)!r} holds splits ({', '.join(splits)}), not classes; "
            f"give one of them: data.path={root / splits[0]}."
        )
    if not folders and stray:
        raise DataError(
            f"data.path {str(root)!r} is flat: {len(stray)} images and no class folders; sort the images "
            "into one sub-folder for each class (ImageNet's val needs a foldered copy)."
        )
    if not folders:
        raise DataError(f"data.path {str(root)!r} holds no class folders and no images; {want}.")
    files = [_list(root / name)[1] for name in folders]
    empty = [name for name, of_class in zip(folders, files, strict=True) if not of_class]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:NAMES_SHOWN])
        raise DataError(
            f"{len(empty)} of {len(folders)} class folders in {str(root)!r} hold no images "
            f"({', '.join(EXTENSIONS)}): {shown}; fill or remove them, or, if they hold folders, {want}."
        )
    return tuple(folders), files


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the visible sub-folders and of the visible image files; links are followed."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    images.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
    except OSError as error:
        raise DataError(f"cannot list {str(folder)!r}: {error.strerror}; check the permissions.") from error
    return sorted(folders), sorted(images)
