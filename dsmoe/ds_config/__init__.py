"""The only room that names DeepSpeed configuration keys: reads ds_configs, resolves batches, writes engine input."""

from dsmoe.ds_config.batch import Batch, resolve_batch
from dsmoe.ds_config.emit import check_policy, engine_config
from dsmoe.ds_config.layouts import layout_of, refusal, write_policy
from dsmoe.ds_config.policy import EnginePolicy, load_policy

__all__ = [
    "Batch",
    "EnginePolicy",
    "check_policy",
    "engine_config",
    "layout_of",
    "load_policy",
    "refusal",
    "resolve_batch",
    "write_policy",
]
