"""A ds_config file as checked engine policy. What the recipe owns must stand as "auto" here (design decision 1)."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from dsmoe.base.activations import EXPERTS, RECOMPUTE
from dsmoe.base.errors import ConfigError, choose_from
from dsmoe.ds_config.keys import PASSED_KEYS, check_values

RECIPE_KEYS = {
    "train_batch_size": "train.global_batch",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "gradient_clipping": "optimizer.clip",
}
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
OURS = "dsmoe"

REMOVED_KEYS = (
    "nebula",
    "compression_training",
    "amp",
    "quantize_training",
    "sparse_gradients",
    "eigenvalue",
    "sparse_attention",
    "elasticity",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
)

# Names that older releases took and 0.19 does not know: (last release that did, what to write instead). From the
# history of DeepSpeed's own constants; those inside zero_optimization stand in keys.REFUSED.
OLD_NAMES = {
    "fp32_allreduce": ("0.5.7", 'write "communication_data_type": "fp32" instead'),
    "allgather_size": ("0.6.7", "set zero_optimization.allgather_bucket_size instead"),
    "zero_reduce_scatter": ("0.2.0", "expert gradients need it, which is the default; drop it"),
    "zero_max_elements_per_comm": ("0.2.0", "set zero_optimization.reduce_bucket_size instead"),
    "deepspeed_adam": ("0.3.0", "dsmoe.optimizer chooses the implementation; drop it"),
    "seq_parallel_comm_data_type": ("0.16.4", "there is no sequence parallelism here; drop it"),
}

NOT_HERE = {
    "activation_checkpointing": 'set dsmoe.activation_checkpointing to true, false or "experts" instead',
    "tensorboard": "the run folder always gets a TensorBoard log; drop it",
    "csv_monitor": "metrics.jsonl holds every figure; drop it",
    "wandb": "metrics.jsonl holds every figure; drop it",
    "checkpoint": "dsmoe writes its own checkpoint format; drop it",
    "torch_autocast": "set bf16.enabled or fp16.enabled instead",
    "aio": "offload goes to the CPU, which reads none of it; drop it",
    "compile": "DeepCompile is not used; drop it",
    "expert_parallel": "set dsmoe.expert_parallel_size instead",
    "autotuning": "the batch is the recipe's and the launcher does not tune; drop it",
    "comet": "metrics.jsonl holds every figure; drop it",
    "sequence_parallel_size": "every rank sees whole images, and DeepSpeed shares no sequence with experts; drop it",
    "seq_parallel_communication_data_type": "every rank sees whole images; drop it",
    "tensor_parallel": "ZeRO shards matrices, dsmoe.expert_parallel_size spreads experts; drop it",
    "pipeline": "every rank runs all blocks; drop it",
    "use_data_before_expert_parallelism": "consecutive ranks share a set of experts, on a host's fast links; drop it",
    "managed_gradient_accumulation": "the engine counts micro-batches, up to the recipe's global batch; drop it",
    "hybrid_engine": "it generates text; drop it",
    "weight_quantization": "weights are kept whole; drop it",
}

MAX_TIMEOUT_MINUTES = 100_000
OPTIMIZERS = ("auto", "torch", "torch_fused", "cpu_adam", "apex")


@dataclass(frozen=True, kw_only=True)
class DsmoeBlock:
    """The block of ours inside a ds_config.

    about: what the file is for. activation_checkpointing: one of base.activations.RECOMPUTE.
    data_workers: loader processes a rank (0 reads in the training process).
    optimizer: which AdamW implementation; auto picks CPU Adam with offload, apex or fused torch where present.
    ops: operation -> the implementation to prefer, by the names that `python -m dsmoe doctor` lists.
    """

    about: str = ""
    expert_parallel_size: int = 1
    activation_checkpointing: bool | str = False
    optimizer: str = "auto"
    data_workers: int = 0
    timeout_minutes: float = 30.0
    ops: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EnginePolicy:
    """Checked engine policy. micro_batch and accumulation are None where the file says "auto"."""

    path: str
    block: DsmoeBlock
    stage: int
    precision: str
    offload_optimizer: bool
    offload_parameters: bool
    stated_global_batch: int | None
    micro_batch: int | None
    accumulation: int | None
    passed: dict


def _fail(path: str, message: str) -> None:
    raise ConfigError(f"{path}: {message}")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    tree: dict[str, object] = {}
    for key, value in pairs:
        if key in tree:
            raise ConfigError(f"key {key!r} stands twice; keep one of them.")
        tree[key] = value
    return tree


def load_policy(path: str) -> EnginePolicy:
    """Read and check a ds_config JSON file; ConfigError names the file, the key, and what is allowed."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ConfigError(
            f"cannot read --deepspeed_config {path}: {error.strerror or error}; give a file such as "
            "ds_configs/quickstart.json."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid JSON: {error}. Correct it there; trailing commas and comments are not allowed."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        _fail(path, f"holds {type(tree).__name__}, not an object of keys; see ds_configs/quickstart.json.")
    _check_keys(path, tree)
    try:
        check_values(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    zero = _zero_block(path, tree)
    for key, usual in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if zero["stage"] and tree.get(key, usual) != usual:
            stage, value = zero["stage"], json.dumps(tree[key])
            _fail(path, f"{key!r} is {value}, which DeepSpeed has at ZeRO stage 0 alone, not at {stage}; drop it.")
    stated = _batch_number(path, tree, "train_batch_size")
    return EnginePolicy(
        path=str(path),
        block=_our_block(path, tree.get(OURS, {})),
        stage=zero["stage"],
        precision=_precision(path, tree),
        offload_optimizer=_offloaded(path, zero, "offload_optimizer"),
        offload_parameters=_offloaded(path, zero, "offload_param"),
        stated_global_batch=stated,
        micro_batch=_batch_number(path, tree, BATCH_KEYS[0]),
        accumulation=_batch_number(path, tree, BATCH_KEYS[1]),
        passed={k: tree[k] for k in PASSED_KEYS if k in tree},
    )


def _check_keys(path: str, tree: dict) -> None:
    known = (*RECIPE_KEYS, *BATCH_KEYS, *PASSED_KEYS, OURS)
    for key, value in tree.items():
        if key in REMOVED_KEYS:
            _fail(path, f"{key!r} was removed from DeepSpeed 0.19; drop it.")
        if key in OLD_NAMES:
            release, way_out = OLD_NAMES[key]
            _fail(path, f"{key!r} is unknown to DeepSpeed since {release}; {way_out}.")
        if key in NOT_HERE:
            _fail(path, f"{key!r} is not taken here: {NOT_HERE[key]}.")
        if key not in known:
            _fail(path, choose_from("key", key, known))
        if key in RECIPE_KEYS and key != "train_batch_size" and value != "auto":
            _fail(
                path,
                f"{key!r} is {json.dumps(value)}, but the recipe owns it ({RECIPE_KEYS[key]}); "
                f'write "{key}": "auto" and set {RECIPE_KEYS[key]} in the recipe.',
            )


def _zero_block(path: str, tree: dict) -> dict:
    zero = tree.get("zero_optimization", {"stage": 0})
    stage = zero.get("stage", 0)
    if not isinstance(stage, int) or stage not in (0, 1, 2, 3):
        _fail(path, f"'zero_optimization.stage' is {json.dumps(stage)}; choose 0, 1, 2 or 3.")
    if zero.get("reduce_scatter") is False:
        _fail(path, "'zero_optimization.reduce_scatter' is false; expert gradients need it, so leave it out.")
    return {**zero, "stage": stage}


def _offloaded(path: str, zero: dict, key: str) -> bool:
    block = zero.get(key)
    if block is None:
        return False
    device = block.get("device")
    if device not in ("none", "cpu"):
        why = " (DeepSpeed 0.19.8 cannot swap spread experts, and it would wear the disk)" if device == "nvme" else ""
        _fail(path, f'\'zero_optimization.{key}.device\' is {json.dumps(device)}{why}; choose "none" or "cpu".')
    if device == "cpu" and zero["stage"] < (3 if key == "offload_param" else 1):
        needed = "3" if key == "offload_param" else "1, 2 or 3"
        _fail(path, f"'zero_optimization.{key}' needs stage {needed}, and stage is {zero['stage']}.")
    return device == "cpu"


def _precision(path: str, tree: dict) -> str:
    enabled = {}
    for name in ("bf16", "fp16"):
        value = tree.get(name, {}).get("enabled", False)
        if not isinstance(value, bool):
            _fail(path, f"'{name}.enabled' is {json.dumps(value)}; choose true or false.")
        enabled[name] = value
    if all(enabled.values()):
        _fail(path, "bf16.enabled and fp16.enabled are both true; choose one.")
    return next((name for name, on in enabled.items() if on), "fp32")


def _batch_number(path: str, tree: dict, key: str) -> int | None:
    value = tree.get(key, "auto")
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _fail(path, f'{key!r} is {json.dumps(value)}; it must be a whole number above 0, or "auto".')
    return value


def _our_block(path: str, tree: object) -> DsmoeBlock:
    if not isinstance(tree, dict):
        _fail(path, f"'dsmoe' is {json.dumps(tree)}; it must be an object.")
    kinds = {f.name: f.type for f in fields(DsmoeBlock)}
    for key, value in tree.items():
        if key not in kinds:
            _fail(path, choose_from("key", f"dsmoe.{key}", [f"dsmoe.{k}" for k in kinds]))
        if key == "activation_checkpointing":
            if type(value) not in (bool, str) or value not in RECOMPUTE:
                _fail(path, f"'dsmoe.{key}' is {json.dumps(value)}; it must be true or false, or \"{EXPERTS}\".")
            continue
        accepted = (int, float) if kinds[key] is float else kinds[key]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kinds[key] is not bool):
            words = {str: "text", int: "a whole number", bool: "true or false", float: "a number", dict: "an object"}
            _fail(path, f"'dsmoe.{key}' is {json.dumps(value)}; it must be {words[kinds[key]]}.")
    block = DsmoeBlock(**tree)
    if block.expert_parallel_size < 1:
        _fail(path, f"'dsmoe.expert_parallel_size' is {block.expert_parallel_size}; it must be at least 1.")
    if block.data_workers < 0 or not 0 < block.timeout_minutes <= MAX_TIMEOUT_MINUTES:
        _fail(
            path,
            f"'dsmoe.data_workers' is {block.data_workers} and 'dsmoe.timeout_minutes' {block.timeout_minutes:g}; "
            f"workers must be 0 or more, the timeout above 0 and at most {MAX_TIMEOUT_MINUTES:,}.",
        )
    if block.optimizer not in OPTIMIZERS:
        _fail(path, choose_from("dsmoe.optimizer", block.optimizer, OPTIMIZERS))
    for op, name in block.ops.items():
        if not isinstance(name, str):
            _fail(path, f"'dsmoe.ops.{op}' is {json.dumps(name)}; it must be text, the name of an implementation.")
    return block
