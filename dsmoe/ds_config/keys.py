"""The engine keys that a ds_config may hold, with their types: DeepSpeed 0.19.8 itself looks at them only after
process groups and model exist, and at some never. Not here: what their values mean together (policy, emit).
"""

import json
from collections.abc import Mapping

from dsmoe.base.errors import ConfigError, choose_from

Kinds = Mapping[str, type]

_OFFLOAD = {"device": str, "buffer_count": int, "pin_memory": bool}
NESTED: dict[str, Kinds] = {
    "zero_optimization": {
        "stage": int,
        "allgather_bucket_size": int,
        "allgather_partitions": bool,
        "contiguous_gradients": bool,
        "enable_sanity_checks": bool,
        "ignore_unused_parameters": bool,
        "load_from_fp32_weights": bool,
        "log_trace_cache_warnings": bool,
        "memory_efficient_linear": bool,
        "offload_optimizer": dict,
        "offload_param": dict,
        "overlap_comm": bool,
        "override_module_apply": bool,
        "parameter_alignment": bool,
        "reduce_bucket_size": int,
        "reduce_scatter": bool,
        "stage3_allgather_sequential": bool,
        "stage3_gather_16bit_weights_on_model_save": bool,
        "stage3_max_live_parameters": int,
        "stage3_max_reuse_distance": int,
        "stage3_model_persistence_threshold": int,
        "stage3_param_persistence_threshold": int,
        "stage3_prefetch_bucket_size": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "sub_group_size": int,
        "use_multi_rank_bucket_allreduce": bool,
        "zero_hpz_partition_size": int,
        "zero_quantized_gradients": bool,
        "zero_quantized_nontrainable_weights": bool,
        "zero_quantized_weights": bool,
    },
    "zero_optimization.offload_optimizer": {
        **_OFFLOAD,
        "fast_init": bool,
        "pipeline_read": bool,
        "pipeline_write": bool,
    },
    "zero_optimization.offload_param": {**_OFFLOAD, "buffer_size": int, "max_in_cpu": int},
    "bf16": {"enabled": bool, "check_grad_overflow": bool, "immediate_grad_update": bool},
    "fp16": {
        "enabled": bool,
        "auto_cast": bool,
        "consecutive_hysteresis": bool,
        "hysteresis": int,
        "initial_scale_power": int,
        "loss_scale": float,
        "loss_scale_window": int,
        "min_loss_scale": int,
    },
    "data_types": {"grad_accum_dtype": str},
    "comms_logger": {"enabled": bool, "debug": bool, "prof_all": bool, "prof_ops": list, "verbose": bool},
    "flops_profiler": {
        "enabled": bool,
        "detailed": bool,
        "module_depth": int,
        "output_file": str,
        "profile_step": int,
        "recompute_fwd_factor": float,
        "top_modules": int,
    },
}
PLAIN: Kinds = {
    "communication_data_type": str,
    "disable_allgather": bool,
    "dump_state": bool,
    "gradient_predivide_factor": float,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
}
PASSED_KEYS = (*(key for key in NESTED if "." not in key), *PLAIN)
# Elsewhere 0 means none or off.
_ABOVE_ZERO = ("reduce_bucket_size", "hysteresis", "loss_scale_window", "min_loss_scale", "gradient_predivide_factor")
_DTYPE_KEYS = ("communication_data_type", "grad_accum_dtype")
_DTYPES = ("fp32", "bf16", "fp16")
_REMOVED = "DeepSpeed 0.19 removed it; drop it"
_FORMAT = "dsmoe writes weights and checkpoints itself; drop it"
_MASTER = "dsmoe keeps fp32 master weights and moments; drop it"
REFUSED = {
    "zero_optimization.compute_grad_norm": "the gradient norm is logged and checked; drop it",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"} instead',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"} instead',
    "zero_optimization.cpu_offload_use_pin_memory": "set pin_memory in the offload block instead",
    "zero_optimization.cpu_offload_params": 'write "offload_param": {"device": "cpu"} instead',
    "zero_optimization.find_unused_parameters": 'write "ignore_unused_parameters" instead',
    "zero_optimization.offload_optimizer.ratio": "the optimizer is offloaded whole; drop it",
    "zero_optimization.offload_optimizer.nvme_path": "offload goes to the CPU only; drop it",
    "zero_optimization.offload_param.nvme_path": "offload goes to the CPU only; drop it",
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    # Its _hp_mapping still counts in the old order: the run is right, what is read out of it is not.
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19.8 loses track of where weights lie, so "
    "that averages and checkpoints would be wrong; drop it",
    "zero_optimization.stage3_module_granularity_threshold": "DeepSpeed 0.19.8 fails at the gradients of modules "
    "that it takes whole; drop it",
    "zero_optimization.zenflow": "it applies gradients late, so the run would be another; drop it",
    "zero_optimization.leaf_module": "an expert layer runs whole on every rank, wherever tokens go; drop it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW; drop it",
    "zero_optimization.pipeline_loading_checkpoint": _FORMAT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _FORMAT,
    "zero_optimization.elastic_checkpoint": _FORMAT,
    "zero_optimization.legacy_stage1": "there is one stage 1; drop it",
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "fp16.fp16_master_weights_and_grads": _MASTER,
}

_WORDS = {
    bool: "true or false",
    int: "a whole number, 0 or more",
    float: "a number, 0 or more",
    str: "text",
    dict: "an object",
    list: "a list",
}


def check_values(tree: Mapping[str, object]) -> None:
    """ConfigError for an unknown key inside a block and for a value of the wrong type; names the dotted key.

    tree: the whole file; keys that are not passed on are not looked at. "auto" in a block means DeepSpeed's default.
    """
    for key in PASSED_KEYS:
        if key in tree:
            _check(key, tree[key], PLAIN.get(key, dict))


def _check(name: str, value: object, kind: type) -> None:
    if kind is dict and isinstance(value, dict):
        _check_block(name, value)
        return
    fits = isinstance(value, kind)
    if kind in (int, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
        # JSON's 5e8 is a float, and a common way to write a bucket size.
        fits = fits and (kind is float or float(value).is_integer())
    if not fits:
        raise ConfigError(f"{name!r} is {json.dumps(value)}; it must be {_WORDS[kind]}.")
    last = name.rsplit(".", 1)[-1]
    if last in _ABOVE_ZERO and value == 0:
        raise ConfigError(f"{name!r} is 0; it must be above 0.")
    if last in _DTYPE_KEYS and value not in _DTYPES:
        raise ConfigError(choose_from(name, value, _DTYPES))


def _check_block(block: str, content: Mapping[str, object]) -> None:
    kinds = NESTED[block]
    for key, value in content.items():
        name = f"{block}.{key}"
        if name in REFUSED:
            raise ConfigError(f"{name!r} is not taken here: {REFUSED[name]}.")
        if key not in kinds:
            raise ConfigError(choose_from(f"key in '{block}':", key, kinds))
        left_out = value is None if kinds[key] is dict else value == "auto"
        if not left_out:
            _check(name, value, kinds[key])
