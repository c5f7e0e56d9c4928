"""
Blended decoding against decoding with the student alone and with the teacher alone.

The bar: one blended `generate` takes at most 1.10 times the student's own `generate` plus the teacher's, for the same
prompts and lengths. Statistics and the record of log-probabilities are on, as in training. Both models have random
weights and the sizes of SmolLM2-135M; nothing is downloaded.

```sh
python examples/benchmarks/decode.py
python examples/benchmarks/decode.py --repeats 9 --new_tokens 96
```
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from _report import Report, Seconds, seconds
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from trl_blend import LogitMixing, ProbabilityMixing, blended_generation


BAR = 1.10
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}
PAD_ID = 2


def random_model(seed: int) -> PreTrainedModel:
    """A model of SmolLM2-135M's sizes with random weights, in float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M), dtype=torch.float32).eval()


def prompts(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Left-padded random prompts of three quarters of `length` to `length` tokens, as a trainer passes them."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, SMOLLM2_135M["vocab_size"], (batch_size, length), generator=generator)
    padding = torch.arange(batch_size) % (length // 4)
    mask = (torch.arange(length) >= padding[:, None]).long()
    return {"input_ids": input_ids.masked_fill(mask == 0, PAD_ID), "attention_mask": mask}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    student, teacher = random_model(0), random_model(1)
    inputs = prompts(args.batch_size, args.prompt_tokens)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": PAD_ID}

    def generate(model: PreTrainedModel, new_tokens: int) -> None:
        # No end-of-sequence token: every arm decodes the same number of tokens
        config = GenerationConfig(**settings, max_new_tokens=new_tokens, eos_token_id=None, disable_compile=True)
        torch.manual_seed(0)
        with torch.no_grad():
            sequences = model.generate(**inputs, generation_config=config)
        assert sequences.shape == (args.batch_size, args.prompt_tokens + new_tokens)

    def blended(rule: Any, new_tokens: int) -> None:
        with blended_generation(student, teacher, rule, record=True) as session:
            generate(student, new_tokens)
        assert session.records[0].behavior_logps.shape == (args.batch_size, new_tokens)

    arms: dict[str, Callable[[int], None]] = {
        "student": lambda new_tokens: generate(student, new_tokens),
        "teacher": lambda new_tokens: generate(teacher, new_tokens),
        "blended_logits": lambda new_tokens: blended(LogitMixing(0.3), new_tokens),
        "blended_probs": lambda new_tokens: blended(ProbabilityMixing(0.3), new_tokens),
    }
    for arm in arms.values():
        arm(2)
    report = Report("decode", {**vars(args), "model": SMOLLM2_135M, "dtype": "float32"})
    times: dict[str, list[Seconds]] = {name: [] for name in arms}
    for repeat in range(args.repeats):
        names = list(arms)
        # Another arm goes first in each round, so that a slow drift of the machine favours none
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(seconds(lambda name=name: arms[name](args.new_tokens)))
        print(f"round {repeat + 1}: " + ", ".join(f"{name} {times[name][-1].wall:.2f} s" for name in arms), flush=True)
    for clock in Seconds._fields:
        by_arm = {name: [getattr(value, clock) for value in values] for name, values in times.items()}
        for name, values in by_arm.items():
            report.note(f"{name}, {clock} time (s)", values)
        for space in ("logits", "probs"):
            rounds = zip(by_arm[f"blended_{space}"], by_arm["student"], by_arm["teacher"], strict=True)
            ratios = [blend / (student_alone + teacher_alone) for blend, student_alone, teacher_alone in rounds]
            report.row(f"blended decode ({space} mixed) / (student + teacher decode), {clock} time", ratios, BAR)
    report.write()


if __name__ == "__main__":
    main()
