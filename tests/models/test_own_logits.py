"""What the comparison with a model's own logits costs, tolerates and leaves alone."""

import pytest
import torch

from tests.tiny import ARCHITECTURES, tiny_lora, tiny_model
from trl_blend import _compat
from trl_blend.errors import UnsupportedError
from trl_blend.models.own_logits import check_own_logits, fused_log_probs
from trl_blend.models.wrappers import evaluation_mode


LAYOUTS = ["right_padded", "left_padded", "packed"]


def with_fused_head(model):
    _compat.add_fused_lm_head(model, temperature=0.7, cast_lm_head_to_fp32=False)
    return model


def check(model, layout="left_padded", **settings):
    check_own_logits(model, "model", fused_log_probs(model), layout=layout, **settings)


# Gemma 2's mask has no float64: the model itself gives NaN
TAKEN = [
    (arch, dtype)
    for arch in ARCHITECTURES
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if arch != "gpt2" and (arch, dtype) != ("gemma2", torch.float64)
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("arch", "dtype"), TAKEN)
def test_every_precision_is_taken(arch, dtype, layout):
    check(with_fused_head(tiny_model(arch).to(dtype)), layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda z: 1.1 * z, lambda z: 8 * torch.tanh(z / 8), lambda z: z.roll(1, -1)])
def test_other_logits_are_refused_in_every_precision(change, dtype):
    model = with_fused_head(tiny_model("llama").to(dtype))
    model.lm_head.register_forward_hook(lambda layer, args, output: change(output))
    with pytest.raises(UnsupportedError, match=r"^`model` \(LlamaForCausalLM\): .* by up to [0-9.]+ nats"):
        check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_that_is_read_is_refused_in_every_precision(dtype):
    model = with_fused_head(tiny_model("llama").to(dtype))
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    check(model, "right_padded")
    with pytest.raises(
        UnsupportedError, match="with padding before it, .* differ from those of the row alone by up to"
    ):
        check(model)
    assert len(model.model._forward_pre_hooks) == 1


def test_looking_ahead_is_refused():
    model = with_fused_head(tiny_model("llama"))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
    with pytest.raises(UnsupportedError, match="depends, by up to .* nats, on what follows"):
        check(model)


@pytest.mark.parametrize(("layout", "tokens"), [("right_padded", 44), ("left_padded", 44), ("packed", 38)])
def test_what_it_costs(layout, tokens):
    model = with_fused_head(tiny_model())
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    check(model, layout)
    assert len(seen) == 3 and sum(seen) == tokens


def test_the_model_and_the_random_state_are_left_alone():
    model = with_fused_head(tiny_model("gpt2")).train()  # with dropout
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    weight = model.transformer.wte.weight
    weight.grad = torch.ones_like(weight)
    state = torch.get_rng_state()
    check(model, "right_padded")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(weight.grad, torch.ones_like(weight)) and weight.requires_grad


def test_the_base_of_an_adapter():
    model = tiny_lora(with_fused_head(tiny_model("llama")))
    inner = model.get_base_model()
    inner.lm_head.register_forward_hook(
        lambda layer, args, output: output if inner.model.layers[0].self_attn.q_proj.disable_adapters else 2 * output
    )
    check(model, disable_adapters=True)
    with pytest.raises(UnsupportedError):
        check(model)


@pytest.mark.parametrize("limit", [4, 8, 12])
def test_a_short_context(limit):
    check(with_fused_head(tiny_model("gpt2", n_positions=limit)))


def test_layers_of_bitsandbytes_stay_in_training_mode():
    """In evaluation mode, on a CPU, their weights would be packed for inference, and no gradient would pass them."""

    class Linear4bit(torch.nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    model = torch.nn.Sequential(Linear4bit(2, 2), torch.nn.Dropout()).train()
    with evaluation_mode(model):
        assert [module.training for module in model.modules()] == [False, True, False]
