"""Training of the KL autoencoder, on a handful of small made-up pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dsmoe.base.errors import ConfigError
from dsmoe.codec import fit
from dsmoe.codec.fit import (
    FitOptions,
    Fitter,
    Pictures,
    Progress,
    kl_to_standard_normal,
    reconstruction_terms,
)
from dsmoe.codec.kl import KLCodec


def _pictures(side: int = 16) -> Pictures:
    """Two-colour pictures: left half one colour, right half another."""
    values = np.random.default_rng(0).integers(0, 256, (16, 2, 3), dtype=np.uint8)

    def draw(size: int) -> torch.Tensor:
        return torch.from_numpy(values.repeat(size // 2, axis=1)[:, None].repeat(size, axis=1).copy())

    return Pictures(base=draw(side), large=draw(2 * side), held_out=draw(side)[:4])


def _weights(fitter: Fitter) -> dict[str, torch.Tensor]:
    state = {f"network.{key}": value for key, value in fitter.network.state_dict().items()}
    return state | {f"average.{key}": value for key, value in fitter.average.state_dict().items()}


def _same(one: Fitter, other: Fitter) -> bool:
    left, right = _weights(one), _weights(other)
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("options", [{}, {"images": 5, "minutes": 1.0}, {"images": 0}, {"minutes": -1.0}])
def test_length_is_given_once_and_positive(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="length of the training"):
        FitOptions(**options)


def test_kl_against_torch_distributions() -> None:
    mean, log_variance = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)


def test_reconstruction_terms_against_a_loop() -> None:
    images, outputs = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)
    d = (outputs - images).numpy()[0].astype(np.float64)
    down = [abs(d[c, y + 1, x] - d[c, y, x]) for c in range(2) for y in range(2) for x in range(4)]
    right = [abs(d[c, y, x + 1] - d[c, y, x]) for c in range(2) for y in range(3) for x in range(3)]
    terms = reconstruction_terms(images, outputs)
    assert float(terms["l1"]) == pytest.approx(np.abs(d).mean(), rel=1e-5)
    assert float(terms["l2"]) == pytest.approx((d**2).mean(), rel=1e-5)
    assert float(terms["edge"]) == pytest.approx(0.5 * (np.mean(down) + np.mean(right)), rel=1e-5)


def test_to_unit_maps_bytes_to_the_ends_of_the_range() -> None:
    picture = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert fit.to_unit(picture).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])
    assert fit.to_unit(picture).shape == (1, 3, 1, 1)


def test_the_seed_decides_and_nothing_else_does() -> None:
    runs = []
    for seed, noise in ((7, 0), (7, 1), (8, 0)):
        torch.manual_seed(noise)
        fitter = Fitter(FitOptions(images=64, batch=4, seed=seed), _pictures())
        for _ in range(4):
            fitter.step()
        runs.append(fitter)
    assert _same(runs[0], runs[1])
    assert not _same(runs[0], runs[2])


def test_a_resumed_training_is_the_unbroken_one(tmp_path: Path) -> None:
    options = FitOptions(images=32, batch=4, seed=1)
    unbroken = Fitter(options, _pictures())
    for _ in range(8):
        unbroken.step()
    first = Fitter(options, _pictures())
    for _ in range(3):
        first.step()
    first.save_state(tmp_path / "state.safetensors")
    second = Fitter(options, _pictures())
    second.load_state(tmp_path / "state.safetensors")
    assert _same(first, second)
    for _ in range(5):
        second.step()
    assert second.images == 32
    assert second.share == 1.0
    assert _same(unbroken, second)


def test_resuming_with_other_options_names_them(tmp_path: Path) -> None:
    fitter = Fitter(FitOptions(images=32, batch=4), _pictures())
    fitter.step()
    fitter.save_state(tmp_path / "state.safetensors")
    other = Fitter(FitOptions(images=64, batch=4, seed=3), _pictures())
    with pytest.raises(ConfigError, match=r"images 32 \(now 64\), seed 0 \(now 3\)"):
        other.load_state(tmp_path / "state.safetensors")


def test_every_fourth_step_sees_the_large_pictures() -> None:
    fitter = Fitter(FitOptions(images=1000, batch=8), _pictures())
    sizes = []
    for step in range(8):
        fitter.images = 8 * step
        images, noise = fitter._batch()
        sizes.append((len(images), images.shape[2]))
        assert noise.shape == (len(images), 4, images.shape[2] // 8, images.shape[3] // 8)
    assert sizes == [(8, 16)] * 3 + [(2, 32)] + [(8, 16)] * 3 + [(2, 32)]


def test_flips_reach_about_half_of_the_pictures() -> None:
    fitter = Fitter(FitOptions(images=1000, batch=256), _pictures())
    left = fit.to_unit(fitter.pictures.base)[:, :, 0, 0]
    images, _ = fitter._batch()
    unflipped = (images[:, None, :, 0, 0] == left[None]).all(dim=2).any(dim=1).float().mean()
    assert 0.3 < float(unflipped) < 0.7  # 256 draws: five standard errors are 0.16


def test_it_learns() -> None:
    fitter = Fitter(FitOptions(images=2000, batch=8, warmup_images=80, ema_decay=0.9), _pictures())
    before = fitter.held_out_psnr()
    for _ in range(60):
        fitter.step()
    assert fitter.held_out_psnr() > before + 6


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    fitter = Fitter(FitOptions(images=1000, batch=10, warmup_images=100, learning_rate=1.0), _pictures())
    rates = []
    for images in (0, 40, 90, 500, 1000):
        fitter.images = images
        rates.append(fitter._learning_rate())
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert rates[1] == pytest.approx(0.5, rel=1e-2)
    assert rates[2] == pytest.approx(1.0, rel=0.03)
    assert rates[3] == pytest.approx(0.5)
    assert rates[4] == pytest.approx(0.0, abs=1e-12)


def test_latent_scale_is_one_over_the_spread_of_samples() -> None:
    fitter = Fitter(FitOptions(images=100), _pictures())
    mean, log_variance = fitter.average.moments(fit.to_unit(fitter.pictures.base))
    generator = torch.Generator().manual_seed(0)
    draws = [mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator) for _ in range(400)]
    # 400 draws of 256 elements: the standard error of a standard deviation is 0.2 %
    assert fitter.latent_scale() == pytest.approx(1 / float(torch.stack(draws).std()), rel=0.01)


def test_saved_weights_are_the_average_in_half_precision(tmp_path: Path) -> None:
    fitter = Fitter(FitOptions(images=100, batch=4), _pictures())
    for _ in range(3):
        fitter.step()
    fitter.save_weights(tmp_path / "w.safetensors", {"note": "x"})
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    codec = KLCodec(tmp_path / "w.safetensors")
    assert codec.scale == fitter.latent_scale()
    images = fit.to_unit(fitter.pictures.base)
    mean, _ = fitter.average.moments(images)
    # fp16 keeps 11 bits: 5e-4 of each weight, a few layers deep
    torch.testing.assert_close(codec.encode(images).mean / codec.scale, mean, rtol=0, atol=5e-3)


def test_run_by_the_clock_reports_and_ends(tmp_path: Path) -> None:
    fitter = Fitter(FitOptions(minutes=0.01, batch=4), _pictures())
    reports: list[Progress] = []
    fit.run(fitter, tmp_path, {}, reports.append, every_s=0.1)
    assert fitter.share == 1.0
    assert reports[-1].share == 1.0
    assert reports[-1].psnr is not None
    assert reports[-1].remaining_s == 0.0
    assert reports[-1].images == fitter.images
    assert set(reports[-1].losses) == {"l1", "l2", "edge", "kl"}
    assert {file.name for file in tmp_path.iterdir()} == {fit.WEIGHTS_FILE, fit.STATE_FILE}


def test_the_average_is_exponential_with_a_short_memory_at_first() -> None:
    """Decay min(0.5, (1 + s) / (10 + s)) after step s: weight 9 / (10 + s) for the new values at first."""
    fitter = Fitter(FitOptions(images=100, batch=4, warmup_images=4, ema_decay=0.5), _pictures())
    name = "encoder.1.weight"
    expected = fitter.network.state_dict()[name].double().clone()
    for step in range(1, 12):
        fitter.step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * fitter.network.state_dict()[name].double()
    torch.testing.assert_close(fitter.average.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-7)
