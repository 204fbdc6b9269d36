"""DeepSpeed's own checkpoint folders (ZeRO 0 to 3): whole weights stitched from the ranks' files.

DeepSpeed is not needed: its files are read as torch files (pickled), and its layout of fp32 masters is this. Stages 1
and 2: of every parameter group one flat vector, cut into one part a rank. Stage 3: every parameter is cut into one
part a rank, ceil(n / ranks) elements each; a rank's parts follow one another. `param_shapes` gives order and shapes.
Tensors are put together one at a time from memory-mapped files.

Not read: tensor-parallel folders (several mp_rank), universal checkpoints, AutoEP under ZeRO-3, and DeepSpeed's own
MoE layer, whose experts no published layout knows.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.base.errors import CheckpointError
from dsmoe.convert.pickled import load
from dsmoe.convert.source import Read, Source, meta

LATEST = "latest"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT_KEY = re.compile(r"(.*\.experts\.w[123])\.(\d+)")
_EXPERT_STACK = re.compile(r".*\.experts\.w[123]")
_GROUPS_12, _GROUPS_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"


@dataclass(frozen=True)
class _Piece:
    """`length` elements from `start` of a flat tensor: keys lead to it from the top of a file."""

    file: Path
    keys: tuple[object, ...]
    start: int
    length: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor: its pieces one after another, in a shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[_Piece, ...]


def find_step(path: Path) -> Path | None:
    """The folder of one step: `path` itself, or the one its `latest` names; None when it is no DeepSpeed folder.

    CheckpointError when `latest` names a folder that is not there.
    """
    if not path.is_dir():
        return None
    if any(_MODEL.fullmatch(p.name) for p in path.iterdir()):
        return path
    latest = path / LATEST
    if not latest.is_file():
        return None
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if Path(name).name != name or not (path / name).is_dir():
        raise CheckpointError(f"{latest} names {name!r}, which is no folder beside it; give the step's folder itself.")
    return find_step(path / name)


def deepspeed_source(step: Path, *, inert: bool) -> tuple[Source, int, str]:
    """The weights of one step's folder, fp32 masters where it holds some: (tensors, images seen, how they were made).

    inert: as for pickled.load; ZeRO's optimizer files, which hold the masters, name DeepSpeed's classes.
    """
    try:
        folder = _Folder(step, inert)
        tensors = dict(folder.tensors())
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{step} is not laid out as DeepSpeed writes it ({type(error).__name__}: {error}); restore it from a copy."
        ) from error

    def reader() -> Read:
        opened = _Files(inert)

        def read(name: str) -> Tensor:
            wanted = tensors[name]
            if len(wanted.pieces) == 1 and wanted.pieces[0].length == math.prod(wanted.shape):
                return opened.flat(wanted.pieces[0]).view(wanted.shape)
            whole = torch.empty(math.prod(wanted.shape), dtype=wanted.dtype)
            at = 0
            for piece in wanted.pieces:
                whole[at : at + piece.length] = opened.flat(piece)
                at += piece.length
            return whole.view(wanted.shape)

        return read

    outline = {name: meta(wanted.shape, wanted.dtype) for name, wanted in tensors.items()}
    return Source(outline, reader), folder.samples, folder.about


class _Files:
    """Opened files, each loaded once."""

    def __init__(self, inert: bool) -> None:
        self._inert = inert
        self._trees: dict[Path, object] = {}

    def tree(self, path: Path) -> dict:
        if path not in self._trees:
            self._trees[path] = load(path, inert=self._inert)
        return self._trees[path]

    def flat(self, piece: _Piece) -> Tensor:
        found = self.tree(piece.file)
        for key in piece.keys:
            found = found[key]
        return found.detach().reshape(-1)[piece.start : piece.start + piece.length]


class _Folder:
    """What one step's folder holds and where."""

    def __init__(self, step: Path, inert: bool) -> None:
        self.step, self._files = step, _Files(inert)
        names = sorted(p.name for p in step.iterdir())
        self.models = self._ranked(_MODEL, names, rank=1, parallel=2)
        self.optimizers = self._ranked(_OPTIMIZER, names, rank=2, parallel=3)
        self.experts = [step / name for name in names if _EXPERT.fullmatch(name)]
        first = self._files.tree(self.models[0])
        if not isinstance(first, dict) or not isinstance(first.get("module"), dict):
            raise CheckpointError(f"{self.models[0]} holds no 'module'; it is not a model file of DeepSpeed.")
        self.samples = int(first.get("global_samples") or 0)
        self.module: dict[str, Tensor] = first["module"]
        self.shapes: list[dict[str, tuple[int, ...]]] = first.get("param_shapes") or []
        self.stage3 = bool(self.optimizers) and _GROUPS_3 in self._optimizer(0)
        self._check()

    def _ranked(self, pattern: re.Pattern, names: list[str], rank: int, parallel: int) -> list[Path]:
        """Files of a kind in the order of ranks."""
        found: dict[int, str] = {}
        for name in names:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            number = int(match[rank] or 0)
            if int(match[parallel]):
                raise CheckpointError(f"{self.step / name} is of a tensor-parallel model, which no DiT layout knows.")
            if number in found:
                raise CheckpointError(f"{self.step} holds both {found[number]} and {name}; remove the older run's.")
            found[number] = name
        return [self.step / found[number] for number in sorted(found)]

    def _optimizer(self, rank: int) -> dict:
        return self._files.tree(self.optimizers[rank])["optimizer_state_dict"]

    def _check(self) -> None:
        if not self.optimizers:
            return
        stated = self._optimizer(0).get("partition_count")
        ranks = max(stated) if isinstance(stated, (list, tuple)) else stated
        if ranks != len(self.optimizers):
            raise CheckpointError(
                f"{self.step} was written by {ranks} ranks and holds {len(self.optimizers)} of their optimizer files; "
                "fetch the missing ones, or remove another run's."
            )
        if self.stage3 and len(self.models) != len(self.optimizers):
            raise CheckpointError(f"{self.step} holds {len(self.models)} model files of {len(self.optimizers)} ranks.")
        if self.stage3 and any(_EXPERT_STACK.fullmatch(name) for group in self.shapes for name in group):
            raise CheckpointError(
                f"{self.step} was written by AutoEP under ZeRO-3, whose experts lie in partitions of partitions; "
                "load it with DeepSpeed and save under ZeRO 0, 1 or 2."
            )

    @property
    def about(self) -> str:
        """One line on what the weights are."""
        if not self.optimizers:
            kind = "ZeRO-0, the model's own weights"
        else:
            kind = f"ZeRO-{'3' if self.stage3 else '1 or 2'}, fp32 masters of {len(self.optimizers)} ranks"
        return f"{kind}{f', {len(self.experts)} expert files as stored' if self.experts else ''}"

    def tensors(self) -> Iterator[tuple[str, _Tensor]]:
        """Every tensor of the model, masters before what only the model file holds."""
        masters = dict(self._stage3() if self.stage3 else self._stage12()) if self.optimizers else {}
        yield from masters.items()
        experts = dict(self._expert_stacks())
        yield from experts.items()
        frozen = dict(self._frozen()) if self.stage3 else {}
        yield from frozen.items()
        known = {*masters, *experts, *frozen}
        for name, tensor in self.module.items():
            if name not in known:
                piece = _Piece(self.models[0], ("module", name), 0, tensor.numel())
                yield name, _Tensor(tuple(tensor.shape), tensor.dtype, (piece,))

    def _stage12(self) -> Iterator[tuple[str, _Tensor]]:
        paddings = self._optimizer(0).get("param_alignment_paddings")
        for group, shapes in enumerate(self.shapes):
            if any(_EXPERT_STACK.fullmatch(name) for name in shapes):
                continue  # of this rank's experts alone, over other ranks; the expert files hold them all
            segments = [
                (path, self._files.tree(path)["optimizer_state_dict"][_GROUPS_12][group].numel())
                for path in self.optimizers
            ]
            offset = 0
            for number, (name, shape) in enumerate(shapes.items()):
                size = math.prod(shape)
                pieces = _cut([(p, ("optimizer_state_dict", _GROUPS_12, group), n) for p, n in segments], offset, size)
                yield name, _Tensor(tuple(shape), torch.float32, self._whole(name, pieces, size))
                offset += size + (paddings[group][number] if paddings else 0)
            # At the end DeepSpeed fills up to a multiple of twice the ranks.
            left = sum(n for _, n in segments) - offset
            if not 0 <= left < 2 * len(self.optimizers):
                raise CheckpointError(
                    f"{self.step}: parameter group {group} has {left} elements too many for its shapes."
                )

    def _stage3(self) -> Iterator[tuple[str, _Tensor]]:
        ranks, offset = len(self.optimizers), 0
        keys = "optimizer_state_dict", _GROUPS_3
        segments = [
            [(path, (*keys, g), flat.numel()) for g, flat in enumerate(self._optimizer(r)[_GROUPS_3])]
            for r, path in enumerate(self.optimizers)
        ]
        for name, shape in (item for group in self.shapes for item in group.items()):
            size = math.prod(shape)
            part = -(-size // ranks)
            pieces = [
                piece for r in range(ranks) for piece in _cut(segments[r], offset, min(part, max(0, size - r * part)))
            ]
            yield name, _Tensor(tuple(shape), torch.float32, self._whole(name, pieces, size))
            offset += part
        for r, parts in enumerate(segments):
            if sum(n for *_, n in parts) != offset:
                raise CheckpointError(f"{self.optimizers[r]} holds another number of elements than its shapes ask for.")

    def _whole(self, name: str, pieces: list[_Piece], size: int) -> tuple[_Piece, ...]:
        found = sum(piece.length for piece in pieces)
        if found != size:
            raise CheckpointError(f"{self.step} holds {found} of the {size} elements of {name}; a file is incomplete.")
        return tuple(pieces)

    def _frozen(self) -> Iterator[tuple[str, _Tensor]]:
        """What has no master, such as a position embedding: parts in every rank's model file."""
        trees = [self._files.tree(path) for path in self.models]
        for name, shape in (trees[0].get("frozen_param_shapes") or {}).items():
            size, pieces, found = math.prod(shape), [], 0
            for path, tree in zip(self.models, trees, strict=True):
                take = min(tree["frozen_param_fragments"][name].numel(), size - found)
                pieces.append(_Piece(path, ("frozen_param_fragments", name), 0, take))
                found += take
            dtype = trees[0]["frozen_param_fragments"][name].dtype
            yield name, _Tensor(tuple(shape), dtype, self._whole(name, pieces, size))

    def _expert_stacks(self) -> Iterator[tuple[str, _Tensor]]:
        """AutoEP's files, one an expert and layer, as stacks; in the dtype that the model ran in."""
        found: dict[str, dict[int, tuple[Path, str, Tensor]]] = {}
        for path in self.experts:
            for key, tensor in self._files.tree(path).items():
                match = _EXPERT_KEY.fullmatch(key)
                if match is None:
                    raise CheckpointError(f"{path} holds {key}; only AutoEP's experts.w1, w2, w3 are known.")
                found.setdefault(match[1], {})[int(match[2])] = path, key, tensor
        for name, experts in found.items():
            if sorted(experts) != list(range(len(experts))):
                raise CheckpointError(f"{self.step} lacks a file of an expert of {name}; it has {sorted(experts)}.")
            first = experts[0][2]
            pieces = [_Piece(experts[e][0], (experts[e][1],), 0, experts[e][2].numel()) for e in range(len(experts))]
            shape = (len(experts), *first.shape)
            yield name, _Tensor(shape, first.dtype, self._whole(name, pieces, math.prod(shape)))


def _cut(segments: list[tuple[Path, tuple, int]], start: int, length: int) -> list[_Piece]:
    """Elements [start, start + length) of segments that follow one another, as pieces."""
    pieces, at = [], 0
    for path, keys, size in segments:
        low, high = max(start, at), min(start + length, at + size)
        if low < high:
            pieces.append(_Piece(path, keys, low - at, high - low))
        at += size
    return pieces
