"""The offline study: its verdicts, costs and tables on made-up runs."""

import csv
import re

import pytest

from reproduce.offline_opd import ARMS, STUDY, Results, claims, ours, plan
from reproduce.offline_opd_data import Data
from reproduce.study import (
    HELD,
    NOT_HELD,
    REVERSE,
    SAMPLES,
    UNTESTABLE,
    Estimate,
    Runs,
    not_worse,
    worse,
    write_report,
)
from testbed.evaluate import CHECKPOINTS


N, STEPS, SEEDS = 200, 20, (0, 1, 2)
MACHINE = {"cpu_cores": 2, "torch_threads": 1, "architecture": "x", "torch": "2", "transformers": "5", "trl": "1"}
RATES = {
    "live_full": 0.7, "live": 0.7, "offline": 0.7, "offline_4": 0.6, "offline_paper": 0.7, "offline_ratio": 0.7,
    "offline_topk": 0.8, "live_second": 0.3, "offline_second": 0.1, "offline_topk_second": 0.1, "late_live": 0.9,
    "late_offline": 0.8, "late_offline_topk": 0.9,
    "gentle_live": 0.9, "gentle_offline": 0.9,
}  # fmt: skip


def point(rate, top=1):
    ones = round(rate * N)
    return "".join([str(top)] * ones + ["0"] * (N - ones))


def scores(rate):
    return {"sampled": point(rate / 2, SAMPLES), "greedy": point(rate)}


def make_run(name, seed, rate, **changes):
    arm = ARMS[name]
    run = {
        "arm": name, "seed": seed, "steps": STEPS, "n_test": N, "eval_interval": 10, "tokens": 1000 + seed,
        "train_seconds": 20.0 if arm.offline else 60.0, "train_cpu_seconds": 10.0 if arm.offline else 40.0,
        "machine": MACHINE, "metrics": {"offline/drift_kl": [0.1] * STEPS},
        "curve": {"10": scores(rate / 2), "20": scores(rate + 0.005 * seed)},
        "probes": {}, "policy": {"kl_to_start": 0.1 + 0.001 * seed, "kl_to_teacher": 0.2},
    }  # fmt: skip
    if arm.offline:
        run["findings"] = {"teacher": "error" if arm.data.teacher == "second" else "ok"}
    else:
        run |= {"rollout_seconds": 20.0, "teacher_seconds": 15.0}
    if arm.probed:
        probe = {"cosine": 0.99, "relative": 0.1, "chance_cosine": 0.99, "chance_relative": 0.1, "norm": 1.0}
        run["probes"] = {"0": probe, "20": probe | {"relative": 0.2, "cosine": 0.9}}
    return run | changes


def make_runs(folder, rates, change=lambda name, run: run):
    runs = Runs(folder / "offline_opd_runs.json")
    start = {model: scores(rate) for model, rate in (("early", 0.4), ("late", 0.8), ("first", 0.99), ("second", 0.9))}
    start |= {key: {"kl_to_teacher": 0.4} for key in ("early_first", "early_second", "late_first")} | {"n_test": N}
    runs.results = {"start": start, "memory": {"live": {"weights": 2**23, "resident": 2**28}}}
    for seed in SEEDS:
        for name, rate in rates.items():
            runs.results[f"{name}-seed{seed}"] = change(name, make_run(name, seed, rate))
        for data in {ARMS[name].data for name in rates}:
            made = {"collect_cpu_seconds": 7.0, "score_cpu_seconds": 3.0, "score_top_k_cpu_seconds": 5.0, "seed": seed}
            made |= {"bytes_per_token": 6.5, "bytes_per_token_top_k": 45.0}
            runs.results[f"data_{data.name()}-seed{seed}"] = made
    return runs


def verdicts(runs):
    found = Results(runs)
    return {claim: (word, numbers) for triples in (claims(found), ours(found)) for claim, word, numbers in triples}


def find(found, start):
    """The verdict on the claims that start so, which must agree."""
    (word,) = {word for claim, (word, _) in found.items() if claim.startswith(start)}
    return word


