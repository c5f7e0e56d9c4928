"""The trust-region script: its settings files parse, it fails before loading anything, and its table is right."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import GenerationConfig

import trust_region_opd
from testbed.evaluate import load_checkpoint
from tests.examples.rates import REWARDS, assert_rates
from trl_blend.scripts.scoring import means_and_errors, tokenize_prompts
from trl_blend.trainers._greedy import decode, own_share


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*opd_*.yaml") if not path.stem.startswith("offline"))
BASELINES = "examples/configs/opd_baselines_testbed.yaml"
TESTBED = "examples/configs/trust_region_opd_testbed.yaml"
STUDENT = str(ROOT / "examples" / "testbed" / "checkpoints" / "student")
# Odd, so that two processes have unequal shares; the tenth prompt is shorter than the others
NUM_PROMPTS = 11


def run(output_dir, *arguments, launch=()):
    command = [sys.executable, *launch, "examples/trust_region_opd.py", "--config", TESTBED, *arguments]
    command += ["--output_dir", str(output_dir), "--num_test_prompts", str(NUM_PROMPTS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, json.loads((output_dir / "before_after.json").read_text())


def parse(path, tmp_path, *arguments):
    """On a CPU, where mixed precision is the one setting that cannot be kept."""
    cpu = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    config = ["--config", str(path)] if path else []
    return trust_region_opd.make_parser().parse_args_and_config([*config, *cpu, *arguments])


def test_the_testbed_run_prints_and_saves_what_its_checkpoints_score(tmp_path):
    steps = ("--max_steps", "2", "--blend_warmup_steps", "1", "--per_device_train_batch_size", "4")
    printed, table = run(tmp_path, *steps, "--learning_rate", "5e-4")
    assert (table["rewards"], table["prompts"]) == (REWARDS, NUM_PROMPTS)
    assert list(table["before"]) == list(table["after"]) == ["student", "teacher"]
    assert_rates(table["before"]["student"], "student", NUM_PROMPTS)
    assert_rates(table["after"]["student"], tmp_path, NUM_PROMPTS)
    for when in ("before", "after"):
        assert_rates(table[when]["teacher"], "teacher", NUM_PROMPTS)
    assert table["before"]["student"] != table["after"]["student"] != table["after"]["teacher"]
    for mean, error in (*table["before"]["student"], *table["after"]["student"]):
        assert f"{mean:.3f} ± {error:.3f}" in printed
    assert "2605.31159" in (tmp_path / "README.md").read_text()


@pytest.mark.distributed
def test_two_processes_score_what_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1")
    _, table = run(
        tmp_path,
        *("--max_steps", "1", "--per_device_train_batch_size", "2"),
        launch=(*launch, "--master_port", port),
    )
    assert_rates(table["before"]["student"], "student", NUM_PROMPTS)
    assert_rates(table["before"]["teacher"], "teacher", NUM_PROMPTS)
    assert_rates(table["after"]["student"], tmp_path, NUM_PROMPTS)


@pytest.mark.parametrize(("num_rows", "num_processes"), [(7, 1), (7, 2), (5, 4), (8, 4), (1, 3)])
def test_shares_of_the_rows(num_rows, num_processes):
    class State:
        def __init__(self, process_index):
            self.process_index, self.num_processes = process_index, num_processes

    shares = [own_share(list(range(num_rows)), State(index)) for index in range(num_processes)]
    assert len({len(share) for share in shares}) == 1
    assert sum(shares, [])[:num_rows] == list(range(num_rows))


def test_prompts_of_unequal_length_are_decoded_as_if_alone():
    model, tokenizer = load_checkpoint("student")
    prompts = [[{"role": "user", "content": text}] for text in ("1+2=?", "907+895=?", "45+6=?")]
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": [tokenizer.eos_token_id]}
    settings = GenerationConfig(do_sample=False, max_new_tokens=56, **ends)
    prompt_ids = tokenize_prompts(tokenizer, prompts)
    together = decode(model, prompt_ids, settings, batch_size=2)
    assert len(set(map(len, prompt_ids))) == 3 and len(set(map(len, together))) > 1
    for ids, completion in zip(prompt_ids, together, strict=True):
        alone = model.generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :].tolist()
        assert completion == alone and completion[-1] == tokenizer.eos_token_id


def test_rewards_that_are_none_are_left_out_of_the_table():
    rewards = torch.tensor([[1.0, 1.0], [0.0, math.nan], [1.0, 0.0], [1.0, 1.0]])
    (first, first_error), (second, second_error) = means_and_errors(rewards)
    assert (first, second) == (pytest.approx(3 / 4), pytest.approx(2 / 3))
    assert first_error == pytest.approx(math.sqrt((3 * 1 / 16 + 9 / 16) / 3 / 4))
    assert second_error == pytest.approx(math.sqrt((2 * 1 / 9 + 4 / 9) / 2 / 3))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_files_parse(path, tmp_path):
    script_args, training_args, model_args, _ = parse(path, tmp_path)
    assert training_args.blends and model_args.model_name_or_path and training_args.teacher_model_name_or_path
    assert (training_args.rollout_policy, training_args.kl_budget) == ("trust_region", 0.01)
    assert script_args.reward_funcs and script_args.num_test_prompts == 300


def test_every_method_of_the_page_is_a_matter_of_flags(tmp_path):
    """Its table of settings, as flags behind the file that names no method."""
    page = (ROOT / "examples" / "trust_region_opd.md").read_text(encoding="utf-8")
    table = page[page.index("| method | settings |") :].split("\n\n")[0]
    methods = re.findall(r"\| `([a-z_]+=[^|]*)` \|", table)
    assert len(methods) == 13
    for settings in methods:
        pairs = dict(pair.split("=") for pair in settings.split(", "))
        flags = [text for name, value in pairs.items() for text in (f"--{name}", value.strip('"'))]
        parser = trust_region_opd.make_parser()
        arguments = ["--config", str(ROOT / BASELINES), "--output_dir", str(tmp_path), *flags]
        _, training_args, _, _ = parser.parse_args_and_config(arguments)
        for name, value in pairs.items():
            assert str(getattr(training_args, name)) == value.strip('"')


def test_the_baselines_run_on_the_settings_of_the_testbed():
    ours, baselines = (yaml.safe_load((ROOT / path).read_text(encoding="utf-8")) for path in (TESTBED, BASELINES))
    method = {"rollout_policy", "kl_budget", "kl_budget_schedule", "blend_warmup_steps", "output_dir"}
    assert {key: value for key, value in ours.items() if key not in method} == {
        key: value for key, value in baselines.items() if key != "output_dir"
    }


def test_the_settings_of_the_paper(tmp_path):
    """Table 2 and Appendix A of arXiv 2605.31159."""
    path = next(path for path in CONFIGS if path.stem.endswith("qwen3"))
    script_args, args, model_args, _ = parse(path, tmp_path)
    assert "NOT RUN BY US" in path.read_text().splitlines()[1]
    assert (model_args.model_name_or_path, args.teacher_model_name_or_path) == (
        "Qwen/Qwen3-1.7B-Base",
        "Qwen/Qwen3-8B",
    )
    assert script_args.system_prompt == r"Please reason step by step, and put your final answer within \boxed{}."
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.01, 1.0)
    assert (args.optim, args.learning_rate) == ("adamw_torch", 1e-5)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("constant_with_warmup", 15)
    assert (args.max_completion_length, args.temperature, args.num_train_epochs) == (7168, 1.0, 1)
    assert (args.beta, args.kl_support, args.kl_top_k) == (1.0, "student_top_k", 16)
    assert args.num_rollouts_per_prompt == 4
    assert 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 64 * 4
    assert (args.kl_budget_schedule, args.blend_warmup_steps, args.canonicalize_eos) == ("linear", 50, True)


BAD = {
    "prompt column": (["--prompt_column", "problm"], "prompt_column=problm.*question, answer"),
    "answer column": (["--prompt_column", "question", "--answer_column", "sum"], "answer_column=sum"),
    "no prompt column": ([], "no column `prompt`.*prompt_column"),
    "reward": (["--prompt_column", "question", "--reward_funcs", "acuracy_reward"], "acuracy_reward.*accuracy_reward"),
    "reward's column": (
        ["--prompt_column", "question", "--reward_funcs", "accuracy_reward"],
        "accuracy_reward reads the column `solution`.*answer_column",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_come_before_a_model_is_loaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trust_region_opd, "TrustRegionOPDTrainer", lambda **_: pytest.fail("a model was loaded"))
    arguments, message = BAD[name]
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(20)]
    Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
    data = ["--dataset_name", str(tmp_path / "data.jsonl"), "--model_name_or_path", STUDENT]
    with pytest.raises(ValueError, match=message):
        trust_region_opd.main(*parse(None, tmp_path, *data, *arguments))


def test_nothing_is_filled_in(tmp_path, monkeypatch):
    """The rewards of the test-bed are those of its settings file; without any, nothing is measured."""
    seen = []

    def record(**arguments):
        seen.append(arguments)
        raise StopIteration

    monkeypatch.setattr(trust_region_opd, "TrustRegionOPDTrainer", record)
    Dataset.from_list([{"prompt": f"{n}+1?"} for n in range(20)]).to_json(tmp_path / "data.jsonl")
    own = ("--dataset_name", str(tmp_path / "data.jsonl"), "--teacher_model_name_or_path", "my-teacher")
    for config, arguments in ((TESTBED, ()), (None, (*own, "--model_name_or_path", STUDENT))):
        with pytest.raises(StopIteration):
            trust_region_opd.main(*parse(config, tmp_path, *arguments))
    testbed, data = seen
    assert [function.__name__ for function in testbed["reward_funcs"]] == REWARDS
    assert testbed["teacher_model"] == "examples/testbed/checkpoints/teacher"
    assert (data["reward_funcs"], data["teacher_model"]) == ([], "my-teacher")
