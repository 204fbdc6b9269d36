"""The latent cache on disk: what its files hold, and reading them. Not here: making one (preprocess).

    DIR/manifest.json                             what the latents are of, and size and SHA-256 of every shard; sealed
    DIR/latents-00000-of-00078.safetensors ...    one run of items each
        moments  [n, views, moments, C, h, w]     views: plain, mirrored; moments: mean, std of the scaled latents
        labels   int64 [n]                        a damaged item has the latents and the label of its stand-in
        damaged  bool [n]

Everything is a function of the header: two builds of one header leave the same bytes (docs/latents.md).
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsmoe import __version__
from dsmoe.base.errors import DataError
from dsmoe.base.sealed import size_difference, unseal

FORMAT = 1
MANIFEST = "manifest.json"
BUILDING = "building"  # sub-folder that is there while the cache is not complete
CROP = "adm-centre"  # transforms.centre_crop_adm
ENCODE_BATCH = 32
FEWEST_SHARDS = 8  # a small set is cut too, so that ranks have something to share
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LABEL_BYTES, _DAMAGED_BYTES = 8, 1
_COMMAND = "launchers/cache_latents.py"


def item_bytes(latent: tuple[int, int, int], *, flip: bool, deterministic: bool, dtype: str) -> int:
    """Bytes of one item in a shard; latent: (C, h, w)."""
    views, moments = 1 + flip, 2 - deterministic
    return views * moments * math.prod(latent) * DTYPES[dtype].itemsize + _LABEL_BYTES + _DAMAGED_BYTES


def items_a_shard(items: int, bytes_an_item: int, shard_bytes: int, encode_batch: int = ENCODE_BATCH) -> int:
    """Items of every shard but the last: whole encoding batches, at least one, about shard_bytes at most.

    It does not know how many ranks build: their number must not change a byte.
    """
    wanted = min(shard_bytes // bytes_an_item, -(-items // FEWEST_SHARDS))
    return max(1, wanted // encode_batch) * encode_batch


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """What decides every byte of a cache: the images, the codec and the form.

    fingerprint: of names, sizes and labels of the source's items. resolution: pixels, after `crop`. flip: the mirrored
    view is there too. codec: its provenance. latent: (C, h, w). deterministic: std is zero and left out. dtype: of the
    moments (DTYPES). encode_batch: images that the codec saw at once, always as many. dsmoe: version that built it.
    """

    source: str
    fingerprint: str
    items: int
    class_names: tuple[str, ...]
    resolution: int
    flip: bool
    codec: dict[str, str]
    latent: tuple[int, int, int]
    deterministic: bool
    dtype: str
    shard_items: int
    encode_batch: int = ENCODE_BATCH
    crop: str = CROP
    dsmoe: str = __version__
    format: int = FORMAT

    @property
    def views(self) -> int:
        """Stored views of an image: 1, or 2 with the mirrored one."""
        return 1 + self.flip

    @property
    def moments(self) -> int:
        """Stored moments of a view: 2, or 1 without std."""
        return 2 - self.deterministic

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.items // self.shard_items)

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return item_bytes(self.latent, flip=self.flip, deterministic=self.deterministic, dtype=self.dtype)

    def shard_name(self, shard: int) -> str:
        """File name of a shard."""
        return f"latents-{shard:05d}-of-{self.shards:05d}.safetensors"

    def shard_shape(self, shard: int) -> tuple[int, ...]:
        """Shape of its moments."""
        return len(self.shard_range(shard)), self.views, self.moments, *self.latent

    def shard_range(self, shard: int) -> range:
        """Its items."""
        return range(shard * self.shard_items, min((shard + 1) * self.shard_items, self.items))

    def to_dict(self) -> dict:
        """Plain mappings; `from_dict` reads them back to an equal header."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_dict(tree: dict) -> "CacheHeader":
        """The header among the entries of a manifest; KeyError or TypeError when one is missing or of another kind."""
        own = {field.name: tree[field.name] for field in dataclasses.fields(CacheHeader)}
        tuples = {name: tuple(own[name]) for name in ("class_names", "latent")}
        return CacheHeader(**own | tuples)

    def facts(self) -> dict[str, object]:
        """Flat {name: value}, as mismatches name them."""
        tree = dataclasses.asdict(self)
        return {f"codec {name}": value for name, value in tree.pop("codec").items()} | tree


