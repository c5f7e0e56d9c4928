"""
Peak memory of the mixed log-probabilities, forward and backward.

Two bars. At V = 49,152 (8 sequences of 512 tokens, hidden size 576): at most 1.3 times what TRL's own fused
log-probabilities of the student alone need, plus the partner's hidden states. At V = 151,936: neither the largest
tensor nor everything together that is allocated on top of the inputs and their gradients is ever above 1/8 of a
float32 `(B, T, V)` tensor.

Each measurement runs in a process of its own: the high-water mark of the resident memory above its level with all
inputs in place, and as a cross-check the bytes of all live tensor storages that a `TorchDispatchMode` saw allocated.
Hidden states and output layers of both models exist before and are in neither number, so that the first bar is the
plain factor 1.3.

```sh
python examples/benchmarks/memory.py
python examples/benchmarks/memory.py --repeats 5 --tokens 4096
```
"""

import argparse
import json
from typing import Any

import torch
from _memory import AllocationMeter, collect, peak_memory
from torch import Tensor


RATIO_BAR = 1.3
SHARE_BAR = 1 / 8


def score(arm: str, student: Any, partner: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies as the trainers compute them: the entropy is only logged."""
    if arm.startswith("trl"):
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils

        chunk = int(arm.removeprefix("trl") or utils._CHUNKED_LOGPROB_CHUNK_SIZE)
        hidden, weight = student[:2]
        arguments = (hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs", "entropy"))
        return ChunkedLogProbFunction.apply(*arguments)[:2]
    from trl_blend.ops import mixed_log_probs

    return mixed_log_probs(student, [partner], [0.3], targets, space=arm)


def measure(arm: str, tokens: int, hidden_size: int, vocab: int) -> dict[str, int]:
    """Peak memory of one forward and backward, in this process."""
    from trl_blend.ops import LMHead

    def head(rows: int, columns: int) -> LMHead:
        return LMHead(torch.randn(rows, hidden_size), torch.randn(columns, hidden_size).mul_(hidden_size**-0.5))

    def run(student: LMHead, partner: LMHead | None, targets: Tensor) -> None:
        logps, _ = score(arm, student, partner, targets)
        logps.sum().backward()

    def inputs(rows: int, columns: int) -> tuple[LMHead, LMHead | None, Tensor]:
        student = head(rows, columns)
        student.hidden.requires_grad_(), student.weight.requires_grad_()
        partner = None if arm.startswith("trl") else head(rows, columns)
        return student, partner, torch.randint(columns, (rows,))

    with AllocationMeter([], gradients=[]):
        run(*inputs(8, 64))  # imports, the meter's included, and the workspaces of the linear algebra library
    student, partner, targets = inputs(tokens, vocab)
    existing = [*student[:2], *(partner[:2] if partner else ()), targets]
    return peak_memory(lambda: run(student, partner, targets), existing, gradients=existing[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8 * 512)
    parser.add_argument("--hidden_size", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--large_vocab", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return
    from _report import Report

    report = Report("memory", {name: value for name, value in vars(args).items() if name != "measure"})
    sizes = {"tokens": args.tokens, "hidden_size": args.hidden_size}
    # TRL's function with tiles as narrow as ours is no bar, but says how much of the difference is the tile width
    results = collect(
        report, __file__, ["trl", "logits", "probs", "trl4096"], {**sizes, "vocab": args.vocab}, args.repeats
    )
    for arm in ("logits", "probs"):
        for kind in ("resident", "allocated"):
            pairs = zip(results[arm], results["trl"], strict=True)
            ratios = [mixed[kind] / trl[kind] for mixed, trl in pairs]
            quantity = f"mixed log-prob ({arm}) / TRL's fused log-prob, V {args.vocab:,}, peak {kind} memory"
            report.row(quantity, ratios, RATIO_BAR)
    full = args.tokens * args.large_vocab * 4
    results = collect(report, __file__, ["logits", "probs"], {**sizes, "vocab": args.large_vocab}, args.repeats)
    for arm, measurements in results.items():
        where = f"V {args.large_vocab:,} ({arm}) / float32 (B, T, V)"
        # A gradient is as large as the input it belongs to, whatever computes it
        for kind in ("resident", "allocated"):
            shares = [(m[kind] - m["gradients"]) / full for m in measurements]
            report.row(f"peak {kind} memory beyond the gradients, {where}", shares, SHARE_BAR)
        report.row(
            f"largest tensor beyond the gradients, {where}", [m["largest"] / full for m in measurements], SHARE_BAR
        )
    report.write()


if __name__ == "__main__":
    main()
