"""
Log-probabilities of every causal language model of transformers that has a tiny one: those of an unpadded forward of
the whole model in float64, or a refusal. What is expected of each architecture is written down, so that none of them
changes sides unseen.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.architectures import tiny_architecture
from trl_blend.errors import UnsupportedError
from trl_blend.models.own_logits import check_own_logits, fused_log_probs
from trl_blend.rollouts.engines.local import _fused_head, score_sequences


PROMPTS, COMPLETIONS = ([6, 7, 8, 9, 33], [11, 12]), ([20, 21, 22], [23, 24, 25, 26, 27, 28])
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
NO_HEAD_DIM: dict[str, Any] = {"head_dim": ...}
# Settings that a tiny model needs, or those without which it would test nothing: scales, caps, biases
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.2},
    "cohere2": {"logit_scale": 0.2},
    "falcon": NO_HEAD_DIM,
    "falcon_alibi": NO_HEAD_DIM | {"alibi": True},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_heads": 4},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "inkling_text": {"logits_mup_width_multiplier": 4.0},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_dt_rank": 4,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "mpt_scaled": {"logit_scale": 0.5},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 5.0},
}

_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
PINNED = re.search(r"^transformers==(.+)$", _CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE).group(1)
OWN, COUNTED, ROWS, REFUSED = "own", "own, with positions from the mask", "own, one row at a time", "refused"
# Scored; in the left-padded rows of a trainer; packed
_ALL = (OWN, OWN, OWN)
_NO_PACKING = (OWN, OWN, REFUSED)
_POSITIONS = (OWN, COUNTED, OWN)
_POSITIONS_NO_PACKING = (OWN, COUNTED, REFUSED)
_SCORES_ONLY = (OWN, REFUSED, REFUSED)
_ROWS_ONLY = (ROWS, REFUSED, REFUSED)
_NONE = (REFUSED, REFUSED, REFUSED)
EXPECTED = {
    **dict.fromkeys(
        (
            *("apertus", "arcee", "aria_text", "bitnet", "codegen", "cohere", "cohere2", "cwm", "deepseek_v4"),
            *("diffllama", "doge", "ernie4_5", "ernie4_5_moe", "exaone4", "flex_olmo", "gemma", "gemma2"),
            *("gemma3_text", "glm", "glm4", "glm4_moe", "gpt_neox", "gptj", "granite", "granitemoe", "granite_swa"),
            *("helium", "hyperclovax", "jais2", "jetmoe", "laguna", "lfm2", "llama", "minimax_m2", "ministral"),
            *("mistral", "mixtral", "moshi", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon"),
            *("phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
            *("solar_open", "stablelm", "starcoder2", "vaultgemma"),
        ),
        _ALL,
    ),
    **dict.fromkeys(
        (
            *("afmoe", "bloom", "falcon", "falcon_alibi", "falcon_mamba", "gpt_oss", "mamba", "minimax"),
            *("mpt", "mpt_scaled", "olmo_hybrid", "opt"),
            *("bamba", "granitemoehybrid", "jamba", "mamba2", "nemotron_h", "qwen3_5_text", "qwen3_next"),
            *("falcon_h1", "inkling_text"),
        ),
        _NO_PACKING,
    ),
    **dict.fromkeys(("ctrl", "gpt_neo", "gpt2", "gpt_bigcode", "hunyuan_v1_dense"), _POSITIONS),
    **dict.fromkeys(("biogpt", "bert-generation", "openai-gpt", "xglm"), _POSITIONS_NO_PACKING),
    **dict.fromkeys(
        ("bart", "blenderbot", "marian", "mbart", "pegasus", "recurrent_gemma", "rwkv", "trocr"), _SCORES_ONLY
    ),
    **dict.fromkeys(
        ("bert", "electra", "llama4_text", "megatron-bert", "modernbert-decoder", "rembert", "roberta"), _ROWS_ONLY
    ),
    **dict.fromkeys(("cpmant", "xlm"), _NONE),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_log_probabilities_are_the_models_own_or_refused(name, caplog):
    model_type = {"falcon_alibi": "falcon", "mpt_scaled": "mpt"}.get(name, name)
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    model = tiny_architecture(model_type, **SETTINGS.get(name, {}))
    rows = [[*prompt, *completion] for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    whole = copy.deepcopy(model)
    whole.set_experts_implementation("eager")  # the others have no float64
    whole = whole if name == "xglm" else whole.double()  # whose mask has no float64 either
    with torch.no_grad():
        reference = [whole(input_ids=torch.tensor([row])).logits[0].log_softmax(-1).float() for row in rows]
    found = (
        scored(model, rows, reference, caplog),
        left_padded(model, rows, reference),
        packed(model, rows, reference),
    )
    if transformers.__version__ == PINNED:
        assert found == EXPECTED[name]
    else:  # another release may mend what is refused here, or the other way round; none may be wrong
        assert set(found) <= {OWN, COUNTED, ROWS, REFUSED}


def scored(model, rows, reference, caplog):
    caplog.clear()
    try:
        scores = score_sequences(model, PROMPTS, COMPLETIONS)
    except UnsupportedError:
        return REFUSED
    for score, prompt, row, logprobs in zip(scores, PROMPTS, rows, reference, strict=True):
        right = logprobs[torch.arange(len(prompt) - 1, len(row) - 1), torch.tensor(row[len(prompt) :])]
        torch.testing.assert_close(torch.from_numpy(score.logps), right, rtol=0, atol=1e-3)
    return ROWS if "one row at a time" in caplog.text else OWN


def left_padded(model, rows, reference):
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    found = accepted(model, inputs, "left_padded")
    if found is None:
        return REFUSED
    for row, mine, right in zip(rows, found, reference, strict=True):
        torch.testing.assert_close(mine[width - len(row) :], right[:-1], rtol=0, atol=1e-3)
    return COUNTED if model.base_model._forward_pre_hooks else OWN


def packed(model, rows, reference):
    inputs = {
        "input_ids": torch.tensor([sum(rows, [])]),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    found = accepted(model, inputs, "packed")
    if found is None:
        return REFUSED
    right = torch.cat(reference)[:-1]
    torch.testing.assert_close(found[0], right, rtol=0, atol=1e-3)
    return OWN


def accepted(model, inputs, layout):
    """Log-probabilities of a batch where the check takes the model; `None` where it refuses it."""
    try:
        with torch.no_grad(), _fused_head(model):
            fused = fused_log_probs(model)
            check_own_logits(model, "model", fused, layout=layout)
            return fused(inputs)
    except UnsupportedError:
        return None
