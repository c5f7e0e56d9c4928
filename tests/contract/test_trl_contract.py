"""
Signatures, log-probabilities and the loss: what this package assumes about TRL and transformers without their word.

A release that moves one of these seams fails here, by name, instead of training something else without a word.
"""

import ast
import inspect
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from trl import DistillationTrainer, GRPOTrainer, SFTTrainer
from trl.trainer import utils as trl_utils

from tests.contract.seams import SEAMS, parameters, resolve
from tests.tiny import tiny_model
from trl_blend import LogitMixGRPOTrainer, OfflineOPDTrainer, TrustRegionOPDTrainer, _compat
from trl_blend.trainers.logit_mix_grpo.config import WORDS_OF_TRL


PACKAGE = Path(_compat.__file__).parent
UPSTREAM = (GRPOTrainer, DistillationTrainer, SFTTrainer, GenerationMixin, GenerationConfig)


# Signatures


@pytest.mark.parametrize("path", SEAMS)
def test_parameters_are_those_this_package_was_written_for(path):
    try:
        actual = parameters(resolve(path))
    except AttributeError as error:
        pytest.fail(f"`{path}` is gone ({error}). Check what uses it in trl_blend.")
    known = (SEAMS[path],) if isinstance(SEAMS[path], str) else SEAMS[path]
    assert actual in known, f"`{path}` now takes ({actual}), it took ({known[-1]}). Check what uses it."


@pytest.mark.parametrize(
    ("ours", "parent"),
    [
        (LogitMixGRPOTrainer, GRPOTrainer),
        (TrustRegionOPDTrainer, DistillationTrainer),
        (OfflineOPDTrainer, SFTTrainer),
    ],
)
def test_every_overridden_trainer_method_is_frozen(ours, parent):
    overridden = {name for name, value in vars(ours).items() if inspect.isfunction(value)}
    inherited = {name for name in overridden if hasattr(parent, name)}
    missing = {f"trl.{parent.__name__}.{name}" for name in inherited} - set(SEAMS)
    assert inherited and not missing, f"overridden but not in tests/contract/seams.py: {sorted(missing)}"


def private_names_used() -> dict[str, str]:
    """Private attributes used anywhere in the package that are methods of an upstream class, with a file that does."""
    upstream = {name for one in UPSTREAM for name in dir(one)}
    used = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if node.attr in upstream and inspect.isroutine(_upstream_value(node.attr)):
                    used[node.attr] = str(file.relative_to(PACKAGE))
    return used


def _upstream_value(name: str):
    return next(getattr(one, name) for one in UPSTREAM if hasattr(one, name))


def test_every_private_upstream_method_in_use_is_frozen():
    used, frozen = private_names_used(), {path.rsplit(".", 1)[1] for path in SEAMS}
    assert len(used) > 10
    missing = {name: file for name, file in used.items() if name not in frozen}
    assert not missing, f"used but not in tests/contract/seams.py: {missing}"


@pytest.mark.parametrize(
    ("alias", "module"),
    [("trl_utils", "trl.trainer.utils"), ("trl_distillation", "trl.trainer.distillation_trainer")],
)
def test_every_symbol_of_an_upstream_module_in_use_is_frozen(alias, module):
    tree = ast.parse((PACKAGE / "_compat.py").read_text(encoding="utf-8"))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == alias}
    frozen = {path for seam in SEAMS for path in (seam, seam.rpartition(".")[0])}  # of a class, one of its methods
    missing = {f"{module}.{name}" for name in used} - frozen
    assert used and not missing


# Log-probabilities: `_compat.fused_log_prob_function` and `trainers/.../mixed_forward.py`


