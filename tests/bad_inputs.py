"""The ways in which recipes, overrides and folders can be wrong, each with what its one line must say.

For test_bad_input; ds_configs, command lines and launch environments are in bad_engines.
"""

import json
from dataclasses import dataclass, field

from made_plan import RECIPE_FILE

ENGINE = {"dsmoe": {"about": "for tests"}, "zero_optimization": {"stage": 1}}
GOOD_FILES = {"engine.json": ENGINE, "base.yaml": RECIPE_FILE}
GOOD_COMMAND = ("--deepspeed_config", "engine.json", "--recipe", "base.yaml")
DEFAULT_FAILED = "runs/base-rejected"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A wrong command, run in a folder that holds GOOD_FILES and `files`.

    args: what follows GOOD_COMMAND. argv: instead of both.
    files: name -> content; a mapping becomes JSON, None an empty folder. says: parts of the line.
    environ: replaces launch variables (None takes one away). failed: where FAILED must lie.
    """

    name: str
    says: tuple[str, ...]
    args: tuple[str, ...] = ()
    argv: tuple[str, ...] | None = None
    files: dict = field(default_factory=dict)
    environ: dict = field(default_factory=dict)
    failed: str = DEFAULT_FAILED

    def write(self, folder) -> list[str]:
        """Make the files; returns the command's arguments."""
        write_files(folder, {**GOOD_FILES, **self.files})
        return list(self.argv if self.argv is not None else (*GOOD_COMMAND, *self.args))


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def override(name, *args, says):
    return Case(name=name, args=args, says=says)


def recipe(name, text, *, says, file="mine.yaml"):
    """A recipe file with this text."""
    args = ("--deepspeed_config", "engine.json", "--recipe", file)
    return Case(
        name=name, argv=args, files={} if text is None else {file: text}, says=says, failed="runs/mine-rejected"
    )


def engine(name, content, *args, says):
    """A ds_config with this content (a mapping is added to the good one)."""
    content = {**ENGINE, **content} if isinstance(content, dict) else content
    files = {} if content is None else {"mine.json": content}
    return Case(
        name=name, argv=("--deepspeed_config", "mine.json", "--recipe", "base.yaml", *args), files=files, says=says
    )


FLOW = ("diffusion.schedule=rectified_flow", "diffusion.prediction=velocity")
GOOD = "model: {preset: nano}\ntrain: {images: 4096}\n"

RECIPES = [
    Case(
        name="unknown recipe",
        argv=("--deepspeed_config", "engine.json", "--recipe", "quikstart"),
        says=("unknown recipe 'quikstart'", "Did you mean 'quickstart'", "Choose from"),
        failed="runs/quikstart-rejected",
    ),
    recipe("recipe file missing", None, says=("'mine.yaml' does not exist", "give an existing .yaml file or a name")),
    Case(
        name="recipe is a folder",
        argv=("--deepspeed_config", "engine.json", "--recipe", "mine.yaml"),
        files={"mine.yaml": None},
        says=("cannot read mine.yaml", "Is a directory", "give a readable YAML file"),
        failed="runs/mine-rejected",
    ),
    Case(
        name="recipe name too long",
        argv=("--deepspeed_config", "engine.json", "--recipe", "n" * 300 + ".yaml"),
        says=("nnn.yaml", "File name too long", "give another"),
        failed=f"runs/{'n' * 100}-rejected",
    ),
    recipe("recipe not YAML", GOOD + "data: {a\n", says=("mine.yaml is not valid YAML", "line 4", "correct it")),
    recipe("recipe not text", b"name: \xff\n", says=("mine.yaml is not valid YAML", "correct it")),
    recipe("recipe with a tab", "model:\n\tpreset: nano\n", says=("mine.yaml is not valid YAML", "line 2")),
    recipe("recipe empty", "", says=("mine.yaml holds nothing", "mapping of keys")),
    recipe("recipe a list", "- a\n", says=("mine.yaml holds list", "mapping of keys")),
    recipe(
        "recipe key twice",
        GOOD + "model: {preset: S/2}\n",
        says=("mine.yaml", "'model' stands twice", "line 3", "keep"),
    ),
    recipe(
        "recipe nested key twice", GOOD + "data: {flip: true, flip: no}\n", says=("'flip' stands twice", "keep one")
    ),
    recipe("recipe with a list as key", GOOD + "? [a]\n: b\n", says=("mine.yaml", "line 3", "keys are names")),
    recipe(
        "recipe with an impossible date",
        GOOD + "description: 2020-13-01\n",
        says=("mine.yaml", "not valid YAML", "month"),
    ),
    recipe("recipe without train", "model: {preset: nano}\n", says=("recipe lacks train", "add it")),
    recipe("recipe without images", "model: {preset: nano}\ntrain: {}\n", says=("lacks train.images", "add it")),
    recipe(
        "recipe with half a model",
        "model: {dim: 64}\ntrain: {images: 9}\n",
        says=("model.depth, model.heads", "preset"),
    ),
    recipe(
        "recipe unknown section", GOOD + "optimiser: {lr: 1e-3}\n", says=("'optimiser'", "Did you mean 'optimizer'")
    ),
    recipe(
        "recipe unknown key", GOOD + "data: {resolutoin: 64}\n", says=("'data.resolutoin'", "mean 'data.resolution'")
    ),
    recipe("recipe section a number", GOOD + "data: 64\n", says=("data is 64", "it must hold keys", "resolution")),
    recipe(
        "recipe for another engine", GOOD + "zero_optimization: {stage: 1}\n", says=("'zero_optimization'", "Choose")
    ),
]

