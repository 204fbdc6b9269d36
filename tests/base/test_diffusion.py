"""Which sampler goes with which schedule and option. The recipe's own refusals: test_recipe."""

import itertools

import pytest

from dsmoe.base.diffusion import BETA_SCHEDULES, FLOW, SAMPLERS, DiffusionSpec, check_sampler, settle_sampler
from dsmoe.base.errors import ConfigError

SPECS = {name: DiffusionSpec(schedule=name) for name in BETA_SCHEDULES}
SPECS[FLOW] = DiffusionSpec(schedule=FLOW, prediction="velocity")
GOOD = {(sampler, schedule) for sampler in ("ddim", "ancestral") for schedule in BETA_SCHEDULES} | {("euler", FLOW)}


@pytest.mark.parametrize(("sampler", "schedule"), list(itertools.product(SAMPLERS, SPECS)))
def test_a_sampler_walks_its_own_kind_of_schedule(sampler, schedule):
    if (sampler, schedule) in GOOD:
        check_sampler(sampler, "trailing", 0.0, SPECS[schedule])
        return
    with pytest.raises(ConfigError, match=rf"sampler {sampler} walks .* {schedule}; take "):
        check_sampler(sampler, "trailing", 0.0, SPECS[schedule])


def test_auto_is_the_deterministic_sampler_of_the_schedule():
    assert [settle_sampler("auto", spec) for spec in SPECS.values()] == ["ddim"] * 3 + ["euler"]
    assert settle_sampler("ancestral", SPECS["linear"]) == "ancestral"
    for spec in SPECS.values():
        check_sampler(settle_sampler("auto", spec), "trailing", 0.0, spec)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("spacing", "eta"), [("leading", 0.0), ("linspace", 0.0), ("trailing", 0.5), ("leading", 1.0)])
def test_spacing_and_eta_are_of_ddim_alone(sampler, spacing, eta):
    spec = SPECS[FLOW if sampler == "euler" else "cosine"]
    if sampler == "ddim":
        check_sampler(sampler, spacing, eta, spec)
        return
    with pytest.raises(ConfigError, match="takes none; leave"):
        check_sampler(sampler, spacing, eta, spec)


def test_continuous_time_allows_more_steps_than_any_schedule_has():
    assert SPECS["linear"].most_sample_steps == 1000
    assert DiffusionSpec(timesteps=250).most_sample_steps == 250
    assert SPECS[FLOW].most_sample_steps == 10000
