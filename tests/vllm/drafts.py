"""What drafts need on a CPU, and nowhere else."""

import torch


def expand_on_the_cpu(patch):
    """vLLM's own expansion of a value per request to one per token fills a copy there, and returns what was in memory."""
    from vllm.v1.sample import rejection_sampler

    def expand(values, ends, num_tokens, replace_from=0, replace_to=0):
        values = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
        return values.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), output_size=num_tokens)

    patch.setattr(rejection_sampler, "expand_batch_to_tokens", expand)
