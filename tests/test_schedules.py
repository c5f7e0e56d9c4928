import math

import pytest

from tests import reference
from trl_blend import schedules
from trl_blend.errors import ConfigError


BY_HAND = {"linear": reference.linear_weight, "cosine": reference.cosine_weight}


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("initial", "steps"), [(0.5, 1000), (0.3, 7), (1.0, 1), (0.0, 4)])
def test_decay_follows_its_formula(name, initial, steps):
    schedule = schedules.make_schedule(name, initial, steps)
    for step in range(0, 2 * steps + 1, max(1, steps // 20)):
        assert schedule(step) == pytest.approx(BY_HAND[name](step, initial, steps), abs=1e-15)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_starts_at_the_initial_value_falls_and_ends_at_exactly_zero(name):
    schedule = schedules.make_schedule(name, 0.7, 13)
    values = [schedule(step) for step in range(14)]
    assert values[0] == 0.7
    assert all(later < earlier for earlier, later in zip(values, values[1:]))
    # The trainer takes "no teacher" from `== 0`: cosine without care ends at 1e-17
    assert [schedule(step) for step in (13, 14, 10**9)] == [0.0, 0.0, 0.0]


def test_decays_differ_where_they_should():
    assert schedules.linear(0.5, 1000)(250) == 0.375
    assert schedules.cosine(0.5, 1000)(250) == pytest.approx(0.25 * (1 + math.sqrt(0.5)))
    assert schedules.cosine(0.5, 1000)(500) == pytest.approx(0.25)


def test_constant_is_constant():
    schedule = schedules.make_schedule("constant", 0.3)
    assert {schedule(step) for step in (0, 1, 10**9)} == {0.3}


@pytest.mark.parametrize("name", schedules.DECAYING_SCHEDULES)
@pytest.mark.parametrize("steps", [None, 0, -1])
def test_a_decay_without_steps_is_an_error(name, steps):
    with pytest.raises(ConfigError, match=f"positive number of decay steps, got {steps}"):
        schedules.make_schedule(name, 0.5, steps)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'exponential'.*'constant', 'linear', 'cosine'"):
        schedules.make_schedule("exponential", 0.5, 10)
