"""The numbers of the README and of the pages are those of the result files."""

import csv
import json
import re

import pytest

from tests.docs.markdown import ROOT, read, section, table


RESULTS = "examples/reproduce/results"
GRPO_PAGE, OPD_PAGE, OFFLINE_PAGE = "examples/grpo_mix.md", "examples/trust_region_opd.md", "examples/offline_opd.md"
VLLM_PAGE = "examples/vllm.md"
# The section of a page whose table has rows of the benchmarks
COSTS = {
    "README.md": "Results",
    **dict.fromkeys((GRPO_PAGE, OPD_PAGE, OFFLINE_PAGE), "Memory and cost"),
    VLLM_PAGE: "Cost",
}
# (page, section, first column there, report, first column there, whether the page shows every row)
TABLES = [
    ("README.md", "Results", "no reward: arm", "zero_reward.md", "arm", False),
    ("README.md", "Results", "arm", "logit_mixing.md", "arm", False),
    ("README.md", "Results", "method", "trust_region.md", "arm", False),
    ("README.md", "Results", "offline study: arm", "offline_opd.md", "arm", False),
    (GRPO_PAGE, "What we measured", "no reward: arm", "zero_reward.md", "arm", True),
    (GRPO_PAGE, "What we measured", "sorting: arm", "zero_reward_sorting.md", "arm", True),
    (GRPO_PAGE, "What we measured", "arm", "logit_mixing.md", "arm", True),
    (OPD_PAGE, "What we measured", "method", "trust_region.md", "arm", True),
    (OPD_PAGE, "What we measured", "off the task: method", "off_task.md", "arm", True),
    (OPD_PAGE, "What we measured", "sorting: method", "off_task_sorting.md", "arm", True),
    (OPD_PAGE, "What we measured", "rollouts at step 0", "trust_region.md", "policy", True),
    (OFFLINE_PAGE, "What we measured", "horizon: loss", "offline_horizon.md", "loss", True),
    (OFFLINE_PAGE, "What we measured", "sorting: loss", "offline_horizon_sorting.md", "loss", True),
]
# What the text of a section repeats stands in these reports
TEXTS = [
    (
        GRPO_PAGE,
        "What we measured",
        [
            *("logit_mixing.md", "weight_sweep.md", "zero_reward.md", "zero_reward_sorting.md"),
            *("importance_ratios.md", "real_weights.md"),
        ],
    ),
    (GRPO_PAGE, "Choosing weight and schedule", ["logit_mixing.md", "weight_sweep.md", "zero_reward.md"]),
    (VLLM_PAGE, "What was run", ["engines.md"]),
    (OPD_PAGE, "What we measured", ["trust_region.md", "off_task.md", "off_task_sorting.md"]),
    (OPD_PAGE, "Choosing a budget", ["trust_region.md", "off_task.md"]),
    (OFFLINE_PAGE, "What we measured", ["offline_opd.md", "offline_horizon.md", "offline_horizon_sorting.md"]),
    (
        "README.md",
        "Results",
        ["zero_reward.md", "zero_reward_sorting.md", "logit_mixing.md", "trust_region.md", "offline_opd.md"],
    ),
]


