"""
What this package assumes about TRL's supervised trainer without its word.

A release that moves one of these seams fails here, by name, instead of training something else without a word.
"""

from inspect import signature

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.runs import SETTINGS
from tests.trainers.scored import NOT_SFT


ROWS = [
    {"input_ids": [7, 8, 9, 10], "labels": [-100, -100, 9, 10]},
    {"input_ids": [11, 12, 13, 14, 15], "labels": [-100, 12, 13, 14, 15]},
]


def build(folder, trainer_class=SFTTrainer, **settings):
    shared = {name: value for name, value in SETTINGS.items() if name not in NOT_SFT}
    args = SFTConfig(output_dir=str(folder), **{**shared, **settings})
    return trainer_class(tiny_model(), args, train_dataset=Dataset.from_list(ROWS), processing_class=tiny_tokenizer())


@pytest.mark.parametrize("name", ["_metrics", "_signature_columns", "data_collator"])
def test_trainer_has_the_attribute(tmp_path, name):
    assert hasattr(build(tmp_path), name), f"`SFTTrainer.{name}` is gone: check trl_blend/trainers/offline_opd."


def test_the_collator_is_a_dataclass_that_can_be_replaced_after_construction(tmp_path):
    trainer = build(tmp_path, padding_free=True, max_length=None)
    # Those of the constructor, which another test freezes
    assert set(trainer.data_collator.__dataclass_fields__) == set(signature(type(trainer.data_collator)).parameters)
    seen = []
    collator = trainer.data_collator
    trainer.data_collator = lambda examples: seen.append(len(examples)) or collator(examples)
    trainer.train()
    assert seen == [2]


def test_the_parent_prepares_through_the_method_and_before_its_signature_is_read(tmp_path):
    class Trainer(SFTTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset.map(lambda row: {"extra": [0.5] * len(row["input_ids"])})

        def _set_signature_columns_if_needed(self):
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, "extra"]

    trainer = build(tmp_path, Trainer)
    seen, collator = [], trainer.data_collator
    trainer.data_collator = lambda examples: seen.append(set(examples[0])) or collator(examples)
    trainer.train()
    assert seen == [{"input_ids", "labels", "extra"}]


@pytest.mark.parametrize("settings", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}])
def test_the_loss_is_minus_the_sum_of_log_probs_over_the_number_of_items(tmp_path, settings):
    """Of what the model that `compute_loss` is given returns for `fused_lm_head=True`; the number is ours to count."""
    counted, losses = [], []

    class Trainer(SFTTrainer):
        def _get_num_items_in_batch(self, batch_samples, device):
            counted.append(len(batch_samples))
            return super()._get_num_items_in_batch([{"labels": torch.zeros(1, 6)}], device)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            def standing_in(**inputs):
                assert inputs["fused_lm_head"] and "labels" in inputs
                outputs = model(**inputs)
                assert outputs.log_probs.shape == outputs.label_mask.shape == inputs["labels"][:, 1:].shape
                assert (outputs.log_probs[inputs["labels"][:, 1:] == -100] == 0).all()
                outputs.log_probs = outputs.log_probs * 0.0 + 3.0
                return outputs

            assert num_items_in_batch == 5
            length = inputs["labels"].shape[1] - 1
            loss = super().compute_loss(standing_in, inputs, return_outputs, num_items_in_batch)
            losses.append(loss.item() / (3.0 * len(inputs["labels"]) * length))
            return loss

    trainer = build(tmp_path, Trainer, **settings)
    trainer.train()
    micro_batches = settings.get("gradient_accumulation_steps", 1)
    assert counted == [micro_batches] and losses == pytest.approx([-1 / 5] * micro_batches)


def test_without_a_number_of_items_the_loss_is_divided_by_the_labels(tmp_path):
    trainer = build(tmp_path)
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    logprobs = trainer.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    expected = -logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].sum() / kept.sum()
    torch.testing.assert_close(loss, expected)
    assert set(trainer._metrics["train"]) >= {"entropy", "mean_token_accuracy"}


def test_log_calls_average_lists_of_metrics_and_prefix_those_of_evaluation(tmp_path):
    trainer = build(tmp_path)
    for training, name in ((True, "offline/x"), (False, "eval_offline/x")):
        trainer.model.train(training)
        trainer._metrics["train" if training else "eval"]["offline/x"].extend([1.0, 3.0])
        logs = {}
        trainer.log(logs)
        assert logs[name] == 2.0