def mismatches(found: dict[str, object], wanted: dict[str, object], sides: tuple[str, str]) -> list[str]:
    """One phrase for each fact that both know and that differs, both sides named; long values are cut."""
    return [
        f"{name.replace('_', ' ')} is {_short(found[name])} in {sides[0]} and {_short(wanted[name])} in {sides[1]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(value)} of them)"


class LatentCache:
    """A complete cache, mapped into memory: nothing is read before it is asked for, and pages are shared by ranks.

    header: CacheHeader.
    """

    def __init__(self, folder: str | Path, build_command: str = _COMMAND) -> None:
        """DataError when it is missing, not complete, damaged as far as sizes tell, or of another format.

        build_command: the line that would make it, for the message.
        """
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder, build_command)
        self.header = CacheHeader.from_dict(self.manifest)
        for shard in self.manifest["shards"]:
            if wrong := size_difference(self.folder / shard["name"], shard):
                raise DataError(
                    f"latent cache {self.folder} is damaged: {wrong}; restore that file, or make it again (it alone): "
                    f"{build_command}."
                )
        self._moments: list[Tensor] = []
        self._labels: list[Tensor] = []
        for shard in range(self.header.shards):
            tensors = _mapped(self.folder / self.header.shard_name(shard), self.header.shard_shape(shard))
            self._moments.append(tensors["moments"].flatten(0, 1))
            self._labels.append(tensors["labels"])

    def __len__(self) -> int:
        return self.header.items

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the source."""
        return self.header.class_names

    @property
    def num_classes(self) -> int:
        """Of the source."""
        return len(self.header.class_names)

    @property
    def damaged(self) -> list[str]:
        """Names, with the reasons, of the items that a stand-in replaces."""
        return [f"{name} ({why})" for shard in self.manifest["shards"] for _, name, why in shard["damaged"]]

    def read(self, items: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """(moments fp32 [B, moments, C, h, w], labels int64 [B]) of items int64 [B], mirrored where bool [B] says so.

        Copies, made without holding Python's lock, so that a background thread can wait for the disk.
        """
        header = self.header
        assert header.flip or not mirrored.any(), "mirrored latents asked of a cache without them"
        shards, places = items // header.shard_items, items % header.shard_items
        rows = places * header.views + mirrored
        moments = torch.empty(len(items), header.moments, *header.latent, dtype=DTYPES[header.dtype])
        labels = torch.empty_like(items)
        for shard in shards.unique().tolist():
            here = (shards == shard).nonzero().flatten()
            moments[here] = self._moments[shard].index_select(0, rows[here])
            labels[here] = self._labels[shard].index_select(0, places[here])
        return moments.to(torch.float32), labels


def read_manifest(folder: Path, build_command: str = _COMMAND) -> dict:
    """The sealed content of a complete cache's manifest; DataError, with the command that helps, when there is none."""
    path = folder / MANIFEST
    try:
        content = unseal(path.read_text(encoding="utf-8"), FORMAT)
        header = CacheHeader.from_dict(content)
        if [shard["name"] for shard in content["shards"]] != [header.shard_name(s) for s in range(header.shards)]:
            raise ValueError("its shards are not those of its header")
        return content
    except FileNotFoundError:
        state = "is not complete" if (folder / BUILDING).is_dir() else "does not exist"
        if state == "does not exist" and folder.exists():
            state = f"holds no {MANIFEST}"
        raise DataError(f"latent cache {folder} {state}; build it: {build_command}.") from None
    except OSError as error:
        raise DataError(f"latent cache {folder} cannot be read ({error.strerror}); check the permissions.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged or of another version ({error}); restore it, or delete the folder and build it again: "
            f"{build_command}."
        ) from error


def _mapped(path: Path, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors whose bytes stay in the file until they are touched; shape: of the moments."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in ("moments", "labels")}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or no safetensors file ({error}); restore it.") from error
    if tensors["moments"].shape != shape or tensors["labels"].shape != shape[:1]:
        raise DataError(f"{path} holds moments {list(tensors['moments'].shape)} instead of {list(shape)}; restore it.")
    return tensors