def test_verdicts_of_made_up_runs(tmp_path):
    found = verdicts(make_runs(tmp_path, RATES))
    like = "With a consistent teacher, offline distillation performs like live distillation: "
    assert find(found, f"{like}early") == HELD and find(found, f"{like}late student.") == NOT_HELD
    assert find(found, f"{like}late student, a tenth") == HELD
    assert find(found, "Another teacher than that of the SFT stage is worse") == HELD
    assert find(found, "With an inconsistent teacher, offline distillation does not match") == HELD
    assert find(found, "With a consistent teacher the offline gradient stays close") == HELD
    assert find(found, "Training is several times as efficient") == HELD
    assert find(found, "Results on mathematics") == UNTESTABLE
    assert find(found, "Offline, the reverse KL over") == HELD
    assert find(found, "As many rollouts of a quarter") == NOT_HELD
    assert find(found, "`check_teacher_consistency`") == HELD


def test_verdicts_of_runs_that_went_the_other_way(tmp_path):
    def change(name, run):
        if ARMS[name].offline:
            run["findings"] = {"teacher": "ok"}
            run["train_cpu_seconds"] = 39.0
            run["policy"]["kl_to_start"] += 0.2
        if ARMS[name].probed:
            run["probes"]["20"]["relative"] = 0.9
        return run

    rates = RATES | {
        "gentle_offline": 0.8,
        "offline": 0.2,
        "offline_second": 0.0,
        "live_second": 0.0,
        "offline_topk": 0.1,
    }
    found = verdicts(make_runs(tmp_path, rates, change))
    assert (
        find(found, "With a consistent teacher, offline distillation performs like live distillation: e") == NOT_HELD
    )
    assert find(found, "With an inconsistent teacher, offline distillation does not match") == UNTESTABLE
    assert find(found, "With a consistent teacher the offline gradient stays close") == NOT_HELD
    assert find(found, "Offline distillation regularises by itself") == REVERSE
    assert find(found, "Training is several times as efficient") == NOT_HELD
    assert find(found, "Offline, the reverse KL over") == NOT_HELD
    assert find(found, "`check_teacher_consistency`") == NOT_HELD


@pytest.mark.parametrize(
    ("gap", "is_not_worse", "is_worse"),
    [
        (Estimate(-0.3, 0.1), NOT_HELD, HELD),
        (Estimate(-0.1, 0.1), HELD, "did not hold: no difference"),
        (Estimate(0.3, 0.1), HELD, REVERSE),
    ],
)
def test_verdict_of_a_gap(gap, is_not_worse, is_worse):
    assert (not_worse(gap), worse(gap)) == (is_not_worse, is_worse)


def test_throughput_with_and_without_what_falls_once(tmp_path):
    runs = make_runs(tmp_path, RATES)
    found = Results(runs)
    assert found.throughput("offline") == {seed: (1000 + seed) / 10.0 for seed in SEEDS}
    assert found.throughput("offline", one_time=True) == {seed: (1000 + seed) / 20.0 for seed in SEEDS}
    assert found.throughput("offline_topk", one_time=True)[0] == pytest.approx(1000 / 22.0)
    assert found.throughput("live", one_time=True)[0] == found.throughput("live")[0] == 25.0
    assert found.speedup("offline", "live").value == pytest.approx(4.0)
    # The second teacher scores what was collected for the first
    runs.results[f"data_{Data(teacher='second').name()}-seed0"]["collect_cpu_seconds"] = 0.0
    assert found.one_time("offline_second", 0) == (7.0, 3.0)


def test_the_report_shows_the_runs(tmp_path):
    text = write_report(STUDY, make_runs(tmp_path, RATES), tmp_path)
    with open(tmp_path / "offline_opd.csv", newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(ARMS)
    assert float(rows["late_offline"]["greedy"]) == pytest.approx(0.805, abs=1e-3)
    for arm in ARMS.values():
        assert f"| {arm.label} |" in text
    for figure in re.findall(r"\((offline_opd_\w+\.png)\)", text):
        assert (tmp_path / figure).stat().st_size > 10_000
    assert CHECKPOINTS.as_posix() not in text


def test_a_report_of_unfinished_runs(tmp_path):
    runs = make_runs(tmp_path, {name: RATES[name] for name in ("live", "offline")})
    assert "offline, sampled token" in write_report(STUDY, runs, tmp_path)


def test_rollouts_are_collected_once_and_scored_by_each_teacher():
    first, second, arms = plan(["live", "offline", "offline_second", "offline_4"], {})
    assert first == ["data_early_first_1x_1_1", "data_early_first_4x_1_1"]
    assert second == ["data_early_second_1x_1_1"]
    assert arms == ["live", "offline", "offline_second", "offline_4"]
