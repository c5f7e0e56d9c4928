"""What the cards of all trainers have in common: names, results, the license, the curves."""

import ast
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig

from tests.trainers import runs
from tests.trainers.card_reading import code_of, metadata_of, read_card, run_of, tables_of, write_card
from trl_blend.reports.curves import draw_curves
from trl_blend.trainers import _cards


COMMIT = "1234567890abcdef1234567890abcdef12345678"
SCORES = {
    "rewards": ["accuracy"],
    "prompts": 20,
    "before": {"student": [(0.25, 0.01)]},
    "after": {"student": [(0.5, 0.02)]},
}


# Names


@pytest.fixture
def from_hub(monkeypatch):
    """`from_hub(trainer)` makes its models come from the Hub."""

    def change(trainer, base="my-org/student", teacher="google/gemma-2-2b-it"):
        trainer.model.config._name_or_path = base
        trainer.model.config._commit_hash = COMMIT
        for partner in trainer.partners:
            partner.config._name_or_path, partner.config._commit_hash = teacher, COMMIT
        return trainer

    return change


def test_names_of_the_hub(build_opd, from_hub):
    card = write_card(from_hub(build_opd()), dataset_name="my-org/prompts")
    metadata, run = metadata_of(card), run_of(card)
    assert metadata["base_model"] == "my-org/student" and metadata["base_model_relation"] == "finetune"
    assert metadata["datasets"] == "my-org/prompts"
    assert run["started from"] == "[my-org/student](https://huggingface.co/my-org/student) at commit `1234567890ab`"
    teacher = "[google/gemma-2-2b-it](https://huggingface.co/google/gemma-2-2b-it) at commit `1234567890ab`, float32"
    assert run["teacher"] == teacher
    assert run["identity of the teacher"].endswith("under this name, at this commit")
    data = "[my-org/prompts](https://huggingface.co/datasets/my-org/prompts)"
    assert run["data"] == f"{len(runs.PROMPTS)} prompts of {data}" and f" on {data}, distilled" in card


@pytest.mark.parametrize("base", ["/home/me/student", "/gone/from/this/machine", "../student", "a/b/c"])
def test_no_path_of_this_machine(build_opd, from_hub, base):
    card = write_card(from_hub(build_opd(), base, "/home/me/my teacher"), dataset_name="/home/me/data/my prompts")
    assert "/home/me" not in card and base not in card
    assert "base_model" not in metadata_of(card) and "datasets" not in metadata_of(card)
    assert run_of(card)["teacher"] == "`my teacher` (a local model), float32"
    assert run_of(card)["data"].endswith("`my prompts` (a local dataset)")


def test_strange_names(build_opd, from_hub):
    name = "a|b\nc {{ model_name }} {% if %} `d`"
    trainer = from_hub(build_opd(), name, f"/x/{name}")
    trainer.create_model_card(model_name="tiny", dataset_name=f"/y/{name}")
    card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    start, dataset, teacher = (run_of(card)[key] for key in ("started from", "data", "teacher"))
    shown = "`a|b c {{ model_name }} {% if %} 'd'`"
    assert start == f"{shown} (a local model)" and teacher == f"{shown} (a local model), float32"
    assert dataset.endswith(f"{shown} (a local dataset)")
    assert f"fine-tuned version of {shown} (a local model) on {shown} (a local dataset), distilled" in card


def test_without_a_name_the_folder_names_the_model(build_opd):
    trainer = build_opd()
    trainer.create_model_card()
    name = Path(trainer.args.output_dir).name
    assert f"# Model Card for {name}\n" in read_card(trainer)


def test_a_model_name_with_quotes_leaves_the_example_valid(build_opd):
    card = write_card(build_opd(), model_name='my "best"\\model')
    assert r'model="my \"best\"\\model")' in card


def test_tags(build_opd):
    for tags in ("mine", ["mine"]):
        found = metadata_of(write_card(build_opd(), tags=tags))["tags"]
        assert found == ["generated_from_trainer", "mine", "trl", "trl-blend", "trust-region-opd"]


def test_adapter(build_opd, from_hub):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    card = write_card(from_hub(build_opd(trainer_kwargs={"peft_config": lora})))
    metadata = metadata_of(card)
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("peft", "adapter")
    assert metadata["base_model"] == "my-org/student"


def test_the_revision_that_was_asked_for(build_opd, from_hub):
    trainer = from_hub(build_opd())
    trainer.model.config._commit_hash = None
    trainer.args.model_init_kwargs = {"revision": "v1.0"}
    assert run_of(write_card(trainer))["started from"].endswith("at revision `v1.0`")


