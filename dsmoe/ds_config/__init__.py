"""The only room that names DeepSpeed configuration keys: reads ds_configs, resolves batches, writes engine input."""

from dsmoe.ds_config.batch import Batch, resolve_batch
from dsmoe.ds_config.emit import check_policy, engine_config
from dsmoe.ds_config.policy import EnginePolicy, load_policy

__all__ = ["Batch", "EnginePolicy", "check_policy", "engine_config", "load_policy", "resolve_batch"]
