"""The launcher of the latent cache: what it refuses, `--verify`, and that a killed build leaves the same bytes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_harness import assert_succeeded, launch
from made_cache import content
from PIL import Image

from dsmoe.evaluation.command import run
from dsmoe.preprocess import cache_build
from dsmoe.preprocess.cache_command import parser, work
from dsmoe.runtime.stopping import EXIT_STOPPED

SCRIPT = Path(__file__).with_name("interrupted_cache.py")
SIDE, CLASSES, EACH = 16, 4, 35  # 140 images: five shards of 32, the last one short


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Smooth random pictures in class folders, one of them damaged."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c in range(CLASSES):
        (folder / f"class{c}").mkdir()
        for i in range(EACH):
            small = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(small).resize((30, 25)).save(folder / f"class{c}" / f"{i:02d}.png")
    (folder / "class1/07.png").write_bytes(b"not a picture")
    return folder


def argv(out: Path, photos: Path, *more: str) -> list[str]:
    """A small build through the committed codec, whose convolutions could sum in another order in another batch."""
    overrides = (f"data.path={photos}", "codec.name=kl-small", "codec.path=null", f"data.resolution={SIDE}")
    policy = ("data.max_bad_fraction=0.5", "codec.cache=none")
    return ["--out", str(out), "--recipe", "photos", "--shard-mib", "0.001", *overrides, *policy, *more]


@pytest.fixture
def command(monkeypatch, capfd):
    """Run in this process as one rank: (exit code, stdout, stderr)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def start(arguments):
        capfd.readouterr()
        code = run(parser("test"), [str(a) for a in arguments], work, {})
        return code, *capfd.readouterr()

    yield start
    torch.set_num_threads(threads)


REFUSED = [
    ((), ("--out is missing",)),
    (("--verify", "nowhere"), ("latent cache nowhere does not exist",)),
    (("--verify", "x", "--out", "y"), ("--verify takes a folder and nothing else",)),
    (("--out", "x", "--dtype", "int8"), ("--dtype is 'int8'", "float32, float16, bfloat16")),
    (("--out", "x", "--shard-mib", "0"), ("--shard-mib is 0", "above 0")),
    (("--out", "x", "--shard-mib", "many"), ("--shard-mib", "many")),
    (("--out", "x", "--workers", "-1"), ("--workers is -1",)),
    (("--out", "x", "--recipe", "photo"), ("unknown recipe 'photo'", "Did you mean 'photos'")),
    (("--out", "x", "--recipe", "photos"), ("codec path 'TAESD' is no folder",)),
    (("--out", "x", "data.resolution=36"), ("data.resolution 36 is not a multiple of 8", "choose such as 32")),
    (("--out", "x", "--resume"), ("--resume", "--help")),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[" ".join(a) or "nothing" for a, _ in REFUSED])
def test_mistakes_are_one_line_and_leave_nothing(command, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dsmoe: ")
    assert err.count("\n") == 1
    for words in says:
        assert words in err
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_is_named_with_both_hashes(command, tmp_path, photos):
    cache = tmp_path / "cache"
    code, _, err = command(argv(cache, photos))
    assert code == 0
    assert "140 images, 5 shards: needs" in err
    assert "stand-ins for 1 damaged images, the first: class1/07.png" in err
    assert f"codec.cache=disk codec.cache_path={cache}" in err
    code, out, _ = command(["--verify", cache])
    assert (code, out.count("  whole\n")) == (0, 5)

    shard = cache / "latents-00003-of-00005.safetensors"
    stated = json.loads((cache / "manifest.json").read_text().split("\n", 1)[1])["shards"][3]["sha256"]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, out, err = command(["--verify", cache])
    assert (code, out.count("  whole\n")) == (2, 4)
    assert "1 of 5 shards" in err
    for words in ("latents-00003-of-00005.safetensors", f"expected {stated}, found "):
        assert words in err
        assert words in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_build_after_the_shard_with_code_75(command, tmp_path, photos, number, monkeypatch):
    plain, calls = cache_build.encode_views, []

    def asked(codec, images, views):
        calls.append(len(images))
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return plain(codec, images, views)

    monkeypatch.setattr(cache_build, "encode_views", asked)
    code, _, err = command(argv(tmp_path / "cache", photos))
    assert code == EXIT_STOPPED == 75
    assert "the same command goes on" in err
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    code, _, err = command(argv(tmp_path / "cache", photos))
    assert code == 0
    assert "64 images are there already" in err
    assert len(calls) == 5, "no image is encoded twice"


@pytest.mark.distributed
def test_killed_and_resumed_on_other_ranks_gives_the_bytes_of_an_unbroken_build(command, tmp_path, photos):
    whole = tmp_path / "whole"
    assert command(argv(whole, photos))[0] == 0
    for world, batch in ((1, 3), (2, 2)):
        cache = tmp_path / f"killed{world}"
        killed = launch([SCRIPT, "SIGKILL", 0, batch, *argv(cache, photos)], world, timeout=60, preloaded=True)
        assert killed[0].returncode == -signal.SIGKILL
        assert all(rank.returncode != 0 for rank in killed)
        kept = [p.name for p in cache.glob("latents-*")]
        assert 0 < len(kept) < 5
        assert not (cache / "manifest.json").exists()
        if world == 1:
            resumed = launch([SCRIPT, "SIGTERM", 0, 0, *argv(cache, photos)], 2, timeout=60, preloaded=True)
            assert_succeeded(resumed)
        else:
            assert command(argv(cache, photos))[0] == 0
        assert content(cache) == content(whole)
