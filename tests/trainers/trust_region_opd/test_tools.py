"""Tools come with the parent: both models decode every turn of a conversation, and tool output is not trained on."""

import pandas as pd
import pytest
import torch
import trl.trainer.distillation_trainer as trl_distillation
from datasets import Dataset

from tests import reference_trust_region
from tests.trainers import runs, tools


BUDGET = 0.3


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """One step with a tool call in every other completion of the first turn: rollouts, record and both models."""
    tokenizer, pair = tools.tokenizer(), tools.models()
    prompts = [[{"role": "user", "content": text}] for text in ("1+2", "what is 3+4?") * 4]
    trainer = runs.build_opd(
        models,
        tmp_path_factory.mktemp("tools"),
        student=pair[0],
        teacher=pair[1],
        teacher_eos_token_id=[tokenizer.eos_token_id, *tools.EOS_IDS],
        kl_budget=BUDGET,
        blend_warmup_steps=5,
        learning_rate=0.0,
        max_completion_length=200,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        log_teacher_statistics=True,
        log_completions=True,
        trainer_kwargs={"processing_class": tokenizer, "tools": [tools.add], "reward_funcs": runs.reward},
    )
    assert trainer.eos is None
    rollouts = runs.record_opd_rollouts(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_distillation, "parse_response", tools.every_other_call())
        record = runs.train(trainer)
    return rollouts, record, pair


def test_every_turn_is_drawn_from_the_trust_region(run):
    rollouts, record, models = run
    (rollout,) = rollouts
    inputs = rollout.inputs
    drawn = inputs["tool_mask"].bool() & inputs["completion_mask"].bool()
    tool = ~inputs["tool_mask"].bool() & inputs["completion_mask"].bool()
    assert tool.any(), "no tool output in the batch: this would test nothing"
    second = tool.int().cumsum(1).bool() & drawn
    assert second.any(), "no second turn in the batch: this would test nothing"
    first_turn, second_turn = rollout.records
    again = tool.any(1)
    assert first_turn.behavior_logps.size(0) == 8 and second_turn.behavior_logps.size(0) == again.sum()

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].size(1)
    with torch.no_grad():
        student, teacher = (
            model.eval()(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1].double()
            for model in models
        )

    def check(row, columns, recorded):
        # A few tokens of each row: the reference is slow
        for position, column in list(enumerate(columns))[:3] + list(enumerate(columns))[-2:]:
            s, t = student[row, column].tolist(), teacher[row, column].tolist()
            weight = reference_trust_region.largest_weight(s, t, BUDGET, halvings=25)
            policy = reference_trust_region.path(s, t, weight)
            token = inputs["completion_ids"][row, column].item()
            assert recorded[position].item() == pytest.approx(policy[token], abs=2e-3)

    rows_again = again.nonzero().flatten().tolist()
    for row in range(8):
        before = (drawn & ~second)[row].nonzero().flatten().tolist()
        check(row, before, first_turn.behavior_logps[row])
    for index, row in enumerate(rows_again):
        check(row, second[row].nonzero().flatten().tolist(), second_turn.behavior_logps[index])


def test_tool_output_is_neither_trained_on_nor_measured(run):
    _, record, models = run
    (call,) = record.calls
    inputs = call.inputs
    drawn = (inputs["tool_mask"] * inputs["completion_mask"]).bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].size(1)
    with torch.no_grad():
        logprobs = [
            model.eval()(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1].double().log_softmax(-1)
            for model in models
        ]
    divergence = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1)
    assert call.loss == pytest.approx(divergence[drawn].mean().item(), rel=1e-4)
    assert call.loss != pytest.approx(divergence[inputs["completion_mask"].bool()].mean().item(), rel=1e-3)
    logps = [rows.gather(-1, inputs["completion_ids"][..., None])[..., 0][drawn].mean() for rows in logprobs]
    assert record.logged("blend/student_logp") == [pytest.approx(logps[0].item(), rel=1e-4)]
    assert record.logged("blend/teacher_logp") == [pytest.approx(logps[1].item(), rel=1e-4)]
    assert len(record.logged("rewards/reward/mean")) == 1


def test_the_completions_table_counts_every_turn(run):
    """Means over the drawn tokens of both turns, and not over what the tool said."""
    rollouts, record, _ = run
    (rollout,) = rollouts
    inputs, (first_turn, second_turn) = rollout.inputs, rollout.records
    table = pd.read_parquet(f"{record.trainer.args.output_dir}/completions/completions_00001.parquet")
    tokenizer = record.trainer.processing_class
    assert table["completion"].tolist() == tokenizer.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    drawn = inputs["tool_mask"].bool() & inputs["completion_mask"].bool()
    tool = ~inputs["tool_mask"].bool() & inputs["completion_mask"].bool()
    rows_again = tool.any(1).nonzero().flatten().tolist()
    for name in ("teacher_weight", "kl_behavior_student"):
        for row in range(8):
            again = tool[row].int().cumsum(0).bool() & drawn[row]
            values = first_turn.statistics[name][row, : int((drawn[row] & ~again).sum())].tolist()
            if row in rows_again:
                values += second_turn.statistics[name][rows_again.index(row), : int(again.sum())].tolist()
            assert table[name][row] == pytest.approx(sum(values) / len(values), rel=1e-6)
