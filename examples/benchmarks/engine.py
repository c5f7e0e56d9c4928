"""
Blended decoding by an engine of vLLM against blended decoding with transformers, for prompts of ragged lengths.

The bars: transformers takes at least 3 times as long for 64 sequences; the blend takes at most 1.15 times the engine's
student and teacher, each alone, together; the trust region at most 1.15 times a fixed weight. Every arm draws the same
number of tokens for the same prompts, each time in a process of its own, whose peak of the resident memory (on a GPU:
of the memory reserved there) is told too. Needs vLLM (`make test-vllm` installs it for the CPU).

```sh
python examples/benchmarks/engine.py
python examples/benchmarks/engine.py --sequences 256 --longest 128
python examples/benchmarks/engine.py --sizes smollm2 --longest 128
python examples/benchmarks/engine.py --sizes smollm2 --shortest 16 --longest 48
python examples/benchmarks/engine.py --sizes smollm2 --sequences 256 --shortest 16 --longest 48
```
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _memory import in_new_process, resident_bytes
from _report import Report, seconds
from decode import SMOLLM2_135M
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from testbed import task
from trl_blend import LogitMixing, TrustRegion, blended_generation
from trl_blend.serving.arguments import engine_arguments
from trl_blend.serving.blend import Blend, Partner


CHECKPOINTS = Path(task.__file__).resolve().parent / "checkpoints"
RULES = {"blend": LogitMixing(0.3), "trust_region": TrustRegion(0.05), "transformers": LogitMixing(0.3)}
CACHE = 2 * 2**30  # bytes of the engine's cache, for each model
LABELS = {
    "blend": "vLLM blended",
    "trust_region": "vLLM trust region",
    "student": "vLLM student",
    "teacher": "vLLM teacher",
    "transformers": "transformers blended",
}
ARMS = tuple(LABELS)


def folders(sizes: str, scratch: Path) -> dict[str, str]:
    """Student and teacher: those of the test-bed, or random ones of SmolLM2-135M's sizes."""
    if sizes == "testbed":
        return {name: str(CHECKPOINTS / name) for name in ("student", "teacher")}
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "student")
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M), dtype=torch.float32)
        model.save_pretrained(scratch / name)
        tokenizer.save_pretrained(scratch / name)
    return {name: str(scratch / name) for name in ("student", "teacher")}


def ragged(count: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Lengths that are spread evenly, in a random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (shortest + order * (longest - shortest) // max(count - 1, 1)).tolist()


def by_engine(arm: str, models: dict[str, str], prompts: list[list[int]], lengths: list[int]) -> Callable[[int], None]:
    """An engine that draws for all prompts, at most so many tokens."""
    from vllm import LLM, SamplingParams

    common: dict[str, Any] = {"dtype": "float32", "enforce_eager": not torch.cuda.is_available(), "seed": 0}
    common |= {"max_num_seqs": len(prompts), "enable_prefix_caching": False, "logprobs_mode": "processed_logprobs"}
    common |= {"max_model_len": max(map(len, prompts)) + max(lengths)}
    common |= {"kv_cache_memory_bytes": (2 if arm in RULES else 1) * CACHE}
    if arm in RULES:
        common |= engine_arguments([Partner(models["teacher"])], Blend(RULES[arm]))
        del common["sleep_preserve_parameter_names"]
    engine = LLM(model=models.get(arm, models["student"]), **common)
    if arm in RULES:
        engine.collective_rpc("set_blend", args=(Blend(RULES[arm], records=True).to_dict(),))
    requests = [{"prompt_token_ids": ids} for ids in prompts]

    def draw(most: int) -> None:
        counts = [min(length, most) for length in lengths]
        params = [
            SamplingParams(temperature=1.0, max_tokens=count, logprobs=0, ignore_eos=True, detokenize=False)
            for count in counts
        ]
        results = engine.generate(requests, params, use_tqdm=False)  # type: ignore[arg-type]
        assert [len(result.outputs[0].token_ids) for result in results] == counts

    return draw


def by_transformers(
    arm: str, models: dict[str, str], prompts: list[list[int]], lengths: list[int]
) -> Callable[[int], None]:
    """A padded batch, which goes on until its longest sequence ends."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
        for name in ("student", "teacher")
    )
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def draw(most: int) -> None:
        count = min(most, max(lengths))
        settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=count, eos_token_id=None, pad_token_id=0)
        with torch.no_grad(), blended_generation(student, teacher, RULES[arm], record=True):
            student.generate(input_ids=ids, attention_mask=mask, generation_config=settings, disable_compile=True)

    return draw


def measure(arm: str, models: dict[str, str], sequences: int, shortest: int, longest: int) -> dict[str, float]:
    """Draw once, after a call of two tokens that sets things up."""
    prompt_lengths, lengths = (ragged(sequences, shortest, longest, seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    vocabulary = AutoConfig.from_pretrained(models["student"]).vocab_size - 10
    prompts = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in prompt_lengths]
    make = by_transformers if arm == "transformers" else by_engine
    draw = make(arm, models, prompts, lengths)
    draw(2)
    time = seconds(lambda: draw(longest))
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else resident_bytes("VmHWM")
    return {**time._asdict(), "peak": peak / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=["testbed", "smollm2"], default="testbed")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=32)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: nothing is measured.")
        return
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's memory is that of the arm's process
    sizes = {"sequences": args.sequences, "shortest": args.shortest, "longest": args.longest}
    with TemporaryDirectory() as scratch:
        sizes["models"] = folders(args.sizes, Path(scratch))
        compare(args, sizes)


def compare(args: argparse.Namespace, sizes: dict[str, Any]) -> None:
    tokens = sum(ragged(args.sequences, args.shortest, args.longest, seed=1))
    settings = {name: value for name, value in vars(args).items() if name != "measure"}
    report = Report(
        f"engine_{args.sizes}_{args.sequences}_{args.longest}",
        {**settings, "dtype": "float32", "tokens": tokens, "cache_gib_per_model": CACHE / 2**30},
    )
    rounds: list[dict[str, dict[str, float]]] = []
    for repeat in range(args.repeats):
        # Another arm goes first in each round, so that a slow drift of the machine favours none
        order = [*ARMS[repeat % len(ARMS) :], *ARMS[: repeat % len(ARMS)]]
        rounds.append({arm: in_new_process(__file__, arm, sizes) for arm in order})
        print(f"round {repeat + 1}: {json.dumps(rounds[-1])}", flush=True)
    what = f"{args.sequences} sequences of {args.sizes} sizes, {args.shortest} to {args.longest} tokens"
    for clock in ("wall", "cpu"):
        for arm in ARMS:
            report.note(f"{arm}, tokens per second of {clock} time", [tokens / one[arm][clock] for one in rounds])
        times = [{arm: measured[clock] for arm, measured in one.items()} for one in rounds]
        ratios = {
            "vLLM blended / transformers blended": ([one["blend"] / one["transformers"] for one in times], 1 / 3),
            "vLLM blended / (vLLM student + vLLM teacher)": (
                [one["blend"] / (one["student"] + one["teacher"]) for one in times],
                1.15,
            ),
            "vLLM trust region / vLLM fixed weight": ([one["trust_region"] / one["blend"] for one in times], 1.15),
        }
        for name, (values, bar) in ratios.items():
            report.row(f"{name}, {what}, {clock} time", values, round(bar, 3))
    for arm in ARMS:
        report.row(f"peak memory, {LABELS[arm]}, {what}", [one[arm]["peak"] for one in rounds], None, " GiB")
    report.write()


if __name__ == "__main__":
    main()
