"""Tiny students and teachers on disk, prompts, and what is expected of the rows that are made of them."""

import json
import math
from pathlib import Path

import torch

from tests.tiny import EOS_ID, tiny_model, tiny_tokenizer
from trl_blend import RolloutConfig, ScoringConfig, collect_rollouts, score_rollouts


TEXTS = ["1+2=", "what is 40+2?", "7", "abc def", "say 99!", "3*3", "x", "(a+b)", "10-4=", "hello world", "0", "z.y"]


def save_model(folder, seed=0, arch="qwen3", tokenizer=None, **overrides):
    """A random model and its tokenizer in `folder`. EOS is likely enough for some completions to end by it."""
    model = tiny_model(arch, seed=seed, **overrides)
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_prompts(path, count=12):
    """A `.jsonl` of prompts of different lengths, no two alike."""
    prompts = [f"{TEXTS[index % len(TEXTS)]} {index}" for index in range(count)]
    Path(path).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def collect(model, prompts, folder, processing_class=None, **settings):
    """Rollouts, without a progress bar."""
    args = RolloutConfig(**{"output_dir": folder, "disable_tqdm": True, **settings})
    return collect_rollouts(model, prompts, args, processing_class)


def score(rollouts, teacher, folder, **settings):
    """Scored rollouts, without a progress bar."""
    return score_rollouts(rollouts, teacher, ScoringConfig(**{"output_dir": folder, "disable_tqdm": True, **settings}))


def rows_of(store):
    """All rows of a store, as dictionaries."""
    return [row for _, table in store.iter_shards() for row in table.to_pylist()]


def log_softmax(values):
    top = max(values)
    normalizer = top + math.log(math.fsum(math.exp(value - top) for value in values))
    return [value - normalizer for value in values]


def warped_logprobs(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=None):
    """
    Log-probabilities of the distribution that is sampled from, from the definitions, in plain float64: temperature,
    the `top_k` most probable, the smallest set of most probable tokens with a mass of `top_p`, then `min_p` times the
    most probable.
    """
    logps = log_softmax([value / temperature for value in logits])
    allowed = sorted(range(len(logps)), key=lambda token: -logps[token])
    if top_k:
        allowed = allowed[:top_k]
    if top_p < 1.0:
        total, kept, mass = math.fsum(math.exp(logps[token]) for token in allowed), [], 0.0
        for token in allowed:
            kept.append(token)
            mass += math.exp(logps[token]) / total
            if mass >= top_p:
                break
        allowed = kept
    if min_p is not None:
        allowed = [token for token in allowed if logps[token] >= math.log(min_p) + logps[allowed[0]]]
    kept = log_softmax([logps[token] for token in allowed])
    result = [-math.inf] * len(logps)
    for token, logp in zip(allowed, kept, strict=True):
        result[token] = logp
    return result


@torch.no_grad()
def forced_logits(model, prompt_ids, completion_ids):
    """Logits before every completion token, from one forward pass without cache or padding, as lists of float64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].double().tolist()


def assert_logps(model, prompt_ids, completion_ids, rollout_logps, student_logps, *, atol=2e-5, **sampling):
    """Both log-probabilities of every token, against a teacher-forced recomputation."""
    logits = forced_logits(model, prompt_ids, completion_ids)
    for token, row, sampled, own in zip(completion_ids, logits, rollout_logps, student_logps, strict=True):
        assert abs(log_softmax(row)[token] - own) < atol
        assert abs(warped_logprobs(row, **sampling)[token] - sampled) < atol


def ends_well(completion_ids, truncated, max_new_tokens, eos=(EOS_ID,)):
    """An end-of-sequence token at the end and nowhere else, or the length limit and none."""
    inside = completion_ids if truncated else completion_ids[:-1]
    clean = not any(token in eos for token in inside)
    return clean and (len(completion_ids) == max_new_tokens if truncated else completion_ids[-1] in eos)
