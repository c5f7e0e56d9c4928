"""The trust-region study: its statistics, verdicts and tables on made-up runs, its probes on the checkpoints."""

import csv
import math

import numpy as np
import pytest
import torch

from reproduce.study import (
    HELD,
    NO_DIFFERENCE,
    NOT_HELD,
    REVERSE,
    SAMPLES,
    UNTESTABLE,
    Estimate,
    Runs,
    all_of,
    as_rates,
    completion_mask,
    difference,
    measure_student,
    verdict,
    write_report,
)
from reproduce.trust_region import (
    METRICS,
    STUDY,
    Results,
    claims,
    make_arms,
    make_trainer,
    training_prompts,
    until_eos,
    warmup_steps,
)
from reproduce.trust_region_probes import Prober, Rollouts, padded, trend, truncate
from testbed.evaluate import CHECKPOINTS, load_checkpoint
from testbed.task import build_prompt_dataset
from trl_blend.generation import TrustRegion, blended_generation


N, STEPS, SEEDS = 200, 8, (0, 1, 2)
MACHINE = {"cpu_cores": 2, "torch_threads": 1, "architecture": "x", "torch": "2", "transformers": "5", "trl": "1"}


def digits(share, top=1, shift=0):
    """N digits, the first `share` of them `top` after a rotation by `shift`, the others 0."""
    values = [top] * round(share * N) + [0] * (N - round(share * N))
    return "".join(map(str, values[shift:] + values[:shift]))


def point(sampled, greedy=0.5, shift=0):
    return {"sampled": digits(sampled, SAMPLES, shift), "greedy": digits(greedy, shift=shift)}


def make_run(arm, seed, rates, entropies=(0.03, 0.03)):
    """A run that was measured at steps 4 and 8; `entropies` during and after the warmup of 3 steps."""
    warmup = warmup_steps(STEPS)
    metrics = {key: [None] * STEPS for key in METRICS}
    noise = 1e-4 * seed
    metrics["blend/teacher_entropy"] = [entropies[0] + noise] * warmup + [entropies[1] + noise] * (STEPS - warmup)
    metrics["blend/teacher_logp"] = [-0.5] * STEPS
    return {
        "arm": arm,
        "seed": seed,
        "steps": STEPS,
        "n_test": N,
        "eval_interval": 4,
        "train_seconds": 10.0 + seed,
        "cpu_seconds": 5.0,
        "machine": MACHINE,
        "metrics": metrics,
        "curve": {str(step): point(rate + 0.005 * seed) for step, rate in zip((4, 8), rates, strict=True)},
    }


def make_probe(seed, values, prefixes):
    """A probe; `values` maps a policy to (log-prob, reward, AUROC), `prefixes` a budget to its success."""
    keys = ("teacher_logp", "reward", "auroc")
    return {
        "seed": seed,
        "n_probe": N,
        "rollouts_per_prompt": 2,
        "machine": MACHINE,
        "support": {
            policy: {key: value + 0.001 * seed for key, value in zip(keys, row, strict=True)}
            | {"teacher_entropy": 0.1}
            for policy, row in values.items()
        },
        "prefixes": {
            budget: {
                model: {str(length): digits(success, 2) for length in (5, 10)}
                for model, success in zip(("teacher", "student"), rates, strict=True)
            }
            for budget, rates in prefixes.items()
        },
        "ended": {budget: {"5": 0, "10": seed} for budget in prefixes},
    }


RISING = {"0.0": (-0.6, 0.1, 0.9), "0.01": (-0.4, 0.2, 0.8), "0.05": (-0.3, 0.3, 0.7), "teacher": (-0.02, 0.9, 0.5)}
PREFIXES = {"0.0": (0.4, 0.2), "0.01": (0.6, 0.2), "0.05": (0.7, 0.1)}


@pytest.fixture
def make_runs(tmp_path):
    def make(arms, entropies=None, values=RISING, prefixes=PREFIXES):
        entropies = entropies or {}
        runs = Runs(tmp_path / "trust_region_runs.json")
        runs.results = {"start": {"n_test": N, "student": point(0.1, 0.4), "teacher": point(0.9, 1.0)}}
        for seed in SEEDS:
            for arm, rates in arms.items():
                run = make_run(arm, seed, rates, entropies.get(arm, (0.03, 0.03)))
                runs.results[f"{arm}-seed{seed}"] = run
            runs.results[f"probe-seed{seed}"] = make_probe(seed, values, prefixes)
        return runs

    return make


