"""`python -m dsmoe plan` as a user types it."""

import subprocess
import sys

import pytest

from dsmoe import __main__ as command
from dsmoe.ds_config import check_policy, load_policy
from dsmoe.scaling import report


def plan(capsys, *arguments):
    code = command.main(["plan", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_printed_plan_holds_what_people_ask_for(capsys):
    code, out, err = plan(capsys, "--preset", "L/2-8E2A", "--nodes", "2", "--gpus", "8", "--top", "3")
    assert (code, err) == (0, "")
    for fact in (
        "2,823,764,000 parameters, 1,011,824,672 active", "256 px, latents 4x32x32, 256 tokens", "222.5 G an image",
        "256 images; 1 moving average", "2 x 8 GPUs of 80 GiB, of which 6.4 kept free", "ZeRO-1", "ZeRO-2", "ZeRO-3",
        "activations", "moments", "averages", "at the start", "network", "binds", "expert parallel 8", "recommended",
    ):  # fmt: skip
        assert fact in out, fact
    rows = out.split("layouts, ")[1].splitlines()
    assert rows[1].split()[:2] == ["layout", "GiB"]
    assert [row.startswith("ZeRO-") for row in rows[2:6]] == [True, True, True, False]


def test_a_recipe_brings_its_own_numbers(capsys):
    code, out, _ = plan(capsys, "--recipe", "quickstart", "--nodes", "1", "--gpus", "1", "--precision", "fp32")
    assert code == 0
    assert "model         quickstart: 6,398,240 parameters" in out
    assert "64 px, latents 4x8x8, 16 tokens" in out
    assert "64 images" in out


def test_resolution_and_batch_go_before_the_defaults(capsys):
    _, out, _ = plan(
        capsys, "--preset", "S/2", "--nodes", "1", "--gpus", "4", "--resolution", "512", "--global-batch", "32"
    )
    assert "1,024 tokens" in out
    assert "a step        32 images" in out


@pytest.mark.parametrize(
    ("option", "written"),
    [
        (["--recompute"], True),
        (["--recompute", "blocks"], True),
        (["--recompute", "experts"], "experts"),
        (["--no-recompute"], False),
    ],
    ids=["blocks by default", "blocks", "experts", "nothing"],
)
def test_the_written_file_is_accepted(capsys, tmp_path, option, written):
    file = tmp_path / "planned.json"
    fixed = ["--zero", "3", "--micro-batch", "4", *option, "--no-offload", "--expert-parallel", "1"]
    code, out, _ = plan(capsys, "--preset", "S/2-8E2A", "--nodes", "1", "--gpus", "8", *fixed, "--write", str(file))
    assert code == 0
    assert f"written       {file}" in out
    assert "1 layouts, 1 fit" in out
    policy = load_policy(str(file))
    check_policy(policy, device_type="cuda", num_experts=8, world_size=8)
    assert (policy.stage, policy.micro_batch, policy.block.activation_checkpointing) == (3, 4, written)


def test_the_plan_counts_the_operations_that_gpus_would_run(capsys, monkeypatch):
    def activations(compiled):
        monkeypatch.setattr(report.ops, "compiled_block", lambda kind: compiled)
        fixed = ["--zero", "1", "--micro-batch", "4", "--no-recompute", "--no-offload", "--expert-parallel", "1"]
        _, out, _ = plan(capsys, "--preset", "S/2-8E2A", *HERE, *fixed)
        lines = out.splitlines()
        told = next(line.split()[1] for line in lines if line.startswith("operations"))
        return told, float(next(line.split()[1] for line in lines if line.startswith("activations")))

    (compiled, less), (reference, more) = activations(True), activations(False)
    assert (compiled, reference) == ("compiled", "reference")
    assert less < 0.8 * more


HERE = ["--nodes", "1", "--gpus", "8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "L/2-8E2", *HERE], "unknown preset 'L/2-8E2'. Did you mean 'L/2-8E2A'"),
        (["--recipe", "quickstrat", *HERE], "Did you mean 'quickstart'"),
        (["--preset", "S/2", "--nodes", "0", "--gpus", "8"], "--nodes is 0; it must be above 0."),
        (["--preset", "S/2", *HERE, "--gpu-memory", "-1"], "--gpu-memory is -1; it must be above 0."),
        (["--preset", "S/2", *HERE, "--global-batch", "100"], "does not divide over 8 GPUs"),
        (["--preset", "S/2", *HERE, "--resolution", "250"], "is not a multiple of 16"),
        (["--preset", "S/2", *HERE, "--zero", "0"], "bf16 needs stage 1, 2 or 3"),
        (["--preset", "S/2", *HERE, "--gpu-memory", "3.1"], "nothing fits 1 x 8 GPUs of 3 GiB"),
        (["--preset", "S/2", *HERE, "--write", "/no/where.json"], "cannot write /no/where.json"),
        (["--preset", "S/2-8E2A", *HERE, "--expert-parallel", "3"], "8 experts on 8 GPUs allow 1, 2, 4, 8"),
    ],
)
def test_impossible_requests_are_one_line_and_exit_code_2(capsys, arguments, words):
    code, out, err = plan(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_help_lists_the_options_without_torch(repo_root):
    call = [sys.executable, "-X", "importtime", "-m", "dsmoe", "plan", "--help"]
    done = subprocess.run(call, cwd=repo_root, capture_output=True, text=True, timeout=60, check=True)
    assert "--gpu-memory" in done.stdout
    assert "| torch\n" not in done.stderr
