"""
Rollouts, loading and adapters: what this package assumes about TRL, transformers and PEFT without their word.

A release that moves one of these seams fails here, by name, instead of training something else without a word.
"""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from tests.contract.seams import DISTILLATION_ATTRIBUTES, GRPO_ATTRIBUTES
from tests.tiny import PAD_ID, tiny_lora, tiny_model
from tests.trainers import runs
from trl_blend import _compat


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


def test_log_probs_of_a_single_turn_become_the_sampling_log_probs_of_the_batch(make_trainer):
    calls = []

    class Sampler(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
            calls.append((images, multimodal_fields, num_generations, kwargs))
            completion_ids = [[5] * (1 + index % 3) for index in range(len(prompt_ids))]
            return completion_ids, [[-0.5 - index] * len(ids) for index, ids in enumerate(completion_ids)]

    trainer = make_trainer(Sampler)
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


def test_trainer_generates_through_the_unwrapped_model_with_its_own_settings(make_trainer):
    trainer, calls = make_trainer(), []
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


def test_generate_returns_what_the_greedy_decode_takes_from_it(make_trainer):
    trainer = make_trainer()
    prompts = list(runs.PROMPTS[:2])
    _, completion_ids, _, completions, *rest = trainer._generate(prompts)
    assert len(rest) == 4
    assert completions == trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    rewards = trainer._calculate_rewards([{"prompt": p} for p in prompts], prompts, completions, completion_ids)
    torch.testing.assert_close(rewards, torch.tensor(runs.reward(completion_ids))[:, None])


ATTRIBUTES = [("grpo", name) for name in GRPO_ATTRIBUTES] + [
    ("distillation", name) for name in DISTILLATION_ATTRIBUTES
]


@pytest.mark.parametrize(("fixture", "name"), ATTRIBUTES)
def test_trainer_has_the_attribute(request, fixture, name):
    trainer = request.getfixturevalue(fixture)
    assert hasattr(trainer, name), f"`{type(trainer).__name__}.{name}` is gone: check what uses it in trl_blend."


@pytest.mark.parametrize("fixture", ["grpo", "distillation"])
def test_metrics_are_lists_per_mode(request, fixture):
    trainer = request.getfixturevalue(fixture)
    assert set(trainer._metrics) == {"train", "eval"} and trainer._metrics["train"]["anything"] == []
    assert (trainer._dist.is_fsdp, trainer._dist.is_zero3) == (False, False)


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


@pytest.mark.parametrize(("fixture", "name"), [("make_trainer", "GRPO"), ("make_distillation", "Distillation")])
def test_card_template_may_lie_outside_trl(request, tmp_path, fixture, name):
    trainer = request.getfixturevalue(fixture)()
    (tmp_path / "mine.md").write_text("---\ntags: []\n---\nA card of {{ trainer_name }}.", encoding="utf-8")
    trainer._template_file = _compat.card_template(str(tmp_path / "mine.md"))
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert card.rstrip().endswith(f"\nA card of {name}.")