def verdicts(runs):
    return {claim: word for claim, word, _ in claims(Results(runs))}


def of(found, part):
    (word,) = [word for claim, word in found.items() if part in claim]
    return word


# Statistics


def test_rates_count_each_digit_once():
    assert as_rates("0110", "greedy").tolist() == [0, 1, 1, 0]
    assert as_rates("0120", "sampled").tolist() == [0, 0.5, 1, 0]


def test_a_difference_is_paired_by_prompt():
    gap = difference(np.array([[1.0, 0.0, 1.0, 1.0]]), np.array([[0.0, 0.0, 1.0, 0.0]]))
    assert gap.value == 0.5
    assert gap.error == pytest.approx(math.sqrt((4 * 0.25) / 3 / 4))


def test_the_variance_of_seeds_is_added_to_that_of_prompts():
    first = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    gap = difference(first, np.zeros((1, 4)))
    assert gap.value == 0.5
    assert gap.error == pytest.approx(
        math.sqrt(np.var([0.5, 0.0, 1.0, 0.5], ddof=1) / 4 + np.var([0.75, 0.25], ddof=1) / 2)
    )


def test_the_best_checkpoint_is_the_step_of_the_highest_mean_over_seeds(make_runs):
    found = Results(make_runs({"vanilla": (0.5, 0.3), "trust_0.01": (0.3, 0.6), "sft": (0.05, 0.05)}))
    assert [found.best_step(name, "sampled") for name in ("vanilla", "trust_0.01", "sft")] == [4, 8, 0]
    best, last = (found.rate("vanilla", "sampled", checkpoint) for checkpoint in ("best", "last"))
    assert (best.value, last.value) == pytest.approx((0.505, 0.305))
    assert best.error == pytest.approx(0.005 / math.sqrt(3))
    steps, rates = found.curve("vanilla", "sampled")
    assert steps == [0, 4, 8] and rates[:, 0].tolist() == [0.1] * 3


def test_metric_gaps_are_paired_by_seed_and_by_steps(make_runs):
    runs = make_runs({"vanilla": (0.5, 0.5), "trust_0.01": (0.5, 0.5)}, {"trust_0.01": (0.02, 0.031)})
    del runs.results["vanilla-seed0"]
    found = Results(runs)
    during = found.entropy_gap("trust_0.01", slice(0, 3))
    assert during.value == pytest.approx(-0.01) and during.error == pytest.approx(0.0, abs=1e-12)
    assert found.entropy_gap("trust_0.01", slice(3, None)).value == pytest.approx(0.001)


# Verdicts


def test_a_difference_counts_above_two_standard_errors():
    gaps = [Estimate(0.21, 0.1), Estimate(0.19, 0.1), Estimate(-0.19, 0.1), Estimate(-0.21, 0.1)]
    assert [verdict(gap) for gap in gaps] == [HELD, NO_DIFFERENCE, NO_DIFFERENCE, REVERSE]
    assert verdict(Estimate(0.5, math.nan)) == NO_DIFFERENCE  # a single seed shows nothing
    unknown = Estimate(math.nan, math.nan)
    assert str(unknown) == unknown.signed() == "—"


def test_a_claim_about_several_comparisons_needs_all_of_them():
    assert all_of([HELD, HELD]) == HELD
    assert all_of([REVERSE, REVERSE]) == REVERSE
    assert all_of([HELD, NO_DIFFERENCE, REVERSE]).startswith(NOT_HELD)
    assert "1 of 3 comparisons did, 1 the reverse" in all_of([HELD, NO_DIFFERENCE, REVERSE])


def test_a_trend_may_pause_but_not_turn():
    up, flat, down = Estimate(0.3, 0.1), Estimate(0.0, 0.1), Estimate(-0.3, 0.1)
    assert trend([up, flat], up) == HELD
    assert trend([up, down], up).startswith(NOT_HELD)
    assert trend([flat, flat], flat) == NO_DIFFERENCE
    assert trend([down, flat], down) == REVERSE


ARMS = ("vanilla", "fixed_0.01", "sft", "skd")


@pytest.mark.parametrize(("others", "expected"), [(0.2, HELD), (0.5, NO_DIFFERENCE), (0.8, REVERSE)])
def test_claims_about_accuracy_follow_the_runs(make_runs, others, expected):
    found = verdicts(make_runs({"trust_0.01": (0.5, 0.5)} | {name: (others, others) for name in ARMS}))
    claims_of = ("best score among", "end above vanilla", "above fixed ε", "persistent fixed ε", "SFT warmup", "SKD")
    for part in (*claims_of, "stays above"):
        assert of(found, part) == expected, part


