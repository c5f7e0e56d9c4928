"""
What a user of the wheel does first: import everything, train one step, read the card, decode with the teacher, run
the commands.

Not a pytest module. `make wheel-test` runs it as `python -I wheel_check.py` in an environment that holds the wheel and
its required dependencies only, from a folder outside the checkout. It writes to a temporary folder.
"""

import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config  # noqa: E402

import trl_blend  # noqa: E402


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def check_imports() -> None:
    home = Path(trl_blend.__file__).resolve().parent
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"imported {home}, not the installed wheel"
    assert (home / "py.typed").is_file()
    for name in trl_blend.__all__:
        getattr(trl_blend, name)
    modules = [module.name for module in pkgutil.walk_packages([str(home)], "trl_blend.")]
    modules.remove("trl_blend.serving.model")  # which vLLM imports where it is installed
    for module in modules:
        importlib.import_module(module)
    print(f"trl_blend {trl_blend.__version__}: {len(trl_blend.__all__)} names, {len(modules)} modules")


def build_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def code_point_reward(completions: list, **kwargs) -> list[float]:
    return [float(sum(map(ord, completion[0]["content"]))) for completion in completions]  # no two are equal


SETTINGS = {
    "max_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}


def save_models(folder: Path) -> None:
    tokenizer = build_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        build_model(seed, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train_one_step(trainer_class: type, args, metric: str, value: float, folder: Path) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two plus two", "3", "four?")]
    trainer = trainer_class(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        reward_funcs=code_point_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if metric in entry)
    assert logged[metric] == value
    assert math.isfinite(logged["loss"]) and logged["grad_norm"] > 0
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    trainer.save_model(args.output_dir)
    trainer.create_model_card()
    card = (Path(args.output_dir) / "README.md").read_text()
    assert trainer_class._name in card and "[[" not in card and "{{ " not in card
    print(
        f"{trainer_class.__name__}: loss {logged['loss']:.4f}, gradient norm {logged['grad_norm']:.4f}; card written"
    )


def run_program(folder: Path, *arguments: str) -> str:
    """The installed command, in a folder without a checkout; what it prints."""
    program = str(Path(sys.executable).parent / "trl-blend")
    return subprocess.run([program, *arguments], check=True, cwd=folder, stdout=subprocess.PIPE, text=True).stdout


def check_commands(folder: Path) -> None:
    environment = run_program(folder, "env")
    assert environment.split()[:2] == ["trl_blend", trl_blend.__version__]
    run_program(folder, "demo", "--output_dir", "demo", "--max_steps", "1", "--num_test_prompts", "4")
    table = json.loads((folder / "demo" / "before_after.json").read_text())
    assert table["prompts"] == 4 and list(table["before"]) == ["student alone", "mixed, weight 0.10", "teacher alone"]
    assert (folder / "demo" / "model.safetensors").is_file()
    teacher = ["--teacher_model_name_or_path", str(folder / "teacher"), "--teacher_weight", "0.3"]
    student = ["--model_name_or_path", str(folder / "student"), "--output_dir", str(folder / "exported")]
    run_program(folder, "export", *student, *teacher)
    assert (folder / "exported" / "custom_generate" / "generate.py").is_file()
    print("env, demo and export work")


def distil_offline(folder: Path) -> None:
    student, teacher, run = (str(folder / name) for name in ("student", "teacher", "offline"))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two plus two", "3", "four?")))
    commands = [
        ["record-teacher", "--model_name_or_path", student, "--teacher_model_name_or_path", teacher],
        ["rollouts", "--model_name_or_path", student, "--dataset_name", str(prompts), "--max_completion_length", "8"],
        ["score", "--teacher_model_name_or_path", teacher, "--rollouts", str(folder / "rollouts")],
        ["inspect", str(folder / "scored"), "--model_name_or_path", student],
    ]
    outputs = [[], ["--output_dir", str(folder / "rollouts")], ["--output_dir", str(folder / "scored")], []]
    for command, output in zip(commands, outputs, strict=True):
        run_program(folder, *command, *output)
    settings = {name: value for name, value in SETTINGS.items() if name != "max_completion_length"}
    args = trl_blend.OfflineOPDConfig(output_dir=run, gradient_accumulation_steps=1, **settings)
    trainer = trl_blend.OfflineOPDTrainer(model=student, args=args, train_dataset=str(folder / "scored"))
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "offline/drift_kl" in entry)
    assert abs(logged["offline/drift_kl"]) < 1e-4 and logged["grad_norm"] > 0
    assert trainer.consistency_report.ok
    trainer.create_model_card()
    assert "OfflineOPD" in (folder / "offline" / "README.md").read_text()
    print(f"OfflineOPDTrainer: loss {logged['loss']:.4f}, gradient norm {logged['grad_norm']:.4f}; card written")


def decode(folder: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(folder / "opd")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    inputs = AutoTokenizer.from_pretrained(folder / "opd")("one", return_tensors="pt")

    def greedy(model: torch.nn.Module) -> list[int]:
        return model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()

    alone = greedy(student)
    with trl_blend.blended_generation(student, teacher, trl_blend.LogitMixing(1.0)):
        blended = greedy(student)
    assert blended == greedy(teacher) != alone, "weight 1 must decode the teacher"
    assert greedy(student) == alone, "the student must be itself again after the block"
    print("blended decoding works")


if __name__ == "__main__":
    check_imports()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        save_models(home)
        mixing = trl_blend.LogitMixGRPOConfig(
            output_dir=str(home / "run"), teacher_weight=0.3, num_generations=4, **SETTINGS
        )
        train_one_step(trl_blend.LogitMixGRPOTrainer, mixing, "mixing/teacher_weight", 0.3, home)
        region = trl_blend.TrustRegionOPDConfig(
            output_dir=str(home / "opd"), kl_budget=0.01, blend_warmup_steps=5, **SETTINGS
        )
        train_one_step(trl_blend.TrustRegionOPDTrainer, region, "blend/kl_budget", 0.01, home)
        decode(home)
        distil_offline(home)
        check_commands(home)
