"""ds_configs as engine policy: what each value becomes, and every refusal with key, value and way out."""

import json
from pathlib import Path

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.ds_config import load_policy
from dsmoe.ds_config.keys import NESTED, PLAIN
from dsmoe.ds_config.keys import REFUSED as REFUSED_IN_BLOCKS
from dsmoe.ds_config.policy import NOT_HERE, OLD_NAMES, OPTIMIZERS, REMOVED_KEYS

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


@pytest.fixture
def load(tmp_path):
    """Policy of a mapping, or of a file's text."""

    def make(content):
        file = tmp_path / "engine.json"
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_policy(str(file))

    return make


@pytest.fixture
def refusal(load):
    """The one line with which content is refused."""

    def make(content):
        with pytest.raises(ConfigError) as error:
            load(content)
        message = str(error.value)
        assert "\n" not in message
        assert "engine.json" in message
        return message

    return make


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_file_loads_and_says_what_it_is_for(file):
    policy = load_policy(str(file))
    assert len(policy.block.about) > 20
    assert policy.stated_global_batch is None, "the recipe owns the global batch"


def test_the_files_that_the_documents_name_ship():
    assert "quickstart" in {file.stem for file in SHIPPED}


def test_an_empty_file_means_one_fp32_engine_with_everything_open(load):
    policy = load({})
    assert (policy.stage, policy.precision) == (0, "fp32")
    assert (policy.stated_global_batch, policy.micro_batch, policy.accumulation) == (None, None, None)
    assert (policy.offload_optimizer, policy.offload_parameters) == (False, False)
    assert (policy.block.optimizer, policy.block.expert_parallel_size, policy.block.data_workers) == ("auto", 1, 0)
    assert policy.passed == {}


def test_auto_and_numbers_are_told_apart(load):
    shared = ("train_batch_size", "optimizer", "scheduler", "gradient_clipping")
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto"}
    policy = load({**dict.fromkeys(shared, "auto"), **sizes})
    assert (policy.stated_global_batch, policy.micro_batch, policy.accumulation) == (None, 4, None)
    assert load({"train_batch_size": 64}).stated_global_batch == 64


@pytest.mark.parametrize(
    ("content", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True, "loss_scale": 0, "hysteresis": 2}}, "fp16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {}, "fp16": {"enabled": False}}, "fp32"),
    ],
)
def test_precision(load, content, precision):
    assert load(content).precision == precision


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offload_is_read_where_the_stage_has_it(load, stage):
    zero = {"stage": stage, "offload_optimizer": None, "offload_param": {"device": "none"}}
    if stage:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    policy = load({"zero_optimization": zero})
    assert (policy.offload_optimizer, policy.offload_parameters) == (stage > 0, stage == 3)


def test_only_deepspeeds_own_keys_are_passed_on(load):
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": "auto"}
    policy = load({
        "dsmoe": {
            "about": "x", "optimizer": "torch", "data_workers": 2, "timeout_minutes": 5, "ops": {"route": "reference"},
        },
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "optimizer": "auto",
        "wall_clock_breakdown": True,
    })  # fmt: skip
    assert policy.passed == {"zero_optimization": zero, "wall_clock_breakdown": True}
    assert (policy.block.optimizer, policy.block.data_workers, policy.block.timeout_minutes) == ("torch", 2, 5)
    assert policy.block.ops == {"route": "reference"}


