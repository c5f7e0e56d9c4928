"""What each of two processes with an engine of its own does; started by `test_two_processes`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from tests.vllm import test_blend_training as training
from tests.vllm.conftest import keep_weights_on_the_cpu
from trl_blend import LogitMixing
from trl_blend.serving.blend import Blend


def main(folder):
    keep_weights_on_the_cpu(SimpleNamespace(setattr=setattr))
    trainer = training.grpo(Path(folder), max_steps=2, per_device_train_batch_size=8)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    teacher = AutoModelForCausalLM.from_pretrained(training.TEACHER, dtype="float32").eval()
    student = trainer.accelerator.unwrap_model(trainer.model).eval()
    rows = training.draw(trainer, LogitMixing(0.3))
    error = training.worst_error([student, teacher], Blend(LogitMixing(0.3)), rows)
    drawn = [None, None]
    torch.distributed.all_gather_object(drawn, [ids for _, ids, _ in rows])
    assert drawn[0] != drawn[1], "both processes draw the same tokens"
    divergences = training.logged(trainer, "mixing/kl_behavior_student") if trainer.is_world_process_zero() else []
    print(f"error {error} divergences {len(divergences)}", flush=True)
    assert error < training.TOLERANCE


if __name__ == "__main__":
    main(sys.argv[1])
