"""
Render the model cards of the test-bed runs into `model_cards/examples/`: the three examples of `examples/`, each with
its own settings file, on the CPU and without a network.

```sh
OMP_NUM_THREADS=1 python examples/testbed/cards.py                            # all three
OMP_NUM_THREADS=1 python examples/testbed/cards.py --only trust_region_opd    # one of them
```
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


if __name__ == "__main__":  # run as a file: make the package importable, and hide this folder's module names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from testbed.task import build_prompt_dataset


ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "examples" / "testbed" / "checkpoints"
CARDS = ROOT / "model_cards" / "examples"
NAMES = ("grpo_mix", "trust_region_opd", "offline_opd")
KEPT = ("README.md", "training_curves.png")
NUM_ROLLOUTS = 2560

_PAGE = """\
# Rendered model cards

What the trainers write beside a model, for the runs of the test-bed (a 0.8M student that learns to add from a 4.8M
teacher): {links}. Written by

```sh
OMP_NUM_THREADS=1 python examples/testbed/cards.py
```

which runs each example with its settings file of `examples/configs/`, unchanged, on the CPU. Nothing here is edited.
"""


def write_scored_rollouts(folder: Path) -> Path:
    """Rollouts of the test-bed's SFT student, scored by its teacher, as `make demo-offline` makes them."""
    from trl_blend import RolloutConfig, ScoringConfig, collect_rollouts, score_rollouts

    student, teacher = (str(CHECKPOINTS / name) for name in ("sft_student", "teacher"))
    drawing = RolloutConfig(
        output_dir=folder / "rollouts", temperature=1.0, top_p=1.0, max_completion_length=48, batch_size=64,
        dtype="float32", disable_tqdm=True,
    )  # fmt: skip
    scoring = ScoringConfig(
        output_dir=folder / "scored", top_k=16, tokens_per_batch=2048, dtype="float32", disable_tqdm=True
    )
    rollouts = collect_rollouts(student, build_prompt_dataset("train", NUM_ROLLOUTS), drawing)
    score_rollouts(rollouts, teacher, scoring)
    return folder / "scored"


def run_example(name: str, folder: Path) -> Path:
    """Run an example with its settings file; returns where it left the model."""
    output = folder / f"{name}_testbed"
    command = [sys.executable, f"examples/{name}.py", "--config", f"examples/configs/{name}_testbed.yaml"]
    if name == "offline_opd":
        command += ["--dataset_name", str(write_scored_rollouts(folder))]
    subprocess.run([*command, "--output_dir", str(output)], cwd=ROOT, check=True)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES, help="the card of one example")
    names = [only] if (only := parser.parse_args().only) else NAMES

    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            output = run_example(name, Path(folder))
            (CARDS / name).mkdir(parents=True, exist_ok=True)
            for file in KEPT:
                shutil.copyfile(output / file, CARDS / name / file)
    links = ", ".join(f"[{name}]({name}/README.md)" for name in NAMES)
    (CARDS / "README.md").write_text(_PAGE.format(links=links), encoding="utf-8")


if __name__ == "__main__":
    main()