def test_the_best_budget_speaks_for_the_trust_region(make_runs):
    found = verdicts(make_runs({"trust_0.001": (0.1, 0.1), "trust_0.05": (0.6, 0.6), "vanilla": (0.3, 0.3)}))
    assert of(found, "end above vanilla") == HELD
    fixed = make_runs({"trust_0.01": (0.1, 0.1), "trust_0.05": (0.6, 0.6), "fixed_0.01": (0.3, 0.3)})
    assert of(verdicts(fixed), "above fixed ε") == REVERSE  # annealed or not, at the same budget


def test_one_rival_that_is_not_beaten_is_enough(make_runs):
    arms = {"trust_0.01": (0.5, 0.5), "vanilla": (0.2, 0.2), "veto": (0.5, 0.5)}
    assert of(verdicts(make_runs(arms)), "best score among").startswith(NOT_HELD)


def test_best_and_last_checkpoints_are_not_confused(make_runs):
    found = verdicts(make_runs({"trust_0.01": (0.5, 0.5), "fixed_0.01": (0.8, 0.2)}))
    assert of(found, "above fixed ε") == REVERSE
    assert of(found, "persistent fixed ε") == HELD


@pytest.mark.parametrize(
    ("during", "after", "expected"),
    [(0.02, 0.03, (HELD, HELD)), (0.04, 0.02, (REVERSE, NOT_HELD)), (0.03, 0.0305, (NO_DIFFERENCE, HELD))],
)
def test_claims_about_entropy_follow_the_metrics(make_runs, during, after, expected):
    arms = {"vanilla": (0.3, 0.3), "trust_0.01": (0.3, 0.3)}
    found = verdicts(make_runs(arms, {"trust_0.01": (during, after)}))
    assert (of(found, "entropy on the visited"), of(found, "largely aligned")) == expected


def test_early_risers_are_counted_at_the_first_point(make_runs):
    arms = {"vanilla": (0.2, 0.9), "trust_0.01": (0.5, 0.5), "skd": (0.5, 0.5), "veto": (0.2, 0.2)}
    assert of(verdicts(make_runs(arms)), "rise faster") == HELD
    assert of(verdicts(make_runs(arms | {"skd": (0.2, 0.9)})), "rise faster") == NOT_HELD


def test_claims_about_support_follow_the_probe(make_runs):
    parts = ("log-probability of the rollouts rises", "reward of the rollouts rises", "AUROC")
    assert [of(verdicts(make_runs({})), part) for part in parts] == [HELD] * 3
    turned = {**RISING, "0.0": (-0.1, 0.5, 0.4)}
    assert [of(verdicts(make_runs({}, values=turned)), part) for part in parts] == [REVERSE] * 3


def test_claims_about_prefixes_follow_the_probe(make_runs):
    found = verdicts(make_runs({}))
    assert of(found, "when the teacher continues") == HELD
    word = of(found, "when the student continues")
    assert word.startswith(NOT_HELD) or word in (NO_DIFFERENCE, REVERSE)
    assert "0 of 4 comparisons did, 2 the reverse" in word


def test_claims_without_runs_are_left_out(make_runs):
    assert set(verdicts(make_runs({"vanilla": (0.3, 0.3)})).values()) >= {UNTESTABLE}
    assert not any("SFT" in claim for claim in verdicts(make_runs({"vanilla": (0.3, 0.3), "trust_0.01": (0.3, 0.3)})))


# Files


