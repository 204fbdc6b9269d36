"""The ways in which the data section and the files it names can be wrong; for test_bad_input, as bad_inputs."""

import importlib.util

from bad_inputs import Case, override
from made_images import png

IMAGE = png(0)
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
NO_PARQUET = ("a.parquet' is no parquet", "copy it again") if HAS_PYARROW else ("pip install pyarrow",)


def photos(name, files, *, says, path="photos"):
    """data.source=image_folder on these files."""
    args = ("data.source=image_folder", f"data.path={path}", "data.size=null")
    return Case(name=name, args=args, files=files, says=says)


def shards(name, path, files, *more, says, source="webdataset"):
    """Tars, or another source, on these files."""
    return Case(
        name=name, args=(f"data.source={source}", f"data.path={path}", "data.size=null", *more), files=files, says=says
    )


CASES = [
    override("scenes with a label map", "data.label_map=m", says=("data.label_map is 'm'", "data.label_map=null")),
    override("scenes with an index", "data.index_folder=x", says=("data.index_folder is 'x'", "has no files")),
    override("blocks of less than nothing", "data.shuffle_block=-1", says=("data.shuffle_block is -1", "0 (shuffle")),
    photos("image folder missing", {}, says=("'photos' does not exist", "sub-folder of images for each class")),
    photos("image folder a file", {"photos": "x"}, says=("'photos' is not a folder", "sub-folder of images")),
    photos(
        "image folder flat", {"photos/a.png": IMAGE}, says=("'photos' is flat: 1 images", "one sub-folder for each")
    ),
    photos("image folder empty", {"photos": None}, says=("'photos' holds no class folders", "sub-folder of images")),
    photos(
        "class without images",
        {"photos/cat/a.png": IMAGE, "photos/dog": None},
        says=("1 of 2 class folders", "'dog'", "fill or remove"),
    ),
    photos(
        "splits instead of classes",
        {"photos/train/cat/a.png": IMAGE},
        says=("splits (train)", "data.path=photos/train"),
    ),
    photos("image folder name too long", {}, path="n" * 300, says=("nnn", "File name too long", "give another path")),
    shards("tars missing", "tars", {}, says=("'tars' does not exist", "give a folder of .tar files, a glob")),
    shards("tar that is none", "a.tar", {"a.tar": "x" * 999}, says=("a.tar' is no tar", "give an uncompressed tar")),
    shards("compressed tar", "a.tar", {"a.tar": b"\x1f\x8b" * 99}, says=("a.tar' is compressed (gzip)", "unpack it")),
    shards(
        "tars of a range missing",
        "t-{00..02}.tar",
        {"t-01.tar": "x"},
        says=("2 of the 3 files", "'t-{00..02}.tar'", "t-00.tar, t-02.tar", "copy them or correct the range"),
    ),
    shards(
        "train and validation in one folder",
        "tars",
        {"tars/train-0.tar": "x", "tars/val-0.tar": "x"},
        says=("2 sets (train-*.tar, val-*.tar)", "'data.path=tars/train-*.tar'"),
    ),
    override(
        "range taken apart by the shell",
        "data.source=webdataset",
        "data.size=null",
        "data.path=t-0.tar",
        "data.path=t-1.tar",
        says=("data.path is given 2 times", "in quotes"),
    ),
    shards("no parquet", "a.parquet", {"a.parquet": "x" * 99}, source="parquet", says=NO_PARQUET),
    shards(
        "label map missing",
        "a",
        {"a/b/c.png": IMAGE},
        "data.label_map=m.txt",
        source="image_folder",
        says=("cannot read label map 'm.txt'", "No such file", "give a label map"),
    ),
    shards(
        "label map of other classes",
        "a",
        {"a/b/c.png": IMAGE, "m.txt": "x\ny\n"},
        "data.label_map=m.txt",
        source="image_folder",
        says=("'m.txt' has 2 classes and lacks 1 of the labels", "'b'", "a label map is text"),
    ),
]
