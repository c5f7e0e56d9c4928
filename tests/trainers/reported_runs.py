"""
Runs of the three trainers that report to every backend, in a process of its own: its home folder and every address it
connects to are looked at afterwards.

    python -m tests.trainers.reported_runs MODELS OUTPUT
"""

import json
import sys
from pathlib import Path
from typing import Any


ADDRESSES: list[tuple[str, str]] = []


def _watch(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.bind"):
        ADDRESSES.append((event, repr(arguments[1])))
    elif event == "socket.getaddrinfo":
        ADDRESSES.append((event, repr(arguments[0])))


BACKENDS = ["wandb", "trackio", "tensorboard"]
STEPS = 3


def trainers(models: Path, folder: Path) -> dict[str, Any]:
    """A function per run that makes its trainer, with settings under which as many metrics as possible are logged."""
    from tests.trainers import runs, scored

    prompts = {"trainer_kwargs": {"eval_dataset": runs.dataset()}}
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": STEPS}
    rollouts = scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"))
    report = {
        name: {**evaluated, "report_to": BACKENDS, "project": name, "run_name": name} for name in DOCUMENTED_RUNS
    }
    student = {"rollout_policy": "student", "max_steps": 2}
    return {
        "logit_mix_grpo": lambda output: runs.build(
            models,
            output,
            objective="student",
            teacher_weight=0.4,
            teacher_weight_schedule="adaptive",
            adaptive_num_prompts=4,
            eval_policy="both",
            log_completions=True,
            **report["logit_mix_grpo"],
            **prompts,
        ),
        "trust_region_opd": lambda output: runs.build_opd(
            models,
            output,
            kl_budget=0.02,
            blend_warmup_steps=2,
            kl_support="student_top_k",
            success_threshold=0.5,
            log_completions=True,
            trainer_kwargs={**prompts["trainer_kwargs"], "reward_funcs": runs.reward},
            **report["trust_region_opd"],
        ),
        "offline_opd": lambda output: scored.build_offline(
            models,
            output,
            train_dataset=rollouts,
            importance_correction="token",
            trainer_kwargs={"eval_dataset": rollouts},
            **report["offline_opd"],
        ),
        # What one run cannot log beside the others
        "offline_opd_top_k": lambda output: scored.build_offline(
            models, output, train_dataset=rollouts, offline_loss="top_k_reverse_kl"
        ),
        "trust_region_opd_temperature": lambda output: runs.build_opd(
            models, output, temperature_warmup_steps=2, **student
        ),
        "trust_region_opd_veto": lambda output: runs.build_opd(models, output, distillation_target="veto", **student),
        "trust_region_opd_losses": lambda output: runs.build_opd(
            models, output, token_selection="tip", forward_kl_entropy=1.0, **student
        ),
        "trust_region_opd_iw_opd": lambda output: runs.build_opd(
            models, output, distillation_objective="iw_opd", **student
        ),
        "trust_region_opd_skd": lambda output: runs.build_opd(models, output, rollout_policy="speculative_kd"),
    }


DOCUMENTED_RUNS = ("logit_mix_grpo", "trust_region_opd", "offline_opd")


def main(models: Path, folder: Path) -> None:
    sys.addaudithook(_watch)
    import wandb

    made, histories = trainers(models, folder), {}
    loaded = sorted(name for name in ("matplotlib", "trl", "trl_blend.trainers._run") if name in sys.modules)
    for name, build in made.items():
        trainer = build(folder / name)
        trainer.train()
        wandb.finish()
        histories[name] = trainer.state.log_history
    found = {"histories": histories, "addresses": ADDRESSES, "loaded": loaded}
    (folder / "runs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