OVERRIDES = [
    override("override without a value", "train.images", says=("'train.images'", "key.path=value")),
    override("override without a key", "=5", says=("'=5'", "key.path=value")),
    override("override of an unknown key", "train.imags=5", says=("'train.imags'", "Did you mean 'train.images'")),
    override("override of an unknown section", "trian.images=5", says=("'trian'", "Did you mean 'train'")),
    override("override of an unknown model key", "model.detph=5", says=("'model.detph'", "Did you mean 'model.depth'")),
    override("override below a value", "train.seed.x=1", says=("train.seed.x=1", "'seed' holds a plain value")),
    override(
        "override not YAML", "optimizer.betas=[0.9", says=("optimizer.betas", "'[0.9'", "not valid YAML", "quote")
    ),
    override("override with a key twice", "train={images: 9, images: 8}", says=("'images' stands twice", "keep one")),
    override("text for a number", "train.images=many", says=("train.images is 'many'", "a whole number")),
    override("fraction for a whole number", "train.images=1000.5", says=("train.images is 1000.5", "a whole number")),
    override("number too large to read", f"train.images={'9' * 400}", says=("train.images", "a whole number")),
    override("nothing for a number", "optimizer.lr=", says=("optimizer.lr is None", "a finite number")),
    override("infinite number", "optimizer.lr=.inf", says=("optimizer.lr is inf", "a finite number")),
    override("text for a switch", "data.flip=maybe", says=("data.flip is 'maybe'", "true or false")),
    override("number for text", "data.path=7", says=("data.path is 7", "text (in quotes")),
    override("one of two betas", "optimizer.betas=[0.9]", says=("optimizer.betas is [0.9]", "list of 2")),
    override("section replaced by a word", "model=nano", says=("model is 'nano'", "preset")),
    override("unknown preset", "model.preset=nano-4E2", says=("'nano-4E2'", "Did you mean 'nano-4E2A'")),
    override("unknown codec", "codec.name=kl_small", says=("'kl_small'", "Did you mean 'kl-small'")),
    override("unknown data source", "data.source=imagenet", says=("data.source 'imagenet'", "scenes, image_folder")),
    override("unknown noise schedule", "diffusion.schedule=linaer", says=("'linaer'", "Did you mean 'linear'")),
    override("unknown prediction", "diffusion.prediction=eps", says=("'eps'", "epsilon, v, x0, velocity")),
    override("unknown time density", "diffusion.time_density=normal", says=("'normal'", "uniform, logit_normal")),
    override("unknown noise", "diffusion.noise=gausian", says=("'gausian'", "Did you mean 'gaussian'")),
    override("unknown sampler", "report.sampler=dpm", says=("'dpm'", "auto, ddim, ancestral, euler")),
    override("unknown spacing", "report.spacing=trail", says=("'trail'", "Did you mean 'trailing'")),
    override(
        "unknown balance scope", "balance.scope=batch", says=("balance.scope 'batch'", "sample, step, micro, none")
    ),
]

