"""The output layer of a model in memory as one plain layer: a weight and a bias that say what it computes."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from trl_blend.errors import UnsupportedError
from trl_blend.models.wrappers import innermost_model


def plain_output_layer(model: nn.Module, argument: str) -> Any:
    """
    The layer whose weight and bias are all that the output layer of `model` computes, its active adapters included.

    That is the model's own layer wherever it can be. Under an adapter it is a copy, into which the adapter is merged:
    the model keeps its weights, tied embeddings included, and the copy has no gradient. `argument` names the one that
    holds the model, for the messages.

    Raises:
        [`~trl_blend.errors.UnsupportedError`]: If there is no output layer, or its weight is quantised.
    """
    inner: Any = innermost_model(model, argument)
    layer: Any = inner.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise UnsupportedError(
            f"`{argument}` is a {type(inner).__name__} without an output layer (`get_output_embeddings()`), so its "
            "log-probabilities cannot be computed from hidden states. Use a causal language model."
        )
    if not layer.weight.dtype.is_floating_point:
        raise UnsupportedError(
            f"The output layer of `{argument}` is a {type(layer).__name__} with quantized weights, which the fused "
            "log-probabilities cannot read. Keep it out of the quantization (`llm_int8_skip_modules`)."
        )
    # An adapter beside the weight of the layer, rather than a weight of its own
    if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
        merged = copy.deepcopy(layer)
        merged.merge()
        return merged.get_base_layer().requires_grad_(False)
    give_bias(inner)
    return layer


def give_bias(model: Any) -> None:
    """Let the output layer say that it has no bias where it says nothing: PEFT's wrapper of trainable tokens."""
    layer = model.get_output_embeddings()
    if layer is not None and hasattr(layer, "weight") and not hasattr(layer, "bias"):
        layer.register_parameter("bias", None)


OutputLayers = list[tuple[Any, nn.Module]]
"""Models and the layers that stand in for their output layers."""


def find_plain_outputs(models: Sequence[nn.Module], argument: str) -> OutputLayers:
    """The [`plain_output_layer`] of each of the models whose own is not plain."""
    inner = [innermost_model(model, argument) for model in models]
    layers = [(model, plain_output_layer(model, argument)) for model in inner]
    return [(model, layer) for model, layer in layers if layer is not model.get_output_embeddings()]


@contextmanager
def plain_outputs(found: OutputLayers) -> Iterator[None]:
    """Inside the context `get_output_embeddings` of the models returns the plain layers, and nothing else changes."""
    for model, layer in found:
        model.get_output_embeddings = lambda layer=layer: layer
    try:
        yield
    finally:
        for model, _ in found:
            del model.get_output_embeddings


def output_layer_name(model: PreTrainedModel) -> str | None:
    """Name of the output layer among the model's modules."""
    layer = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is layer), None)
