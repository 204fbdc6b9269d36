"""Which files a `data.path` means: a folder, one file, a glob or a brace range. Not here: what the files hold."""

import glob
import os
import re
from pathlib import Path

from dsmoe.base.errors import DataError
from dsmoe.data.index_file import Shard

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_SHARDS = 1_000_000
_SHOWN = 3


def shard_files(path: str, ending: str) -> tuple[Path, list[Shard]]:
    """(the folder that holds them all, the files `path` means): a range in its own order, others sorted by path.

    path: a folder (its own *ENDING files), a file, a glob, or a brace range train-{0000..1023}ENDING, all with ~ for
    the home. Shards are named by their path below the folder. DataError when there are none, when a file of a range is
    missing, or when a folder holds the files of several sets, such as train and validation, or not all of one.
    """
    want = f"give a folder of {ending} files, a glob 'DIR/train-*{ending}' or a range 'DIR/{{000..999}}{ending}'"
    text = os.path.expanduser(path)
    if Path(text).is_dir():
        files = sorted(p for p in Path(text).iterdir() if p.name.endswith(ending) and not p.name.startswith("."))
        _refuse_several_sets(path, files, ending)
        _refuse_gaps(path, files, ending)
    elif _RANGE.search(text):
        files = [Path(name) for name in _expand(path, text)]
        if missing := [file for file in files if not file.is_file()]:
            raise DataError(
                f"{len(missing)} of the {len(files)} files of data.path {path!r} do not exist: "
                f"{', '.join(str(file) for file in missing[:_SHOWN])}; copy them or correct the range."
            )
    elif "{" in text:
        raise DataError(f"data.path {path!r} has braces that are no range of numbers such as {{0000..1023}}; {want}.")
    elif glob.has_magic(text):
        files = sorted(Path(name) for name in glob.glob(text, recursive=True))
    elif not Path(text).exists():
        raise DataError(f"data.path {path!r} does not exist; {want}.")
    else:
        files = [Path(text)]
    if not files:
        below = next((str(file.parent) for file in sorted(Path(text).glob(f"*/*{ending}"))), None)
        hint = f"data.path={below} holds some, or {want}" if below else want
        raise DataError(f"data.path {path!r} means no {ending} file; {hint}.")
    if wrong := [file for file in files if not (file.name.endswith(ending) and file.is_file())]:
        raise DataError(f"data.path {path!r} means {str(wrong[0])!r}, which is no {ending} file; {want}.")
    root = Path(os.path.commonpath([file.parent for file in files]))
    return root, [Shard.of(file, str(file.relative_to(root))) for file in files]


def _expand(path: str, text: str) -> list[str]:
    """Every name of the brace ranges, the last range running fastest; numbers as wide as the first bound."""
    found = _RANGE.search(text)
    if not found:
        return [text]
    first, last = found.groups()
    if int(last) < int(first) or int(last) - int(first) >= MAX_SHARDS:
        raise DataError(f"data.path {path!r} has the range {found[0]}; its bounds rise, by at most {MAX_SHARDS} files.")
    before, after = text[: found.start()], text[found.end() :]
    names = (f"{before}{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return [name + rest for name in names for rest in _expand(path, after)]


def _refuse_several_sets(path: str, files: list[Path], ending: str) -> None:
    """timm and the Hugging Face hub keep train, validation and test shards in one folder."""
    sets = sorted({re.sub(r"\d+", "*", file.name) for file in files})
    if len(sets) > 1:
        shown = ", ".join(sets[:_SHOWN]) + (", ..." if len(sets) > _SHOWN else "")
        likely = next((name for name in sets if "train" in name), sets[0])
        raise DataError(
            f"data.path {path!r} holds {ending} files of {len(sets)} sets ({shown}); choose one by a glob in quotes: "
            f"'data.path={os.path.join(path, likely)}'."
        )


def _refuse_gaps(path: str, files: list[Path], ending: str) -> None:
    """Names such as train-00017-of-00294 say how many there should be: a copy that stopped halfway."""
    totals = {int(found[1]) for file in files if (found := re.search(r"-of-(\d+)", file.name))}
    if len(totals) == 1 and len(files) < max(totals):
        raise DataError(
            f"data.path {path!r} holds {len(files)} of {max(totals)} {ending} files; copy the others, or take what is "
            f"there by a glob in quotes: 'data.path={os.path.join(path, '*' + ending)}'."
        )
