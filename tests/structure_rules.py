"""The house rules as functions: each takes a repository root and returns its violations, one line each.

docs/design.md is the truth for the floors and is parsed, not copied. test_structure.py applies the rules to this
repository and, with planted violations, to small trees.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DESIGN = Path("docs") / "design.md"
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
TOP = ("launchers", "__main__", "benchmarks")

RANK_VARIABLES = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_\w+|OMPI_\w+|PMI_\w+"
)
# The keys of DeepSpeed's configuration whose names mean nothing else ("optimizer", "bf16", "pin_memory" do).
DEEPSPEED_KEYS = frozenset(
    (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "zero_optimization", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "offload_optimizer", "offload_param", "sub_group_size", "overlap_comm",
        "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions",
        "contiguous_gradients", "round_robin_gradients", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
        "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients", "loss_scale",
        "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale", "prescale_gradients",
        "gradient_predivide_factor", "communication_data_type", "seq_parallel_communication_data_type",
        "wall_clock_breakdown", "steps_per_print", "dump_state", "memory_breakdown", "comms_logger",
        "flops_profiler", "cpu_checkpointing", "contiguous_memory_optimization", "partition_activations",
        "data_types", "grad_accum_dtype", "sparse_gradients", "expert_parallel", "aio", "pipeline_read",
        "bf16_master_weights_and_grads", "bf16_optimizer_states", "torch_autocast",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Module:
    """One parsed Python file: path from the root, and its room ("ops", "launchers", "__main__", ...)."""

    path: Path
    source: str
    tree: ast.Module

    @property
    def room(self) -> str:
        parts = self.path.parts
        if parts[0] != "dsmoe":
            return parts[0]
        return parts[1] if len(parts) > 2 else self.path.stem

    @property
    def in_package(self) -> bool:
        return self.path.parts[0] == "dsmoe"

    def at(self, node: ast.AST, text: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {text}"


def modules(root: Path, *folders: str) -> Iterator[Module]:
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            yield _parse(file.relative_to(root), file.read_text(encoding="utf-8"))


@cache
def _parse(path: Path, source: str) -> Module:
    return Module(path, source, ast.parse(source))


def floors(design: str) -> dict[str, int]:
    """Room -> height, from the table of docs/design.md: highest line first, rooms separated by two blanks or more."""
    block = design.split("## Floors and rooms", 1)[1].split("```", 2)[1]
    lines = [line for line in block.splitlines() if line and not line.startswith(" ")]
    heights: dict[str, int] = dict.fromkeys(TOP, len(lines) - 1)
    for height, line in enumerate(reversed(lines)):
        for word in re.split(r"\s{2,}", line):
            if not re.fullmatch(r"[a-z_]+", word):
                break
            heights[word] = height
    return heights


def imports(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name, dotted, those inside functions too: `from a.b import c` gives "a.b.c"."""
    package = module.path.parts[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                yield node, f"{stem}.{alias.name}"


def _top(name: str) -> str:
    return name.split(".", 1)[0]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def _strings(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value


def arrows(root: Path) -> list[str]:
    """A module imports lower floors and its own room only."""
    heights = floors((root / DESIGN).read_text(encoding="utf-8"))
    found = []
    for module in modules(root, "dsmoe", "launchers", "benchmarks"):
        if module.in_package and module.room == "__init__":
            found += [module.at(n, f"dsmoe/__init__ imports {i}") for n, i in imports(module) if _top(i) == "dsmoe"]
            continue
        if module.room not in heights:
            found.append(module.at(module.tree, f"room {module.room!r} is not in docs/design.md"))
            continue
        for node, name in imports(module):
            parts = name.split(".")
            target = parts[1] if parts[0] == "dsmoe" and len(parts) > 1 else parts[0]
            if parts[0] not in ("dsmoe", "launchers", "benchmarks") or target in (module.room, "__version__"):
                continue
            if heights.get(target, len(heights)) >= heights[module.room]:
                found.append(module.at(node, f"{module.room} imports {name}, which is not on a lower floor"))
    return found


def deepspeed_imports(root: Path) -> list[str]:
    """deepspeed only in training/, moe/deepspeed_layer.py and launchers/ (ds_config only writes a dictionary)."""
    found = []
    for module in modules(root, "dsmoe", "launchers", "benchmarks"):
        allowed = module.room in ("training", "launchers", "benchmarks")
        if allowed or module.path == Path("dsmoe/moe/deepspeed_layer.py"):
            continue
        found += [module.at(n, f"imports {name}") for n, name in imports(module) if _top(name) == "deepspeed"]
    return found


def torch_in_base(root: Path) -> list[str]:
    """base is plain Python; base/metrics.py alone may use torch."""
    found = []
    for module in modules(root, "dsmoe/base"):
        if module.path != Path("dsmoe/base/metrics.py"):
            found += [module.at(n, f"imports {name}") for n, name in imports(module) if _top(name) == "torch"]
    return found


def cuda_calls(root: Path) -> list[str]:
    """torch.cuda only in runtime/device.py (benchmarks time kernels with it and are free)."""
    found = []
    for module in modules(root, "dsmoe", "launchers"):
        if module.path == Path("dsmoe/runtime/device.py"):
            continue
        uses = [n for n in ast.walk(module.tree) if isinstance(n, ast.Attribute) and dotted(n) == "torch.cuda"]
        uses += [n for n, name in imports(module) if (name + ".").startswith("torch.cuda.")]
        found += [module.at(node, "uses torch.cuda") for node in uses]
    return found


def rank_variables(root: Path) -> list[str]:
    """Names of launch variables only in runtime/."""
    found = []
    for module in modules(root, "dsmoe", "launchers", "benchmarks"):
        if module.room != "runtime":
            found += [module.at(n, f"names {s!r}") for n, s in _strings(module) if RANK_VARIABLES.fullmatch(s)]
    return found


def lengths(root: Path) -> list[str]:
    """Modules under 400 lines, functions under 60."""
    found = []
    for module in modules(root, "dsmoe", "launchers", "benchmarks", "tests"):
        count = len(module.source.splitlines())
        if count >= MAX_MODULE_LINES:
            found.append(module.at(module.tree, f"{count} lines"))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                if count >= MAX_FUNCTION_LINES:
                    found.append(module.at(node, f"function {node.name} has {count} lines"))
    return found


def unsafe_calls(root: Path) -> list[str]:
    """No pickle, no yaml.load, no shell, torch.load with weights_only=True only."""
    found = []
    for module in modules(root, "dsmoe", "launchers", "benchmarks"):
        for node, name in imports(module):
            if _top(name) in ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
                found.append(module.at(node, f"imports {name}"))
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and (why := _unsafe(node)):
                found.append(module.at(node, why))
    return found


def _unsafe(call: ast.Call) -> str:
    name = dotted(call.func)
    given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
    if given.get("shell"):
        return "shell=True"
    if given.get("allow_pickle"):
        return "allow_pickle=True"
    if "weights_only" in given and given["weights_only"] is not True:
        return "weights_only is not True"
    if name == "torch.load" and "weights_only" not in given:
        return "torch.load without weights_only=True"
    plain = ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "eval", "exec")
    return name if name in plain else ""


def deepspeed_keys(root: Path) -> list[str]:
    """Names of DeepSpeed's configuration keys only in ds_config."""
    found = []
    for module in modules(root, "dsmoe", "launchers"):
        if module.room != "ds_config":
            found += [module.at(n, f"names the key {s!r}") for n, s in _strings(module) if s in DEEPSPEED_KEYS]
    return found


def docstrings(root: Path) -> list[str]:
    """Every module of dsmoe/ and every public function and class at its top level says what it is."""
    found = []
    for module in modules(root, "dsmoe"):
        if not ast.get_docstring(module.tree):
            found.append(module.at(module.tree, "module without docstring"))
        for node in module.tree.body:
            kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(module.at(node, f"{node.name} without docstring"))
    return found


RULES: dict[str, Callable[[Path], list[str]]] = {
    rule.__name__: rule
    for rule in (
        arrows,
        deepspeed_imports,
        torch_in_base,
        cuda_calls,
        rank_variables,
        lengths,
        unsafe_calls,
        deepspeed_keys,
        docstrings,
    )
}
