"""The SFT warmup: its prompts are those that the trainer draws, and it trains on what the teacher says, as tokens."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

import sft_warmup
from testbed.task import answer_reward, build_prompt_dataset
from tests.tiny import tiny_model, tiny_tokenizer
from trl_blend import TrustRegionOPDConfig, TrustRegionOPDTrainer


CHECKPOINTS = Path(sft_warmup.__file__).parent / "testbed" / "checkpoints"
NAMED = ("--dataset_name", "testbed", "--model_name_or_path", str(CHECKPOINTS / "student"))
NAMED += ("--teacher_model_name_or_path", str(CHECKPOINTS / "teacher"))
CPU = ("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--seed", "3")


def parse(tmp_path, *arguments):
    return sft_warmup.make_parser().parse_args_and_config(["--output_dir", str(tmp_path), *CPU, *arguments])


@pytest.mark.parametrize(("rollouts", "accumulation"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_prompts_are_those_that_the_trainer_draws(rollouts, accumulation, tmp_path):
    """Three steps; where a step has 8 prompts the second begins a new epoch, in another order."""
    dataset = Dataset.from_dict({"prompt": [f"{n}+{n}=" for n in range(11)]})
    drawn = []

    def record(prompts, **kwargs):
        drawn.extend(prompts)
        return [0.0] * len(prompts)

    args = TrustRegionOPDConfig(
        output_dir=str(tmp_path),
        rollout_policy="student",
        num_rollouts_per_prompt=rollouts,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        max_completion_length=2,
        max_steps=3,
        seed=3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    TrustRegionOPDTrainer(
        model=tiny_model(seed=0),
        teacher_model=tiny_model(seed=1),
        args=args,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        reward_funcs=record,
    ).train()
    per_step = 8 * accumulation
    assert len(drawn) == 3 * per_step
    rows = sft_warmup.prompts_of_first_steps(dataset, 3, per_step, rollouts, seed=3)
    assert rows["prompt"] == drawn
    assert rows["prompt"] != sft_warmup.prompts_of_first_steps(dataset, 3, per_step, rollouts, seed=4)["prompt"]


def test_training_rows_are_the_teachers_tokens(tmp_path):
    """With a student that ends its answers with another token than the teacher."""
    prompts = build_prompt_dataset("train", 24)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "student", eos_token="<|endoftext|>")
    teacher_eos = AutoTokenizer.from_pretrained(CHECKPOINTS / "teacher").eos_token_id
    script_args, training_args, _, _ = parse(tmp_path, "--max_completion_length", "56")
    rows = sft_warmup.teacher_answers(
        prompts, str(CHECKPOINTS / "teacher"), tokenizer, script_args, training_args, "float32"
    )
    assert len(rows) == 24 and tokenizer.eos_token_id != teacher_eos
    texts = []
    for row, prompt in zip(rows, prompts["prompt"], strict=True):
        given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = row["input_ids"][len(given) :]
        assert row["input_ids"][: len(given)] == given
        assert row["labels"] == [-100] * len(given) + answer
        assert answer.index(tokenizer.eos_token_id) == len(answer) - 1 and teacher_eos not in answer
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    # 0.93 at temperature 1; an answer in the wrong row would be wrong
    assert sum(answer_reward(texts, prompts["answer"])) / 24 > 0.75


def test_an_answer_that_is_cut_off_gets_no_end(tmp_path):
    script_args, training_args, _, _ = parse(tmp_path, "--max_completion_length", "5")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "student")
    rows = sft_warmup.teacher_answers(
        build_prompt_dataset("train", 4),
        str(CHECKPOINTS / "teacher"),
        tokenizer,
        script_args,
        training_args,
        "float32",
    )
    for row in rows:
        answer = [token for token in row["labels"] if token != -100]
        assert len(answer) == 5 and tokenizer.eos_token_id not in answer


def test_the_script_trains_on_them_in_order_and_saves(tmp_path, monkeypatch):
    seen, answers = [], []
    teacher_answers, training_step = sft_warmup.teacher_answers, SFTTrainer.training_step
    monkeypatch.setattr(
        sft_warmup, "teacher_answers", lambda *args: answers.append(teacher_answers(*args)) or answers[0]
    )

    def recording_step(self, model, inputs, *args):
        seen.extend(ids[ids != -100].tolist() for ids in inputs["labels"])
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(SFTTrainer, "training_step", recording_step)
    settings = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2")
    rollouts = ("--num_rollouts_per_prompt", "2", "--max_completion_length", "56")
    sft_warmup.main(*parse(tmp_path, *NAMED, *settings, *rollouts, "--learning_rate", "1e-3"))
    expected = [[token for token in row["labels"] if token != -100] for row in answers[0]]
    assert len(expected) == 16 and seen == expected
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (CHECKPOINTS / "student", tmp_path)
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "max_steps=-1"),
        (("--max_steps", "1", "--num_rollouts_per_prompt", "3"), "num_rollouts_per_prompt=3.*8 rollouts"),
        (("--max_steps", "1", "--per_device_train_batch_size", "9000"), "9000 prompts"),
        (("--max_steps", "1", "--use_peft"), "use_peft"),
        (("--max_steps", "1", "--load_in_8bit"), "load_in_8bit"),
    ],
)
def test_errors_come_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_warmup, "load_frozen", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        sft_warmup.main(*parse(tmp_path, *NAMED, *arguments))