def test_fused_head_looks_its_function_up_at_call_time_and_passes_nine_arguments(monkeypatch):
    model = tiny_model("gemma2")  # with a softcap, so that no two arguments look alike
    trl_utils.add_fused_lm_head(model, temperature=0.7)
    calls = []

    class Recorder:
        @staticmethod
        def apply(*args):
            calls.append(args)
            return torch.arange(args[0].shape[0], dtype=torch.float32), None, None, None, None

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Recorder)
    input_ids = torch.randint(3, 60, (2, 5))
    output = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)

    assert len(calls) == 1 and len(calls[0]) == 9
    hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs = calls[0]
    assert hidden.shape == (8, model.config.hidden_size)
    assert weight is model.get_output_embeddings().weight and bias is None
    assert targets.tolist() == input_ids[:, 1:].reshape(-1).tolist()
    assert (temperature, softcap, logit_scale) == (0.7, 5.0, 1.0)
    assert isinstance(chunk_size, int) and "log_probs" in outputs
    assert output.log_probs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_head_that_zero_3_does_not_manage_is_not_asked_for_its_shards(monkeypatch):
    managed = []
    monkeypatch.setattr(_compat, "_gather_managed", lambda *given: managed.append(given) or nullcontext())
    model = tiny_model()
    trl_utils.add_fused_lm_head(model, temperature=1.0)
    input_ids = torch.randint(3, 60, (2, 5))
    with _compat.fused_log_prob_function(lambda head, targets, temperature, outputs: None):
        model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
        weight = model.get_output_embeddings().weight
        weight.ds_status = "not available"
        model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
    assert managed[0] == () and managed[-1] == (weight,)


def test_trainer_scores_the_model_it_is_given_through_its_fused_forward(grpo):
    trainer, calls = grpo, []

    class StandIn:
        def __call__(self, **inputs):
            calls.append(inputs)
            return trainer.model(**inputs)

    input_ids = torch.randint(3, 60, (2, 7))
    mask = torch.ones_like(input_ids)
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        StandIn(), input_ids, mask, 4, compute_entropy=True
    )
    assert len(calls) == 1
    assert set(calls[0]) == {"input_ids", "attention_mask", "labels", "fused_lm_head"}
    expected = trainer.model(input_ids=input_ids).logits[:, :-1].log_softmax(-1)
    expected = expected.gather(-1, input_ids[:, 1:, None]).squeeze(-1)[:, -4:]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert entropies.shape == (2, 4)


# The loss: `_importance_clip`, and the old log-probabilities of `objective="student"`


def loss_inputs(trainer, log_ratio: float, advantages: list[float]) -> dict[str, torch.Tensor]:
    """A batch of two rows whose importance ratio is `exp(log_ratio)` at each of its tokens."""
    prompt_ids, completion_ids = torch.randint(3, 60, (2, 3)), torch.randint(3, 60, (2, 4))
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(completion_ids.numel()),
    }
    sequences = torch.cat([prompt_ids, completion_ids], dim=1)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, sequences, torch.ones_like(sequences), completion_ids.size(1)
    )
    return {**inputs, "old_per_token_logps": logps.detach() - log_ratio}


@pytest.fixture
def bounds(grpo):
    """`bounds(low, high, delta)` sets TRL's clipping bounds for one test."""
    saved = grpo.epsilon_low, grpo.epsilon_high, grpo.args.delta

    def set_bounds(low, high, delta):
        grpo.epsilon_low, grpo.epsilon_high, grpo.args.delta = low, high, delta

    yield set_bounds
    set_bounds(*saved)


def test_loss_uses_old_log_probs_when_the_batch_has_them(grpo, bounds):
    bounds(float("inf"), float("inf"), None)
    inputs = loss_inputs(grpo, 0.5, [1.0, -0.5])
    ratio = torch.tensor(0.5).exp()
    torch.testing.assert_close(grpo._compute_loss(grpo.model, inputs), -(ratio * 1.0 - ratio * 0.5) / 2)
    del inputs["old_per_token_logps"]
    torch.testing.assert_close(grpo._compute_loss(grpo.model, inputs), torch.tensor(-0.25))


@pytest.mark.parametrize("advantages", [[1.0, 2.0], [-1.0, -2.0], [1.0, -3.0]])
@pytest.mark.parametrize("log_ratio", [-1.2, 0.3, 1.5])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_infinite_lower_bound_and_equal_caps_leave_a_truncated_surrogate(grpo, bounds, advantages, log_ratio, cap):
    high = float("inf") if cap is None else cap - 1
    bounds(float("inf"), high, cap)
    inputs = loss_inputs(grpo, log_ratio, advantages)
    ratio = torch.tensor(log_ratio).exp().clamp(max=cap if cap is not None else float("inf"))
    torch.testing.assert_close(
        grpo._compute_loss(grpo.model, inputs), -(ratio * torch.tensor(advantages)).mean(), rtol=1e-4, atol=1e-5
    )


def test_words_are_those_that_the_loss_compares():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for name, words in WORDS_OF_TRL.items():
        compared = re.findall(rf"{name} (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
        assert set(re.findall(r"\"(\w+)\"", " ".join(compared))) == set(words), name
