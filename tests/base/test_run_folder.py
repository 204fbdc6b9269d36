"""The run folder: who may write in it, what may lie in it, and what is left in it when something goes wrong."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from made_plan import made_plan, made_recipe

from dsmoe.base.errors import ConfigError, TrainingFailure
from dsmoe.base.plan import Plan
from dsmoe.base.run_folder import (
    DEFAULT_ROOT,
    Lease,
    RunFolder,
    default_run_folder,
    rejected_run_folder,
)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def refusal(folder, plan=None):
    with pytest.raises(ConfigError) as error:
        RunFolder(folder).check(plan or made_plan())
    message = str(error.value)
    assert "\n" not in message
    assert "--run" in message, "the way out"
    return message


def test_every_path_lies_in_the_folder():
    folder = RunFolder(Path("r"))
    paths = [getattr(folder, n) for n, v in vars(RunFolder).items() if isinstance(v, property)]
    assert sorted(map(str, paths)) == [
        "r/DONE", "r/FAILED", "r/ckpt", "r/lease.json", "r/logs", "r/metrics.jsonl", "r/plan.json", "r/routing.jsonl",
        "r/samples", "r/tb",
    ]  # fmt: skip


def test_default_folder_is_named_by_recipe_and_science():
    plan = made_plan()
    assert default_run_folder(plan).path == DEFAULT_ROOT / f"tiny-{plan.science_hash}"
    assert default_run_folder(made_plan(world_size=1)).path == default_run_folder(plan).path


def test_creating_makes_folders_plan_and_lease_and_clears_an_old_failure(tmp_path):
    folder, plan = RunFolder(tmp_path / "deep" / "run"), made_plan()
    folder.check(plan)
    assert not folder.path.exists(), "looking must leave nothing behind"
    folder.record_failure("an earlier mistake")
    folder.check(plan)
    folder.create(plan)
    assert names(folder.path) == ["ckpt", "lease.json", "logs", "plan.json", "samples", "tb"]
    assert Plan.from_dict(json.loads(folder.plan.read_text())) == plan


def test_the_same_science_may_come_back_with_other_engine_policy(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(made_plan())
    again = made_plan(made_recipe(name="other", report={"samples": 4}), world_size=1, precision="bf16")
    folder.check(again)
    folder.create(again)
    assert json.loads(folder.plan.read_text())["engine"]["world_size"] == 1


def test_other_science_is_refused_with_every_changed_key(tmp_path):
    RunFolder(tmp_path).create(made_plan())
    plan = made_plan(made_recipe(train={"seed": 4}, optimizer={"betas": [0.9, 0.95]}, data={"flip": False}))
    message = refusal(tmp_path, plan)
    for change in ("train.seed 3 -> 4", "optimizer.betas [0.9, 0.999] -> [0.9, 0.95]", "data.flip True -> False"):
        assert change in message
    assert message.count("->") == 3


def test_a_file_in_place_of_the_folder_or_above_it_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert f"{file} is a file" in refusal(file)
    assert "Not a directory" in refusal(file / "run")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert f"{link} is a file" in refusal(link)


def test_places_where_nothing_can_be_made_are_refused(tmp_path):
    # Refused to root as well, which passes every permission bit.
    assert "cannot be used" in refusal(Path("/proc/run"))
    assert "File name too long" in refusal(tmp_path / ("n" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root passes permission bits")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    assert "Permission denied" in refusal(tmp_path / "run")


def test_a_folder_of_other_things_is_refused_and_an_empty_one_taken(tmp_path):
    RunFolder(tmp_path).check(made_plan())
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty and holds no plan.json" in refusal(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_traces_of_a_refused_command_do_not_count_as_content(tmp_path):
    for name in ("FAILED", ".FAILED.7.dsmoe-tmp", "lease.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "logs").mkdir()
    RunFolder(tmp_path).check(made_plan())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1}', "\xff"])
def test_an_unreadable_plan_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content.encode("latin-1"))
    assert f"{tmp_path / 'plan.json'} cannot be read" in refusal(tmp_path)


def test_a_plan_with_fields_of_another_version_is_refused_by_its_name(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(made_plan())
    tree = json.loads(folder.plan.read_text())
    tree["recipe"]["train"]["epochs"] = 3
    folder.plan.write_text(json.dumps(tree))
    message = refusal(tmp_path)
    assert "plan.json cannot be read" in message
    assert "train.epochs" in message


def test_a_later_lease_ends_the_earlier_one(tmp_path):
    folder = RunFolder(tmp_path)
    first = folder.create(made_plan())
    first.verify()
    second = folder.create(made_plan())
    assert (first.generation, second.generation) == (1, 2)
    second.verify()
    assert second.is_current()
    assert not first.is_current()
    with pytest.raises(TrainingFailure, match=r"later job \(lease 2, ours 1\)"):
        first.verify()
    assert json.loads(folder.lease.read_text())["generation"] == 2


def test_two_jobs_that_took_the_same_number_at_once_are_told_apart(tmp_path):
    folder = RunFolder(tmp_path)
    first = folder.create(made_plan())
    folder.lease.unlink()
    second = Lease.take(folder)
    assert second.generation == first.generation
    second.verify()
    with pytest.raises(TrainingFailure):
        first.verify()


def test_a_damaged_lease_is_nobodys(tmp_path):
    folder = RunFolder(tmp_path)
    lease = folder.create(made_plan())
    for damage in ("", "[]", '{"generation": "x"}'):
        folder.lease.write_text(damage)
        assert not lease.is_current()
    folder.create(made_plan()).verify()


def test_failure_is_recorded_but_never_over_done(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.record_failure("first")
    folder.record_failure("second")
    assert folder.failed.read_text() == "second\n"
    folder.record_failure("third", replace=False)
    assert folder.failed.read_text() == "second\n"
    folder.failed.unlink()
    folder.record_done({"loss": 0.5})
    assert json.loads(folder.done.read_text()) == {"loss": 0.5}
    folder.record_failure("late")
    assert not folder.failed.exists()


def test_recording_a_failure_where_nothing_can_be_written_is_silent(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "run", Path("/proc/run"), tmp_path / ("n" * 300)):
        RunFolder(path).record_failure("line")
    assert file.read_text() == "x"


def test_a_refused_command_leaves_its_line_where_it_touches_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = RunFolder(DEFAULT_ROOT / "quickstart-rejected")
    taken = Path("taken")
    RunFolder(taken).create(made_plan())
    Path("file").write_text("x")
    Path("empty").mkdir()
    Path("failed").mkdir()
    Path("failed/FAILED").write_text("x")

    def where(run):
        return rejected_run_folder(run, "quickstart").path.absolute()

    for run in ("new", "empty", "failed"):
        assert where(run) == tmp_path / run
    for run in ("taken", "file"):
        assert where(run) == tmp_path / f"{run}-rejected"
    for run in (None, "", "file/below", "/proc/run", "/", "n" * 300):
        assert where(run) == default.path.absolute()
    assert where(".") == tmp_path.with_name(f"{tmp_path.name}-rejected")
    assert rejected_run_folder(None, "a/my.recipe.yaml").path == DEFAULT_ROOT / "my.recipe-rejected"
    assert rejected_run_folder(None, "").path == DEFAULT_ROOT / "recipe-rejected"


def test_lease_and_folder_are_frozen(tmp_path):
    lease = RunFolder(tmp_path).create(made_plan())
    with pytest.raises(dataclasses.FrozenInstanceError):
        lease.generation = 9


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_job_killed_while_it_makes_the_folder_leaves_one_that_the_next_accepts(tmp_path, monkeypatch, writes):
    """Killed at the n-th file, half-written: what is left must not lock the run out of its own folder."""
    folder, plan, done = RunFolder(tmp_path / "run"), made_plan(), []

    def dies(path, text):
        if len(done) == writes:
            path.with_name(f".{path.name}.1.tmp").write_text(text[:5])
            raise KeyboardInterrupt
        done.append(path)
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr("dsmoe.base.run_folder.write_whole", dies)
        try:
            folder.create(plan)
        except KeyboardInterrupt:
            assert len(done) == writes
    folder.check(plan)
    folder.create(plan).verify()
    assert folder.plan.exists()
