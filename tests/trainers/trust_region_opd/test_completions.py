"""The completions table: what each completion was decoded with, against the recorded values of its tokens."""

import re

import pandas as pd
import pytest
import torch
from transformers import set_seed
from transformers.utils import is_rich_available

from tests.trainers import runs
from trl_blend.generation.recording import RolloutRecord
from trl_blend.generation.rules import TrustRegion
from trl_blend.trainers.trust_region_opd.completions import CompletionsTable


TRUST_REGION = {"kl_budget": 0.3, "blend_warmup_steps": 2}
STATISTICS = ["teacher_weight", "kl_behavior_student"]
REWARDED = {"trainer_kwargs": {"reward_funcs": runs.reward}}


def table(trainer, step):
    return pd.read_parquet(f"{trainer.args.output_dir}/completions/completions_{step:05d}.parquet")


def rows_by_text(trainer, rollout):
    """Index of each completion's row, by its text: the table is one of texts."""
    texts = trainer.processing_class.batch_decode(rollout.inputs["completion_ids"], skip_special_tokens=True)
    assert len(set(texts)) == len(texts)
    return {text: index for index, text in enumerate(texts)}


def expected_mean(rollout, name, index):
    """Mean of a recorded statistic over the tokens of a completion, token by token."""
    (record,) = rollout.records
    length = int(rollout.inputs["completion_mask"][index].sum())
    values = [float(value) for value in record.statistics[name][index, :length].double()]
    return sum(values) / length


@pytest.mark.parametrize(
    ("settings", "level", "statistics"),
    [
        (TRUST_REGION, "kl_budget", STATISTICS),
        ({"rollout_policy": "fixed_weight", "teacher_weight": 0.3}, "teacher_weight", ["kl_behavior_student"]),
        ({"rollout_policy": "speculative_kd", "skd_top_k": 3}, None, ["replaced_share", "kl_behavior_student"]),
    ],
)
def test_columns_are_means_of_the_recorded_tokens(build_opd, settings, level, statistics):
    """In two micro-batches, with the levels of two steps, beside the rewards."""
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = build_opd(**settings, **accumulated, **REWARDED, log_completions=True)
    rollouts = runs.record_opd_rollouts(trainer)
    trainer.train()
    for step, rollout in enumerate(rollouts, start=1):
        found, rows = table(trainer, step), rows_by_text(trainer, rollout)
        columns = ([level] if level else []) + statistics
        assert list(found.columns) == ["step", "prompt", "completion", "reward", *columns] and len(found) == 8
        seen = set()
        for _, row in found.iterrows():
            index = rows[row["completion"]]
            seen.add(index)
            for name in statistics:
                assert row[name] == pytest.approx(expected_mean(rollout, name, index), rel=1e-12)
            mask = rollout.inputs["completion_mask"][index].bool()
            (reward,) = runs.reward([rollout.inputs["completion_ids"][index][mask].tolist()])
            assert row["reward"] == pytest.approx(reward, rel=1e-6)
        assert seen == set(range(8)) and (found["step"] == step).all()
        assert all(found[name].nunique() > 1 for name in statistics)
        if level:
            value = settings.get("teacher_weight", 0.3 * (1 - (step - 1) / 2))
            assert found[level].tolist() == pytest.approx([value] * 8)


def test_prompts_belong_to_their_completions(build_opd):
    """The rows of all columns are the same rollouts: a reward that depends on the prompt says which one it is."""

    def length(prompts, **kwargs):
        return [float(len(prompt)) for prompt in prompts]

    trainer = build_opd(**TRUST_REGION, log_completions=True, trainer_kwargs={"reward_funcs": length})
    trainer.train()
    found = table(trainer, 1)
    assert found["length"].tolist() == [len(prompt) for prompt in found["prompt"]] and found["length"].nunique() > 3


def test_the_students_own_rollouts_have_zeros(build_opd):
    """After the warmup, and in evaluation, whose table TRL writes in the place of the step's."""
    data = {"eval_dataset": runs.dataset(), "reward_funcs": runs.reward}
    trainer = build_opd(**TRUST_REGION, max_steps=3, log_completions=True, trainer_kwargs=data)
    trainer.train()
    for step, level in ((1, 0.3), (2, 0.15), (3, 0.0)):
        found = table(trainer, step)
        assert found["kl_budget"].tolist() == pytest.approx([level] * 8)
        assert ((found[STATISTICS] > 0).all() == (level > 0)).all()
    trainer.state.global_step = 4
    trainer._rule = TrustRegion(0.3)  # evaluation in the middle of the warmup
    trainer.evaluate()
    found = table(trainer, 4)
    assert (found[["kl_budget", *STATISTICS]] == 0.0).all(axis=None) and len(found) == 8
    assert found["reward"].nunique() > 1


