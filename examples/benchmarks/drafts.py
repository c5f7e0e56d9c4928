"""
Drafts of the student in the engine of vLLM: how often the teacher runs for each token, and what that is worth.

Prompts are the test-bed's, its student and teacher the models, tokens are sampled. The bars, at a budget of .01: at
most .35 teacher passes per token with 4 drafts, .25 with 8. Times are of one engine against another in the same round.
Needs vLLM (`make test-vllm` installs it for the CPU).

```sh
python examples/benchmarks/drafts.py
```

A pair of any two folders whose tokenizer has a chat template, on questions from a file of JSON lines with `input`:

```sh
python examples/benchmarks/drafts.py --student student --teacher smollm2 --data mawps_singleop.jsonl \
    --tokens 32 --sequences 1 8 16 --repeats 3
```

Model and data of this command are those of `examples/reproduce/real_weights.py`. The student is the same model without
6 of its 30 layers, distilled on 240 rollouts:

```python
student = AutoModelForCausalLM.from_pretrained("smollm2")
del student.model.layers[20:26]
student.config.num_hidden_layers = 24
student.save_pretrained("dropped")
AutoTokenizer.from_pretrained("smollm2").save_pretrained("dropped")
```

```sh
python examples/trust_region_opd.py --model_name_or_path dropped --teacher_model_name_or_path smollm2 \
    --dataset_name mawps_singleop.jsonl --prompt_column input --max_steps 30 --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 1 --max_completion_length 32 --learning_rate 1e-4 --kl_budget 0.05 \
    --blend_warmup_steps 15 --use_cpu true --bf16 false --gradient_checkpointing false \
    --output_dir student
```
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _report import Report, Seconds, seconds
from transformers import AutoTokenizer

from testbed import task
from trl_blend import LogitMixing, TrustRegion
from trl_blend.ops.trust_region import acceptance_bound
from trl_blend.serving.arguments import engine_arguments
from trl_blend.serving.blend import Blend, Partner


CHECKPOINTS = Path(task.__file__).resolve().parent / "checkpoints"
BARS = {4: 0.35, 8: 0.25}
RULES = {
    **{f"budget {budget}": TrustRegion(budget) for budget in (0.001, 0.01, 0.05)},
    **{f"weight {weight}": LogitMixing(weight) for weight in (0.1, 0.3, 0.5)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--student", help="a folder, instead of the test-bed's student")
    parser.add_argument("--teacher", help="a folder, instead of the test-bed's teacher")
    parser.add_argument("--data", help="JSON lines with `input`, instead of the prompts of the test-bed")
    parser.add_argument("--tokens", type=int, default=task.MAX_NEW_TOKENS)
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: nothing is measured.")
        return
    if not torch.cuda.is_available():  # where vLLM needs what its tests give it to sample drafts at all
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from tests.vllm.conftest import expand_on_the_cpu

        expand_on_the_cpu(SimpleNamespace(setattr=setattr))
    measure(args)


def measure(args: argparse.Namespace) -> None:
    from vllm import LLM, SamplingParams

    cpu = not torch.cuda.is_available()
    common: dict[str, Any] = {"dtype": "float32", "enforce_eager": cpu, "max_model_len": 256, "seed": 0}
    common |= {"max_num_seqs": max(args.sequences), "enable_prefix_caching": False}
    common |= {} if cpu else {"gpu_memory_utilization": 0.2}
    student_folder = args.student or str(CHECKPOINTS / "student")
    teacher_folder = args.teacher or str(CHECKPOINTS / "teacher")
    engines: dict[int | None, Any] = {}
    for drafts in (None, *BARS):
        arguments = engine_arguments(
            [Partner(teacher_folder)],
            Blend(TrustRegion(0.01)),
            draft_model=student_folder,
            draft_tokens=(drafts,) if drafts else (),
        )
        del arguments["sleep_preserve_parameter_names"]
        engines[drafts] = LLM(model=student_folder, **common, **arguments)
        engines[drafts].collective_rpc("lead_drafts")
    student = LLM(model=student_folder, **common)
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    if args.data:
        lines = Path(args.data).read_text(encoding="utf-8").splitlines()[: max(args.sequences)]
        messages = [[{"role": "user", "content": json.loads(line)["input"]}] for line in lines]
    else:
        messages = task.build_prompt_dataset("test", max(args.sequences))["prompt"]
    prompts = [
        {"prompt_token_ids": tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]}
        for prompt in messages
    ]

    def draw(engine: Any, count: int, **settings: Any) -> int:
        params = SamplingParams(temperature=1.0, max_tokens=args.tokens, detokenize=False, **settings)
        results = engine.generate(prompts[:count], params, use_tqdm=False)
        return sum(len(result.outputs[0].token_ids) for result in results)

    pair = Path(args.teacher).name if args.teacher else "testbed"
    report = Report(f"drafts_{pair}", {**vars(args), "dtype": "float32"})
    for drafts, bar in BARS.items():
        for name, rule in RULES.items():
            blend = Blend(rule, stop_token_ids=(tokenizer.eos_token_id,), records=True)
            engines[drafts].collective_rpc("set_blend", args=(blend.to_dict(),))
            passes, acceptance = [], []
            for _ in range(args.repeats):
                draw(engines[drafts], max(args.sequences))
                (sums,) = engines[drafts].collective_rpc("take_blend_statistics")
                for values, key in ((passes, "passes_per_token"), (acceptance, "draft_acceptance")):
                    values.append(sums[key][0] / sums[key][1])
            has_bar = rule == TrustRegion(0.01)
            report.row(f"teacher passes per token, {name}, {drafts} drafts, {pair}", passes, bar if has_bar else None)
            report.note(f"acceptance, {name}, {drafts} drafts, {pair}", acceptance)
            if isinstance(rule, TrustRegion):
                report.note(
                    f"bound of the acceptance, {name}, {drafts} drafts, {pair}", acceptance_bound(rule.kl_budget)
                )
    for engine in engines.values():
        engine.collective_rpc("set_blend", args=(Blend(TrustRegion(0.01)).to_dict(),))
    for count in args.sequences:
        arms: dict[str, Callable[[], Any]] = {
            f"{drafts or 'no'} drafts": partial(draw, engine, count, ignore_eos=True)
            for drafts, engine in engines.items()
        }
        arms["student alone"] = partial(draw, student, count, ignore_eos=True)
        compare(report, arms, f"budget 0.01, {count} sequences, {pair}", args.repeats)
    report.write()


def compare(report: Report, arms: dict[str, Callable[[], Any]], what: str, repeats: int) -> None:
    """Times of the arms in alternation, as ratios to that without drafts."""
    times: dict[str, list[Seconds]] = {name: [] for name in arms}
    for repeat in range(repeats):
        names = list(arms)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(seconds(arms[name]))
    for clock in Seconds._fields:
        plain = [getattr(value, clock) for value in times["no drafts"]]
        for name in [name for name in arms if name != "no drafts"]:
            ratios = [getattr(value, clock) / one for value, one in zip(times[name], plain)]
            report.row(f"{name} / no drafts, {what}, {clock} time", ratios, None)


if __name__ == "__main__":
    main()