def test_the_commit_that_the_cache_knows(build_opd, from_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commits = {"my-org/student": "a" * 40, "google/gemma-2-2b-it": "b" * 40}
    for name, commit in commits.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        for file, content in ((f"snapshots/{commit}/config.json", "{}"), ("refs/v2", commit)):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(content)
    trainer = from_hub(build_opd())
    trainer.model.config._commit_hash = trainer.partners[0].config._commit_hash = None
    trainer.args.model_init_kwargs, trainer.args.teacher_model_revision = {"revision": "v2"}, "v2"
    run = run_of(write_card(trainer))
    assert run["started from"].endswith("at commit `aaaaaaaaaaaa`")
    assert "at commit `bbbbbbbbbbbb`" in run["teacher"]
    trainer.args.teacher_model_init_kwargs = {"revision": "v3"}  # which is what is loaded, and not in the cache
    run = run_of(write_card(trainer))
    assert "at revision `v3`" in run["teacher"] and run["identity of the teacher"].endswith("were not hashed")


def test_the_usage_shows_a_prompt_of_the_data(build_opd, build):
    """In the form that it was trained in: text as it is, messages through the chat template."""
    system = {"role": "system", "content": 'Add {{two}} "numbers".'}
    messages = [system, {"role": "user", "content": "1 + 1 =\n" + "x" * 400}]
    rows = Dataset.from_dict({"prompt": [messages] * 8})
    for make in (build_opd, build):
        _, code = code_of(write_card(make()))
        assert '"role"' not in code and '("12+3="' in code
        tree, code = code_of(write_card(make(train_dataset=rows)))
        (shown,) = [
            ast.literal_eval(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.List) and "role" in ast.dump(node)
        ]
        assert shown[0] == system and shown[1]["content"] == messages[1]["content"][:200] + "…"


def test_a_stream_has_no_prompt_to_show(build_opd):
    trainer = build_opd(train_dataset=runs.dataset().to_iterable_dataset())
    assert '"content": "What is 123 + 456?"' in write_card(trainer)
    trainer.processing_class.chat_template = None
    assert '("What is 123 + 456?"' in write_card(trainer)


# Results and curves


def test_scores(build_opd):
    trainer = build_opd()
    assert "## Results" not in write_card(trainer)
    trainer.card_results = SCORES
    card = write_card(trainer)
    assert tables_of(card)["Results"] == [
        ["policy", "reward", "before", "after"],
        ["student", "accuracy", "0.250 ± 0.010", "0.500 ± 0.020"],
    ]
    assert "On 20 held-out prompts: mean ± standard error." in card and "model-index" not in metadata_of(card)
    trainer.card_results = {**SCORES, "decoding": "greedy", "dataset": "openai/gsm8k", "policy": "student"}
    card = write_card(trainer)
    assert "Greedy decoding of 20 held-out prompts" in card
    ((result,),) = [model["results"] for model in metadata_of(card)["model-index"]]
    assert result["dataset"]["type"] == "openai/gsm8k" and result["metrics"] == [{"type": "accuracy", "value": 0.5}]


def test_curves(build_opd, monkeypatch):
    trainer = build_opd(max_steps=2, save_strategy="steps", save_steps=1)
    assert "training_curves.png" not in write_card(trainer)  # nothing is logged yet
    drawn = []
    monkeypatch.setattr(
        _cards, "draw_curves", lambda log, *args, **names: drawn.append(len(log)) or draw_curves(log, *args, **names)
    )
    trainer.train()
    assert drawn == [3]  # once, at the end, with the summary of the run
    assert "](training_curves.png)" in read_card(trainer) and "| last logged |" not in read_card(trainer)
    card, picture = write_card(trainer), Path(trainer.args.output_dir, "training_curves.png")
    assert "](training_curves.png)" in card and "![The budget" in card
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert drawn == [3]
    picture.unlink()
    monkeypatch.setattr(trainer, "write_curves", lambda: None)
    assert "training_curves.png" not in write_card(trainer)


def test_a_run_of_one_log_has_a_table_instead_of_dots(build_opd):
    trainer = build_opd(max_steps=1, kl_budget=0.1, blend_warmup_steps=2)
    trainer.train()
    assert not Path(trainer.args.output_dir, "training_curves.png").exists()
    table = next(rows for rows in tables_of(write_card(trainer)).values() if rows[0][0] == "last logged")
    values = {name: (step, value) for name, step, value in table[1:]}
    logged = trainer.state.log_history[0]
    assert values["KL(behaviour ‖ student): realised, nats per token"] == (
        "1",
        f"{logged['blend/kl_behavior_student']:.4g}",
    )
    assert values["Loss"] == ("1", f"{logged['loss']:.4g}")


def test_half_precision_is_told_apart(build_opd):
    trainer = build_opd()
    trainer.args.bf16 = True
    assert run_of(write_card(trainer))["trained weights"] == "all, float32 weights, bfloat16 arithmetic"


# License


def test_no_license_is_invented(build_opd):
    card = write_card(build_opd())
    assert "license" not in metadata_of(card) and "licence" not in card


def test_the_license_of_the_base_is_passed_on_and_that_of_the_publisher_stays(build_opd, models, tmp_path):
    base = shutil.copytree(models / "student", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\n---\n")
    trainer = build_opd(student=str(base))
    metadata = metadata_of(write_card(trainer))
    assert (metadata["license"], metadata["license_name"]) == ("other", "theirs")
    path = Path(trainer.args.output_dir, "README.md")
    text = path.read_text().replace("license_name: theirs\n", "")
    path.write_text(text.replace("license: other", "license: apache-2.0\nlanguage: en"))
    metadata = metadata_of(write_card(trainer))
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", "en") and "license_name" not in metadata


# Processes and the Hub


def test_only_the_main_process_writes(build_opd, monkeypatch):
    trainer = build_opd()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(trainer, "card_fields", lambda: 1 / 0)
    trainer.create_model_card(model_name="tiny")
    assert not Path(trainer.args.output_dir, "README.md").exists()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_code_of_an_ordinary_card_decodes_the_student(build_opd, adapter, capsys):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    prompt = [{"role": "user", "content": "What is 123 + 456?"}]
    rows = Dataset.from_dict({"prompt": [prompt] * 8})
    trainer = build_opd(trainer_kwargs={"peft_config": lora if adapter else None}, train_dataset=rows)
    trainer.save_model()
    code = code_of(write_card(trainer))[1]
    greedily = "max_new_tokens=8, do_sample=False"
    code = code.replace('"tiny"', repr(trainer.args.output_dir)).replace("max_new_tokens=256", greedily)
    exec(code, {})
    tokenizer = trainer.processing_class
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    output = trainer.model.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.splitlines()[-1] == text and text
