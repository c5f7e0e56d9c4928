"""What the tests of exported policies share: the package's own decoding, and a process with transformers only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from testbed.task import build_prompt_dataset
from trl_blend import blended_generation
from trl_blend.generation.rules import mixing_rule


CHECKPOINTS = Path(__file__).resolve().parents[2] / "examples" / "testbed" / "checkpoints"
DECODE_ALONE = Path(__file__).with_name("decode_alone.py")
SPACES = ("logits", "probs")
DETAILS = {"return_dict_in_generate": True, "output_scores": True}
GREEDY = {"do_sample": False, "max_new_tokens": 48}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 12}


def testbed_inputs(num_prompts: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts of the test bed, of several lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "student", padding_side="left")
    rows = build_prompt_dataset("test", num_prompts)
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert not inputs["attention_mask"].all()
    return dict(inputs)


def blended(student: Any, partners: Any, weights: Any, space: str, inputs: dict, settings: dict, seed: int = 0) -> Any:
    """Output of `generate` with this package's own mixture, the one the trainer samples from."""
    torch.manual_seed(seed)
    weights = weights if isinstance(weights, tuple) else (weights,)
    with blended_generation(student, partners, mixing_rule(space, weights)):
        return student.generate(**inputs, **settings, **DETAILS)


def job(folder: Path, repository: Path | str, inputs: dict, settings: dict, **fields: Any) -> dict[str, Any]:
    """A job of `decode_alone.py`; the inputs are written into `folder`."""
    path = folder / f"inputs{len(list(folder.glob('inputs*.pt')))}.pt"
    torch.save(inputs, path)
    return {"repository": str(repository), "how": "auto", "inputs": str(path), "settings": settings, **fields}


def decode_alone(
    folder: Path, jobs: list[dict], python: str = sys.executable, *options: str, **env: str
) -> list[dict]:
    """Results of the jobs, of a process in which importing this package or anything it stands on fails."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [python, "-I", str(DECODE_ALONE), str(folder / "jobs.json"), str(folder / "results.pt"), *options]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "home")} | env
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def assert_same_decoding(result: dict[str, Any], expected: Any, tolerance: float = 1e-5) -> None:
    """The same tokens, and at every step log-probabilities within the tolerance."""
    assert "error" not in result, result.get("error")
    assert torch.equal(result["sequences"], expected.sequences)
    logps, others = (scores.log_softmax(dim=-1) for scores in (result["scores"], torch.stack(expected.scores)))
    assert torch.equal(logps == -torch.inf, others == -torch.inf)
    torch.testing.assert_close(logps, others, atol=tolerance, rtol=0)
