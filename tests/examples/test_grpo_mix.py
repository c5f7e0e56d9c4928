"""The example script: its settings files parse, its rewards are right, and one short run prints and saves a table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import get_peft_config

import grpo_mix
import rewards
from trl_blend import LogitMixGRPOConfig
from trl_blend.scripts.data import load_prompts


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("grpo_mix_*.yaml"))


def run(*arguments, **environment):
    command = [sys.executable, "examples/grpo_mix.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_the_testbed_run_prints_and_saves_both_tables(tmp_path):
    result = run(
        *("--config", "examples/configs/grpo_mix_testbed.yaml", "--output_dir", str(tmp_path), "--max_steps", "1"),
        *("--num_test_prompts", "8", "--per_device_train_batch_size", "8"),
        OMP_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    table = json.loads((tmp_path / "before_after.json").read_text())
    assert list(table["before"]) == ["student alone", "mixed, weight 0.10", "teacher alone"]
    assert table["rewards"] == ["format_and_answer_reward", "answer_reward", "format_reward"]
    assert table["before"]["teacher alone"] == table["after"]["teacher alone"]
    assert table["before"]["teacher alone"][0][0] > 0.8 > table["before"]["student alone"][0][0]
    for policy in table["before"]:
        assert policy in result.stdout
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "README.md").is_file()


@pytest.mark.parametrize(("space", "alone"), [("logits", ["teacher 0 alone", "teacher 1 alone"]), ("arithmetic", [])])
def test_no_sum_of_logits_is_a_teacher_alone(tmp_path, space, alone):
    settings = {"teacher_weight": [0.5, 0.25], "mixing_space": space, "use_cpu": True, "bf16": False}
    args = LogitMixGRPOConfig(output_dir=str(tmp_path), disable_tqdm=True, report_to="none", **settings)
    decoded = SimpleNamespace(rewards=torch.ones(2, 1))
    trainer = SimpleNamespace(args=args, partners=[None, None], greedy_rewards=lambda *_: decoded)
    policies = ["student alone", "mixed, weight 0.50/0.25", *alone]
    assert list(grpo_mix.score_policies(trainer, [])) == policies


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_files_parse(path, tmp_path):
    """On a CPU, where mixed precision is the one setting that cannot be kept."""
    parser = grpo_mix.make_parser()
    script_args, training_args, model_args, _ = parser.parse_args_and_config(
        ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    )
    assert training_args.mixes and model_args.model_name_or_path and training_args.teacher_model_name_or_path
    assert len(training_args.reward_weights) == len(script_args.reward_funcs)
    if path.stem == "grpo_mix_logit_fusion":
        assert (training_args.objective, training_args.teacher_weight_decay_steps) == ("student", 1000)
        assert model_args.use_peft and model_args.lora_dropout == 0
    if not path.stem.endswith("_testbed"):
        assert "NOT RUN BY US" in path.read_text()


def test_prompts_of_a_local_file(tmp_path):
    rows = [{"problem": f"{n}+1?", "answer": str(n + 1), "solution": "long"} for n in range(40)]
    Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
    parser = grpo_mix.make_parser()
    parsed = parser.parse_args_and_config(
        ["--dataset_name", str(tmp_path / "data.jsonl"), "--prompt_column", "problem", "--answer_column", "answer"]
        + ["--system_prompt", "Add.", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        + ["--model_name_or_path", str(ROOT / "examples/testbed/checkpoints/student")]
    )
    train, test = load_prompts(*parsed)
    assert len(train) + len(test) == 40 and len(test) > 0
    row = train[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert int(row["solution"]) == int(row["prompt"][1]["content"].split("+")[0]) + 1
    assert not {tuple(row["prompt"][1].items()) for row in train} & {tuple(row["prompt"][1].items()) for row in test}


def test_adapters_have_no_dropout_unless_it_is_asked_for(tmp_path, caplog):
    """Of which the trainer warns."""
    given = ["--config", str(CONFIGS[-1]), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    for arguments, dropout in ((["--use_peft"], 0.0), (["--use_peft", "--lora_dropout", "0.05"], 0.05)):
        _, _, model_args, _ = grpo_mix.make_parser().parse_args_and_config([*given, *arguments])
        assert get_peft_config(model_args).lora_dropout == dropout


@pytest.mark.parametrize("form", ["messages", "folder", "parquet", "csv", "saved"])
def test_prompts_of_every_kind_of_file(form, tmp_path):
    """Messages are taken as they are; a folder's test split is the held-out one; 0 holds out nothing."""
    rows = Dataset.from_list([{"question": f"{n}+1=?", "answer": str(n + 1)} for n in range(20)])
    name = tmp_path / f"data.{form}"
    if form == "messages":
        rows = rows.map(lambda row: {"question": [{"role": "user", "content": row["question"]}]})
        name = tmp_path / "data.jsonl"
        rows.to_json(name)
    elif form == "folder":
        for split, count in (("train", 20), ("test", 4)):
            rows.select(range(count)).to_json(name / f"{split}.jsonl")
    elif form == "saved":
        rows.save_to_disk(name)
    else:
        getattr(rows, f"to_{form}")(name)
    given = ["--dataset_name", str(name), "--prompt_column", "question", "--output_dir", str(tmp_path / "out")]
    given += ["--model_name_or_path", str(ROOT / "examples/testbed/checkpoints/student"), "--use_cpu", "--bf16=false"]
    train, test = load_prompts(*grpo_mix.make_parser().parse_args_and_config(given))
    assert (len(train), len(test)) == ((20, 4) if form == "folder" else (18, 2))
    assert all(row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"].endswith("+1=?") for row in train)
    given += ["--num_test_prompts", "0"]
    train, test = load_prompts(*grpo_mix.make_parser().parse_args_and_config(given))
    assert len(train) == 20 and test is None


@pytest.mark.parametrize(
    ("completion", "formatted", "right"),
    [
        (r"so it is \boxed{4}", 1.0, 1.0),
        (r"so it is \boxed{5}.", 1.0, 0.0),
        ("so it is 4", 0.0, 0.0),
        (r"\boxed{4} and then much more text, on and on, long after the answer was given", 0.0, 0.0),
        (r"\boxed{\frac{8}{2}}", 1.0, 1.0),
    ],
)
def test_boxed_rewards(completion, formatted, right):
    for form in (completion, [{"role": "assistant", "content": completion}]):
        assert rewards.boxed_format_reward([form]) == [formatted]
        assert rewards.boxed_accuracy_reward([form], solution=["4"]) == [right]
