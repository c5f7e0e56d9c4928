"""
Rollouts of trust-region distillation: the student alone, a fixed teacher weight, the trust region, speculative KD.

The bar: rollouts from the trust region take at most 1.20 times those with a fixed teacher weight, at batch 16. What is
compared is the blend rule, so statistics and the record of log-probabilities are on in every blended arm, as in
training. Sizes are those of SmolLM2-135M for the teacher, and of 12 of its 30 layers for the student. Both have
random weights and nothing is downloaded; `--teacher` adds a pair of real weights: a checkpoint of that shape, and a
student of its layers. The number of passes over the vocabulary depends on how far apart the two policies are.

```sh
python examples/benchmarks/opd_rollout.py
python examples/benchmarks/opd_rollout.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct
```
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from _report import Report, Seconds, seconds
from decode import PAD_ID, SMOLLM2_135M, prompts, random_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trl_blend import LogitMixing, SpeculativeKD, TrustRegion, blended_generation


BAR = 1.20
# Early and late layers, as is usual when layers are dropped
STUDENT_LAYERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 28, 29)


def layers_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """A student that is the teacher with [`STUDENT_LAYERS`] only."""
    student = copy.deepcopy(teacher)
    layers = [student.model.layers[index] for index in STUDENT_LAYERS]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    student.model.layers = torch.nn.ModuleList(layers)
    student.config.num_hidden_layers = len(layers)
    return student


def pairs(checkpoint: str | None) -> dict[str, tuple[PreTrainedModel, PreTrainedModel]]:
    """Student and teacher of each comparison, in float32."""
    found = {"random weights": (layers_of(random_model(0)), random_model(1))}
    if checkpoint is not None:
        teacher = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        found["real weights"] = layers_of(teacher), teacher
    return found


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, args: argparse.Namespace
) -> tuple[dict[str, list[Seconds]], dict[str, Any]]:
    """Time of every round of each arm, and the means of the rules' statistics."""
    inputs = prompts(args.batch_size, args.prompt_tokens)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": PAD_ID}
    statistics: dict[str, Any] = {}

    def generate(new_tokens: int) -> None:
        # No end-of-sequence token: every arm decodes the same number of tokens
        config = GenerationConfig(**settings, max_new_tokens=new_tokens, eos_token_id=None, disable_compile=True)
        torch.manual_seed(0)
        with torch.no_grad():
            sequences = student.generate(**inputs, generation_config=config)
        assert sequences.shape == (args.batch_size, args.prompt_tokens + new_tokens)

    def blended(rule: Any, new_tokens: int) -> None:
        with blended_generation(student, teacher, rule, record=True) as session:
            generate(new_tokens)
        means = {name: values.mean().item() for name, values in session.records[0].statistics.items()}
        statistics[type(rule).__name__] = means

    arms: dict[str, Callable[[int], None]] = {
        "student alone": generate,
        "fixed weight": lambda new_tokens: blended(LogitMixing(0.3), new_tokens),
        "trust region": lambda new_tokens: blended(TrustRegion(0.01), new_tokens),
        "speculative KD": lambda new_tokens: blended(SpeculativeKD(15, 0.2), new_tokens),
    }
    for arm in arms.values():
        arm(2)
    times: dict[str, list[Seconds]] = {name: [] for name in arms}
    for repeat in range(args.repeats):
        names = list(arms)
        # Another arm goes first in each round, so that a slow drift of the machine favours none
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(seconds(lambda name=name: arms[name](args.new_tokens)))
        print(f"round {repeat + 1}: " + ", ".join(f"{name} {times[name][-1].wall:.2f} s" for name in arms), flush=True)
    return times, statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a checkpoint of SmolLM2-135M's shape, to measure real weights too")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    report = Report("opd_rollout", {**vars(args), "model": SMOLLM2_135M, "student_layers": STUDENT_LAYERS})
    tokens = args.batch_size * args.new_tokens
    for weights, (student, teacher) in pairs(args.teacher).items():
        times, statistics = measure(student, teacher, args)
        for name, values in times.items():
            report.note(f"{weights}: {name}, tokens/s", [tokens / value.wall for value in values])
        report.note(f"{weights}: means of the rules' statistics", statistics)
        for clock in Seconds._fields:
            fixed = [getattr(value, clock) for value in times["fixed weight"]]
            ratios = [getattr(ours, clock) / other for ours, other in zip(times["trust region"], fixed, strict=True)]
            report.row(f"trust-region rollouts / fixed-weight rollouts, {weights}, {clock} time", ratios, BAR)
    report.write()


if __name__ == "__main__":
    main()
