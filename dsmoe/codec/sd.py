"""Stable Diffusion's autoencoder (any diffusers `AutoencoderKL`) from a local folder or a hub id.

diffusers is imported only when this codec is built. Network access is the hub client's business:
HF_HUB_OFFLINE=1 keeps it to its cache. Only safetensors weights are read.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.codec.files import tensor_sha256
from dsmoe.codec.protocol import IMAGE_CHANNELS, Posterior, check_images, check_latents, provenance

DEFAULT_MODEL = "stabilityai/sd-vae-ft-ema"  # the autoencoder DiT was trained with
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
_HOW = "give codec.path a folder with config.json and diffusion_pytorch_model.safetensors, or a cached hub id"


class SDCodec(nn.Module):
    """`AutoencoderKL`; latents are (raw - shift_factor) * scaling_factor, from its config (0 and 0.18215).

    path: a folder with config.json (itself or in its subfolder `vae`), a hub id `owner/name[/subfolder]`, or
    None for `DEFAULT_MODEL`. `provenance["sha256"]` is over names, shapes and fp32 values of the tensors, so
    it does not depend on how the files were written.
    """

    name = "sd"
    input_range = (-1.0, 1.0)
    deterministic = False

    def __init__(self, path: Path | str | None = None) -> None:
        super().__init__()
        self.network = _load(str(path) if path is not None else DEFAULT_MODEL)
        config = self.network.config
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.image_multiple = self.factor
        self.scale = float(config.scaling_factor)
        self._shift = float(config.shift_factor or 0.0)
        sha256 = tensor_sha256(self.network.state_dict())
        self.provenance = provenance(self.name, sha256, self.scale, self.factor)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """images [B, 3, H, W] in [-1, 1] -> Posterior over scaled latents [B, channels, h, w]."""
        check_images(self, images)
        raw = self.network.encode(images.to(torch.float32)).latent_dist
        return Posterior((raw.mean - self._shift) * self.scale, raw.std * self.scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """scaled latents [B, channels, h, w] -> images [B, 3, h*factor, w*factor], not clamped."""
        check_latents(self, latents)
        return self.network.decode(latents.to(torch.float32) / self.scale + self._shift).sample


def _load(path: str) -> nn.Module:
    source, subfolder = _locate(path)  # before the import, which takes seconds
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            f"codec 'sd' needs the package diffusers ({error}); install it or choose another codec"
        ) from error
    try:
        network, info = AutoencoderKL.from_pretrained(
            source,
            subfolder=subfolder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and the hub client raise many kinds: all mean "not loadable"
        raise ConfigError(f"codec 'sd' cannot load {path!r}: {_first_lines(error)}; {_HOW}") from error
    _check_loaded(path, network, info)
    return network


def _locate(path: str) -> tuple[str, str | None]:
    """(folder or hub id, subfolder) for diffusers."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder), None
        if (folder / "vae" / "config.json").is_file():
            return str(folder), "vae"
        raise ConfigError(f"codec path {path!r} has no config.json, nor vae/config.json; {_HOW}")
    if not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise ConfigError(f"codec path {path!r} is no folder and no hub id owner/name[/subfolder]; {_HOW}")
    owner, name, *rest = path.split("/")
    return f"{owner}/{name}", rest[0] if rest else None


def _check_loaded(path: str, network: nn.Module, info: dict[str, Any]) -> None:
    """diffusers only warns about weights it lacks and leaves them random; that must not pass here."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := info.get(kind):
            names = ", ".join(str(key) for key in keys[:4])
            said = f"{kind.replace('_', ' ')} {names} ({len(keys)} in all)"
            raise CheckpointError(f"codec 'sd' weights {path!r} do not fit their config.json: {said}")
    if network.config.in_channels != IMAGE_CHANNELS:
        raise ConfigError(f"codec 'sd' {path!r} takes {network.config.in_channels} channels, expected 3")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
