"""
What this package assumes about TRL's distillation trainer without its word.

A release that moves one of these seams fails here, by name, instead of training something else without a word.
"""

import inspect
from pathlib import Path

import pytest
import torch
import trl.trainer.distillation_trainer as trl_distillation
from torch import nn
from transformers import GenerationConfig
from trl import DistillationTrainer, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from tests.tiny import PAD_ID, tiny_model
from tests.trainers import runs
from trl_blend import _compat


PROMPTS = tuple(f"{number}+5=" for number in range(8))


def test_metrics_are_averaged_and_cleared_by_log(make_distillation):
    trainer = make_distillation()
    trainer.model.train()
    trainer._metrics["train"]["blend/x"].extend([1.0, float("nan"), 3.0])
    trainer._metrics["eval"]["blend/x"].append(7.0)
    for mode, name, value in ((True, "blend/x", 2.0), (False, "eval_blend/x", 7.0)):
        trainer.model.train(mode)
        logs = {}
        trainer.log(logs)
        assert logs[name] == value
    assert not trainer._metrics["train"] and not trainer._metrics["eval"]


# The constructor and the teacher


def test_the_teacher_may_be_left_out_and_set_later(make_distillation):
    trainer = make_distillation(teacher=None)
    assert trainer.teacher_model is None
    trainer.teacher_model = tiny_model(seed=1)
    later, given = runs.train(trainer), runs.train(make_distillation())
    runs.assert_same_run(later, given)


def test_a_teacher_is_asked_for_its_configuration_its_head_and_its_hidden_states(make_distillation):
    """All that `BaseTeacher` provides."""
    asked = []

    class Teacher(nn.Module):
        @property
        def config(self):
            asked.append("config")
            return tiny_model().config

        def get_output_embeddings(self):
            asked.append("head")
            return nn.Linear(32, 64, bias=False)

    class Trainer(trl_distillation.DistillationTrainer):
        def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep):
            if isinstance(unwrapped_model, Teacher):
                asked.append("hidden")
                assert not unwrapped_model.training and not torch.is_grad_enabled()
                return torch.zeros(*input_ids.shape[:1], logits_to_keep, 32)
            return super()._get_last_hidden_state(unwrapped_model, input_ids, attention_mask, logits_to_keep)

    trainer = make_distillation(Trainer, teacher=None)
    trainer.teacher_model = Teacher()
    assert runs.train(trainer).losses and set(asked) == {"config", "head", "hidden"}


def test_eos_ids_are_the_tokenizers_and_the_models(make_distillation):
    student = tiny_model()
    student.generation_config.eos_token_id = [7, 9]
    trainer = make_distillation(student=student)
    assert trainer.eos_token_ids == [1, 7, 9] and trainer._tokenizer.eos_token_id == 1
    assert trainer.generation_config.eos_token_id == trainer.generation_kwargs["eos_token_id"] == [1, 7, 9]


# The loss: `_compat.divergence_function`


def inputs_of(trainer, lengths=(3, 1)):
    prompt_ids, completion_ids = torch.randint(3, 60, (2, 3)), torch.randint(3, 60, (2, max(lengths)))
    mask = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "num_items_in_batch": torch.tensor(10),
    }


def test_divergence_is_looked_up_at_each_call_with_both_output_layers(make_distillation, monkeypatch):
    # With a soft-cap of the student's and another hidden size, so that no two arguments look alike
    teacher = tiny_model(seed=1, hidden_size=16)
    trainer = make_distillation(student=tiny_model("gemma2"), teacher=teacher, temperature=0.7, beta=0.3)
    inputs, calls = inputs_of(trainer), []

    def divergence(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.tensor(1.5), torch.tensor(8.0), torch.tensor(4)

    monkeypatch.setattr(trl_distillation, "_chunked_divergence_loss", divergence)
    loss, entropy_sum, count = trainer._compute_loss(trainer.model, inputs, 5)
    assert (loss, entropy_sum, count) == (1.5, 8.0, 4)
    (((hidden, teacher_hidden, weight, teacher_weight, mask, beta), named),) = calls
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    for model, states in ((trainer.model, hidden), (teacher, teacher_hidden)):
        expected = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, 2:-1]
        valid = inputs["completion_mask"].bool()
        torch.testing.assert_close(states[valid], expected[valid])
    assert weight is trainer.model.lm_head.weight and teacher_weight is teacher.lm_head.weight
    assert torch.equal(mask, inputs["completion_mask"]) and beta == 0.3
    assert named == {
        "num_items_in_batch": 5,
        "student_lm_head_bias": None,
        "teacher_lm_head_bias": None,
        "student_logit_scale": 1.0,
        "teacher_logit_scale": 1.0,
        "student_final_logit_softcapping": 5.0,
        "teacher_final_logit_softcapping": None,
        "temperature": 0.7,
    }
    assert hidden.requires_grad and not teacher_hidden.requires_grad


