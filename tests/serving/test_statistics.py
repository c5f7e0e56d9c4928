"""Sums over the rows of an engine, against a float64 computation."""

import math

import pytest
import torch

from trl_blend import LogitMixing, TrustRegion
from trl_blend.serving.statistics import OF_DRAFTS, RunningSums, drawn_tokens, row_statistics


def logits(seed, rows=6, size=9):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("partners", [1, 2])
def test_row_statistics(partners):
    student, others = logits(0), [logits(1 + index) for index in range(partners)]
    step = LogitMixing((0.3, 0.2)[:partners])(student, others)
    values = row_statistics(step, others)
    behavior = step.logits.double().log_softmax(-1)
    assert set(values) == {"kl_behavior_student"} | {
        f"{name}_{index}"
        for name in ("kl_behavior_teacher", "teacher_logp", "teacher_entropy")
        for index in range(partners)
    }
    for index, other in enumerate(others):
        teacher = other.double().log_softmax(-1)
        divergence = (behavior.exp() * (behavior - teacher)).sum(-1)
        torch.testing.assert_close(values[f"kl_behavior_teacher_{index}"].double(), divergence, atol=1e-5, rtol=1e-5)
        mean_logp = (behavior.exp() * teacher).sum(-1)
        torch.testing.assert_close(values[f"teacher_logp_{index}"].double(), mean_logp, atol=1e-5, rtol=1e-5)
        entropy = -(teacher.exp() * teacher).sum(-1)
        torch.testing.assert_close(values[f"teacher_entropy_{index}"].double(), entropy, atol=1e-5, rtol=1e-5)


def test_sums_leave_out_masked_rows_and_infinite_values():
    sums = RunningSums()
    mask = torch.tensor([True, True, False])
    sums.add({"a": torch.tensor([1.0, math.inf, 7.0]), "b": torch.tensor([-1.0, -2.0, 5.0])}, mask)
    sums.add({"a": torch.tensor([2.0]), "b": torch.tensor([-math.inf])}, torch.tensor([True]))
    assert sums.pop() == {"a": (3.0, 2, 2.0), "b": (-3.0, 2, -1.0)}
    assert sums.pop() == {}
    sums.add({"a": torch.tensor([4.0])}, torch.tensor([False]))
    assert sums.pop() == {"a": (0.0, 0, 0.0)}


def test_a_token_that_the_teacher_excludes_is_counted_nowhere():
    student, teacher = logits(0), logits(1)
    teacher[0, 3] = -math.inf
    values = row_statistics(TrustRegion(0.0)(student, [teacher]), [teacher])
    assert values["kl_behavior_teacher_0"][0] == math.inf and values["teacher_logp_0"][0] == -math.inf
    sums = RunningSums()
    sums.add(values, torch.ones(6, dtype=torch.bool))
    assert sums.pop()["teacher_logp_0"].count == 5


# Drafts


def loop(ended, ends, drawn):
    """Row by row: whether a token was drawn from it, and what that says of the drafts."""
    mask, values = [], {name: [] for name in OF_DRAFTS}
    for start, end, number in zip([0, *ends], ends, drawn):
        over, kept = False, []
        for row in range(start, end):
            over = over or ended[row]
            kept.append(row - start < number and not over)
        accepted = [kept[place] and place < number - 1 for place in range(end - start)]
        mask += kept
        last = end - start - 1
        values["draft_acceptance"] += [float(yes) if place < last else math.nan for place, yes in enumerate(accepted)]
        values["accepted_drafts"] += [float(sum(accepted)) if last else math.nan] + [math.nan] * last
        values["passes_per_token"] += [1.0] + [0.0] * last
        values["draft_tokens"] += [float(last) if last else math.nan] + [math.nan] * last
    return mask, values


@pytest.mark.parametrize("seed", range(20))
def test_tokens_drawn_with_drafts(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (7,), generator=generator)
    drawn = 1 + (torch.rand(7, generator=generator) * sizes).long()
    ends, ended = sizes.cumsum(0), torch.rand(int(sizes.sum()), generator=generator) < 0.2
    mask, values = drawn_tokens(ended, ends.int(), drawn)
    expected_mask, expected = loop(ended.tolist(), ends.tolist(), drawn.tolist())
    assert mask.tolist() == expected_mask and set(values) == set(OF_DRAFTS)
    for name in OF_DRAFTS:
        torch.testing.assert_close(values[name], torch.tensor(expected[name]), equal_nan=True, atol=0, rtol=0)


def test_rows_of_refused_drafts_are_left_out():
    """Two requests with two drafts each: one is refused at once, the other ends with its first draft."""
    sums = RunningSums(drafts=True)
    values = {"a": torch.tensor([1.0, 10.0, 100.0, 2.0, 20.0, 200.0])}
    ended = torch.tensor([False, False, False, False, True, False])
    sums.add_step(values, ended)
    sums.settle(torch.tensor([3, 6]), torch.tensor([1, 3]))
    assert sums.pop() == {
        "a": (3.0, 2, 2.0),
        "draft_acceptance": (1.0, 2, 1.0),
        "accepted_drafts": (1.0, 2, 1.0),
        "passes_per_token": (2.0, 2, 1.0),
        "draft_tokens": (4.0, 2, 2.0),
    }


def test_a_step_without_drafts_counts_every_row():
    sums = RunningSums(drafts=True)
    for _ in range(2):
        sums.add_step({"a": torch.tensor([1.0, 2.0])}, torch.tensor([False, True]))
    found = sums.pop()
    assert found["a"] == (2.0, 2, 1.0) and found["passes_per_token"] == (2.0, 2, 1.0)
    assert found["draft_acceptance"] == found["accepted_drafts"] == found["draft_tokens"] == (0.0, 0, 0.0)
    plain = RunningSums()
    plain.add_step({"a": torch.tensor([1.0, 2.0])}, torch.tensor([False, True]))
    assert plain.pop() == {"a": (1.0, 1, 1.0)}
