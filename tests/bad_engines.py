"""The ways in which ds_configs, command lines and launch environments can be wrong. For test_bad_input."""

from bad_inputs import Case, engine

ENGINES = [
    engine(
        "engine file missing", None, says=("--deepspeed_config mine.json", "No such file", "ds_configs/quickstart.json")
    ),
    Case(
        name="engine file a folder",
        argv=("--deepspeed_config", ".", "--recipe", "base.yaml"),
        says=("--deepspeed_config .", "Is a directory", "give"),
    ),
    engine("engine file not JSON", '{"bf16": {},}', says=("mine.json is not valid JSON", "line 1", "railing commas")),
    engine("engine file not text", b"\xff", says=("mine.json is not valid JSON",)),
    engine("engine file a list", "[1]", says=("mine.json: holds list", "object of keys")),
    engine("engine key twice", '{"bf16": {}, "bf16": {}}', says=("mine.json", "'bf16' stands twice", "keep one")),
    engine(
        "engine nested key twice",
        '{"bf16": {"enabled": true, "enabled": false}}',
        says=("'enabled' stands twice", "keep"),
    ),
    engine("engine unknown key", {"zero_optimisation": {}}, says=("'zero_optimisation'", "mean 'zero_optimization'")),
    engine(
        "engine unknown ZeRO key",
        {"zero_optimization": {"stag": 1}},
        says=("'zero_optimization': 'stag'", "mean 'stage'"),
    ),
    engine("engine unknown bf16 key", {"bf16": {"enable": True}}, says=("'bf16': 'enable'", "mean 'enabled'")),
    engine("engine unknown key of ours", {"dsmoe": {"worker": 1}}, says=("'dsmoe.worker'", "'dsmoe.data_workers'")),
    engine(
        "engine wrong stage",
        {"zero_optimization": {"stage": 5}},
        says=("zero_optimization.stage' is 5", "0, 1, 2 or 3"),
    ),
    engine("engine text for a number", {"train_micro_batch_size_per_gpu": "8"}, says=('gpu\' is "8"', "whole number")),
    engine(
        "engine text for a switch", {"bf16": {"enabled": "yes"}}, says=("'bf16.enabled' is \"yes\"", "true or false")
    ),
    engine(
        "engine text for a size", {"zero_optimization": {"sub_group_size": "1e9"}}, says=("sub_group_size' is", "whole")
    ),
    engine("engine text for workers", {"dsmoe": {"data_workers": "2"}}, says=('data_workers\' is "2"', "whole number")),
    engine("engine endless timeout", {"dsmoe": {"timeout_minutes": 1e30}}, says=("timeout_minutes' 1e+30", "at most")),
    engine("engine key DeepSpeed removed", {"elasticity": {}}, says=("'elasticity' was removed", "drop it")),
    engine(
        "engine ZeRO key DeepSpeed removed",
        {"zero_optimization": {"mics_shard_size": 2}},
        says=("mics_shard_size'", "drop"),
    ),
    engine(
        "engine with an optimizer", {"optimizer": {"type": "AdamW"}}, says=("'optimizer' is", "the recipe", '"auto"')
    ),
    engine(
        "engine with a scheduler", {"scheduler": {"type": "WarmupLR"}}, says=("'scheduler' is", "optimizer.schedule")
    ),
    engine(
        "engine with clipping",
        {"gradient_clipping": 1.0},
        says=("'gradient_clipping' is 1.0", "optimizer.clip", '"auto"'),
    ),
    engine(
        "engine with checkpointing", {"activation_checkpointing": {}}, says=("'activation_checkpointing'", "dsmoe.act")
    ),
    engine("fp16 on a CPU", {"fp16": {"enabled": True}}, says=("fp16 is not supported on CPU", "use bf16")),
    engine(
        "bf16 without ZeRO",
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}},
        says=("bf16 with ZeRO stage 0", "use stage 1"),
    ),
    engine(
        "bf16 and fp16",
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        says=("bf16.enabled and fp16.enabled are both true", "choose one"),
    ),
    engine(
        "offload without ZeRO",
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        says=("offload_optimizer' needs stage 1, 2 or 3", "stage is 0"),
    ),
    engine(
        "parameter offload below stage 3",
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        says=("offload_param' needs stage 3", "stage is 2"),
    ),
    engine(
        "offload to a disk",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        says=('offload_param.device\' is "nvme"', '"none" or "cpu"'),
    ),
    engine(
        "device optimizer with offload",
        {
            "dsmoe": {"optimizer": "torch_fused"},
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        },
        says=("torch_fused", "auto, cpu_adam or torch"),
    ),
    engine(
        "experts over more ranks than there are",
        {"dsmoe": {"expert_parallel_size": 3}},
        says=("expert_parallel_size' is 3", "must divide", "ranks"),
    ),
    engine(
        "expert groups of a dense model",
        {"dsmoe": {"expert_parallel_size": 2}},
        "model.preset=nano",
        says=("expert_parallel_size' is 2", "the model is dense", "set 1"),
    ),
    engine(
        "unknown op",
        {"dsmoe": {"ops": {"gather": "reference"}}},
        says=("mine.json: 'dsmoe.ops': unknown op 'gather'", "rows"),
    ),
    engine(
        "unknown implementation of an op",
        {"dsmoe": {"ops": {"gather_rows": "triton"}}},
        says=("mine.json: 'dsmoe.ops': unknown implementation of ops.gather_rows on cpu 'triton'", "reference"),
    ),
    engine("unknown optimizer", {"dsmoe": {"optimizer": "adam"}}, says=("dsmoe.optimizer 'adam'", "cpu_adam")),
    engine("apex on a CPU", {"dsmoe": {"optimizer": "apex"}}, says=("apex", "use auto or torch_fused")),
]

