"""
The trust-region solver against the binary search of the paper, to the same tolerance and in one run.

The bars: at V = 151,936 and B = 32 the solver is at least 5 times as fast as a float32 binary search that is
vectorised over the rows and takes its log-softmaxes once, both on one thread; and on real pairs it needs at most 5
passes over the vocabulary. The rows of the first comparison are synthetic (Zipf-like logits of varied sharpness and a
teacher that agrees with most of them); the real pair is the test-bed's student and teacher along rollouts of the
student. A pass is one evaluated point of the path from student to teacher, its two ends included.

With CUDA the time of one solve at B = 64 is measured too. Nothing is downloaded.

```sh
python examples/benchmarks/solver.py
python examples/benchmarks/solver.py --kl_budget 0.001 --repeats 11
```
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from _report import Report, seconds
from torch import Tensor

from trl_blend.ops import solve_trust_region


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SPEEDUP_BAR = 5.0
PASSES_BAR = 5.0
PAPER_BUDGETS = (0.001, 0.005, 0.01, 0.02, 0.05)


def synthetic_pair(rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Logits that fall with the logarithm of a token's rank, sharper in some rows, and a teacher near them."""
    generator = torch.Generator().manual_seed(0)
    falling = -1.1 * torch.arange(1, vocab_size + 1).log()
    ranks = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(rows)])
    common = falling[ranks] + 2.0 * torch.randn(rows, vocab_size, generator=generator)
    student = common * torch.empty(rows, 1).uniform_(0.6, 2.5, generator=generator)
    teacher = 1.1 * student + torch.randn(rows, vocab_size, generator=generator)
    likely = student.topk(20, dim=-1).indices
    return student, teacher.scatter_add(1, likely, 1.5 * torch.randn(rows, 20, generator=generator))


@torch.no_grad()
def testbed_pair(prompts: int) -> tuple[Tensor, Tensor]:
    """Logits `(N, V)` of the test-bed's student and teacher on every prefix of sampled rollouts of the student."""
    from testbed.evaluate import load_checkpoint
    from testbed.task import build_prompt_dataset

    student, tokenizer = load_checkpoint("student")
    teacher, _ = load_checkpoint("teacher")
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in build_prompt_dataset("test", prompts)["prompt"]
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    sequences = student.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=40)
    start = inputs["input_ids"].shape[1]
    completions = sequences[:, start:]
    ended = (completions == tokenizer.eos_token_id).long().cumsum(-1)
    # The end-of-sequence token is drawn too
    is_prefix = ended - (completions == tokenizer.eos_token_id).long() == 0
    mask = torch.cat([inputs["attention_mask"], is_prefix.long()], dim=1)
    logits = [
        model(input_ids=sequences, attention_mask=mask).logits[:, start - 1 : -1] for model in (student, teacher)
    ]
    return logits[0][is_prefix].float(), logits[1][is_prefix].float()


def bisect(student_logits: Tensor, teacher_logits: Tensor, kl_budget: float, halvings: int) -> Tensor:
    """The paper's binary search, all rows at once; `halvings + 1` passes, the teacher's included."""
    student, teacher = student_logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
    low, high = torch.zeros(student.shape[0]), torch.ones(student.shape[0])
    is_teacher = (teacher.exp() * (teacher - student)).sum(dim=-1) <= kl_budget
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        behavior = torch.lerp(student, teacher, middle[:, None]).log_softmax(dim=-1)
        feasible = (behavior.exp() * (behavior - student)).sum(dim=-1) <= kl_budget
        low, high = torch.where(feasible, middle, low), torch.where(feasible, high, middle)
    return low.masked_fill(is_teacher, 1.0)


def compare(report: Report, args: argparse.Namespace) -> None:
    """Time of both on the synthetic rows."""
    student, teacher = synthetic_pair(args.batch_size, args.vocab_size)
    solution = solve_trust_region(student, teacher, args.kl_budget, rtol=args.rtol)
    # A bracket no wider than the tolerance of the smallest weight: what float32 makes of it is another matter
    halvings = math.ceil(-math.log2(args.rtol * solution.weight.min().item()))
    difference = (bisect(student, teacher, args.kl_budget, halvings) / solution.weight - 1).abs().max().item()
    ours, theirs = [], []
    for repeat in range(args.repeats):
        arms = [
            lambda: ours.append(seconds(lambda: solve_trust_region(student, teacher, args.kl_budget, rtol=args.rtol))),
            lambda: theirs.append(seconds(lambda: bisect(student, teacher, args.kl_budget, halvings))),
        ]
        for arm in arms[:: 1 if repeat % 2 else -1]:
            arm()
    report.note("binary search, passes", halvings + 1)
    report.note("solver, passes of each row", solution.iterations.tolist())
    report.note("largest relative difference of a weight", difference)
    size = f"V {args.vocab_size:,}, B {args.batch_size}, budget {args.kl_budget:g}"
    for clock in ("wall", "cpu"):
        times = [[getattr(value, clock) for value in arm] for arm in (ours, theirs)]
        for name, values in zip(("solver", "binary search"), times, strict=True):
            report.note(f"{name}, {clock} time (ms)", [1e3 * value for value in values])
        report.note(f"speed-up, {clock} time", [their / our for our, their in zip(*times, strict=True)])
        ratios = [our / their for our, their in zip(*times, strict=True)]
        report.row(f"trust-region solver / binary search, {size}, {clock} time", ratios, 1 / SPEEDUP_BAR)


def count_passes(report: Report, args: argparse.Namespace) -> None:
    """Passes on the real pair, for the budgets of the paper."""
    student, teacher = testbed_pair(args.prompts)
    means, tails = [], []
    for budget in PAPER_BUDGETS:
        solution = solve_trust_region(student, teacher, budget, rtol=args.rtol)
        passes = solution.iterations.float()
        means.append(passes.mean().item())
        tails.append(passes.quantile(0.99).item())
        counts = torch.bincount(solution.iterations).tolist()
        report.note(
            f"test-bed, budget {budget:g}",
            {
                "prefixes": len(passes),
                "teacher_feasible": solution.feasible.float().mean().item(),
                "rows by passes": {passes: rows for passes, rows in enumerate(counts) if rows},
                "share above 5 passes": (passes > PASSES_BAR).float().mean().item(),
            },
        )
    report.row("trust-region solver, mean passes, test-bed pair, budgets of the paper", means, PASSES_BAR)
    report.row("trust-region solver, 99th percentile of passes, same rows", tails, PASSES_BAR)


def time_on_cuda(report: Report, args: argparse.Namespace, batch_size: int = 64) -> None:
    """Microseconds of one solve on the GPU, as one decoding step would pay."""
    if not torch.cuda.is_available():
        report.note("one solve on a GPU", "not measured: no CUDA device")
        return
    student, teacher = (logits.cuda() for logits in synthetic_pair(batch_size, args.vocab_size))
    times = []
    for _ in range(args.repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        solve_trust_region(student, teacher, args.kl_budget, rtol=args.rtol)
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    report.note(f"one solve on {torch.cuda.get_device_name()}, B {batch_size} (µs)", times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--kl_budget", type=float, default=0.01)
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("solver", vars(args))
    compare(report, args)
    count_passes(report, args)
    time_on_cuda(report, args)
    report.write()


if __name__ == "__main__":
    main()