CONTRADICTIONS = [
    override(
        "guidance without label dropout", "train.label_dropout=0", says=("report.guidance is 3.0", "label_dropout=0.1")
    ),
    override(
        "warm-up longer than the run", "train.images=5000", says=("warmup_images 5000", "train.images 5000", "shorten")
    ),
    override("fewer images than a batch", "train.images=100", says=("train.images is 100", "train.global_batch (128)")),
    override(
        "more sampling steps than timesteps",
        "diffusion.timesteps=20",
        says=("sample_steps 50", "timesteps 20", "fewer"),
    ),
    override(
        "velocity on a discrete schedule",
        "diffusion.prediction=velocity",
        says=("prediction is velocity", "schedule is linear", "schedule=rectified_flow", "epsilon, v or x0"),
    ),
    override(
        "noise prediction on rectified flow",
        "diffusion.schedule=rectified_flow",
        says=("prediction is epsilon", "schedule is rectified_flow", "prediction=velocity"),
    ),
    override(
        "logit-normal times of discrete steps",
        "diffusion.time_density=logit_normal",
        says=("time_density is logit_normal", "schedule linear", "time_density=uniform"),
    ),
    override(
        "timesteps of rectified flow",
        *FLOW,
        "diffusion.timesteps=500",
        says=("timesteps is 500", "continuous", "leave timesteps out"),
    ),
    override(
        "strength of Gaussian noise",
        "diffusion.noise_strength=0.5",
        says=("noise_strength is 0.5", "noise is gaussian", "noise=multi_resolution"),
    ),
    override("Euler on a discrete schedule", "report.sampler=euler", says=("sampler euler", "is linear", "take ddim")),
    override("DDIM on rectified flow", *FLOW, "report.sampler=ddim", says=("sampler ddim", "take euler")),
    override("eta of Euler", *FLOW, "report.eta=0.5", says=("eta is 0.5", "sampler euler takes none", "leave eta out")),
    override("eta out of range", "report.eta=1.5", says=("eta is 1.5", "from 0 (deterministic) to 1")),
    override(
        "spacing of ancestral sampling",
        "report.sampler=ancestral",
        "report.spacing=leading",
        says=("spacing is leading", "sampler ancestral takes none"),
    ),
    override(
        "too few timesteps for the betas",
        "diffusion.timesteps=10",
        "report.sample_steps=5",
        says=("schedule 'linear' with 10 timesteps", "use more timesteps"),
    ),
    override(
        "decay and half-life", "ema.decay=0.99", says=("ema.decay is 0.99", "half_life_images 5000", "exactly one")
    ),
    override("rate out of range", "optimizer.lr=-1e-3", says=("optimizer.lr is -0.001", "above 0")),
    override("heads that do not divide", "model.heads=3", says=("model.heads 3", "model.dim 128", "divisor")),
    override("more choices than experts", "model.top_k=5", says=("model.top_k 5", "model.num_experts 4", "lower it")),
    override(
        "experts without hidden units", "model.mlp_ratio=1e-4", says=("model.mlp_ratio 0.0001", "hidden", "raise")
    ),
    override(
        "resolution no multiple of the patch",
        "data.resolution=34",
        says=("data.resolution 34", "multiple of 4", "such as 32"),
    ),
    override("resolution the scenes do not have", "data.resolution=1024", says=("resolution 1024", "from 32 to 512")),
    override("more scenes than there are", "data.size=9000000000", says=("size 9000000000", "leave it out")),
    override("scenes with a path", "data.path=/photos", says=("data.path is '/photos'", "data.path=null")),
    override("images without a path", "data.source=image_folder", says=("data.path is missing", "data.path=PATH")),
    override(
        "images with a size", "data.source=image_folder", "data.path=x", says=("data.size is 64", "data.size=null")
    ),
    override("codec none with a path", "codec.path=x", says=("codec.path is 'x'", "remove it")),
    override(
        "codec file missing",
        "codec.name=kl-small",
        "codec.path=x.pt",
        says=("'x.pt'", "no path for the weights that ship"),
    ),
    override(
        "codec folder missing",
        "codec.name=taesd",
        "codec.path=x",
        says=("'x' is no folder", "taesd_encoder.safetensors"),
    ),
    override("codec without its folder", "codec.name=taesd", says=("'taesd' needs codec.path",)),
    override("codec without a config", "codec.name=sd", "codec.path=./x", says=("'./x'", "config.json")),
    Case(
        name="codec file damaged",
        args=("codec.name=kl-small", "codec.path=x.st"),
        files={"x.st": b"no weights"},
        says=("x.st", "damaged or no safetensors"),
    ),
    override(
        "latents that do not fit into memory",
        "data.resolution=512",
        "data.size=2000000000",
        says=("codec.cache memory", "2000000000 images at 512 pixels", "the limit is 4 GiB", "codec.cache=none"),
    ),
    override(
        "latent cache that is not there",
        "codec.cache=disk",
        "codec.cache_path=nowhere",
        says=("latent cache nowhere does not exist", "build it: python launchers/cache_latents.py --out DIR --recipe"),
    ),
    Case(
        name="latent cache that is something else",
        args=("codec.cache=disk", "codec.cache_path=full"),
        files={"full/x": b"x"},
        says=("latent cache full holds no manifest.json", "build it: python launchers/cache_latents.py"),
    ),
    engine("batch of another size", {"train_batch_size": 64}, says=("'train_batch_size' is 64", "128", 'write "auto"')),
    engine(
        "product that is no batch",
        {"train_micro_batch_size_per_gpu": 48},
        says=("'train_micro_batch_size_per_gpu' 48", "128 on 2 ranks", "product is 64"),
    ),
    engine(
        "accumulation that does not divide",
        {"gradient_accumulation_steps": 3},
        says=("'gradient_accumulation_steps' 3", "128 on 2 ranks", "product is 64"),
    ),
    override("batch that ranks do not share", "train.global_batch=7", says=("global_batch 7", "2 ranks", "such as 8")),
]

