"""Two processes through the launcher: class folders, tars and parquet with the same photos are the same run."""

import json
from pathlib import Path

import numpy as np
import pytest
from distributed_harness import assert_succeeded, launch
from made_images import encoded
from made_shards import three_forms
from PIL import Image

from dsmoe.data.index_file import BESIDE

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("run_several.py")
STOPPED = 75
FIGURES = ("images_seen", "loss", "mse", "vb", "balance", "grad_norm", "load_entropy")
TINY = [
    "codec.name=none", "model.preset=nano-4E2A", "model.depth=2", "model.dim=32", "model.heads=2", "model.patch=4",
    "data.size=null", "data.resolution=32", "data.max_bad_fraction=0.5", "data.shuffle_block=3", "codec.cache=none",
    "train.global_batch=8", "train.images=64", "optimizer.warmup_images=16", "ema.half_life_images=20",
    "report.log_every=8", "report.samples=2", "report.sample_steps=1",
]  # fmt: skip


def _photos() -> list[tuple[str, bytes, int]]:
    """Twenty smooth random pictures of three classes, one of them damaged."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((48, 40)) for _ in range(20)]
    contents = [encoded(picture, "JPEG") for picture in pictures]
    contents[3] = contents[3][: len(contents[3]) // 2]
    return [(f"k{i:02d}", content, i // 7) for i, content in enumerate(contents)]


def _figures(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in FIGURES} for row in rows]


def test_the_losses_are_the_same_bit_by_bit_and_after_a_resume(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    forms = three_forms(tmp_path / "photos", _photos())
    folders = {form: tmp_path / f"run-{form}" for form in forms}
    config = tmp_path / "engine.json"
    config.write_text(json.dumps({"dsmoe": {"about": "test"}, "zero_optimization": {"stage": 1}}))

    def run(form: str, stop: int = 0) -> dict:
        given = [f"data.source={forms[form][0]}", f"data.path={forms[form][1]}"]
        argv = ["--deepspeed_config", str(config), "--run", str(folders[form]), *TINY, *given]
        return {"argv": argv, "stop": stop}

    results = launch([SCRIPT, json.dumps([run("tar", stop=3), *map(run, forms)])], 2, timeout=150, preloaded=True)
    assert_succeeded(results)
    ranks = [json.loads(r.stdout.splitlines()[-1]) for r in results]
    assert [[code for code, _ in rank] for rank in ranks] == [[STOPPED, 0, 0, 0]] * 2
    # Which rank scans which is chance. That one does not scan all: tests/data/test_item_index.py.
    scanned = [sorted(name for _, names in of_ranks for name in names) for of_ranks in zip(*ranks, strict=True)]
    tars = sorted(path.name for path in forms["tar"][1].glob("*.tar"))
    assert scanned == [tars, [], [], []], "each tar is scanned once, by either rank, and not again by a later run"
    assert len(tars) == 4
    want = _figures(folders["folder"])
    assert [row["images_seen"] for row in want] == list(range(8, 65, 8))
    first = {"folder": "000/k03.jpg", "tar": "photos-0000.tar/k03", "parquet": "photos-00000.parquet:3"}
    for form in forms:
        assert _figures(folders[form]) == want, form
        log = (folders[form] / "logs" / "rank00000.log").read_text()
        assert f"skipped 1 damaged images, the first: {first[form]}" in log
        assert len(list((forms[form][1] / BESIDE).glob("*.safetensors"))) == (form != "folder")