def test_the_report_is_that_of_the_files(make_runs, tmp_path):
    made = make_runs({"vanilla": (0.2, 0.3), "trust_0.01": (0.5, 0.4)})
    made.add("start", made.start)
    runs = Runs(made.path)
    assert runs.results == made.results

    text = write_report(STUDY, runs, tmp_path)
    assert text == (tmp_path / "trust_region.md").read_text(encoding="utf-8")
    assert "| trust region 0.01, annealed | 0.505 ± 0.003 | 4 | 0.405 ± 0.003 |" in text
    assert "| teacher | 10 | 0.400 | +0.200 ± " in text and "at t = 10, 3 to 3 of 1200" in text
    assert text.count("**Held.**") == sum(word == HELD for word in verdicts(runs).values())
    with open(tmp_path / "trust_region.csv", newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert float(rows["vanilla"]["sampled_last"]) == pytest.approx(0.305, abs=1e-4)
    assert rows["trust_0.01"]["sampled_best_step"] == "4"
    for name in ("curves", "entropy", "support", "prefixes"):
        assert (tmp_path / f"trust_region_{name}.png").stat().st_size > 10_000


# Arms


def test_every_arm_sees_the_same_prompts_in_the_same_order(tmp_path):
    prompts = training_prompts(seed=1, steps=3)
    assert len(prompts) == 48 and len({str(prompt) for prompt in prompts["prompt"]}) == 48
    arms = make_arms(3)
    assert arms["sft"].sft_steps == warmup_steps(3) and sum(arm.sft_steps > 0 for arm in arms.values()) == 1
    expected = [row for row in range(48) for _ in range(4)]
    for name in ("trust_0.05", "veto"):
        trainer = make_trainer(arms[name], CHECKPOINTS / "student", prompts, 1, 3, str(tmp_path))
        assert list(trainer._get_train_sampler()) == expected


def test_measuring_leaves_the_random_state_and_repeats_itself():
    model, tokenizer = load_checkpoint("student")
    test = build_prompt_dataset("test", 24)
    state = torch.get_rng_state()
    first = measure_student(model, tokenizer, test, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert measure_student(model, tokenizer, test, 7) == first
    assert set(first["greedy"]) == {"0", "1"} and set(first["sampled"]) <= set("012") and len(first["sampled"]) == 24


def test_until_eos_keeps_the_first_end():
    assert until_eos([5, 6, 2, 7, 2], 2) == [5, 6, 2]
    assert until_eos([5, 6], 2) == [5, 6]


# Probes


def test_completion_mask_includes_the_end_of_sequence():
    mask = completion_mask(torch.tensor([[5, 2, 2, 0], [5, 6, 7, 8], [2, 5, 2, 0]]), 2)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_truncation_leaves_out_what_has_ended():
    completions = padded(torch.tensor([[5, 6, 7, 2], [5, 2, 0, 0], [5, 6, 2, 0]]), 0)
    prompts, prompt_mask = torch.tensor([[0, 9], [9, 9], [9, 9]]), torch.tensor([[0, 1], [1, 1], [1, 1]])
    rollouts = Rollouts(prompts, prompt_mask, completions, completion_mask(completions, 2), {})
    ids, mask, rows = truncate(rollouts, 2)
    assert rows.tolist() == [0, 2]  # the second one's end of sequence is its second token
    assert ids.tolist() == [[0, 9, 5, 6], [9, 9, 5, 6]] and mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert truncate(rollouts, 1)[2].tolist() == [0, 1, 2] and truncate(rollouts, 3)[2].tolist() == [0]
    with pytest.raises(ValueError, match="`length` is 48"):
        truncate(rollouts, 48)


@torch.no_grad()
def test_the_probe_scores_what_was_sampled():
    prober = Prober(seed=3, n=6)
    rollouts = prober.rollouts(0.01)
    torch.manual_seed(3)
    with blended_generation(prober.student, prober.teacher, TrustRegion(0.01), record=True) as session:
        drawn = prober.student.generate(
            input_ids=prober.prompts,
            attention_mask=prober.prompt_mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=48,
        )[:, prober.prompts.size(1) :]
    width = drawn.size(1)
    assert torch.equal(drawn, rollouts.completions[:, :width])
    recorded, mask = session.records[0], rollouts.mask[:, :width].bool()
    logps, entropy = prober.logps(prober.teacher, rollouts)
    torch.testing.assert_close(logps[:, :width][mask], recorded.teacher_logps[0][mask], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(entropy[:, :width][mask], recorded.teacher_entropies[0][mask], rtol=1e-3, atol=1e-4)
    assert rollouts.statistics["kl_behavior_student"] == pytest.approx(
        recorded.statistics["kl_behavior_student"][mask].mean().item(), rel=1e-4
    )
    support = prober.support(rollouts)
    assert support["teacher_logp"] == pytest.approx(logps[rollouts.mask.bool()].mean().item(), rel=1e-5)


@torch.no_grad()
def test_a_whole_prefix_keeps_its_own_reward():
    prober = Prober(seed=0, n=8)
    rollouts = prober.rollouts("teacher")
    own = prober.reward(rollouts.completions)
    expected = "".join(str(int(first + second)) for first, second in zip(own[:8], own[8:], strict=True))
    assert prober.continued(rollouts, 47, prober.student) == expected  # every one has ended by then
    first = prober.continued(rollouts, 5, prober.student)
    assert len(first) == 8 and sum(map(int, first)) < sum(map(int, expected))
