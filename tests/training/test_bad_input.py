"""Bad input is found before process groups and model exist, told once, in one line, and ends every rank with code 2."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import bad_data
import bad_engines
import bad_inputs
import pytest
import torch
from bad_inputs import DEFAULT_FAILED, ENGINE, GOOD_COMMAND, GOOD_FILES, write_files
from distributed_harness import launch

from dsmoe.base.run_folder import rejected_run_folder
from dsmoe.models.dit import DiT
from dsmoe.training import pretrain

CASES = [*bad_inputs.CASES, *bad_data.CASES, *bad_engines.CASES]
ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launchers/pretrain.py"
EXIT_BAD_INPUT = 2


def rank_environment(rank, world_size=2):
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_logging():
    root, deepspeed = logging.getLogger(), logging.getLogger("DeepSpeed")
    before = root.handlers[:], root.level, deepspeed.filters[:], deepspeed.level
    yield
    root.handlers[:], root.level, deepspeed.filters[:], deepspeed.level = before
    logging.captureWarnings(False)
    root.setLevel(root.level)  # clears the level caches


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run main as one rank in an empty folder: (exit code, stdout, stderr). Nothing may come to life."""

    def never(*args, **kwargs):
        raise AssertionError("bad input got as far as process groups or the model")

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, GOOD_FILES)
    monkeypatch.setattr(pretrain, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(DiT, "__init__", never)
    monkeypatch.setattr(pretrain, "new_model", never)
    monkeypatch.setattr(pretrain.distributed, "initialize", never)
    monkeypatch.setattr(torch.distributed, "init_process_group", never)

    def run(argv, environ):
        capfd.readouterr()
        code = pretrain.main(argv, "test", environ)
        assert not torch.distributed.is_initialized()
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_enough_ways_are_tried_and_their_names_differ():
    assert len(CASES) >= 50
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_refuses_and_rank_0_alone_says_why(case, command, tmp_path):
    argv = case.write(tmp_path)
    # Also after rank 0 has left its FAILED, for the ranks are not in step.
    for rank in (1, 0, 1):
        environ = {k: v for k, v in {**rank_environment(rank), **case.environ}.items() if v is not None}
        code, out, err = command(argv, environ)
        assert code == EXIT_BAD_INPUT
        assert out == ""
        if rank:
            assert err == ""
            continue
        assert err.startswith("dsmoe: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        for words in case.says:
            assert words in err, err
        assert len(err) < 1200, "one line that a person reads"
        failed = Path(case.failed.format(folder=tmp_path.name)) / "FAILED"
        assert failed.read_text() == err


def test_other_science_in_the_run_folder_is_refused_with_the_changed_keys(command, tmp_path):
    from dsmoe.base.run_folder import RunFolder
    from dsmoe.runtime.launch_environment import discover
    from dsmoe.training.prepare import parse_command, prepare

    argv = [*GOOD_COMMAND, "--run", "mine"]
    plan = prepare(parse_command(argv, ""), discover(rank_environment(0))).plan
    RunFolder(Path("mine")).create(plan)
    before = Path("mine/plan.json").read_bytes()
    other = [*argv, "train.seed=5", "optimizer.lr=2e-3"]
    assert command(other, rank_environment(1)) == (EXIT_BAD_INPUT, "", "")
    code, out, err = command(other, rank_environment(0))
    assert (code, out) == (EXIT_BAD_INPUT, "")
    for words in (
        "run folder mine",
        "other science",
        "train.seed 0 -> 5",
        "optimizer.lr 0.001 -> 0.002",
        "another --run",
    ):
        assert words in err
    assert err.count("->") == 2
    assert Path("mine-rejected/FAILED").read_text() == err
    assert Path("mine/plan.json").read_bytes() == before
    assert not Path("mine/FAILED").exists(), "the run that lies there has not failed"


def test_a_rank_beyond_the_world_size_speaks_for_itself(command, tmp_path):
    code, out, err = command([*GOOD_COMMAND], rank_environment(2, 2))
    assert (code, out) == (EXIT_BAD_INPUT, "")
    assert err == Path("runs/command-rejected/FAILED").read_text()
    for words in ("rank 2 of world size 2", "0..1", "check RANK and WORLD_SIZE"):
        assert words in err


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file whose content cannot be read")
def test_files_whose_content_cannot_be_read_are_named(command, tmp_path):
    for name in ("mine.yaml", "mine.json"):
        (tmp_path / name).symlink_to("/proc/self/mem")
    for argv, words in (
        (["--deepspeed_config", "engine.json", "--recipe", "mine.yaml"], "cannot read mine.yaml: Input/output error"),
        (["--deepspeed_config", "mine.json"], "cannot read --deepspeed_config mine.json: Input/output error"),
    ):
        code, _, err = command(argv, rank_environment(0))
        assert code == EXIT_BAD_INPUT
        assert words in err


def test_a_good_command_gets_past_all_checks(command, tmp_path, monkeypatch):
    """The base of the cases is good: what they are refused for is what they change."""
    for rank in (0, 1):
        code, out, err = command(["--plan", *GOOD_COMMAND], rank_environment(rank))
        assert (code, err) == (0, "")
        assert ("science hash" in out) == (rank == 0)
    assert not Path("runs").exists()
    reached = []
    monkeypatch.setattr(pretrain, "run", lambda prepared, place: reached.append(place.rank) or 0)
    options = ["train.seed=4", *GOOD_COMMAND, "--run", "mine", "train.images=6000"]
    assert command(options, rank_environment(1))[0] == 0
    assert reached == [1]


def test_correcting_the_mistake_clears_the_way(command, tmp_path, monkeypatch):
    argv = [*GOOD_COMMAND, "--run", "mine"]
    assert command([*argv, "optimizer.lr=0"], rank_environment(0))[0] == EXIT_BAD_INPUT
    assert Path("mine/FAILED").exists()
    assert rejected_run_folder("mine", "base.yaml").path == tmp_path / "mine"
    monkeypatch.setattr(pretrain, "run", lambda prepared, place: 0)
    assert command(argv, rank_environment(0))[0] == 0


def test_too_few_gpus_are_met_by_every_rank_of_the_host(command, tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("dsmoe.runtime.device.gpu_count", lambda: 2)
    argv = [*GOOD_COMMAND]
    for rank in range(4):
        code, out, err = command(argv, rank_environment(rank, world_size=4))
        assert (code, out) == (EXIT_BAD_INPUT, "")
        assert ("local rank 3 has no GPU: 2 are visible" in err) == (rank == 0)


def test_other_ranks_wait_for_rank_0_to_speak(command, tmp_path, monkeypatch):
    """A launcher that sees one rank end kills the others, and with them the line."""
    waited = []
    monkeypatch.setattr(pretrain, "PATIENCE_SECONDS", 3.5)
    monkeypatch.setattr(pretrain.time, "sleep", waited.append)
    for rank in (0, 1):
        command([], rank_environment(rank))
        assert waited == [3.5] * rank


def command_in(folder):
    """GOOD_COMMAND for ranks that start elsewhere."""
    return [LAUNCHER, "--deepspeed_config", folder / "engine.json", "--recipe", folder / "base.yaml"]


NO_FOLDER = ["data.source=image_folder", "data.path=/no/such/folder", "data.size=null"]


@pytest.mark.distributed
def test_real_ranks_end_with_code_2_and_one_line(tmp_path, subtests):
    """Ranks that start as users start them, then some that do not import torch again."""
    cases = [
        ("bad key", {"zero_optimization": {"stag": 1}}, [], "'zero_optimization': 'stag'"),
        ("no data", {}, NO_FOLDER, "'/no/such/folder'"),
        ("a file as run folder", {}, [], "is a file"),
    ]
    for name, content, args, words in cases:
        with subtests.test(name):
            write_files(tmp_path, {**GOOD_FILES, "engine.json": {**ENGINE, **content}})
            folder = tmp_path / name
            if words == "is a file":
                folder.touch()
            argv = [*command_in(tmp_path), "--run", folder, *args]
            results = launch(argv, 2, timeout=60, preloaded=name != "bad key")
            assert [(r.returncode, r.killed) for r in results] == [(EXIT_BAD_INPUT, False)] * 2
            assert [r.stdout for r in results] == ["", ""]
            assert results[1].stderr == ""
            assert results[0].stderr.count("\n") == 1
            assert words in results[0].stderr
            failed = folder if folder.is_dir() else tmp_path / f"{name}-rejected"
            assert (failed / "FAILED").read_text() == results[0].stderr
            assert [p.name for p in failed.iterdir()] == ["FAILED"]


@pytest.mark.distributed
def test_the_deepspeed_command_passes_the_exit_code_on(tmp_path):
    cli = Path(sys.executable).with_name("deepspeed")
    if not cli.exists():
        pytest.skip("this environment has no deepspeed command")
    write_files(tmp_path, {**GOOD_FILES, "engine.json": {**ENGINE, "gradient_clipping": 1.0}})
    environ = {k: v for k, v in os.environ.items() if k not in rank_environment(0)}
    path = os.pathsep.join(p for p in (str(ROOT), environ.get("PYTHONPATH", "")) if p)
    environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, cli, "--num_gpus", "2", LAUNCHER, *GOOD_COMMAND],
        cwd=tmp_path, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    ours = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("dsmoe: ")]
    assert len(ours) == 1, done.stderr
    assert "'gradient_clipping' is 1.0" in ours[0]
    assert (tmp_path / DEFAULT_FAILED / "FAILED").read_text() == ours[0] + "\n"
