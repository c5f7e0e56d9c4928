"""
What this package assumes about TRL, transformers, accelerate and PEFT beyond what they document.

A release that moves one of these seams fails here, by name, instead of training something else without a word.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from tests.contract.seams import SEAMS, TRAINER_ATTRIBUTES, parameters, resolve
from tests.tiny import PAD_ID, tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import runs
from trl_blend import LogitMixGRPOTrainer, _compat


PACKAGE = Path(_compat.__file__).parent


def make_trainer(folder: Path, trainer_class: type = GRPOTrainer, **settings):
    return trainer_class(
        model=tiny_model(),
        reward_funcs=runs.reward,
        args=runs.config(folder, runs.GRPOConfig, **settings),
        train_dataset=runs.dataset(),
        processing_class=tiny_tokenizer(),
    )


# Signatures


@pytest.mark.parametrize("path", SEAMS)
def test_parameters_are_those_this_package_was_written_for(path):
    try:
        actual = parameters(resolve(path))
    except AttributeError as error:
        pytest.fail(f"`{path}` is gone ({error}). trl_blend/{SEAMS[path].users} relies on it.")
    assert actual == SEAMS[path].parameters, (
        f"`{path}` now takes ({actual}), it took ({SEAMS[path].parameters}). Check trl_blend/{SEAMS[path].users}."
    )


def test_every_overridden_trainer_method_is_frozen():
    overridden = {name for name, value in vars(LogitMixGRPOTrainer).items() if inspect.isfunction(value)}
    inherited = {name for name in overridden if hasattr(GRPOTrainer, name)}
    missing = {f"trl.GRPOTrainer.{name}" for name in inherited} - set(SEAMS)
    assert inherited and not missing, f"overridden but not in tests/contract/seams.py: {sorted(missing)}"


def private_names_used() -> dict[str, str]:
    """Private attributes used anywhere in the package that are methods of an upstream class, with a file that does."""
    upstream = set(dir(GRPOTrainer)) | set(dir(GenerationMixin)) | set(dir(GenerationConfig))
    used = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if node.attr in upstream and inspect.isroutine(_upstream_value(node.attr)):
                    used[node.attr] = str(file.relative_to(PACKAGE))
    return used


def _upstream_value(name: str):
    return next(getattr(c, name) for c in (GRPOTrainer, GenerationMixin, GenerationConfig) if hasattr(c, name))


def test_every_private_upstream_method_in_use_is_frozen():
    used, frozen = private_names_used(), {path.rsplit(".", 1)[1] for path in SEAMS}
    assert len(used) > 10
    missing = {name: file for name, file in used.items() if name not in frozen}
    assert not missing, f"used but not in tests/contract/seams.py: {missing}"


def test_every_symbol_of_trl_utils_in_use_is_frozen():
    tree = ast.parse((PACKAGE / "_compat.py").read_text(encoding="utf-8"))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "trl_utils"}
    missing = {f"trl.trainer.utils.{name}" for name in used} - set(SEAMS)
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


def test_trainer_scores_the_model_it_is_given_through_its_fused_forward(tmp_path):
    trainer, calls = make_trainer(tmp_path), []

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


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("grpo"), loss_type="grpo")


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


# Rollouts


def test_split_and_shuffle_carry_a_list_column_in_unison_with_tensors():
    rows = 6
    batch = {
        "prompt_ids": torch.arange(rows)[:, None],
        "teacher_weight": [(index / 10,) for index in range(rows)],
        "num_items_in_batch": torch.tensor(42),
    }
    shuffled = trl_utils.shuffle_sequence_dict(batch)
    order = shuffled["prompt_ids"][:, 0].tolist()
    assert sorted(order) == list(range(rows)) and order != list(range(rows))
    assert shuffled["teacher_weight"] == [(index / 10,) for index in order]
    parts = trl_utils.split_tensor_dict(shuffled, 3)
    for number, part in enumerate(parts):
        mine = order[2 * number : 2 * number + 2]
        assert part["prompt_ids"][:, 0].tolist() == mine
        assert part["teacher_weight"] == [(index / 10,) for index in mine]
        assert part["num_items_in_batch"].item() == 42


def test_user_logits_processors_run_after_penalties_and_before_the_temperature():
    model, seen = tiny_model(), []

    class Recorder(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores + torch.arange(scores.shape[-1])

    input_ids = torch.randint(3, 60, (2, 5))
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        logits_processor=LogitsProcessorList([Recorder()]),
        do_sample=True,
        temperature=0.5,
        top_k=0,
        repetition_penalty=2.0,
        max_new_tokens=1,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    raw = output.logits[0]
    repeated = torch.zeros_like(raw, dtype=torch.bool).scatter(1, input_ids, True)
    penalised = torch.where(repeated, torch.where(raw < 0, raw * 2, raw / 2), raw)
    torch.testing.assert_close(seen[0], penalised)
    torch.testing.assert_close(output.scores[0], (penalised + torch.arange(raw.shape[-1])) / 0.5)


def test_log_probs_of_a_single_turn_become_the_sampling_log_probs_of_the_batch(tmp_path):
    calls = []

    class Sampler(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
            calls.append((images, multimodal_fields, num_generations, kwargs))
            completion_ids = [[5] * (1 + index % 3) for index in range(len(prompt_ids))]
            return completion_ids, [[-0.5 - index] * len(ids) for index, ids in enumerate(completion_ids)]

    trainer = make_trainer(tmp_path, Sampler)
    trainer.model.train()
    rows = [{"prompt": prompt} for prompt in runs.PROMPTS[:2] for _ in range(4)]
    output = trainer._generate_and_score_completions(rows)
    assert calls == [(None, {}, 4, {})]
    lengths = output["completion_mask"].sum(dim=1).tolist()
    assert lengths == [1, 2, 3, 1, 2, 3, 1, 2]
    for index, length in enumerate(lengths):
        assert output["sampling_per_token_logps"][index].tolist() == [-0.5 - index] * length + [0.0] * (3 - length)
        assert output["completion_ids"][index, length:].tolist() == [PAD_ID] * (3 - length)
    assert "old_per_token_logps" not in output  # absent from aligned steps: `objective="student"` must add its own


def test_trainer_generates_through_the_unwrapped_model_with_its_own_settings(tmp_path):
    trainer, calls = make_trainer(tmp_path), []
    original = trainer.model.generate

    def generate(**kwargs):
        calls.append(kwargs)
        return original(**kwargs)

    trainer.model.generate = generate  # an instance attribute, as `blended_generation` sets it
    prompt_ids = [[5, 6, 7], [8]]
    replaced = GenerationConfig(**{**trainer.generation_kwargs, "do_sample": False, "max_new_tokens": 3})
    trainer.generation_config = replaced
    completion_ids, logprobs = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    assert len(calls) == 1 and calls[0]["generation_config"] is replaced
    assert calls[0]["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert calls[0]["input_ids"].tolist() == [[5, 6, 7], [PAD_ID, PAD_ID, 8]]
    assert logprobs is None and [len(ids) for ids in completion_ids] == [3, 3]
    assert all(isinstance(token, int) for ids in completion_ids for token in ids)


def test_generate_returns_what_the_greedy_decode_takes_from_it(tmp_path):
    trainer = make_trainer(tmp_path)
    prompts = list(runs.PROMPTS[:2])
    _, completion_ids, _, completions, *rest = trainer._generate(prompts)
    assert len(rest) == 4
    assert completions == trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    rewards = trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, completion_ids)
    torch.testing.assert_close(rewards, torch.tensor(runs.reward(completion_ids))[:, None])


@pytest.mark.parametrize("name", TRAINER_ATTRIBUTES)
def test_trainer_has_the_attribute(grpo, name):
    assert hasattr(grpo, name), f"`GRPOTrainer.{name}` is gone: check trl_blend/{TRAINER_ATTRIBUTES[name]}."


def test_metrics_are_lists_per_mode(grpo):
    assert set(grpo._metrics) == {"train", "eval"} and grpo._metrics["train"]["anything"] == []
    assert (grpo._dist.is_fsdp, grpo._dist.is_zero3) == (False, False)


# Loading and adapters


def test_zero3_is_detected_through_the_reference_that_loading_hides():
    from transformers.integrations import deepspeed

    class Zero3:
        @staticmethod
        def is_zero3():
            return True

    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
            assert not deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_adapter_layers_obey_the_flag_that_decoding_sets():
    pytest.importorskip("peft")
    input_ids = torch.randint(3, 60, (2, 5))
    with torch.no_grad():
        base = tiny_model()(input_ids).logits
        model = tiny_lora(tiny_model())
        layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
        assert layers and not torch.allclose(model(input_ids).logits, base)
        for layer in layers:
            assert layer.disable_adapters is False and layer.active_adapters == ["default"]
            layer._disable_adapters = True
        torch.testing.assert_close(model(input_ids).logits, base)
        assert layers[0].disable_adapters is True