def test_without_anything_to_add_the_table_is_trls_own(build_opd):
    (ours, parent) = trainers = [
        build_opd(**settings, log_completions=True, max_steps=2)
        for settings in ({"rollout_policy": "student"}, {"parent": True})
    ]
    for trainer in trainers:
        set_seed(1)
        trainer.train()
    for step in (1, 2):
        pd.testing.assert_frame_equal(table(ours, step), table(parent, step))
    assert list(table(ours, 1).columns) == ["step", "prompt", "completion"]


def test_the_first_columns_are_trls_own(build_opd, capsys):
    """With rewards and nothing blended: the same rollouts, the same table and the same print, and a column more."""
    ours = build_opd(rollout_policy="student", log_completions=True, **REWARDED)
    parent = build_opd(parent=True, log_completions=True)
    printed = []
    for trainer in (ours, parent):
        set_seed(1)
        trainer.train()
        printed.append(capsys.readouterr().out)
    first = ["step", "prompt", "completion"]
    pd.testing.assert_frame_equal(table(ours, 1)[first], table(parent, 1))
    assert list(table(ours, 1).columns) == [*first, "reward"]
    assert all("Step 1" in text and "Completion" in text for text in printed)
    assert ("reward" in printed[0], "reward" in printed[1]) == (True, False)


@pytest.mark.skipif(not is_rich_available(), reason="printed with rich")
def test_the_printed_table_has_the_columns(build_opd, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    trainer = build_opd(**TRUST_REGION, log_completions=True, num_completions_to_print=3)
    trainer.train()
    headers = re.findall(r".*Prompt.*", capsys.readouterr().out)
    assert len(headers) == 2  # of the step, and of the summary at the end of the run
    for header in headers:
        assert re.findall(r"\w+", header) == ["Prompt", "Completion", "kl_budget", *STATISTICS]


def test_unique_prompts_and_backends(build_opd, monkeypatch):
    """Each prompt once in what the backends get, all rows in the file; TRL's own table is not sent beside it."""
    import trackio

    sent = []
    monkeypatch.setattr(trackio, "Table", lambda columns, data: [pd.DataFrame(data, columns=columns)])
    monkeypatch.setattr(trackio, "log", lambda metrics, **kwargs: sent.extend(metrics.get("completions", ())))
    settings = {"num_rollouts_per_prompt": 4, "log_unique_prompts": True, "log_completions": True}
    trainer = build_opd(**TRUST_REGION, **settings)
    trainer.args.report_to = ["trackio"]  # no callback of it
    trainer.train()
    found = table(trainer, 1)
    assert len(found) == 8 and found["prompt"].nunique() == 2
    rows = sent[0]
    assert rows["prompt"].tolist() == found["prompt"].unique().tolist()
    first = [found["prompt"].tolist().index(prompt) for prompt in rows["prompt"]]
    assert rows["teacher_weight"].tolist() == found["teacher_weight"][first].tolist()
    assert len(sent) == 2  # of the step, and of the summary at the end of the run
    assert trainer.log_completions is True


def test_nothing_is_gathered_unless_it_is_logged(build_opd, monkeypatch):
    def fail(*args):
        raise AssertionError("gathered")

    monkeypatch.setattr("trl_blend.trainers.trust_region_opd.completions.gather_object", fail)
    build_opd(**TRUST_REGION, **REWARDED).train()


# Turns of a conversation


class Args:
    """What the table reads of a configuration."""

    log_completions, blends, rollout_policy, max_completion_length = True, True, "trust_region", 6
    use_vllm = False


def record_of(weights):
    weights = torch.tensor(weights)
    empty = torch.zeros_like(weights)
    return RolloutRecord(empty, empty, empty, {"teacher_weight": weights, "kl_behavior_student": empty})


def test_a_mean_is_over_all_turns_of_its_completion():
    """Two rows of one prompt, the second of which goes on after a tool call and is cut at six tokens."""
    completions = CompletionsTable(Args, [], 8)
    completions.start()
    completions.add_turn(record_of([[0.1, 0.3], [0.5, 9.0], [1.0, 1.0]]), [[7], [7], [8]], [[1, 2], [3], [4, 5]])
    completions.add_turn(record_of([[0.2, 0.4, 0.6, 9.0]]), [[7, 3, 60, 61]], [[5, 5, 5, 5]])
    completions.finish(3, TrustRegion(0.3), None)
    found = {name: list(values) for name, values in completions._extra.items()}
    assert found["teacher_weight"] == pytest.approx([0.2, (0.5 + 0.2 + 0.4 + 0.6) / 4, 1.0])
    assert found["kl_budget"] == [0.3] * 3 and found["kl_behavior_student"] == [0.0] * 3
    completions.start()
    completions.finish(2, None, None)
    assert list(completions._extra["teacher_weight"])[3:] == [0.0, 0.0]


def test_values_that_are_not_finite_are_left_out():
    completions = CompletionsTable(Args, [], 8)
    completions.add_turn(record_of([[float("inf"), 0.5], [float("inf"), float("nan")]]), [[1], [2]], [[1, 2], [1, 2]])
    completions.finish(2, TrustRegion(0.3), None)
    assert list(completions._extra["teacher_weight"]) == [0.5, 0.0]
