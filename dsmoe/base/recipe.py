"""The recipe: the science of a run as one frozen, typed tree, read from YAML and `key=value` overrides.

Lives here: fields, defaults, checks, named recipes, the science hash. Not here: engine policy (ds_config) and
anything that needs the data, the codec or the machine (plan).
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.base.diffusion import AUTO, SAMPLERS, SPACING, DiffusionSpec, check_sampler, settle_sampler
from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.base.presets import ModelSpec
from dsmoe.base.typed_tree import from_mapping, read_yaml, set_by_path

RECIPE_DIR = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "quickstart"

SOURCES = ("scenes", "image_folder", "webdataset", "parquet")
CACHES = ("none", "memory", "disk")
CACHE_DTYPES = ("float32", "float16", "bfloat16")
LR_SCHEDULES = ("constant", "exponential")
BALANCE_SCOPES = ("sample", "step", "micro", "none")

EMA = "ema"  # name of the first average

_POLICY = {"science": False}


def _require(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key} is {value!r}; it must be {allowed}.")


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(choose_from(key, value, allowed))


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Images (docs/data.md). resolution in pixels; size = distinct training images of `scenes` (None: its default).

    path: a folder, or for tars and parquet also a glob or a range DIR/train-{0000..1023}.tar. label_map: file that
    numbers and names the classes. shuffle_block: 0 shuffles items; n shuffles blocks of n consecutive items, for
    storage that reads neighbours faster (data.order). index_folder: where an index of the items is kept.
    """

    source: str = "scenes"
    path: str | None = None
    resolution: int = 256
    size: int | None = None
    flip: bool = True
    label_map: str | None = None
    shuffle_block: int = 0
    max_bad_fraction: float = field(default=0.01, metadata=_POLICY)
    index_folder: str | None = field(default=None, metadata=_POLICY)

    def __post_init__(self) -> None:
        _one_of("data.source", self.source, SOURCES)
        _require(self.resolution >= 8, "data.resolution", self.resolution, "at least 8 pixels")
        _require(self.size is None or self.size >= 1, "data.size", self.size, "at least 1, or null")
        _require(self.shuffle_block >= 0, "data.shuffle_block", self.shuffle_block, "0 (shuffle items) or more")
        _require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")
        if self.source != "scenes" and self.path is None:
            raise ConfigError(f"data.source is {self.source} and data.path is missing; give data.path=PATH.")
        if self.source != "scenes" and self.size is not None:
            raise ConfigError(f"data.size is {self.size}; only data.source scenes takes a size. Set data.size=null.")
        for key in ("path", "label_map", "index_folder"):
            value = getattr(self, key)
            if self.source == "scenes" and value is not None:
                raise ConfigError(f"data.{key} is {value!r} but data.source scenes has no files; set data.{key}=null.")


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """Latent autoencoder by name and, where it has files, path.

    cache: `none` encodes while training, `memory` encodes a small set once at the start, `disk` reads what
    launchers/cache_latents.py wrote to cache_path. From float32 latents these are the same run; other cache_dtypes
    hold rounded ones, and stand here so that no run takes them unawares.
    """

    name: str = "sd"
    path: str | None = None
    cache: str = field(default="none", metadata=_POLICY)
    cache_path: str | None = field(default=None, metadata=_POLICY)
    cache_dtype: str = "float32"

    def __post_init__(self) -> None:
        _one_of("codec.cache", self.cache, CACHES)
        _one_of("codec.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        if self.cache == "disk" and self.cache_path is None:
            raise ConfigError(
                "codec.cache is disk and codec.cache_path is missing; give the folder that launchers/cache_latents.py "
                "wrote as codec.cache_path=DIR."
            )
        if self.cache != "disk" and self.cache_path is not None:
            raise ConfigError(
                f"codec.cache_path is {self.cache_path!r} but codec.cache is {self.cache}; set codec.cache=disk, or "
                "codec.cache_path=null."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """AdamW and its learning-rate schedule, counted in images.

    lr: peak rate. warmup_images: linear warm-up from 0. schedule `exponential` then falls to lr * final_ratio at
    the last image (Marigold's shape, contracts 4.7). clip: global gradient norm limit, 0 for none.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0
    schedule: str = "constant"
    warmup_images: int = 0
    final_ratio: float = 0.01

    def __post_init__(self) -> None:
        _require(0 < self.lr < 10, "optimizer.lr", self.lr, "above 0 and below 10")
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", list(self.betas), "two numbers in [0, 1)")
        _require(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(self.clip >= 0, "optimizer.clip", self.clip, "0 (off) or more")
        _one_of("optimizer.schedule", self.schedule, LR_SCHEDULES)
        _require(self.warmup_images >= 0, "optimizer.warmup_images", self.warmup_images, "0 or more")
        _require(0 < self.final_ratio <= 1, "optimizer.final_ratio", self.final_ratio, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class BalanceSpec:
    """Expert load balancing (design decision 5); coefficients multiply the sum over layers.

    bias_rate: balancing without a loss, 0 for none: after each step an expert's selection bias moves by so much, up
    when it had less than its share, down when more (Wang et al. 2024; 1e-3 there).
    """

    scope: str = "sample"
    coefficient: float = 0.01
    z_coefficient: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        _one_of("balance.scope", self.scope, BALANCE_SCOPES)
        _require(self.coefficient >= 0, "balance.coefficient", self.coefficient, "0 or more")
        _require(self.z_coefficient >= 0, "balance.z_coefficient", self.z_coefficient, "0 or more")
        _require(0 <= self.bias_rate <= 1, "balance.bias_rate", self.bias_rate, "in [0, 1]; 0.001 is usual")


@dataclass(frozen=True, kw_only=True)
class EmaSpec:
    """Moving averages of the weights: constant decays a step, or half-lives in images (exactly one of the two).

    One value or a list of them, all kept at once. The first is the run's own: sample sheets are drawn from it.
    """

    decay: tuple[float, ...] = ()
    half_life_images: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.decay) == bool(self.half_life_images):
            raise ConfigError(
                f"ema.decay is {_listed(self.decay)} and ema.half_life_images {_listed(self.half_life_images)}; give "
                "exactly one (set the other to null)."
            )
        for decay in self.decay:
            _require(0 <= decay < 1, "ema.decay", decay, "in [0, 1)")
        for half in self.half_life_images:
            _require(half > 0, "ema.half_life_images", half, "above 0")
        for key, values in (("decay", self.decay), ("half_life_images", self.half_life_images)):
            if len(set(values)) < len(values):
                raise ConfigError(f"ema.{key} is {_listed(values)}; a value stands there twice, give each once.")

    def step_decays(self, global_batch: int) -> dict[str, float]:
        """Weight kept of the old average in one optimizer step, by the average's name.

        The first is `ema`, the others `ema_<decay>` or `ema_<half-life in images>`: names of states in a checkpoint
        and of weight files.
        """
        values = self.decay or self.half_life_images
        names = [EMA, *(f"{EMA}_{value}" for value in values[1:])]
        kept = self.decay or [0.5 ** (global_batch / half) for half in self.half_life_images]
        return dict(zip(names, kept, strict=True))


def _listed(values: tuple) -> object:
    return list(values) if len(values) > 1 else values[0] if values else None


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How much and in what portions: images in all, images a step, label dropout for guidance, seed."""

    images: int
    global_batch: int = 256
    label_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.global_batch >= 1, "train.global_batch", self.global_batch, "at least 1")
        _require(
            self.images >= self.global_batch,
            "train.images",
            self.images,
            f"at least one train.global_batch ({self.global_batch})",
        )
        _require(0 <= self.label_dropout < 1, "train.label_dropout", self.label_dropout, "in [0, 1)")
        _require(0 <= self.seed < 2**63, "train.seed", self.seed, "from 0 to 2^63-1")

    @property
    def steps(self) -> int:
        """Optimizer steps; a last partial batch is not taken."""
        return self.images // self.global_batch


@dataclass(frozen=True, kw_only=True)
class ReportSpec:
    """What is shown while training and at its end; no effect on the trained weights.

    Periods are counted in images; 0 turns sample grids during training off (the final one is always drawn).
    sampler: auto is euler on rectified_flow, else ddim. spacing, eta: of ddim alone (diffusion.samplers).
    """

    log_every: int = 25600
    sample_every: int = 0
    samples: int = 16
    sampler: str = AUTO
    sample_steps: int = 50
    spacing: str = SPACING
    eta: float = 0.0
    guidance: float = 4.0
    cfg_channels: int | str = 3

    def __post_init__(self) -> None:
        _require(self.log_every >= 1, "report.log_every", self.log_every, "at least 1 image")
        _require(self.sample_every >= 0, "report.sample_every", self.sample_every, "0 (off) or more")
        _require(1 <= self.samples <= 4096, "report.samples", self.samples, "from 1 to 4096")
        _one_of("report.sampler", self.sampler, (AUTO, *SAMPLERS))
        _require(1 <= self.sample_steps <= 10000, "report.sample_steps", self.sample_steps, "from 1 to 10000")
        _require(self.guidance >= 1, "report.guidance", self.guidance, "1 (no guidance) or more")
        _require(self.cfg_channels in (3, "all"), "report.cfg_channels", self.cfg_channels, "3 or all")


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """Resumable checkpoints while training, counted in images; a run that is asked to stop always makes one.

    every: 0 makes none at intervals. keep: the newest that stay. keep_every: beside them one for every so many images
    stays, 0 for none.
    """

    every: int = 0
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", self.every, "0 (off) or more images")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        _require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "0 (off) or more images")


_NO_SCIENCE = {"metadata": _POLICY}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The science of one run. Field order is the order in which `--plan` prints it."""

    name: str = field(**_NO_SCIENCE)
    description: str = field(default="", **_NO_SCIENCE)
    model: ModelSpec
    data: DataSpec = field(default_factory=DataSpec)
    codec: CodecSpec = field(default_factory=CodecSpec)
    diffusion: DiffusionSpec = field(default_factory=DiffusionSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    balance: BalanceSpec = field(default_factory=BalanceSpec)
    ema: EmaSpec = field(default_factory=lambda: EmaSpec(decay=(0.9999,)))
    train: TrainSpec
    report: ReportSpec = field(default_factory=ReportSpec, **_NO_SCIENCE)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec, **_NO_SCIENCE)

    @property
    def ema_decays(self) -> dict[str, float]:
        """Every average's name and decay a step, the run's own first (EmaSpec.step_decays)."""
        return self.ema.step_decays(self.train.global_batch)

    def __post_init__(self) -> None:
        if not self.name or any(c not in _NAME_CHARACTERS for c in self.name):
            raise ConfigError(f"name is {self.name!r}; a recipe name is made of letters, digits, '.', '_', '-'.")
        if self.optimizer.warmup_images >= self.train.images:
            raise ConfigError(
                f"optimizer.warmup_images {self.optimizer.warmup_images} is not below train.images "
                f"{self.train.images}; shorten the warm-up or train longer."
            )
        report = self.report
        check_sampler(settle_sampler(report.sampler, self.diffusion), report.spacing, report.eta, self.diffusion)
        if report.sample_steps > self.diffusion.most_sample_steps:
            raise ConfigError(
                f"report.sample_steps {report.sample_steps} exceeds diffusion.timesteps "
                f"{self.diffusion.timesteps}; take fewer steps."
            )
        if self.report.guidance > 1 and self.train.label_dropout == 0:
            raise ConfigError(
                f"report.guidance is {self.report.guidance} but train.label_dropout is 0, so no unconditional model "
                "is trained; set report.guidance=1 or train.label_dropout=0.1."
            )


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def list_recipes() -> list[tuple[str, str]]:
    """(name, one-line description) of every recipe that ships with dsmoe."""
    found = [(path.stem, read_yaml(path)) for path in sorted(RECIPE_DIR.glob("*.yaml"))]
    return [(name, str(tree.get("description", ""))) for name, tree in found]


def load_recipe(name_or_file: str = DEFAULT_RECIPE, overrides: list[str] | None = None) -> Recipe:
    """The recipe of that name or YAML file, with `key.path=value` overrides applied; ConfigError names the key."""
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPE_DIR / f"{name_or_file}.yaml"
        if not path.is_file():
            raise ConfigError(choose_from("recipe", name_or_file, [n for n, _ in list_recipes()]))
    elif not path.exists():
        raise ConfigError(f"recipe file {name_or_file!r} does not exist; give an existing .yaml file or a name.")
    tree = read_yaml(path)
    tree.setdefault("name", path.stem)
    paths = [text for text in overrides or [] if text.startswith("data.path=")]
    if len(paths) > 1:
        raise ConfigError(
            f"data.path is given {len(paths)} times, {paths[0]!r} first; give it once, and a range {{0000..1023}} in "
            "quotes, or the shell takes it apart."
        )
    for text in overrides or []:
        key, found, value = text.partition("=")
        if not found or not key:
            raise ConfigError(f"override {text!r} is not of the form key.path=value, such as train.images=100000.")
        set_by_path(tree, key, value)
    return recipe_from_dict(tree)


def recipe_from_dict(tree: dict) -> Recipe:
    """A checked Recipe from plain mappings (YAML, or the `recipe` entry of a plan.json)."""
    return from_mapping(Recipe, tree, "recipe")


def recipe_to_dict(recipe: Recipe) -> dict:
    """Plain mappings that `recipe_from_dict` reads back to an equal Recipe."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def science_of(recipe: Recipe) -> dict:
    """Flat {dotted key: value} of every field that can change the trained weights."""
    flat: dict[str, object] = {}

    def walk(node: object, prefix: str) -> None:
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if not f.metadata.get("science", True):
                continue
            if dataclasses.is_dataclass(value):
                walk(value, f"{prefix}{f.name}.")
            else:
                flat[prefix + f.name] = list(value) if isinstance(value, tuple) else value

    walk(recipe, "")
    return flat


def science_hash(recipe: Recipe) -> str:
    """Ten hex digits that name the science of a run; equal for runs that must train the same weights."""
    text = json.dumps(science_of(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
