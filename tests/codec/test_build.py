"""Codecs by name."""

from pathlib import Path

import pytest

from dsmoe.base.errors import CheckpointError, ConfigError
from dsmoe.codec import NAMES, build


def test_names_are_the_published_ones() -> None:
    assert NAMES == ("kl-small", "taesd", "sd", "none")


def test_an_unknown_name_lists_all_and_suggests() -> None:
    with pytest.raises(ConfigError) as caught:
        build("kl_small")
    message = str(caught.value)
    assert "'kl_small'" in message
    assert "Did you mean 'kl-small'" in message
    assert all(name in message for name in NAMES)
    assert "\n" not in message


@pytest.mark.parametrize("name", ["kl-small", "taesd", "sd"])
def test_a_path_that_does_not_exist_is_named(name: str, tmp_path: Path) -> None:
    missing = tmp_path / "absent" / "x"
    with pytest.raises(ConfigError) as caught:
        build(name, missing)
    assert str(missing) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_taesd_without_a_path_says_which_files() -> None:
    with pytest.raises(ConfigError, match=r"codec\.path.*taesd_encoder\.safetensors.*taesd_decoder"):
        build("taesd")


def test_taesd_in_an_empty_folder_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"taesd_encoder\.safetensors do not exist"):
        build("taesd", tmp_path)
