"""Who speaks where: console of rank 0, console of the others, rank files."""

import io
import logging
import warnings

import pytest

from dsmoe.base.errors import ConfigError
from dsmoe.runtime.logging import Progress, attach_run_folder, configure, get_logger


@pytest.fixture(autouse=True)
def _restore_logging():
    root, deepspeed = logging.getLogger(), logging.getLogger("DeepSpeed")
    before = root.handlers[:], root.level, deepspeed.handlers[:], deepspeed.filters[:], deepspeed.level
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level, deepspeed.handlers[:], deepspeed.filters[:], deepspeed.level = before
    logging.captureWarnings(False)
    root.setLevel(root.level)  # clears the level caches


def _speak(rank, stream, folder=None):
    configure(rank, stream)
    file = attach_run_folder(folder, rank) if folder else None
    get_logger().debug("ours debug")
    get_logger().info("ours info %d", 1)
    get_logger("codec").warning("ours warning")
    logging.getLogger("library").info("library info")
    logging.getLogger("library").warning("library warning")
    logging.getLogger("library").error("library error")
    return file


def test_rank_0_prints_ours_and_other_peoples_warnings():
    stream = io.StringIO()
    _speak(0, stream)
    lines = [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == [
        "ours info 1",
        "WARNING ours warning",
        "WARNING library: library warning",
        "ERROR library: library error",
    ]


def test_other_ranks_print_errors_only_and_say_who_they_are():
    stream = io.StringIO()
    _speak(2, stream)
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("[rank 2] ERROR library: library error")


def test_every_rank_writes_everything_into_its_own_file(tmp_path):
    files = [_speak(rank, io.StringIO(), tmp_path) for rank in (0, 2)]
    assert [str(f.relative_to(tmp_path)) for f in files] == ["logs/rank00000.log", "logs/rank00002.log"]
    for file in files:
        messages = [line.split(": ", 1)[1] for line in file.read_text().splitlines()]
        assert messages == ["ours info 1", "ours warning", "library info", "library warning", "library error"]


def test_a_second_run_appends_to_the_file(tmp_path):
    _speak(0, io.StringIO(), tmp_path)
    file = _speak(0, io.StringIO(), tmp_path)
    assert len(file.read_text().splitlines()) == 10


@pytest.mark.parametrize("imported_first", [True, False])
def test_deepspeeds_own_handler_is_bypassed(tmp_path, imported_first):
    """DeepSpeed gives its logger a handler on stdout and cuts it off from the root."""
    own = io.StringIO()

    def import_deepspeed():
        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(logging.StreamHandler(own))

    if imported_first:
        import_deepspeed()
    console = io.StringIO()
    configure(0, console)
    file = attach_run_folder(tmp_path, 0)
    if not imported_first:
        import_deepspeed()
    logging.getLogger("DeepSpeed").info("chatter")
    logging.getLogger("DeepSpeed").warning("trouble")
    assert own.getvalue() == ""
    assert console.getvalue().count("trouble") == 1
    assert "chatter" not in console.getvalue()
    assert file.read_text().count("trouble") == 1
    # Imported later it sets its own level again, and only its warnings are logged.
    assert ("chatter" in file.read_text()) is imported_first


def test_python_warnings_go_to_the_log_and_deprecations_not_to_the_console(tmp_path):
    console = io.StringIO()
    configure(0, console)
    file = attach_run_folder(tmp_path, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("look here", UserWarning, stacklevel=1)
        warnings.warn("old name", FutureWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "look here" in console.getvalue()
    assert "old name" not in console.getvalue()
    assert "look here" in file.read_text()
    assert "old name" in file.read_text()


def test_configure_twice_prints_once():
    first, second = io.StringIO(), io.StringIO()
    configure(0, first)
    configure(0, second)
    get_logger().info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_a_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        attach_run_folder(tmp_path, 0)


def _progress(total):
    now = [0.0]
    stream = io.StringIO()
    configure(0, stream)
    return Progress("latents", total, "images", interval=10, clock=lambda: now[0]), now, stream


def test_progress_prints_one_line_an_interval():
    progress, now, stream = _progress(400)
    for second in range(1, 41):
        now[0] = float(second)
        progress.update(5)
    lines = stream.getvalue().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "latents: 50/400 images (12%), 5 images/s, 0:01:10 left",
        "latents: 100/400 images (25%), 5 images/s, 0:01:00 left",
        "latents: 150/400 images (38%), 5 images/s, 0:00:50 left",
        "latents: 200/400 images (50%), 5 images/s, 0:00:40 left",
    ]
    now[0] = 3725.0
    progress.finish()
    assert stream.getvalue().splitlines()[-1].endswith("latents: 200 images in 1:02:05 (0.0537 images/s)")
    assert "\r" not in stream.getvalue()


def test_progress_of_unknown_length_and_of_nothing():
    progress, now, stream = _progress(0)
    progress.finish()
    now[0] = 20.0
    progress.update(0)
    progress.update(10)
    assert "rate unknown" in stream.getvalue()
    assert "left" not in stream.getvalue()
