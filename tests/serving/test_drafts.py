"""How many tokens are drafted: the cheapest number by its definition, and what it follows."""

import math
from types import SimpleNamespace

import pytest

from trl_blend import LogitMixing, ProbabilityMixing, SpeculativeKD, TrustRegion
from trl_blend.generation.rules import LogitArithmetic
from trl_blend.ops.trust_region import acceptance_bound
from trl_blend.serving.drafts import NUMBERS, DraftChoice, cheapest_number, most_refused, schedule_drafts
from trl_blend.serving.statistics import Statistic


def expected_cost(drafts, acceptance, share):
    """Passes over tokens of one round, by the probability of every way that it can go."""
    tokens = sum((place + 1) * acceptance**place * (1 - acceptance) for place in range(drafts))
    tokens += (drafts + 1) * acceptance**drafts
    return (1 + drafts * share) / tokens


@pytest.mark.parametrize("share", [0.02, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.93, 1.0])
def test_the_cheapest_number(acceptance, share):
    costs = {number: expected_cost(number, acceptance, share) for number in NUMBERS}
    assert costs[cheapest_number(acceptance, share)] == pytest.approx(min(costs.values()), rel=1e-12)


def test_where_it_lies():
    assert cheapest_number(0.0, 0.1) == cheapest_number(0.4, 0.5) == 0  # no draft pays for itself
    assert cheapest_number(1.0, 0.1) == 8
    found = [cheapest_number(acceptance, 0.2) for acceptance in (0.1, 0.5, 0.7, 0.9, 0.99)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 8
    assert cheapest_number(0.9, 0.05) > cheapest_number(0.9, 0.5)


def test_how_many_drafts_may_be_refused():
    assert most_refused(TrustRegion(0.01)) == pytest.approx(1 - acceptance_bound(0.01))
    assert most_refused(TrustRegion(math.inf)) == 1.0
    assert most_refused(ProbabilityMixing((0.2, 0.1))) == pytest.approx(0.3)
    assert most_refused(LogitMixing(0.3)) == 0.3 and most_refused(LogitArithmetic(1.0, (0.7, -0.7))) == 1.0
    assert most_refused(SpeculativeKD(5, 0.6)) == 1.0


def test_the_choice_follows_the_budget_and_what_was_counted():
    choose = DraftChoice("auto")
    choose.student_share = 0.2
    assert choose.numbers == NUMBERS and choose(None) == 0  # without a teacher
    # Before anything is counted: from the bound, and at least one draft, which is counted
    assert choose(TrustRegion(0.01)) == cheapest_number(acceptance_bound(0.01), 0.2)
    assert choose(SpeculativeKD(5, 0.6)) == 1
    choose.observe(None, Statistic(0.0, 50, 0.0))
    choose.observe(TrustRegion(0.02), Statistic(0.0, 0, 0.0))
    choose.observe(TrustRegion(0.02), None)
    assert choose(TrustRegion(0.01)) == cheapest_number(acceptance_bound(0.01), 0.2)
    # A third as many are refused as may be: at another budget too
    refused = (1 - acceptance_bound(0.08)) / 3
    choose.observe(TrustRegion(0.08), Statistic(1000 * (1 - refused), 1000, 1.0))
    assert choose(TrustRegion(0.08)) == cheapest_number(1 - refused, 0.2)
    assert choose(TrustRegion(0.02)) == cheapest_number(1 - refused / 2, 0.2)  # half the square root
    # Teachers so far away that no draft pays, until their weight falls
    choose.observe(LogitMixing(0.5), Statistic(10.0, 100, 1.0))
    assert choose(LogitMixing(0.5)) == 0 and choose(LogitMixing(0.1)) == cheapest_number(0.82, 0.2) > 0


def test_a_number_is_kept():
    choose = DraftChoice(5)
    assert choose.numbers == (0, 5)
    choose.observe(TrustRegion(0.01), Statistic(0.0, 50, 0.0))
    assert choose(None) == 0 and choose(TrustRegion(0.01)) == choose(LogitMixing(0.9)) == 5


def test_the_table_of_the_scheduler():
    table = [0, 1, 2, 4, 4]
    core = SimpleNamespace(scheduler=SimpleNamespace(dynamic_sd_lookup=table))
    schedule_drafts(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))), 2)
    assert table == [2] * 5
