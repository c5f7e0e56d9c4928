"""The offline script: its settings file parses, it refuses before loading anything, and its tables are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import offline_opd
from testbed.evaluate import CHECKPOINTS
from testbed.task import MAX_NEW_TOKENS, build_prompt_dataset
from tests.examples.rates import REWARDS, assert_rates
from tests.rollouts.collecting import collect, score


ROOT = Path(__file__).resolve().parents[2]
TESTBED = ROOT / "examples" / "configs" / "offline_opd_testbed.yaml"
STUDENT, TEACHER = str(CHECKPOINTS / "sft_student"), str(CHECKPOINTS / "teacher")
NUM_PROMPTS = 11
ROWS = 12


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Scored rollouts of the shipped student, as the demo makes them."""
    folder = tmp_path_factory.mktemp("stores")
    drawing = {"temperature": 1.0, "top_p": 1.0, "max_completion_length": MAX_NEW_TOKENS, "dtype": "float32"}
    rollouts = collect(STUDENT, build_prompt_dataset("train", ROWS), folder / "rollouts", **drawing)
    score(rollouts, TEACHER, folder / "scored", top_k=4, dtype="float32")
    return folder / "scored"


def run(script, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def parse(tmp_path, *arguments, config=()):
    cpu = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    return offline_opd.make_parser().parse_args_and_config([*config, *cpu, *arguments])


def test_the_testbed_run_prints_and_saves_what_its_checkpoints_score(scored, tmp_path):
    printed = run(
        "examples/offline_opd.py", "--config", str(TESTBED), "--dataset_name", str(scored), "--output_dir",
        str(tmp_path), "--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
        "--num_test_prompts", str(NUM_PROMPTS),
    )  # fmt: skip
    table = json.loads((tmp_path / "before_after.json").read_text())
    assert (table["rewards"], table["prompts"]) == (REWARDS, NUM_PROMPTS)
    assert_rates(table["before"]["student"], "sft_student", NUM_PROMPTS)
    assert_rates(table["after"]["student"], tmp_path, NUM_PROMPTS)
    assert table["before"]["student"] != table["after"]["student"]
    for mean, error in (*table["before"]["student"], *table["after"]["student"]):
        assert f"{mean:.3f} ± {error:.3f}" in printed
    card = (tmp_path / "README.md").read_text()
    assert "2604.13010" in card


def test_prompts_of_the_testbed_are_written_as_json_lines(tmp_path):
    file = tmp_path / "new" / "prompts.jsonl"
    run("examples/testbed/prompts.py", "--n", "5", "--seed", "3", "--output", str(file))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == build_prompt_dataset("train", 5, 3).to_list()


def test_the_settings_file_parses_and_is_complete(tmp_path):
    given = yaml.safe_load(TESTBED.read_text())
    script_args, training_args, model_args = parse(tmp_path, config=("--config", str(TESTBED)))
    assert model_args.model_name_or_path == "examples/testbed/checkpoints/sft_student"
    assert script_args.test_dataset_name == "testbed" and training_args.teacher_consistency == "strict"
    assert (training_args.max_steps, training_args.offline_loss) == (given["max_steps"], "top_k_reverse_kl")
    # A step is 64 rollouts, each used once: what the demo collects must be enough for the steps
    demo = (ROOT / "Makefile").read_text()
    (prompts,) = re.findall(r"prompts.py --n (\d+)", demo)
    assert int(prompts) == training_args.max_steps * training_args.per_device_train_batch_size
    assert training_args.gradient_accumulation_steps == 1 and "--top_k " in demo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--test_dataset_name", "testbed"), "`--reward_funcs` (what the table of `test_dataset_name` measures) is"),
        (("--test_dataset_name", "testbed", "--reward_funcs", "nonsense"), "`reward_funcs` has 'nonsense'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(arguments, message, tmp_path, monkeypatch, scored):
    monkeypatch.setattr(offline_opd, "OfflineOPDTrainer", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        named = ("--dataset_name", str(scored), "--model_name_or_path", STUDENT)
        offline_opd.main(*parse(tmp_path, *named, *arguments))


def test_the_table_is_of_the_test_split_or_else_of_the_train_split(tmp_path):
    rows = [{"prompt": f"{n}+1=?", "answer": str(n + 1)} for n in range(30)]
    for split, count in (("train", 30), ("test", 3)):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    given = (
        "--model_name_or_path",
        STUDENT,
        "--reward_funcs",
        "testbed.task.answer_reward",
        "--num_test_prompts",
        "20",
    )
    for name, expected in (("data", 3), ("data/train.jsonl", 20)):
        parsed = parse(tmp_path, "--test_dataset_name", str(tmp_path / name), *given, "--max_completion_length", "8")
        assert len(offline_opd.load_test(*parsed)[0]) == expected


def test_the_table_asks_as_the_rollouts_were_drawn(scored, tmp_path, monkeypatch):
    asked = {"role": "user", "content": "1+2=?"}
    begun = [asked, {"role": "assistant", "content": "3"}]
    rows = [{"prompt": prompt, "answer": "3"} for prompt in ([asked], begun)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = offline_opd.load_scored_rollouts(scored)
    template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    store.manifest.source["chat_template_kwargs"] = {"chat_template": template}
    monkeypatch.setattr(offline_opd, "load_scored_rollouts", lambda *_, **__: store)
    found = []

    def greedy_scores(model, rows, prompt_ids, *_, **__):
        found.append(prompt_ids)
        return [(0.0, None)]

    monkeypatch.setattr(offline_opd, "greedy_scores", greedy_scores)
    offline_opd.main(*parse(
        tmp_path / "out", "--dataset_name", str(scored), "--model_name_or_path", STUDENT, "--max_steps", "1",
        "--report_to", "none", "--dtype", "float32", "--test_dataset_name", str(tmp_path / "prompts.jsonl"),
        "--reward_funcs", "testbed.task.answer_reward", "--max_completion_length", "8",
    ))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("1+2=?=", "1+2=?3")]
    assert found == [expected, expected]


def test_without_test_prompts_there_is_no_table(scored, tmp_path, capsys):
    script, training, model = parse(
        tmp_path, "--dataset_name", str(scored), "--model_name_or_path", STUDENT, "--max_steps", "1",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--report_to", "none",
        "--dtype", "float32",
    )  # fmt: skip
    offline_opd.main(script, training, model)
    assert "held-out prompts" not in capsys.readouterr().out
    assert not (tmp_path / "before_after.json").exists() and (tmp_path / "model.safetensors").exists()