COMMANDS = [
    Case(
        name="no engine file",
        argv=("--recipe", "base.yaml"),
        says=("--deepspeed_config is missing", "ds_configs/quickstart.json"),
    ),
    Case(
        name="empty engine file name",
        argv=("--deepspeed_config", ""),
        says=("--deepspeed_config is missing", "give a file"),
    ),
    Case(
        name="unknown flag",
        args=("--recpie", "quickstart"),
        failed="runs/command-rejected",
        says=("'--recpie'", "Did you mean '--recipe'"),
    ),
    Case(
        name="flag without its value",
        args=("--recipe",),
        failed="runs/command-rejected",
        says=("--recipe", "expected one argument", "--help"),
    ),
    Case(
        name="rank given as text",
        args=("--local_rank=first",),
        failed="runs/command-rejected",
        says=("--local_rank", "'first'", "--help"),
    ),
    Case(
        name="world size missing", environ={"WORLD_SIZE": None}, says=("RANK is", "WORLD_SIZE is not set", "set both")
    ),
    Case(name="world size of 0", environ={"WORLD_SIZE": "0"}, says=("world size 0", "at least 1")),
    Case(name="world size no number", environ={"WORLD_SIZE": "two"}, says=("WORLD_SIZE is 'two'", "integer")),
    Case(
        name="local rank missing", environ={"LOCAL_RANK": None}, says=("LOCAL_RANK is not set", "start with torchrun")
    ),
    Case(name="port no number", environ={"MASTER_PORT": "x"}, says=("MASTER_PORT is 'x'", "integer")),
    Case(name="port out of range", environ={"MASTER_PORT": "70000"}, says=("MASTER_PORT is 70000", "1..65535")),
    Case(name="more local than global", environ={"LOCAL_WORLD_SIZE": "3"}, says=("of 3 on this host", "world size 2")),
]
COMMANDS = [
    case if not case.environ and case.argv is None else Case(**{**vars(case), "failed": "runs/command-rejected"})
    for case in COMMANDS
]

CASES = [*ENGINES, *COMMANDS]