def test_tool_tokens_are_masked_out_of_the_divergence(distillation, monkeypatch):
    masks, inputs = [], inputs_of(distillation)
    inputs["tool_mask"] = torch.tensor([[1, 0, 1], [1, 1, 1]])

    def divergence(*args, **kwargs):
        masks.append(args[4])
        return torch.zeros(3).unbind()

    monkeypatch.setattr(trl_distillation, "_chunked_divergence_loss", divergence)
    distillation._compute_loss(distillation.model, inputs, None)
    assert masks[0].tolist() == [[1, 0, 1], [1, 0, 0]]


def test_the_shim_reduces_as_trl(distillation):
    """What a divergence of this package returns per token is reduced to the same loss, entropy and count."""
    inputs = inputs_of(distillation)

    def divergence(heads):
        logits = heads.student.hidden @ heads.student.weight.T
        teacher = heads.teacher.hidden @ heads.teacher.weight.T
        logprobs, target = logits.log_softmax(-1), teacher.log_softmax(-1)
        mask = heads.mask.reshape(-1)
        return (logprobs.exp() * (logprobs - target)).sum(-1), -(logprobs.exp() * logprobs).sum(-1) * mask

    for items in (None, torch.tensor(10.0)):
        expected = distillation._compute_loss(distillation.model, inputs, items)
        with _compat.divergence_function(divergence):
            found = distillation._compute_loss(distillation.model, inputs, items)
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, check_dtype=False)
        with _compat.divergence_function(lambda heads: None):
            assert distillation._compute_loss(distillation.model, inputs, items)[0] == expected[0]


def test_the_loss_gets_the_tokens_of_the_generation_batch(make_distillation, monkeypatch):
    given = []
    original = trl_distillation.DistillationTrainer._compute_loss

    def compute(trainer, student, inputs, num_items):
        given.append((float(num_items), inputs["completion_mask"].sum().item()))
        return original(trainer, student, inputs, num_items)

    monkeypatch.setattr(trl_distillation.DistillationTrainer, "_compute_loss", compute)
    make_distillation(per_device_train_batch_size=4, gradient_accumulation_steps=2).train()
    assert len(given) == 2 and {items for items, _ in given} == {sum(tokens for _, tokens in given)}


# Rollouts