def keyed(rows, *columns):
    """Rows by the text of some columns, each of which they have once."""
    found = {tuple(row[column] for column in columns): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(("page", "heading", "first", "report", "column", "whole"), TABLES)
def test_tables_are_those_of_the_runs(page, heading, first, report, column, whole):
    shown = table(section(read(page), heading), first)
    rows = table(read(f"{RESULTS}/{report}"), column)
    columns = [column, *(name for name in ("policy", "learning rate") if name in rows[0] and name != column)]
    full = keyed(rows, *columns)
    shown = [{(column if name == first else name): value for name, value in row.items()} for row in shown]
    assert len(keyed(shown, *columns)) >= 4 and (not whole or len(shown) == len(full))
    for row in shown:
        expected = full[tuple(row[name] for name in columns)]
        assert row == {name: expected[name] for name in row}


@pytest.mark.parametrize(("page", "heading", "reports"), TEXTS)
def test_numbers_of_the_text_are_those_of_the_runs(page, heading, reports):
    known = " ".join(read(f"{RESULTS}/{report}") for report in reports)
    text = re.sub(r"^\|.*\|$|\]\([^)]*\)", "", section(read(page), heading), flags=re.MULTILINE)
    if page == "README.md":
        text = text.partition("### Cost")[0]
    numbers = re.findall(r"(?<![\w.])[-+]?\d+\.\d{3,}", text)
    assert len(numbers) >= 2
    for number in numbers:
        assert re.search(rf"(?<!\d){re.escape(number)}(?!\d)", known), number


@pytest.mark.parametrize("page", ["README.md", "examples/recipes/no_reward.md"])
def test_numbers_before_the_first_section_are_those_of_the_runs(page):
    known = "".join(read(f"{RESULTS}/{report}.md") for report in ("zero_reward", "zero_reward_sorting", "off_task"))
    numbers = re.findall(r"(?<![\w.])\d+\.\d{3}", read(page).partition("## Install")[0])
    assert len(numbers) >= 3
    for number in numbers:
        assert number in known, number


def test_numbers_of_the_offline_page_are_those_of_the_runs():
    page, report = read(OFFLINE_PAGE), read(f"{RESULTS}/offline_opd.md")
    accuracy, cost = (keyed(table(part, "arm"), "arm") for part in report.split("## Cost"))
    shown = table(section(page, "What we measured"), "arm")
    assert [(row["arm"],) for row in shown] == list(accuracy)
    for row in shown:
        key = (row["arm"],)
        expected = accuracy[key] | {"tokens/CPU s": cost[key]["tokens/CPU s"]}
        assert row == {name: expected[name] for name in row}
    with_top_k, sampled = re.search(r"takes ([\d.]+) bytes on disk.*?and ([\d.]+)\b", " ".join(page.split())).groups()
    assert (sampled, with_top_k) == re.search(r"On disk: ([\d.]+) bytes.*?, ([\d.]+) with", report).groups()


def test_rewards_of_the_first_rollouts():
    reward = {row["policy"]: row["reward"] for row in table(read(f"{RESULTS}/trust_region.md"), "policy")}
    text = " ".join(read(OPD_PAGE).split())
    values = [reward[policy].split()[0] for policy in ("student (ε = 0)", "ε = 0.01", "ε = 0.05")]
    assert "{} without, {} at ε = 0.01, {} at 0.05".format(*values) in text


def test_the_sweep_numbers_are_those_of_the_sweep():
    with open(ROOT / RESULTS / "weight_sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for space in ("logits", "probs"):
        best = max(rows, key=lambda row: float(row[f"{space}_solve"]))
        assert float(best["weight"]) == 0.5
        assert f"{float(best[f'{space}_solve']):.3f}" in section(read(GRPO_PAGE), "What we measured")


@pytest.mark.parametrize("page", COSTS)
def test_costs_are_those_of_the_benchmarks(page):
    measured = keyed(table(read("examples/benchmarks/results/README.md"), "quantity"), "quantity")
    shown = table(section(read(page), COSTS[page]), "quantity")
    assert len(shown) >= 7
    for row in shown:
        assert row == {name: measured[row["quantity"],][name] for name in row}


def test_what_missed_its_bar_is_shown():
    """Every wall time that missed its bar is on a page; the README shows that there are some."""
    missed = {
        row["quantity"]
        for row in table(read("examples/benchmarks/results/README.md"), "quantity")
        if row["met"] == "**no**" and "wall time" in row["quantity"]
    }
    shown = {page: table(section(read(page), heading), "quantity") for page, heading in COSTS.items()}
    assert [row for row in shown.pop("README.md") if row["met"] == "**no**"]
    assert missed and missed <= {row["quantity"] for rows in shown.values() for row in rows}


def test_the_roofline_is_that_of_the_script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    import roofline

    report, page = read("examples/benchmarks/results/roofline.md"), read(VLLM_PAGE)
    assert roofline.table() in report and roofline.memory() in report
    assert roofline.table() in page and roofline.memory().replace("\n", " ") in page.replace("\n", " ")


@pytest.mark.parametrize(
    ("said", "batch", "order"),
    [
        (r"takes ([\d.]+) to ([\d.]+) times as long per step of 64 rollouts", 64, ""),
        (r"([\d.]+) to ([\d.]+) with offline rows grouped by length", 64, ", rows grouped by length"),
        (r"and ([\d.]+) times per step of 16 rollouts", 16, ""),
    ],
)
def test_the_speeds_on_the_offline_page_are_those_of_the_benchmarks(said, batch, order):
    results = table(read("examples/benchmarks/results/README.md"), "quantity")
    measured = {row["quantity"]: row["measured"] for row in results}
    names = [
        f"training step, batch {batch}, offline{order} / {live}, wall time"
        for live in ("`trl.DistillationTrainer`", "live, sampled token")
    ]
    ratios = {f"{1 / float(measured[name].split()[0]):.1f}" for name in names}
    assert list(re.search(said, " ".join(read(OFFLINE_PAGE).split())).groups()) == sorted(ratios)


@pytest.mark.parametrize(
    ("study", "arms"),
    [
        ("logit_mixing", 11),
        ("trust_region", 10),
        ("offline_opd", 15 + 6),
        ("zero_reward", 19),
        ("zero_reward_sorting", 12),
        ("off_task", 14 + 1),
        ("off_task_sorting", 4),
        ("offline_horizon", 8 + 1),
        ("offline_horizon_sorting", 4 + 1),
        ("engines", 2),
    ],
)
def test_runs_have_three_seeds_each(study, arms):
    seeds = {}
    for key in runs_of(study):
        name, is_seeded, seed = key.partition("-seed")
        if is_seeded:
            seeds.setdefault(name, set()).add(seed)
    assert len(seeds) == arms and all(len(found) >= 3 for found in seeds.values())


def runs_of(study):
    return json.loads(read(f"{RESULTS}/{study}_runs.json"))


@pytest.mark.parametrize(
    ("run", "study", "arm", "metric"),
    [
        ("logit_mix_grpo: mixed, weight 0.3", "logit_mixing", "mixed_0.3", "reward"),
        ("logit_mix_grpo: mixed, adaptive weight", "logit_mixing", "adaptive", "reward"),
        ("logit_mix_grpo: student, 0.5 to 0", "logit_mixing", "decay_0.5", "reward"),
        ("trust_region_opd: trust region 0.01, annealed", "trust_region", "trust_0.01", "blend/teacher_logp"),
        ("trust_region_opd: speculative KD", "trust_region", "skd", "blend/replaced_share"),
        ("offline_opd: sampled token (forgets the task)", "offline_opd", "offline", "offline/drift_kl"),
        ("offline_opd: sampled token, with the ratio", "offline_opd", "offline_ratio", "offline/drift_kl"),
        ("offline_opd: top-16 reverse KL", "offline_opd", "offline_topk", "offline/drift_kl"),
    ],
)
def test_runs_of_the_metric_ranges_are_those_of_the_studies(run, study, arm, metric):
    """They are the same arms with the same seed, so what both have kept is equal, step by step."""
    kept = runs_of("metric_ranges")[run]["metrics"][metric]
    finished = runs_of(study)[f"{arm}-seed0"]
    expected = finished["rollout_reward"] if metric == "reward" else finished["metrics"][metric]
    assert len(kept) == len(expected) >= 30
    assert list(kept.values()) == pytest.approx(expected, rel=1e-3, abs=6e-4)
