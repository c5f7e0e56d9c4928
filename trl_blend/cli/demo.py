"""`trl-blend demo`: the test-bed run of `grpo-mix`, on the CPU, without a network."""

import shlex
from collections.abc import Callable
from typing import Any

from trl_blend.cli import training


def add_command(command: Callable[..., Any]) -> None:
    """Add the command to the command line."""
    add = command(
        "demo", run, "train a tiny student with its teacher on the CPU; prints a before/after table (about 3 minutes)"
    ).add_argument
    add("--output_dir", default="outputs/demo", help="folder to write to (default: outputs/demo)")
    add("--max_steps", type=int, default=20, help="optimizer steps (default: 20)")
    add("--num_test_prompts", type=int, default=300, help="prompts of the before/after table (default: 300)")
    add("--num_processes", type=int, default=1, help="processes (default: 1)")
    add("--resume_from_checkpoint", metavar="FOLDER", help="checkpoint to go on from")


def run(resume_from_checkpoint: str | None, **options: Any) -> int:
    """Run the demo; returns the exit code."""
    given = [item for name, value in options.items() for item in (f"--{name}", str(value))]
    command = shlex.join(["trl-blend", "demo", *given])
    if resume_from_checkpoint:
        given += ["--resume_from_checkpoint", resume_from_checkpoint]
    shipped = ["--config", "grpo_mix_testbed", "--accelerate_config", "cpu", "--num_cpu_threads_per_process", "1"]
    return training.run("grpo-mix", [*shipped, *given], command)
