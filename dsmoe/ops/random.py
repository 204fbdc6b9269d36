"""Counter-based random numbers: every draw is a pure function of (seed, purpose, sample index).

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
same numbers come out on any device, in any batch, on any number of ranks: only integer operations and
correctly rounded float operations (+, -, *, /, sqrt) are used, so even normals agree to the last bit.

Layout. Key: the 64-bit seed, low word first. Counter, four 32-bit words:
    word 0, 1   sample index n, low word first (n < 2^63)
    word 2      block number; a block is four output words, element j of a draw is word j % 4 of block j // 4
    word 3      purpose (PURPOSES)
A longer draw therefore begins with the shorter one. What lives elsewhere: what each purpose is used for.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers are part of every recorded run: never renumber, only append.
PURPOSES: dict[str, int] = {
    "order": 1,
    "crop": 2,
    "flip": 3,
    "timestep": 4,
    "noise": 5,
    "label_drop": 6,
    "posterior": 7,
    "jitter": 8,
    "variance": 9,
    "sample_noise": 10,
    "sample_step": 11,
    "sample_label": 12,
    "noise_ratio": 13,
    "noise_levels": 14,
    "block_order": 15,
}

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """One Philox4x32-10 block: four int64 tensors holding uint32 words, and two key words, to four words.

    The counter words may be of any shapes that broadcast together.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 64 bits hold the whole product of two words; int64 may wrap negative, which the masks undo.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = ((p1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _blocks(seed: int, purpose: str, index: Tensor, block: Tensor) -> Tensor:
    """Output words [..., 4] of the blocks numbered `block` of the samples `index` (the two broadcast)."""
    assert 0 <= seed < 1 << 64, f"seed {seed} is not a 64-bit unsigned integer"
    assert purpose in PURPOSES, f"unknown purpose {purpose!r}, one of {', '.join(PURPOSES)}"
    assert index.dtype == torch.int64, f"sample index is {index.dtype}, int64 is needed"
    words = (index & _MASK, (index >> 32) & _MASK, block, torch.full_like(block, PURPOSES[purpose]))
    return torch.stack(torch.broadcast_tensors(*philox(words, (seed & _MASK, seed >> 32))), dim=-1)


def bits(seed: int, purpose: str, index: Tensor, count: int) -> Tensor:
    """`count` uint32 words (as int64) for each sample.

    index: int64 [B], global sample indices >= 0. Returns int64 [B, count] on the device of index.
    """
    block = torch.arange((count + 3) // 4, device=index.device)
    return _blocks(seed, purpose, index[:, None], block[None]).flatten(1)[:, :count]


def uniform(seed: int, purpose: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """float32 [B, *shape] in [0, 1), multiples of 2^-24 (the top 24 bits of a word)."""
    words = bits(seed, purpose, index, math.prod(shape))
    return ((words >> 8).to(torch.float32) * 2.0**-24).view(len(index), *shape)


def randint(seed: int, purpose: str, index: Tensor, high: int) -> Tensor:
    """int64 [B] in [0, high): floor(word * high / 2^32), biased by less than high / 2^32. high <= 2^31."""
    assert 1 <= high <= 1 << 31, f"high is {high}, allowed are 1 to 2^31"
    return (bits(seed, purpose, index, 1)[:, 0] * high) >> 32


def normal(seed: int, purpose: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Standard normals, float32 [B, *shape]: Box-Muller in float64, elements 2i, 2i+1 from words 2i, 2i+1.

    |value| <= 6.77 (the largest radius 32 bits give).
    """
    count = math.prod(shape)
    words = bits(seed, purpose, index, count + count % 2).unflatten(1, (-1, 2))
    radius = _log_unit(words[..., 0]).mul_(-2.0).sqrt_()
    cosine, sine = _cos_sin_turn(words[..., 1])
    pairs = torch.stack((cosine.mul_(radius), sine.mul_(radius)), dim=-1)
    return pairs.flatten(1)[:, :count].to(torch.float32).view(len(index), *shape)


def permutation(seed: int, epoch: int, n: int, *, purpose: str = "order", device: torch.device | str = "cpu") -> Tensor:
    """A permutation of range(n), int64 [n]: the data order of one epoch.

    Item i gets a 64-bit key, words 0 and 1 of the block with that purpose, sample index i and block number
    `epoch` (0 <= epoch < 2^32); the permutation sorts the items by key, equal keys in item order.
    """
    assert 0 <= epoch <= _MASK, f"epoch {epoch} does not fit in 32 bits"
    items = torch.arange(n, device=device)
    words = _blocks(seed, purpose, items, torch.full_like(items, epoch))
    return torch.argsort((words[:, 0] << 32) | words[:, 1], stable=True)


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Polynomial of x, highest power first; each step rounds twice, on every device alike."""
    total = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total.mul_(x).add_(c)
    return total


# Library logarithms and sines differ in the last bit between CPU vector units and GPUs; these series do not.
_ATANH = tuple(2.0 / (2 * i + 1) for i in reversed(range(10)))
_SIN = tuple((-1) ** i / math.factorial(2 * i + 1) for i in reversed(range(8)))
_COS = tuple((-1) ** i / math.factorial(2 * i) for i in reversed(range(9)))


def _log_unit(word: Tensor) -> Tensor:
    """log((word + 1/2) / 2^32) in float64, to 1e-15 relative: 2 atanh((m - 1) / (m + 1)) + e log 2."""
    mantissa, exponent = torch.frexp((2 * word + 1).to(torch.float64))
    low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low.to(exponent.dtype) - 33
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return _horner(s * s, _ATANH).mul_(s).add_(exponent.to(torch.float64) * math.log(2.0))


def _cos_sin_turn(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi word / 2^32 in float64, absolute error below 1e-15."""
    quarter = (word + (1 << 29)) >> 30
    x = (word - (quarter << 30)).to(torch.float64) * (math.pi * 2.0**-31)  # |x| <= pi / 4
    x2 = x * x
    sine, cosine = _horner(x2, _SIN).mul_(x), _horner(x2, _COS)
    swap = (quarter & 1).to(torch.bool)
    cos_sign = 1 - ((quarter + 1) & 2)
    sin_sign = 1 - (quarter & 2)
    return torch.where(swap, sine, cosine) * cos_sign, torch.where(swap, cosine, sine) * sin_sign
