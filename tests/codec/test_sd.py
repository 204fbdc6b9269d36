"""The diffusers autoencoder, with a tiny random one in place of the 84 M parameters."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.codec.sd import SDCodec

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _tiny(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    ).eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("vae")
    model = _tiny()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(original: tuple[Path, torch.nn.Module], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "copy"))


def test_agrees_with_diffusers(original: tuple[Path, torch.nn.Module]) -> None:
    folder, model = original
    codec = SDCodec(folder)
    assert (codec.channels, codec.factor, codec.scale, codec.image_multiple) == (4, 4, 0.18215, 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        raw = model.encode(images).latent_dist
        posterior = codec.encode(images)
        torch.testing.assert_close(posterior.mean, raw.mean * 0.18215, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(posterior.std, raw.std * 0.18215, rtol=1e-6, atol=1e-6)
        latents = torch.randn(2, 4, 4, 6)
        expected = model.decode(latents / 0.18215).sample
    torch.testing.assert_close(codec.decode(latents), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_scale_and_shift_come_from_the_config(tmp_path: Path) -> None:
    model = _tiny(latent_channels=6, scaling_factor=0.5, shift_factor=0.25)
    model.save_pretrained(tmp_path)
    codec = SDCodec(tmp_path)
    assert (codec.channels, codec.scale) == (6, 0.5)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        raw = model.encode(images).latent_dist.mean
        expected = model.decode(raw).sample
    posterior = codec.encode(images)
    torch.testing.assert_close(posterior.mean, (raw - 0.25) * 0.5, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(codec.decode(posterior.mean), expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_folder_is_read_through_its_vae_subfolder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    folder.rename(tmp_path / "pipeline" / "vae")
    assert SDCodec(tmp_path / "pipeline").factor == 4


def test_old_attention_names_load_to_the_same_weights(folder: Path) -> None:
    """Published files (sd-vae-ft-ema and -mse among them) name the middle attention query, key, value, proj_attn."""
    reference = SDCodec(folder).provenance["sha256"]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in load_file(folder / WEIGHTS).items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        renamed[key] = value
    assert any(".proj_attn." in key for key in renamed)
    save_file(renamed, folder / WEIGHTS, {"format": "pt"})
    assert SDCodec(folder).provenance["sha256"] == reference


def test_provenance_follows_the_weights(folder: Path) -> None:
    before = SDCodec(folder).provenance
    tensors = load_file(folder / WEIGHTS)
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"] + 1e-3
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    after = SDCodec(folder).provenance
    assert before["sha256"] != after["sha256"]
    assert before["scale"] == after["scale"] == "0.18215"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("encoder.conv_in.bias"), "missing keys encoder.conv_in.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected keys extra"),
    ],
)
def test_incomplete_weights_are_refused(folder: Path, change: object, said: str) -> None:
    """diffusers itself would only warn, and keep random values."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        SDCodec(folder)


def test_wrong_shape_names_the_key(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["encoder.conv_in.bias"] = torch.zeros(3)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"encoder\.conv_in\.bias") as caught:
        SDCodec(folder)
    assert "\n" not in str(caught.value)


def _empty(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _damaged(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"damaged")


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _one_channel(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"in_channels": 1}))


@pytest.mark.parametrize("spoil", [_empty, _no_weights, _damaged, _bad_config, _one_channel])
def test_an_unusable_folder_is_one_line(folder: Path, spoil: object) -> None:
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        SDCodec(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("path", ["", "justaname", "./relative/x", "a/b/c/d"])
def test_neither_a_folder_nor_a_hub_id(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json"):
        SDCodec(path)


def test_offline_hub_id_says_what_to_do(tmp_path: Path, repo_root: Path) -> None:
    code = (
        "from dsmoe.codec import build; from dsmoe.base.errors import ConfigError\n"
        "try: build('sd')\n"
        "except ConfigError as error: print('SAID', error)"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(repo_root),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert len(lines) == 1, done.stderr
    assert "stabilityai/sd-vae-ft-ema" in lines[0]
    assert "give codec.path a folder with config.json" in lines[0]


def test_without_diffusers_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match="needs the package diffusers"):
        SDCodec(folder)
