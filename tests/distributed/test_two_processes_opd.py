"""
Two CPU processes against one, for the distillation trainer beside `test_common.py`: prompts, metrics, completions.
"""

from collections import Counter

import pytest

from tests.distributed import opd_worker


pytestmark = pytest.mark.distributed

LAUNCHES = ("ddp", "fsdp2")
SAMPLED = [(launch, name) for launch in LAUNCHES for name in opd_worker.END_TO_END]
UPDATES = [(launch, name) for launch in LAUNCHES for name in opd_worker.UPDATES]
UPDATES += [("ddp", name) for name in opd_worker.PEFT_UPDATES]
# Of this process
LOCAL = ("seconds", "per_second")


@pytest.mark.parametrize(("launch", "name"), UPDATES)
def test_metrics_of_the_loss_are_those_of_one_process(launched_opd, launch, name):
    """Support of the teacher, reverse KL and AUROC of the same rollouts."""
    (single,), ranks = launched_opd("single"), launched_opd(launch)
    expected = single[name]["log"]
    names = {"blend/auroc", "blend/student_logp", "blend/teacher_logp", "blend/teacher_entropy"}
    if name not in ("student", "peft_trust_region"):
        names.add("blend/reverse_kl")
    if name == "iw_opd":
        names.add("blend/iw_opd_weight")
    if name == "tip":
        names |= {"blend/kept_share", "blend/forward_kl_share"}
        assert all(0.0 < entry["blend/kept_share"] < 1.0 for entry in expected)
    assert len(expected) == 3 and sum("blend/auroc" in entry for entry in expected) > 1
    for rank in ranks:
        for found, entry in zip(rank[name]["log"], expected, strict=True):
            for key in names & entry.keys():
                assert found[key] == pytest.approx(entry[key], rel=1e-4, abs=1e-5), key
            assert names - {"blend/auroc"} <= entry.keys()


@pytest.mark.parametrize(("launch", "name"), SAMPLED)
def test_each_prompt_is_rolled_out_twice_over_all_ranks(launched_opd, launch, name):
    first, second = (rank[name]["prompts"] for rank in launched_opd(launch))
    assert len(first) == len(second) == 3
    for ours, theirs in zip(first, second, strict=True):
        assert sorted(Counter(ours + theirs).values()) == [2] * 4


@pytest.mark.parametrize(("launch", "name"), SAMPLED)
def test_metrics_are_those_of_all_ranks_on_every_rank(launched_opd, launch, name):
    first, second = (rank[name] for rank in launched_opd(launch))
    blended = {"blend/kl_behavior_student", "blend/teacher_entropy", "rewards/verdict/mean", "blend/teacher_logp"}
    blended.add({"sampled_trust_region": "blend/teacher_weight/max"}.get(name, "blend/replaced_share"))
    for step, (ours, theirs) in enumerate(zip(first["log"], second["log"], strict=True)):
        names = {key for key in ours if key.startswith(("blend/", "rewards/")) and not key.endswith(LOCAL)}
        assert (blended <= names) == (step < 2)
        assert {key: ours[key] for key in names} == {key: theirs[key] for key in names}
    assert len(first["statistics"]) == len(second["statistics"]) == 2  # of the blended steps
    for step, (ours, theirs) in enumerate(zip(first["statistics"], second["statistics"], strict=True)):
        logged = first["log"][step]
        means = [{key: total / count for key, (total, count, _) in one.items()} for one in (ours, theirs)]
        assert means[0] != pytest.approx(means[1], rel=1e-2)
        for statistic, (total, count, largest) in ours.items():
            other_total, other_count, other_largest = theirs[statistic]
            mean = (total + other_total) / (count + other_count)
            suffix = "/mean" if statistic == "teacher_weight" else ""
            assert logged[f"blend/{statistic}{suffix}"] == pytest.approx(mean, rel=1e-4)
            if statistic == "teacher_weight":
                assert logged["blend/teacher_weight/max"] == pytest.approx(max(largest, other_largest))


@pytest.mark.parametrize(("launch", "name"), SAMPLED)
def test_evaluation_of_an_odd_number_of_prompts(launched_opd, launch, name):
    first, second = (rank[name]["eval_log"] for rank in launched_opd(launch))
    assert len(first) == len(second) == 3
    for ours, theirs in zip(first, second, strict=True):
        names = {key for key in ours if key.startswith(("eval_blend/", "eval_rewards/")) and not key.endswith(LOCAL)}
        assert {"eval_blend/teacher_logp", "eval_blend/student_logp", "eval_rewards/verdict/mean"} <= names
        assert {key: ours[key] for key in names} == {key: theirs[key] for key in names}


@pytest.mark.parametrize(("launch", "name"), SAMPLED)
def test_columns_of_the_completions_table_belong_to_its_rows(launched_opd, launch, name):
    """The rows of both ranks, in one order in every column: of training, evaluation, training and so on."""
    ranks = [rank[name] for rank in launched_opd(launch)]
    statistic = "teacher_weight" if "trust_region" in name else "replaced_share"
    seen = []
    for rows in zip(*(rank["table_rows"] for rank in ranks), strict=True):
        for row in (*rows[0], *rows[1]):
            seen.append({"teacher_weight": 0.0, "replaced_share": 0.0, "kl_behavior_student": 0.0, **row})
    tables = ranks[0]["tables"]
    assert len(tables) == 7 and ranks[1]["tables"] == []
    assert [table["step"][0] for table in tables] == [1, 1, 2, 2, 3, 3, 3]
    assert tables.pop() == tables[-1]  # of the summary at the end of the run
    for index, table in enumerate(tables):
        expected = seen[8 * index : 8 * index + 8]
        for column in ("prompt", "completion", "verdict"):
            assert table[column] == [row[column] for row in expected], column
        for column in (statistic, "kl_behavior_student"):
            assert table[column] == pytest.approx([row[column] for row in expected], rel=1e-5), column
        is_blended = index in (0, 2)
        assert {value > 0 for value in table[statistic]} == {is_blended}
        if name == "sampled_trust_region":
            assert {value > 0 for value in table["kl_budget"]} == {is_blended}