def test_key_tables_agree_with_the_installed_deepspeed():
    """Every key we let through is one that this DeepSpeed knows, or it would fail after the model exists."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for block, model in models.items():
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert set(NESTED[block]) <= names, block
        # Each value of the right type must be one that DeepSpeed takes too.
        sample = {bool: True, int: 2, float: 1.0}
        usual = {k: sample[kind] for k, kind in NESTED[block].items() if kind in sample and k != "enabled"}
        model(**usual)


def test_removed_keys_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime import config

    assert set(REMOVED_KEYS) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    of_zero = {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert {key for key, way_out in REFUSED_IN_BLOCKS.items() if "removed" in way_out} == of_zero


def test_every_zero_key_of_the_installed_deepspeed_is_passed_on_or_refused_with_its_reason():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    refused = {key.split(".")[1] for key in REFUSED_IN_BLOCKS if key.startswith("zero_optimization.")}
    assert names - set(NESTED["zero_optimization"]) <= refused


@pytest.mark.parametrize("key", REFUSED_IN_BLOCKS)
def test_keys_refused_inside_blocks_say_why(refusal, key):
    blocks, _, inner = key.rpartition(".")
    content = {inner: 2}
    for block in reversed(blocks.split(".")):
        content = {block: content}
    message = refusal(content)
    assert f"'{key}' is not taken here: {REFUSED_IN_BLOCKS[key]}." in message


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_keys_that_deepspeed_removed_are_named(refusal, key):
    message = refusal({key: {"enabled": True}})
    assert f"'{key}' was removed from DeepSpeed" in message
    assert "drop it" in message


@pytest.mark.parametrize("key", OLD_NAMES)
def test_names_of_older_releases_say_since_when_and_what_instead(refusal, key):
    release, way_out = OLD_NAMES[key]
    message = refusal({key: True})
    assert f"'{key}' is unknown to DeepSpeed since {release}" in message
    assert way_out in message


def test_names_of_older_releases_are_unknown_to_the_installed_one():
    from deepspeed.runtime import constants

    assert not set(OLD_NAMES) & {value for value in vars(constants).values() if isinstance(value, str)}


OLD_IN_ZERO = {
    "cpu_offload": '"offload_optimizer"',
    "cpu_offload_param": '"offload_param"',
    "cpu_offload_params": '"offload_param"',
    "find_unused_parameters": '"ignore_unused_parameters"',
}


@pytest.mark.parametrize("key", OLD_IN_ZERO)
def test_names_that_a_zero_block_had_say_what_instead(refusal, key):
    message = refusal({"zero_optimization": {"stage": 3, key: True}})
    assert f"'zero_optimization.{key}'" in message
    assert OLD_IN_ZERO[key] in message


@pytest.mark.parametrize("key", NOT_HERE)
def test_keys_with_a_place_of_their_own_say_where(refusal, key):
    message = refusal({key: {"enabled": True}})
    assert f"'{key}' is not taken here" in message
    assert NOT_HERE[key] in message


# (content, fragments of the line)
REFUSED = [
    # Owned by the recipe.
    ({"optimizer": {"type": "Adam"}}, ("'optimizer'", '"type": "Adam"', "the recipe owns it", '"optimizer": "auto"')),
    ({"scheduler": None}, ("'scheduler' is null", "optimizer.schedule")),
    ({"gradient_clipping": 1.0}, ("'gradient_clipping' is 1.0", "optimizer.clip", '"auto"')),
    # Batch numbers.
    ({"train_batch_size": 0}, ("'train_batch_size' is 0", "above 0", '"auto"')),
    ({"train_batch_size": "64"}, ("'train_batch_size' is \"64\"", "whole number")),
    ({"train_micro_batch_size_per_gpu": 1.5}, ("'train_micro_batch_size_per_gpu' is 1.5", "whole number")),
    ({"gradient_accumulation_steps": True}, ("'gradient_accumulation_steps' is true",)),
    # ZeRO.
    ({"zero_optimization": True}, ("'zero_optimization' is true", "object")),
    ({"zero_optimization": None}, ("'zero_optimization' is null", "object")),
    ({"zero_optimization": {"stage": 4}}, ("'zero_optimization.stage' is 4", "0, 1, 2 or 3")),
    ({"zero_optimization": {"stage": True}}, ("'zero_optimization.stage' is true", "whole number")),
    ({"zero_optimization": {"stage": "auto"}}, ("'zero_optimization.stage' is \"auto\"", "0, 1, 2 or 3")),
    ({"zero_optimization": {"stage": 1.0}}, ("'zero_optimization.stage' is 1.0", "0, 1, 2 or 3")),
    ({"zero_optimization": {"stagee": 1}}, ("key in 'zero_optimization': 'stagee'", "Did you mean 'stage'")),
    ({"zero_optimization": {"reduce_bucket_size": "big"}}, ('reduce_bucket_size\' is "big"', "whole number")),
    ({"zero_optimization": {"reduce_bucket_size": -5}}, ("reduce_bucket_size' is -5", "0 or more")),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, ("reduce_bucket_size' is 0", "above 0")),
    ({"zero_optimization": {"allgather_bucket_size": 1.5}}, ("allgather_bucket_size' is 1.5", "whole number")),
    ({"zero_optimization": {"overlap_comm": "yes"}}, ('overlap_comm\' is "yes"', "true or false")),
    ({"zero_optimization": {"reduce_scatter": False}}, ("reduce_scatter' is false", "leave it out")),
    ({"zero_optimization": {"mics_shard_size": 2}}, ("'zero_optimization.mics_shard_size'", "removed", "drop it")),
    ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, ("compute_grad_norm'", "logged", "drop it")),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ("cpu_offload'", '"offload_optimizer"')),
    ({"zero_optimization": {"stage": 2}, "prescale_gradients": True}, ("'prescale_gradients' is true", "not at 2")),
    ({"zero_optimization": {"stage": 3}, "gradient_predivide_factor": 2}, ("predivide_factor' is 2", "not at 3")),
    # Offload.
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        ("offload_optimizer' needs stage 1, 2 or 3", "0"),
    ),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ("offload_param' needs stage 3", "2")),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        ('"nvme"', "spread experts", '"cpu"'),
    ),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "gpu"}}}, ('"gpu"', '"none" or "cpu"')),
    # DeepSpeed's default is "none", so a block without a device would silently offload nothing.
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {}}}, ("offload_optimizer.device' is null", '"cpu"')),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, ('offload_optimizer\' is "cpu"', "object")),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": "auto"}}, ('offload_optimizer\' is "auto"', "object")),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"devise": "cpu"}}},
        ("offload_optimizer': 'devise'", "mean 'device'"),
    ),
    # Precision.
    ({"bf16": True}, ("'bf16' is true", "object")),
    ({"bf16": {"enabled": "auto"}}, ("'bf16.enabled' is \"auto\"", "true or false")),
    ({"bf16": {"enabled": 1}}, ("'bf16.enabled' is 1", "true or false")),
    ({"bf16": {"enabeld": True}}, ("'bf16': 'enabeld'", "Did you mean 'enabled'")),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ("bf16.enabled and fp16.enabled", "choose one")),
    ({"bf16": {"bf16_optimizer_states": True}}, ("bf16_optimizer_states'", "fp32 master weights", "drop it")),
    ({"fp16": {"loss_scale": -1}}, ("'fp16.loss_scale' is -1", "0 or more")),
    ({"fp16": {"loss_scale_window": 0}}, ("'fp16.loss_scale_window' is 0", "above 0")),
    ({"data_types": {"grad_accum_dtype": "fp8"}}, ("grad_accum_dtype 'fp8'", "fp32, bf16, fp16")),
    # Other engine keys.
    ({"communication_data_type": "float"}, ("communication_data_type 'float'", "fp32, bf16, fp16")),
    ({"wall_clock_breakdown": "yes"}, ("'wall_clock_breakdown' is \"yes\"", "true or false")),
    ({"steps_per_print": "often"}, ("'steps_per_print' is \"often\"", "whole number")),
    ({"gradient_predivide_factor": 0}, ("'gradient_predivide_factor' is 0", "above 0")),
    ({"comms_logger": {"enabled": True, "prof_ops": "all"}}, ("'comms_logger.prof_ops' is \"all\"", "list")),
    ({"flops_profiler": {"enbled": True}}, ("'flops_profiler': 'enbled'", "'enabled'")),
    ({"bfloat16": {"enabled": True}}, ("'bfloat16'", "Did you mean", "'bf16'")),
    ({"zero_optimisation": {"stage": 1}}, ("'zero_optimisation'", "Did you mean 'zero_optimization'")),
    # Our block.
    ({"dsmoe": 3}, ("'dsmoe' is 3", "object")),
    ({"dsmoe": {"expert_paralel_size": 2}}, ("'dsmoe.expert_paralel_size'", "'dsmoe.expert_parallel_size'")),
    ({"dsmoe": {"expert_parallel_size": "2"}}, ("'dsmoe.expert_parallel_size' is \"2\"", "whole number")),
    ({"dsmoe": {"expert_parallel_size": True}}, ("'dsmoe.expert_parallel_size' is true", "whole number")),
    ({"dsmoe": {"expert_parallel_size": 0}}, ("'dsmoe.expert_parallel_size' is 0", "at least 1")),
    ({"dsmoe": {"activation_checkpointing": {}}}, ("'dsmoe.activation_checkpointing' is {}", "true or false")),
    ({"dsmoe": {"activation_checkpointing": 1}}, ("'dsmoe.activation_checkpointing' is 1", 'or "experts"')),
    ({"dsmoe": {"activation_checkpointing": "expert"}}, ('_checkpointing\' is "expert"', 'or "experts"')),
    ({"dsmoe": {"about": None}}, ("'dsmoe.about' is null", "text")),
    ({"dsmoe": {"data_workers": -1}}, ("'dsmoe.data_workers' is -1", "0 or more")),
    ({"dsmoe": {"timeout_minutes": 0}}, ("'dsmoe.timeout_minutes' 0", "above 0")),
    ({"dsmoe": {"timeout_minutes": 1e300}}, ("'dsmoe.timeout_minutes' 1e+300", "at most")),
    ('{"dsmoe": {"timeout_minutes": NaN}}', ("'dsmoe.timeout_minutes' nan", "above 0")),
    ({"dsmoe": {"ops": "megatron"}}, ("'dsmoe.ops' is \"megatron\"", "an object")),
    ({"dsmoe": {"ops": {"route": 1}}}, ("'dsmoe.ops.route' is 1", "name of an implementation")),
    ({"dsmoe": {"optimizer": "adam"}}, ("dsmoe.optimizer 'adam'", ", ".join(OPTIMIZERS))),
    # Not JSON, or not an object.
    ("", ("not valid JSON", "line 1")),
    ("{'a': 1}", ("not valid JSON", "line 1 column 2")),
    ('{"bf16": {"enabled": true,}}', ("not valid JSON", "trailing commas")),
    ('{"bf16": {} // mine\n}', ("not valid JSON", "comments")),
    (b'{"dsmoe": {"about": "\xff"}}', ("not valid JSON",)),
    ("[" * 100_000, ("not valid JSON",)),
    ("[1]", ("holds list", "object")),
    ("null", ("holds NoneType", "object")),
    ('{"bf16": {}, "bf16": {}}', ("'bf16' stands twice", "keep one")),
    ('{"dsmoe": {"about": "a", "about": "b"}}', ("'about' stands twice", "keep one")),
]


@pytest.mark.parametrize(("content", "words"), REFUSED, ids=lambda v: None if isinstance(v, tuple) else str(v)[:60])
def test_refusals_name_key_value_and_way_out(refusal, content, words):
    message = refusal(content)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("key", PLAIN)
def test_every_plain_key_has_its_type_checked(refusal, key):
    assert f"'{key}' is [1]" in refusal({key: [1]})


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--deepspeed_config .*gone\.json: No such file.*give.*quickstart\.json"):
        load_policy(str(tmp_path / "gone.json"))
    with pytest.raises(ConfigError, match=r"--deepspeed_config .*: Is a directory"):
        load_policy(str(tmp_path))