FOLDERS = [
    Case(
        name="run folder a file",
        args=("--run", "mine"),
        files={"mine": "x"},
        says=("run folder mine is a file", "give --run a folder"),
        failed="mine-rejected",
    ),
    Case(
        name="run folder below a file",
        args=("--run", "mine/run"),
        files={"mine": "x"},
        says=("run folder mine/run", "(Not a directory: ", "/mine)", "another --run"),
    ),
    override(
        "run folder where nothing can be made",
        "--run",
        "/proc/run",
        says=("run folder /proc/run", "/proc)", "another --run"),
    ),
    override(
        "run folder name too long", "--run", "n" * 300, says=("run folder nnn", "File name too long", "another --run")
    ),
    Case(
        name="run folder of something else",
        args=("--run", "mine"),
        files={"mine/notes.txt": "x"},
        says=("run folder mine is not empty", "no plan.json", "new or empty folder"),
        failed="mine-rejected",
    ),
    Case(
        name="run folder the current one",
        args=("--run", "."),
        says=("run folder . is not empty", "new or empty folder"),
        failed="../{folder}-rejected",
    ),
    Case(
        name="run folder with a damaged plan",
        args=("--run", "mine"),
        files={"mine/plan.json": "{"},
        says=("mine/plan.json cannot be read", "another --run"),
        failed="mine-rejected",
    ),
    Case(
        name="run folder with another's plan",
        args=("--run", "mine"),
        files={"mine/plan.json": "[]"},
        says=("mine/plan.json cannot be read", "not a dsmoe plan", "another --run"),
        failed="mine-rejected",
    ),
    Case(
        name="mistake with a run folder given",
        args=("--run", "mine", "optimizer.lr=0"),
        says=("optimizer.lr is 0.0", "above 0"),
        failed="mine",
    ),
    Case(
        name="mistake with an empty --run",
        args=("--run", "", "optimizer.lr=0"),
        says=("optimizer.lr is 0.0", "above 0"),
    ),
]

CASES = [*RECIPES, *OVERRIDES, *CONTRADICTIONS, *FOLDERS]
