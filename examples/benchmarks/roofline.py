"""
On paper: what drafts are worth on one H100, from the sizes of the models alone. Nothing is measured.

A pass over the rows of all sequences takes as long as the slower of two things: reading the weights and the cached
keys and values once from memory, and two operations per parameter and row. A round with k drafts is k passes of the
student and one of all models over k + 1 rows per sequence; it gives (1 - a^(k + 1)) / (1 - a) tokens where a draft is
accepted with probability a, for which the bound of the trust region at a budget of .01 stands here. Times of a token
are for a context of 1024. Launches, attention's own operations, the sampler and the prompts are left out.

```sh
python examples/benchmarks/roofline.py
```
"""

from typing import NamedTuple

from _report import RESULTS

from trl_blend.ops.trust_region import acceptance_bound


BANDWIDTH = 3.35e12  # bytes per second, H100 SXM
OPERATIONS = 989e12  # per second, bfloat16, dense
MEMORY = 0.9 * 80e9  # what vLLM takes of it by default
CONTEXTS = (128, 1024)  # tokens in the cache of each sequence
BUDGET = 0.01
DRAFTS = (4, 8)


class Shape(NamedTuple):
    """Of a Qwen3 model in bfloat16, as its `config.json` has it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    tied: bool
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151_936

    @property
    def read(self) -> int:
        """Parameters that a pass reads: all but an embedding that is no output layer too."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    @property
    def held(self) -> int:
        """Bytes of all parameters."""
        return 2 * (self.read + (0 if self.tied else self.vocabulary * self.hidden))

    def seconds(self, context: int, sequences: int, rows: int = 1) -> float:
        """Time of a pass over some rows of each sequence."""
        cache = 2 * self.layers * self.kv_heads * self.head_dim * context
        reading = 2 * (self.read + sequences * cache) / BANDWIDTH
        return max(reading, 2 * self.read * sequences * rows / OPERATIONS)


QWEN3 = {
    "1.7B": Shape(28, 2048, 6144, 16, True),
    "4B": Shape(36, 2560, 9728, 32, True),
    "8B": Shape(36, 4096, 12288, 32, False),
    "32B": Shape(64, 5120, 25600, 64, False),
}
PAIRS = (("1.7B", "8B"), ("4B", "32B"))


def per_token(student: Shape, teacher: Shape, context: int, sequences: int, drafts: int = 0) -> float:
    """Seconds for each token of each sequence."""
    accepted = acceptance_bound(BUDGET)
    rows = drafts + 1
    together = student.seconds(context, sequences, rows) + teacher.seconds(context, sequences, rows)
    tokens = (1 - accepted**rows) / (1 - accepted)
    return (drafts * student.seconds(context, sequences) + together) / tokens


def crossover(student: Shape, teacher: Shape, context: int, drafts: int) -> str:
    """Number of sequences from which drafts take longer than none."""
    for count in range(1, 20_000):
        if per_token(student, teacher, context, count, drafts) > per_token(student, teacher, context, count):
            return f"{count} sequences"
    return "never"


def table() -> str:
    """A line for each pair and number of drafts."""
    heads = ["student <- teacher", "drafts", "weights read per token"]
    heads += ["time / student alone, 1 sequence", "64 sequences", *(f"slower from, context {n}" for n in CONTEXTS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    accepted = acceptance_bound(BUDGET)
    for names in PAIRS:
        student, teacher = (QWEN3[name] for name in names)
        for drafts in (0, *DRAFTS):
            tokens = (1 - accepted ** (drafts + 1)) / (1 - accepted)
            read = 2 * ((drafts + 1) * student.read + teacher.read) / tokens / 1e9
            cells = [" <- ".join(names), str(drafts), f"{read:.1f} GB"]
            for count in (1, 64):
                ratio = per_token(student, teacher, CONTEXTS[-1], count, drafts)
                cells.append(f"{ratio / student.seconds(CONTEXTS[-1], count):.2f}")
            cells += [crossover(student, teacher, context, drafts) if drafts else "" for context in CONTEXTS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory() -> str:
    """What the weights take; drafts are made by the student's own."""
    parts = []
    for names in PAIRS:
        student, teacher = (QWEN3[name].held for name in names)
        total = student + teacher
        fits = f", more than the {MEMORY / 1e9:.0f} GB that vLLM takes of an H100 by default"
        parts.append(f"{' <- '.join(names)}: {total / 1e9:.0f} GB{'' if total < MEMORY else fits}.")
    return "\n".join(parts)


if __name__ == "__main__":
    text = f"{(__doc__ or '').strip().partition('```')[0]}\n{table()}\n\nWeights in bfloat16.\n{memory()}\n"
    (RESULTS / "roofline.md").write_text(text, encoding="utf-8")
    print(text)
