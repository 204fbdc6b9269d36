"""How a DiT turns its inputs into vectors and its tokens back into an image: patches, positions, timestep,
label.

The leaf layers with DiT's initialisations live here too, because every module of the model is made of them.
Transformer blocks and the model live in `dsmoe.models.dit`.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from dsmoe.base.accounting import TIMESTEP_DIM
from dsmoe.ops.initialize import initialize

MAX_PERIOD = 10_000.0


def _small_normal(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.02)


class Linear(nn.Linear):
    """Linear layer with DiT's default initialisation: weight xavier_uniform, bias 0 (contracts 2.1.6).

    The initialisation is in `reset_parameters`, which the constructor calls, so that it also holds under
    ZeRO-3, where a parameter is partitioned as soon as its own module is built.
    """

    def reset_parameters(self) -> None:
        initialize(self.weight, nn.init.xavier_uniform_)
        nn.init.zeros_(self.bias)


class ZeroLinear(Linear):
    """Linear layer that starts as zero: adaLN and output layers (adaLN-Zero, DiT section 3.2)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class NormalLinear(Linear):
    """Linear layer with weight N(0, 0.02), bias 0: the timestep MLP."""

    def reset_parameters(self) -> None:
        initialize(self.weight, _small_normal)
        nn.init.zeros_(self.bias)


class PatchConv(nn.Conv2d):
    """Patch projection [D, C, p, p] initialised as the Linear [D, C*p*p] it is: xavier_uniform, bias 0."""

    def reset_parameters(self) -> None:
        initialize(self.weight, lambda weight: nn.init.xavier_uniform_(weight.flatten(1)))
        nn.init.zeros_(self.bias)


class LabelTable(nn.Embedding):
    """Embedding rows N(0, 0.02), the null row included."""

    def reset_parameters(self) -> None:
        initialize(self.weight, _small_normal)


class FixedBufferModule(nn.Module):
    """A module with computed fp32 constants that no cast or `to_empty` can spoil.

    `model.bfloat16()` casts buffers with the parameters and `to_empty` leaves them undefined; constants
    registered here follow the device and keep their fp32 values (design decision 8). They are not part of the
    state dict.
    """

    def register_fixed(self, name: str, values: np.ndarray) -> None:
        """Register `values` (any shape, rounded to fp32) as a non-persistent buffer on the default device."""
        if not hasattr(self, "_fixed_values"):
            self._fixed_values: dict[str, np.ndarray] = {}
        # From numpy: DeepSpeed's zero.Init makes torch's constructors round to the training dtype.
        self._fixed_values[name] = values.astype(np.float32)
        tensor = torch.from_numpy(self._fixed_values[name].copy()).to(torch.get_default_device())
        self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, values in self._fixed_values.items():
            device = getattr(self, name).device
            setattr(self, name, torch.from_numpy(values.copy()).to(device))
        return self


def position_embedding(dim: int, grid: int) -> np.ndarray:
    """MAE's 2-D sine-cosine embedding of a grid x grid map of tokens: float64 [grid*grid, dim], row-major
    tokens.

    The first dim/2 features encode the column (w goes first), the rest the row; each half is
    [sin(dim/4) | cos(dim/4)] of coordinate * 10000^(-k/(dim/4)) with integer coordinates (contracts 2.1.4).
    """
    assert dim % 4 == 0, dim
    omega = MAX_PERIOD ** (-np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    angles = np.arange(grid, dtype=np.float64)[:, None] * omega
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [grid, dim/2]
    columns = np.broadcast_to(line[None, :, :], (grid, grid, dim // 2))
    rows = np.broadcast_to(line[:, None, :], (grid, grid, dim // 2))
    return np.concatenate([columns, rows], axis=2).reshape(grid * grid, dim)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Tokens [B, T, p*p*C] to an image [B, C, S, S] with S = p*sqrt(T).

    Features of a token are ordered (row in patch, column in patch, channel), channel fastest; the patch
    convolution orders its inputs (channel, row, column), so this is not its inverse layout (contracts 2.1.5).
    """
    batch, count, width = tokens.shape
    grid, channels = math.isqrt(count), width // patch**2
    assert (grid * grid, channels * patch**2) == (count, width), tuple(tokens.shape)
    tiles = tokens.view(batch, grid, grid, patch, patch, channels)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid * patch, grid * patch)


class PatchEmbed(nn.Module):
    """Image [B, C, S, S] to tokens [B, T, D], row-major; the image is cast to the storage dtype."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = PatchConv(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class PatchEmbedRouter(nn.Module):
    """Like PatchEmbed with one convolution a task, `proj.conv_in_{1..}`: an image goes through its label's (2.3.3).

    labels: those of the tasks, in the order of the convolutions. An image with another label becomes NaN: nothing
    here may wait for the device to look at labels, and no convolution would be the right one.
    """

    def __init__(self, channels: int, dim: int, patch: int, labels: range) -> None:
        super().__init__()
        self.labels = labels
        self.proj = nn.ModuleDict(
            {f"conv_in_{i + 1}": PatchConv(channels, dim, kernel_size=patch, stride=patch) for i in range(len(labels))}
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, C, S, S], labels y int64 [B] to tokens [B, T, D].

        Every convolution sees the whole batch, on every rank and in every step: under ZeRO-3 ranks must ask for the
        same weights in the same order, whatever tasks they drew. It costs one more thousandth of a forward pass.
        """
        out = None
        for label, conv in zip(self.labels, self.proj.values(), strict=True):
            found = conv(x.to(conv.weight.dtype))
            out = torch.full_like(found, torch.nan) if out is None else out
            out = torch.where((y == label)[:, None, None, None], found, out)
        return out.flatten(2).transpose(1, 2)


class TimestepEmbedder(FixedBufferModule):
    """Timestep [B] to [B, D]: 256 features [cos | sin] of t * exp(-ln(1e4) i/128), then Linear-SiLU-Linear.

    t is in the units the weights were trained with: 0..999 for DiT, (0, 1] for DiT-MoE's rectified flow. The
    features are made in fp32 at least and then cast to the storage dtype (contracts 2.1.3).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(NormalLinear(TIMESTEP_DIM, dim), nn.SiLU(), NormalLinear(dim, dim))
        half = TIMESTEP_DIM // 2
        self.register_fixed("frequencies", np.exp(-math.log(MAX_PERIOD) * np.arange(half) / half))

    def features(self, t: Tensor) -> Tensor:
        """[B] to [B, 256] in fp32, or fp64 when t is fp64."""
        angles = t.to(torch.promote_types(t.dtype, torch.float32))[:, None] * self.frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        storage = self.mlp[0].weight.dtype
        if storage == torch.float64:
            t = t.double()
        return self.mlp(self.features(t).to(storage))


class LabelEmbedder(nn.Module):
    """Class label [B] int64 to [B, D]. With `null_class` the last row, num_classes, means "no label"."""

    def __init__(self, num_classes: int, dim: int, null_class: bool) -> None:
        super().__init__()
        self.embedding_table = LabelTable(num_classes + int(null_class), dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)
