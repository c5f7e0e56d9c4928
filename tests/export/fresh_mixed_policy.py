"""
Exports the test bed's student with its teacher and decodes it in an environment that has torch and transformers only.

`python tests/export/fresh_mixed_policy.py PYTHON`, PYTHON being that environment's; `make export-test` creates one.
Greedy tokens of 200 prompts and log-probabilities of 40 sampled rollouts are compared with this package's own.
"""

import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from transformers import AutoModelForCausalLM  # noqa: E402

from tests.export import mixed_policies as mixed  # noqa: E402
from trl_blend import export_mixed_policy  # noqa: E402


_ABSENT = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, {!r})))"


def main(python: str) -> None:
    absent = ["trl_blend", "trl", "accelerate", "peft", "datasets"]
    subprocess.run([python, "-I", "-c", _ABSENT.format(absent)], check=True)
    student, teacher = (str(mixed.CHECKPOINTS / name) for name in ("student", "teacher"))
    models = [AutoModelForCausalLM.from_pretrained(name) for name in (student, teacher)]
    with tempfile.TemporaryDirectory() as name:
        folder, jobs, expected = Path(name), [], []
        for space in mixed.SPACES:
            repository = export_mixed_policy(student, teacher, 0.4, folder / space, mixing_space=space)
            for prompts, settings in ((200, mixed.GREEDY), (40, mixed.SAMPLED)):
                inputs = mixed.testbed_inputs(prompts)
                for how in ("auto", "custom"):
                    jobs.append(mixed.job(folder, repository, inputs, settings, how=how, student=student))
                    expected.append((space, how, mixed.blended(*models, 0.4, space, inputs, settings)))
        results = mixed.decode_alone(folder, jobs, python, "--not-blocked")
    for result, (space, how, output) in zip(results, expected, strict=True):
        mixed.assert_same_decoding(result, output)
        rows, tokens = len(output.sequences), len(output.scores)
        print(f"{space:6} {how:6} {rows:3} prompts, {tokens} steps: same tokens, log-probs within 1e-5")


if __name__ == "__main__":
    main(sys.argv[1])
