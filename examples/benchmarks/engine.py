"""
Blended decoding by an engine of vLLM against blended decoding with transformers, for prompts of ragged lengths.

The bars: transformers takes at least 3 times as long for 64 sequences; the blend takes at most 1.15 times the engine's
student and teacher, each alone, together; the trust region at most 1.15 times a fixed weight. Every arm draws the same
number of tokens for the same prompts. Needs vLLM (`make test-vllm` installs it for the CPU).

```sh
python examples/benchmarks/engine.py
python examples/benchmarks/engine.py --sequences 256 --longest 128
python examples/benchmarks/engine.py --sizes smollm2 --shortest 16 --longest 48
```
"""

import argparse
import importlib.util
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _report import Report, Seconds, seconds
from decode import SMOLLM2_135M
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from testbed import task
from trl_blend import LogitMixing, TrustRegion, blended_generation
from trl_blend.serving.arguments import engine_arguments
from trl_blend.serving.blend import Blend, Partner


CHECKPOINTS = Path(task.__file__).resolve().parent / "checkpoints"
RULES = {"fixed_weight": LogitMixing(0.3), "trust_region": TrustRegion(0.05)}


def folders(sizes: str, scratch: Path) -> list[str]:
    """Student and teacher: those of the test-bed, or random ones of SmolLM2-135M's sizes."""
    if sizes == "testbed":
        return [str(CHECKPOINTS / name) for name in ("student", "teacher")]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "student")
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M), dtype=torch.float32)
        model.save_pretrained(scratch / name)
        tokenizer.save_pretrained(scratch / name)
    return [str(scratch / name) for name in ("student", "teacher")]


def ragged(count: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Lengths that are spread evenly, in a random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (shortest + order * (longest - shortest) // max(count - 1, 1)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=["testbed", "smollm2"], default="testbed")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=32)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: nothing is measured.")
        return
    with TemporaryDirectory() as scratch:
        measure(args, *folders(args.sizes, Path(scratch)))


def measure(args: argparse.Namespace, student_folder: str, teacher_folder: str) -> None:
    from vllm import LLM, SamplingParams

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        for name in (student_folder, teacher_folder)
    )
    lengths = (args.shortest, args.longest)
    prompt_lengths, new_tokens = (ragged(args.sequences, *lengths, seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.vocab_size for model in (student, teacher)) - 10
    prompts = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in prompt_lengths]
    blended = engine_arguments([Partner(teacher_folder)], Blend(RULES["fixed_weight"]))
    del blended["sleep_preserve_parameter_names"]
    common: dict[str, Any] = {"dtype": "float32", "enforce_eager": not torch.cuda.is_available(), "seed": 0}
    common |= {"max_model_len": 2 * args.longest, "max_num_seqs": args.sequences, "enable_prefix_caching": False}
    common |= {"logprobs_mode": "processed_logprobs"}
    memory = {"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {}
    engine = LLM(model=student_folder, **common, **memory, **blended)
    alone = {
        "student": LLM(model=student_folder, **common, **memory),
        "teacher": LLM(model=teacher_folder, **common, **memory),
    }
    params = [
        SamplingParams(temperature=1.0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
        for tokens in new_tokens
    ]
    requests = [{"prompt_token_ids": ids} for ids in prompts]

    def by_engine(llm: Any) -> None:
        results = llm.generate(requests, params, use_tqdm=False)
        assert [len(result.outputs[0].token_ids) for result in results] == new_tokens

    def by_blend(rule: str) -> None:
        engine.collective_rpc("set_blend", args=(Blend(RULES[rule], records=True).to_dict(),))
        by_engine(engine)

    width, longest = max(prompt_lengths), max(new_tokens)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=longest, eos_token_id=None, pad_token_id=0)

    def by_transformers(rule: str) -> None:
        # A batch goes on until its longest sequence ends
        with torch.no_grad(), blended_generation(student, teacher, RULES[rule], record=True):
            student.generate(input_ids=ids, attention_mask=mask, generation_config=settings, disable_compile=True)

    arms: dict[str, Callable[[], None]] = {
        "blend": lambda: by_blend("fixed_weight"),
        "trust_region": lambda: by_blend("trust_region"),
        "student": lambda: by_engine(alone["student"]),
        "teacher": lambda: by_engine(alone["teacher"]),
        "transformers": lambda: by_transformers("fixed_weight"),
    }
    by_engine(engine), by_engine(alone["student"]), by_engine(alone["teacher"])  # first calls set things up
    name = f"engine_{args.sizes}_{args.sequences}"
    report = Report(name, {**vars(args), "dtype": "float32", "tokens": sum(new_tokens)})
    times: dict[str, list[Seconds]] = {name: [] for name in arms}
    for repeat in range(args.repeats):
        names = list(arms)
        # Another arm goes first in each round, so that a slow drift of the machine favours none
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(seconds(arms[name]))
        print(f"round {repeat + 1}: " + ", ".join(f"{name} {times[name][-1].wall:.2f} s" for name in arms), flush=True)
    what = f"{args.sequences} sequences of {args.sizes} sizes"
    for clock in Seconds._fields:
        by_arm = {name: [getattr(value, clock) for value in values] for name, values in times.items()}
        for name, values in by_arm.items():
            report.note(f"{name}, tokens per second of {clock} time", [sum(new_tokens) / value for value in values])
        rounds = [dict(zip(by_arm, values)) for values in zip(*by_arm.values())]
        ratios = {
            "vLLM blended / transformers blended": ([one["blend"] / one["transformers"] for one in rounds], 1 / 3),
            "vLLM blended / (vLLM student + vLLM teacher)": (
                [one["blend"] / (one["student"] + one["teacher"]) for one in rounds],
                1.15,
            ),
            "vLLM trust region / vLLM fixed weight": ([one["trust_region"] / one["blend"] for one in rounds], 1.15),
        }
        for name, (values, bar) in ratios.items():
            report.row(f"{name}, {what}, {clock} time", values, round(bar, 3))
    report.note("peak resident memory (GiB)", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    report.write()


if __name__ == "__main__":
    main()
