"""Whether a sample sheet is drawn where the whole model may not fit; drawing itself: test_pretrain_runs."""

import logging

import pytest
from made_plan import made_plan

from dsmoe.runtime.device import Device
from dsmoe.training import sampling
from dsmoe.training.sampling import SampleSheets

# made_plan's model has 1000 parameters: 4000 bytes, twice on the host, in at most 0.8 of what is free.
NEEDED = 10_000


class Asked(Exception):
    """The engine was asked for its weights: the sheet is being drawn."""


class Engine:
    def shapes(self):
        raise Asked

    def fragments(self):
        return []


@pytest.fixture
def sheets(tmp_path):
    return SampleSheets(made_plan(), None, tmp_path, Device("cpu"))


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_sheet_waits_for_the_weight_file_where_the_whole_model_does_not_fit(sheets, monkeypatch, caplog, ranks):
    monkeypatch.setattr(sampling, "host_free_bytes", lambda: NEEDED * ranks - 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with caplog.at_level(logging.WARNING, logger="dsmoe.samples"):
        assert sheets.draw(Engine(), None, 64) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("no sample sheet at 64 images: ")
    assert "launchers/sample.py" in line


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_sheet_is_drawn_where_it_does(sheets, monkeypatch, ranks):
    monkeypatch.setattr(sampling, "host_free_bytes", lambda: NEEDED * ranks)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    ema = type("Ema", (), {"averages": {"ema": []}})
    with pytest.raises(Asked):
        sheets.draw(Engine(), ema, 64)
