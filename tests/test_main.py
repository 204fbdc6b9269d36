"""`python -m dsmoe` as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe import __main__ as command
from dsmoe import ops
from dsmoe.base.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_imports_neither_torch_nor_deepspeed():
    done = _run("-X", "importtime", "-m", "dsmoe", "--help")
    assert done.returncode == 0
    assert "doctor" in done.stdout
    assert "recipes" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "dsmoe.base.errors" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "deepspeed", "numpy")}


def test_recipes_lists_them_without_torch():
    done = _run("-X", "importtime", "-m", "dsmoe", "recipes")
    assert done.returncode == 0
    assert "quickstart" in done.stdout
    assert "| torch\n" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["recipes", "--no-such-option"]])
def test_bad_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2


def test_a_users_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def fail(_):
        raise ConfigError("recipe 'x' is\nunknown.")

    monkeypatch.setattr(command, "_recipes", fail)
    assert command.main(["recipes"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "error: recipe 'x' is unknown.\n"
    assert shown.out == ""


def test_doctor_reports_every_op_and_the_device(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main(["doctor", "--no-measure"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert "op route" in lines
    assert lines["tuning"].strip().startswith("shipped with the package: ")
    assert {"dsmoe", "python", "torch", "device", "deepspeed", "compiler", "nvcc", "extensions"} <= {
        k.strip() for k in lines
    }


def test_doctor_shows_the_ops_as_a_ds_config_prefers_them(tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "engine.json", []
    file.write_text(json.dumps({"dsmoe": {"ops": {"route": "reference"}}}))
    monkeypatch.setattr(ops, "prefer", lambda preferences, device: asked.append((preferences, device)))
    assert command.main(["doctor", "--no-measure", "--deepspeed_config", str(file)]) == 0
    assert asked == [({"route": "reference"}, "cpu")]
    monkeypatch.undo()
    file.write_text(json.dumps({"dsmoe": {"ops": {"rout": "reference"}}}))
    assert command.main(["doctor", "--no-measure", "--deepspeed_config", str(file)]) == 2
    assert "unknown op 'rout'. Did you mean 'route'" in capsys.readouterr().err
