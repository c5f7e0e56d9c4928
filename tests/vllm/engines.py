"""Engines of vLLM on the CPU, in this process, that blend tiny models; and what their tokens should be drawn from."""

from contextlib import contextmanager

import torch

from tests.tiny import tiny_model, tiny_tokenizer
from trl_blend.generation.step import blend_step
from trl_blend.serving.arguments import engine_arguments
from trl_blend.serving.blend import Blend, Partner
from trl_blend.serving.drafts import schedule_drafts


# Head sizes that vLLM's attention has kernels for on a CPU
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}


def saved(folder, arch="qwen3", *, model=None, **overrides):
    """A tiny model in a folder, with its tokenizer; gives the folder."""
    model = tiny_model(arch, **{**SHAPE, **overrides}) if model is None else model
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@contextmanager
def running(student, partners=(), blend=None, draft_tokens=(), **options):
    """An engine in float32; without partners one of the student alone."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 64}
    settings |= {"logprobs_mode": "processed_logprobs", "disable_log_stats": True}
    if partners:
        named = [one if isinstance(one, Partner) else Partner(one) for one in partners]
        settings |= engine_arguments(named, blend or Blend(), draft_model=student, draft_tokens=draft_tokens)
    llm = LLM(model=student, **{**settings, **options})
    try:
        if draft_tokens:
            assert llm.collective_rpc("lead_drafts") == [True]
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


@contextmanager
def passes(llm):
    """How often each model runs inside the context."""
    (blend,) = llm.apply_model(lambda model: model)
    (draft,) = llm.collective_rpc(lambda worker: worker.get_draft_model())
    models = {"student": blend.student, "teacher": blend.partner_0, "drafts": getattr(draft, "_model", draft)}
    counts = dict.fromkeys(models, 0)
    handles = [
        model.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, model in models.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def set_blend(llm, blend):
    llm.collective_rpc("set_blend", args=(blend.to_dict(),))
    if blend.draft_tokens is not None:
        schedule_drafts(llm, blend.draft_tokens)


def prompts(count=8, vocab_size=60, shortest=1):
    """Prompts of ragged lengths."""
    return [
        [(7 * row + 13 * column) % (vocab_size - 6) + 6 for column in range(shortest + 5 * row)]
        for row in range(count)
    ]


def generate(llm, prompt_ids, temperature=1.0, max_tokens=24, **settings):
    """`(prompt, completion, log-probabilities)` of each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, logprobs=0, detokenize=False, **settings)
    results = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompt_ids], params, use_tqdm=False)
    rows = []
    for prompt, result in zip(prompt_ids, results, strict=True):
        output = result.outputs[0]
        ids = list(output.token_ids)
        rows.append((prompt, ids, [entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)]))
    return rows


@torch.no_grad()
def teacher_forced(models, blend, prompt, completion):
    """Log-policy `(T, V)` at each position of a completion, and the step, by transformers."""
    ids = torch.tensor([[*prompt, *completion]])
    student, *partners = (model(ids).logits[0, len(prompt) - 1 : -1].float() for model in models)
    limit = min([model.config.vocab_size for model in models] + [blend.vocab_size or student.shape[-1]])
    settings = {"temperature": blend.temperature, "eos": blend.eos, "vocab_size": limit}
    step, teachers = blend_step(blend.rule, student, partners, **settings)
    return step.logits.log_softmax(-1), step, teachers


def worst_error(models, blend, rows):
    """Largest difference between the log-probabilities of the engine and those of transformers."""
    worst = 0.0
    for prompt, completion, logps in rows:
        policy, _, _ = teacher_forced(models, blend, prompt, completion)
        expected = policy.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        worst = max(worst, (expected - torch.tensor(logps)).abs().max().item())
    return worst
