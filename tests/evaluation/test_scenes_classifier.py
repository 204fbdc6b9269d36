"""The judge: it learns, it is repeatable, its file is strict, and the committed one is as good as documented."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage, stats

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.data.scenes import Scenes
from dsmoe.data.transforms import to_float
from dsmoe.evaluation import scenes_classifier as module
from dsmoe.evaluation.scenes_classifier import (
    WEIGHTS,
    ScenesClassifier,
    at_side,
    blur,
    degrade,
    fit,
    load_classifier,
    render,
    save_classifier,
)

NAMES = Scenes("train", 64).class_names


@pytest.fixture(scope="module")
def train_scenes() -> tuple[torch.Tensor, torch.Tensor]:
    return render("train", 256)


def test_render_gives_the_scenes_channels_first() -> None:
    images, labels = render("validation", 3, 32)
    scenes = Scenes("validation", 32)
    assert images.shape == (3, 3, 32, 32)
    for i in range(3):
        image, label = scenes.read(i)
        assert np.array_equal(images[i].permute(1, 2, 0).numpy(), image)
        assert labels[i] == label


def test_blur_is_gaussian() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, 0.9, 0.9), mode="nearest", truncate=10)
    # The kernel is cut at three sigma or beyond, which leaves out 0.3 % of its weight at most.
    assert np.abs(blur(images, 0.9).numpy() - expected).max() < 3e-3


def test_bringing_to_the_side_keeps_flat_images_and_means() -> None:
    flat = torch.full((1, 3, 32, 32), 0.25)
    assert torch.allclose(at_side(flat), torch.full((1, 3, 64, 64), 0.25), atol=1e-6)
    large = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    small = at_side(large)
    assert small.shape == (1, 3, 64, 64)
    # Pixels are independent with deviation 0.29; averaging 4x4 of them with a triangle leaves less than a quarter.
    assert small.std() < 0.29 / 4
    same = torch.zeros(1, 3, 64, 64)
    assert at_side(same) is same


def test_worsened_images_are_still_the_same_scenes() -> None:
    images = to_float(render("train", 32)[0])
    worse = degrade(images, torch.Generator().manual_seed(0))
    again = degrade(images, torch.Generator().manual_seed(0))
    assert torch.equal(worse, again)
    assert worse.shape == images.shape
    flipped = 0
    for before, after in zip(images, worse, strict=True):
        likeness = [torch.corrcoef(torch.stack([x.flatten(), after.flatten()]))[0, 1] for x in (before, before.flip(2))]
        assert max(likeness) > 0.7
        flipped += int(likeness[1] > likeness[0])
    assert 4 <= flipped <= 28  # of 32 at one half: further out once in 10^5


def test_fit_learns_and_repeats(train_scenes) -> None:
    images, labels = train_scenes
    seen = []
    torch.manual_seed(11)
    untouched = torch.random.get_rng_state()
    model = fit(images, labels, NAMES, epochs=8, report=seen.append)
    assert torch.equal(torch.random.get_rng_state(), untouched)
    assert [p.epoch for p in seen] == list(range(1, 9))
    assert seen[-1].loss < seen[0].loss
    assert not model.training
    # Chance is 16 of 256 with a deviation of 3.9; this is six of them above.
    assert int((model.classify(images) == labels).sum()) > 40
    short = [fit(images[:128], labels[:128], NAMES, epochs=1, seed=s).head.weight for s in (3, 3, 4)]
    assert torch.equal(short[0], short[1])
    assert not torch.equal(short[0], short[2])


def test_fit_refuses_less_than_a_batch(train_scenes) -> None:
    with pytest.raises(ConfigError, match="100 training scenes"):
        fit(train_scenes[0][:100], train_scenes[1][:100], NAMES, epochs=1)


def test_classify_judges_in_evaluation_mode_and_leaves_the_mode(train_scenes) -> None:
    model = ScenesClassifier(NAMES).train()
    images = train_scenes[0][:40]
    whole = model.classify(images)
    assert torch.equal(whole, model.classify(images, batch_size=7))
    assert model.training


def test_file_round_trip(tmp_path) -> None:
    model = ScenesClassifier(NAMES)
    save_classifier(tmp_path / "c.safetensors", model, {"epochs": "3"})
    found, notes = load_classifier(tmp_path / "c.safetensors")
    assert notes["epochs"] == "3"
    assert found.class_names == NAMES
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full_disk(_: dict, file, metadata: dict) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_classifier(tmp_path / "c.safetensors", ScenesClassifier(NAMES), {})
    assert list(tmp_path.iterdir()) == []


def test_unusable_files_are_refused(tmp_path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_classifier(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="format None"):
        load_classifier(path)
    state = {name: value.contiguous() for name, value in ScenesClassifier(NAMES).state_dict().items()}
    del state["head.bias"]
    save_file(state, path, metadata={"format": module.FORMAT, "class_names": json.dumps(NAMES)})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_classifier(path)


def test_committed_classifier_is_as_good_as_documented() -> None:
    model, notes = load_classifier()
    assert model.class_names == NAMES
    assert WEIGHTS.stat().st_size < 1_500_000
    assert all(value.isfinite().all() for value in load_file(WEIGHTS).values())
    documented = float(notes["validation_accuracy"])
    assert documented >= 0.95
    images, labels = render("validation", 256)
    # What 2048 scenes leave possible (Wilson), less three deviations of a draw of 256.
    possible = stats.binomtest(round(2048 * documented), 2048).proportion_ci(0.95, "wilson").low
    margin = 3 * (possible * (1 - possible) / 256) ** 0.5
    assert (model.classify(images) == labels).float().mean() >= possible - margin
    small, labels = render("validation", 128, 32)
    assert (model.classify(small) == labels).float().mean() >= 0.95
