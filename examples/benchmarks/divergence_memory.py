"""
Peak memory and time of the distillation losses that TRL does not have, forward and backward, against TRL's chunked
reverse KL over the full support.

The bar: at most 1.2 times TRL's memory, at 4 sequences of 512 tokens, V = 49,152, hidden size 576, float32. Arms: the
student's top 16 tokens, the target of Veto, and both together with several end-of-sequence tokens; the plain reverse
KL of this package only to compare (a trainer leaves that one to TRL). The ratio of wall times is reported without a
bar.

Each measurement runs in a process of its own, as in `memory.py`: hidden states and output layers of both models exist
before and are not counted. Time is that of a second call, without the meter.

```sh
python examples/benchmarks/divergence_memory.py
python examples/benchmarks/divergence_memory.py --vocab 151936
```
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from _memory import AllocationMeter, collect, peak_memory
from torch import Tensor


RATIO_BAR = 1.2
ARMS: dict[str, dict[str, Any]] = {
    "student top-k": {"top_k": 16},
    "Veto": {"veto_weight": 0.4},
    "Veto on the student top-k, EOS merged": {"top_k": 16, "veto_weight": 0.4, "eos": (2, (0, 5))},
    "reverse KL": {},
}


def divergence(arm: str) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    """Per-token loss and entropy of the student, from both output layers."""
    if arm == "TRL":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return lambda student, teacher: ChunkedDivergenceFunction.apply(
            student.hidden, student.weight, None, teacher.hidden, teacher.weight, None, 1.0
        )
    from trl_blend.ops import EosMap, reverse_kl

    arguments = {name: EosMap(*value) if name == "eos" else value for name, value in ARMS[arm].items()}
    return lambda student, teacher: reverse_kl(student, teacher, **arguments)[:2]


def measure(arm: str, tokens: int, hidden_size: int, vocab: int) -> dict[str, Any]:
    """Peak memory and time of one forward and backward, in this process."""
    from _report import seconds

    from trl_blend.ops import LMHead

    def inputs(rows: int, columns: int) -> tuple[LMHead, LMHead]:
        def head() -> LMHead:
            return LMHead(torch.randn(rows, hidden_size), torch.randn(columns, hidden_size).mul_(hidden_size**-0.5))

        student, teacher = head(), head()
        student.hidden.requires_grad_(), student.weight.requires_grad_()
        return student, teacher

    loss_of = divergence(arm)

    def run(student: LMHead, teacher: LMHead) -> None:
        student.hidden.grad = student.weight.grad = None
        loss_of(student, teacher)[0].sum().backward()

    with AllocationMeter([], gradients=[]):
        run(*inputs(8, 64))  # imports, the meter's included, and the workspaces of the linear algebra library
    student, teacher = inputs(tokens, vocab)
    memory = peak_memory(lambda: run(student, teacher), [*student[:2], *teacher[:2]], gradients=student[:2])
    time = seconds(lambda: run(student, teacher))
    return {**memory, "wall": time.wall, "cpu": time.cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4 * 512)
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    from _report import Report

    report = Report("divergence_memory", {name: value for name, value in vars(args).items() if name != "measure"})
    sizes = {"tokens": args.tokens, "hidden_size": args.hidden_size, "vocab": args.vocab}
    results = collect(report, __file__, ["TRL", *ARMS], sizes, args.repeats)
    for arm in ARMS:
        is_plain = not ARMS[arm]  # the trainer leaves it to TRL
        for kind in ("resident", "allocated"):
            ratios = [ours[kind] / trl[kind] for ours, trl in zip(results[arm], results["TRL"], strict=True)]
            quantity = f"{arm} / TRL's chunked reverse KL, V {args.vocab:,}, peak {kind} memory"
            report.row(quantity, ratios, None if is_plain else RATIO_BAR)
        for kind in ("wall", "cpu"):
            ratios = [ours[kind] / trl[kind] for ours, trl in zip(results[arm], results["TRL"], strict=True)]
            report.row(f"{arm} / TRL's chunked reverse KL, V {args.vocab:,}, {kind} time", ratios, None)
    report.write()


if __name__ == "__main__":
    main()
