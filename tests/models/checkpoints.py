"""Tiny checkpoints on disk, a Hub cache of them, and scored rollouts whose numbers are known."""

import copy
from pathlib import Path

import numpy as np
import torch

from tests.tiny import EOS_ID, PAD_ID, tiny_tokenizer
from trl_blend.models.fingerprint import identify_model
from trl_blend.rollouts.format import Manifest, row_key
from trl_blend.rollouts.store import RolloutStore
from trl_blend.rollouts.writer import ShardWriter


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def save_model(model, folder, tokenizer=None, **settings):
    """`model` and a tokenizer in `folder`; its path as text."""
    model.save_pretrained(folder, **settings)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def changed(model, amount, name=None):
    """A copy of `model` with one parameter moved: its first element, by `amount`."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        dict(other.named_parameters())[name or next(iter(dict(other.named_parameters())))].view(-1)[0] += amount
    return other


def noisy(model, scale, seed=0):
    """A copy of `model` with noise on all weights: a student near its teacher."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


def hub_snapshot(cache, repo_id, commit=COMMIT, branch="main"):
    """Folder of a repository's snapshot inside a Hub cache, to be filled; `branch` points to it."""
    repository = Path(cache) / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@torch.no_grad()
def reference_logps(model, prompts, completions, temperature=1.0):
    """Log-prob of each completion token, float64, one row at a time."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double() / temperature
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        rows.append(np.array([logprobs[step, token].item() for step, token in enumerate(completion)]))
    return rows


@torch.no_grad()
def sampled_completions(model, prompts, max_new_tokens, seed=0):
    """Completions at temperature 1 and whether each was cut; the end-of-sequence token is kept."""
    torch.manual_seed(seed)
    width = len(prompts[0])
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    ids = model.generate(
        input_ids=torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), width, dtype=torch.long),
        do_sample=True,
        max_new_tokens=max_new_tokens,
        **settings,
    )[:, width:].tolist()
    rows = [row[: row.index(EOS_ID) + 1] if EOS_ID in row else row for row in ids]
    return rows, [EOS_ID not in row for row in rows]


def scored_columns(student, teacher, num_rows=24, max_new_tokens=40):
    """Columns of scored rollouts of `student` at temperature 1, computed without the package."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(6, 60, (num_rows, 4)).tolist()
    completions, truncated = sampled_completions(student, prompts, max_new_tokens)
    own = reference_logps(student, prompts, completions)
    return {
        "key": [row_key(prompt, index) for index, prompt in enumerate(prompts)],
        "prompt_ids": prompts,
        "completion_ids": completions,
        "rollout_logps": own,
        "student_logps": own,
        "truncated": truncated,
        "teacher_logps": reference_logps(teacher, prompts, completions),
    }


SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "eos_token_ids": [EOS_ID]}


def write_scored(folder, columns, student=None, teacher=None, num_shards=3, **fields):
    """A finished store of `columns`; `student` and `teacher` are models, folders or identities."""
    manifest = Manifest(
        kind="scored_rollouts",
        settings={},
        **{
            "logps_dtype": "float32",
            "sampling": SAMPLING,
            "scoring": {"temperature": 1.0, "top_k": None, "dtype": "float32"},
            "student": _identity(student),
            "teacher": _identity(teacher),
            **fields,
        },
    )
    writer = ShardWriter(folder, manifest)
    for index, rows in enumerate(np.array_split(np.arange(len(columns["prompt_ids"])), num_shards)):
        writer.write(index, {name: [values[row] for row in rows] for name, values in columns.items()}, f"{index}")
    writer.update_manifest(complete=True)
    return RolloutStore.open(folder)


def _identity(model):
    if model is None or isinstance(model, dict):
        return model
    return (identify_model(model) if isinstance(model, str) else model).to_dict()
