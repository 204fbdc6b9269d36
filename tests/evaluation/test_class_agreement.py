"""The measure: its bound against scipy, its counts against loops, its controls, and the benchmark's command."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats

from dsmoe.base.errors import ConfigError
from dsmoe.codec import build as build_codec
from dsmoe.data.scenes import Scenes
from dsmoe.evaluation.class_agreement import (
    Agreement,
    agreement,
    balanced_labels,
    measure,
    round_trip,
    shuffled,
    table,
    wilson_lower,
)
from dsmoe.evaluation.scenes_classifier import load_classifier, render


@pytest.mark.parametrize("trials", [1, 16, 512, 2048])
@pytest.mark.parametrize("share", [0.0, 0.0625, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_lower_bound_is_wilsons(trials: int, share: float, confidence: float) -> None:
    agreed = round(share * trials)
    interval = stats.binomtest(agreed, trials).proportion_ci(confidence, method="wilson")
    assert wilson_lower(agreed, trials, confidence) == pytest.approx(interval.low, abs=1e-12)
    assert 0 <= wilson_lower(agreed, trials, confidence) <= agreed / trials


def test_counts_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    table_ = np.zeros((5, 5), int)
    for y, f in zip(labels, found, strict=True):
        table_[y, f] += 1
    got = agreement(torch.from_numpy(found), torch.from_numpy(labels), 5)
    assert np.array_equal(np.array(got.confusion), table_)
    assert got.count == 200
    assert got.agreed == int((labels == found).sum())
    assert got.share == got.agreed / 200
    assert got.chance == 0.2
    assert got.ratio == pytest.approx(stats.binomtest(got.agreed, 200).proportion_ci(0.95, "wilson").low / 0.2)


def test_what_four_times_chance_asks_of_512_samples() -> None:
    """148 of 512 is the least whose bound reaches 4/16: 29 %, not 25 %."""
    bound = [stats.binomtest(k, 512).proportion_ci(0.95, "wilson").low * 16 for k in (147, 148)]
    assert bound[0] < 4 <= bound[1]
    for agreed, expected in zip((147, 148), bound, strict=True):
        rows = [[0] * 16 for _ in range(16)]
        rows[0][0], rows[1][0] = agreed, 512 - agreed
        assert Agreement(tuple(map(tuple, rows))).ratio == pytest.approx(expected)


def test_labels_are_balanced_or_refused() -> None:
    assert torch.bincount(balanced_labels(512, 16)).tolist() == [32] * 16
    for samples in (0, -16, 8, 500):
        with pytest.raises(ConfigError, match=f"--samples {samples} .*multiple of the 16"):
            balanced_labels(samples, 16)


def test_shuffled_labels_tell_nothing_about_the_images() -> None:
    labels = balanced_labels(1600, 16)
    mixed = shuffled(labels, 3)
    assert torch.equal(mixed.sort().values, labels.sort().values)
    assert torch.equal(mixed, shuffled(labels, 3))
    assert not torch.equal(mixed, shuffled(labels, 4))
    # Perfect verdicts against shuffled labels: 100 +- 9.7 of 1600 agree; five deviations.
    assert abs(agreement(labels, mixed, 16).agreed - 100) < 49


def test_round_trip_through_no_codec_changes_nothing() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(build_codec("none"), images, torch.device("cpu"), batch_size=2), images)


def test_round_trip_decodes_what_it_encoded() -> None:
    class Halving:
        """Latents are half the image; decoding forgets to double them."""

        def encode(self, images: torch.Tensor) -> object:
            return type("Posterior", (), {"mean": images / 2})

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(round_trip(Halving(), white, torch.device("cpu")), torch.full_like(white, 191))


def test_measure_tells_good_images_from_noise() -> None:
    """Real test scenes stand for a perfect model, noise for one that learnt nothing."""
    classifier, _ = load_classifier()
    codec = build_codec("none")
    scenes, labels = render("test", 160, 32)
    noise = torch.randint(0, 256, scenes.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    common = {"held_out": 64, "seed": 0, "device": torch.device("cpu")}
    good = measure(classifier, codec, scenes, labels, **common)
    bad = measure(classifier, codec, noise, labels, **common)
    assert good.generated.share > 0.95
    assert good.generated.ratio > 4
    # 160 guesses at 1/16: five deviations above chance are 25.
    assert bad.generated.agreed < 26
    assert bad.generated.ratio < 4
    assert good.shuffled.agreed < 26
    assert good.held_out.share > 0.9
    assert good.at_side == good.round_trip
    text = table(good, classifier.class_names)
    assert "striped_ball" in text
    assert f"{good.generated.share:.1%}" in text
    assert f"{good.generated.lower:.1%}" in text


def test_table_names_the_most_frequent_mistake() -> None:
    counts = Agreement(((1, 4, 2), (0, 7, 0), (3, 0, 4)))
    line = table(type("M", (), {"generated": counts, "rows": lambda self: []})(), ("a", "b", "c")).splitlines()
    assert line[-3].split() == ["a", "1", "7", "b", "(4)"]
    assert line[-2].split() == ["b", "7", "7", "-"]
    assert line[-1].split() == ["c", "4", "7", "a", "(3)"]


# --- benchmarks/class_agreement.py ---


@pytest.fixture(scope="module")
def benchmark_script(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("class_agreement_script", repo_root / "benchmarks/class_agreement.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_benchmark_reports_and_judges(benchmark_script, scenes_run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "report.json"
    argv = ["--checkpoint", str(scenes_run), "--samples", "32", "--held-out", "64", "--out", str(out)]
    assert benchmark_script.main(argv) == 0
    report = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert report["generated"]["images"] == 32
    assert [sum(row) for row in report["generated"]["confusion"]] == [2] * 16
    assert report["generated"]["chance"] == 1 / 16
    assert report["real_round_trip"]["agreement"] > 0.9
    assert report["images_seen"] == 1234
    assert report["sampling"] == "ddim, 2 steps, guidance 3 (channels all), seed 7"
    assert "real, through the codec (ceiling)" in printed
    # Random weights: 32 guesses; a bound of 4x chance would take 15 of them.
    assert benchmark_script.main([*argv, "--require", "4"]) == 1
    assert "NOT met" in capsys.readouterr().out
    assert benchmark_script.main([*argv, "--require", "0"]) == 0


def test_benchmark_refuses_weights_of_other_classes(benchmark_script, run_folder: Path, capsys) -> None:
    assert benchmark_script.main(["--checkpoint", str(run_folder)]) == 2
    assert "data.source=scenes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "{run}", "--samples", "500"], "--samples 500 is not a multiple"),
        (["--checkpoint", "{run}", "--held-out", "0"], "--held-out is 0"),
        (["--checkpoint", "{run}", "--classifier", "{run}/none"], "does not exist"),
        (["--checkpoint", "{run}", "--out", "{run}/r.txt"], "must end in .json"),
        (["--train", "--epochs", "0"], "--epochs is 0"),
        (["--train", "--classifier", "{run}/c.safetensors", "--codec", "vae"], "unknown codec 'vae'"),
        (["--train"], "--train needs --classifier"),
        (["--train", "--classifier", "{run}"], "must end in .safetensors"),
    ],
)
def test_benchmark_mistakes_are_one_line(benchmark_script, scenes_run, argv, message, capsys) -> None:
    assert benchmark_script.main([word.replace("{run}", str(scenes_run)) for word in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dsmoe: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("codec", [(), ("--codec", "none")])
def test_benchmark_trains_a_classifier(benchmark_script, tmp_path: Path, codec: tuple[str, ...], capsys) -> None:
    file = tmp_path / "c.safetensors"
    argv = ["--train", "--classifier", str(file), "--scenes", "64" if codec else "128", "--epochs", "1", *codec]
    assert benchmark_script.main([*argv, "--held-out", "32"]) == 0
    model, notes = load_classifier(file)
    assert model.class_names == Scenes("train", 64).class_names
    assert (notes["epochs"], notes["validation_scenes"]) == ("1", "32")
    assert notes["codec"] == ("none none" if codec else "not shown")
    assert 0 <= float(notes["validation_accuracy"]) <= 1
    assert str(file) in capsys.readouterr().out