def test_rows_of_a_batch_may_have_more_columns(make_distillation):
    """`verifier_reward` travels with its row through shuffling and splitting to the loss."""
    seen = []

    class Trainer(trl_distillation.DistillationTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["verifier_reward"] = output["completion_ids"].float().mean(1)
            return output

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    make_distillation(Trainer, per_device_train_batch_size=4, gradient_accumulation_steps=2).train()
    assert len(seen) == 2
    for inputs in seen:
        assert torch.equal(inputs["verifier_reward"], inputs["completion_ids"].float().mean(1))
        assert inputs["verifier_reward"].shape == (4,)


def test_trainer_generates_through_the_unwrapped_model_with_its_own_settings(make_distillation):
    trainer, calls = make_distillation(), []
    original = trainer.model.generate

    def generate(**kwargs):
        taken, _ = trainer.model._prepare_generation_config(kwargs["generation_config"])
        calls.append((kwargs, taken.temperature))
        return original(**kwargs)

    trainer.model.generate = generate  # an instance attribute, as `blended_generation` sets it
    replaced = GenerationConfig(**{**trainer.generation_kwargs, "do_sample": False, "max_new_tokens": 3})
    trainer.generation_config = replaced
    completion_ids = trainer._generate_single_turn([[5, 6, 7], [8]], None, {})
    trainer.generation_config.temperature, trainer.generation_kwargs["temperature"] = 0.5, 0.5
    trainer._generate_single_turn([[5, 6, 7], [8]], None, {})
    (first, _), (_, temperature) = calls
    assert first["generation_config"] is replaced and temperature == 0.5
    assert first["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first["input_ids"].tolist() == [[5, 6, 7], [PAD_ID, PAD_ID, 8]]
    assert [len(ids) for ids in completion_ids] == [3, 3]
    assert all(isinstance(token, int) for ids in completion_ids for token in ids)


def test_suppressed_tokens_are_those_of_the_generation_config(make_distillation):
    trainer = make_distillation()
    suppressed = list(range(3, 64))
    trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"] = suppressed
    rows = trainer._generate_single_turn([[5, 6, 7], [8]], None, {})
    assert {token for row in rows for token in row} <= {0, 1, 2}


def test_the_engine_is_chosen_and_its_weights_synchronised_at_each_call(make_distillation):
    trainer, calls = make_distillation(), []

    class Engine:
        temperature = 1.0

        def sync_weights(self):
            calls.append("sync")

        def generate(self, prompts, images, num_generations, profiler):
            calls.append((prompts, images, num_generations))
            return None, [[4], [5]], None, None

    trainer.vllm_generation, trainer._last_loaded_step = Engine(), -1
    prompts = [[5, 6, 7], [8]]
    assert trainer._generate_single_turn(prompts, None, {}) != [[4], [5]] and calls == []
    trainer.use_vllm = True
    assert trainer._generate_single_turn(prompts, None, {}) == [[4], [5]]
    trainer._generate_single_turn(prompts, None, {})
    assert calls == ["sync", (prompts, None, 1), (prompts, None, 1)]


def test_the_engine_reads_its_temperature_at_each_call():
    assert "self.temperature" in inspect.getsource(VLLMGeneration.generate)
    assert "self.temperature = temperature" in inspect.getsource(VLLMGeneration.__init__)


# Prompts: `_compat.repeated_prompts`


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_prompts_are_repeated_through_names_of_the_module_with_named_arguments(make_distillation, monkeypatch, kind):
    name = {"map": "RepeatSampler", "iterable": "repeat_iterable_dataset"}[kind]
    data, original, calls = runs.dataset(PROMPTS), getattr(trl_distillation, name), []

    def recording(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(trl_distillation, name, recording)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train_dataset = data if kind == "map" else data.to_iterable_dataset()
    trainer = make_distillation(train_dataset=train_dataset, **settings)
    loader = trainer.get_train_dataloader()
    assert len(calls) == 1
    assert {key: calls[0][key] for key in ("mini_repeat_count", "batch_size", "repeat_count")} == {
        "mini_repeat_count": 1,
        "batch_size": 4,
        "repeat_count": 2,
    }
    batches = [[row["prompt"] for row in batch] for batch in loader]
    assert [len(batch) for batch in batches] == [4] * 4
    assert batches[0] == batches[1] and batches[2] == batches[3] and not set(batches[0]) & set(batches[2])


# Checkpoints and card


def test_a_checkpoint_is_saved_and_loaded_through_the_overridden_methods(make_distillation):
    calls = []

    class Trainer(trl_distillation.DistillationTrainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            calls.append(("save", folder.is_dir(), self.args.should_save))

        def _load_optimizer_and_scheduler(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            calls.append(("load", checkpoint))

    trainer = make_distillation(Trainer, save_strategy="steps", save_steps=1)
    trainer.train()
    assert calls == [("save", True, True)]
    checkpoint = f"{trainer.args.output_dir}/checkpoint-1"
    make_distillation(Trainer, max_steps=2).train(resume_from_checkpoint=checkpoint)
    assert ("load", checkpoint) in calls


def test_both_trainers_build_the_engine_by_the_name_of_their_module():
    for trainer in (GRPOTrainer, DistillationTrainer):
        source = inspect.getsource(trainer.__init__)
        assert "self.vllm_generation = VLLMGeneration(" in source
        assert inspect.getmodule(trainer).VLLMGeneration is VLLMGeneration


def test_the_engine_has_what_ours_reads():
    source = inspect.getsource(VLLMGeneration)
    assert "self.llm = LLM(" in source and "self._init_vllm()" in inspect.getsource(VLLMGeneration.__init__)
    for name in ("mode", "enable_sleep_mode", "_dist", "generation_kwargs", "top_p", "top_k", "min_p"):
        assert f"self.{name} = " in inspect.getsource(VLLMGeneration.__init__)
    for name in ("_llm_weights_sleeping", "vllm_client", "llm"):
        assert f"self.{name} = " in inspect.getsource(VLLMGeneration._init_vllm)
    # What is told to a sleeping engine is told after this, and nothing wakes it twice
    assert 'if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping:' in source
    # The correction for the difference between engine and trainer is left out by this attribute
    assert "self.use_vllm and self.vllm_importance_sampling_correction" in inspect.getsource(GRPOTrainer._compute_loss)
