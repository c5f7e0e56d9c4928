"""Every setting that is refused, before anything else happens, and the defaults of the reference."""

import pytest

from tests.trainers.scored import offline_config
from trl_blend import OfflineOPDConfig
from trl_blend.errors import ConfigError


def test_defaults_are_those_of_the_reference(tmp_path):
    args = OfflineOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay) == (2e-6, "constant", 0.1)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.98, 1.0)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
    assert (args.offline_loss, args.loss_aggregation, args.teacher_consistency) == (
        "auto",
        "sequence",
        "strict",
    )
    assert (args.rescore_num_rows, args.max_policy_drift, args.num_train_epochs) == (0, None, 1.0)


REFUSED = {
    "loss_type": {"loss_type": "dft"},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "assistant_only_loss": {"assistant_only_loss": True},
    "chat_template_path": {"chat_template_path": "template.jinja"},
    "eos_token": {"eos_token": "<eos>"},
    "truncation_mode": {"truncation_mode": "keep_end"},
    "completion_only_loss": {"completion_only_loss": False},
    "skip_prepare_dataset": {"dataset_kwargs": {"skip_prepare_dataset": True}},
    "packing_strategy='wrapped'": {"packing": True, "max_length": 64, "packing_strategy": "wrapped"},
    "packing_strategy='bfd_split'": {"packing": True, "max_length": 64, "packing_strategy": "bfd_split"},
    "Set `max_length`": {"packing": True},
    "eval_packing=True": {"eval_packing": True, "max_length": 64},
    "metric_for_best_model='loss'": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
    },
    "metric_for_best_model='loss'`: the sampled": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
    },
    "metric_for_best_model='eval_loss'": {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    },
    "metric_for_best_model='eval_math_loss'": {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_math_loss",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    },
    "importance_correction='token'": {"importance_correction": "token", "offline_loss": "top_k_reverse_kl"},
    "importance_cap=5": {"importance_cap": 5.0},
    "importance_correction='token'` has no effect": {"importance_correction": "token", "offline_loss": "auto"},
    "importance_correction='none'` has no effect": {"importance_correction": "none", "offline_loss": "auto"},
    "importance_cap=2.0` has no effect": {"importance_cap": 2.0, "offline_loss": "auto"},
    "importance_cap=0": {"importance_cap": 0.0, "importance_correction": "token"},
    "importance_cap='2'` must be a number": {"importance_cap": "2", "importance_correction": "token"},
    "reward_extrapolation='2'` must be a number": {"reward_extrapolation": "2"},
    "advantage_baseline='kl'` has no effect": {"advantage_baseline": "kl", "offline_loss": "auto"},
    "reward_extrapolation=1.25` has no effect": {"reward_extrapolation": 1.25, "offline_loss": "top_k_reverse_kl"},
    "reward_extrapolation=0.5` must be": {"reward_extrapolation": 0.5},
    "reward_extrapolation=nan` must be": {"reward_extrapolation": float("nan")},
    "advantage_baseline='kl'` with `reward_extrapolation=1.25`": {
        "advantage_baseline": "kl",
        "reward_extrapolation": 1.25,
    },
    "padding_free=True": {"padding_free": True, "max_length": 64},
    "rescore_num_rows=-1": {"rescore_num_rows": -1},
    "rescore_num_rows=8` needs a teacher": {"rescore_num_rows": 8},
    "`rescore_num_rows=0` leaves out": {"teacher_model_name_or_path": "t", "rescore_num_rows": 0},
    "`teacher_consistency='off'` leaves out": {"teacher_model_name_or_path": "t"},
    "sft_teacher='t'": {"sft_teacher": "t"},
    "max_policy_drift=0": {"max_policy_drift": 0.0},
    "max_policy_drift=nan": {"max_policy_drift": float("nan")},
    "stream_rollouts=True": {"stream_rollouts": True, "max_steps": -1},
    "policy_drift_action='stop'` has no effect": {"policy_drift_action": "stop"},
    "teacher_model_revision='v2'` has no effect": {"teacher_model_revision": "v2"},
    "teacher_model_init_kwargs=.* has no effect": {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
    "dataset_text_field='story'": {"dataset_text_field": "story"},
}


@pytest.mark.parametrize(("match", "settings"), REFUSED.items(), ids=REFUSED)
def test_refused(tmp_path, match, settings):
    with pytest.raises(ConfigError, match=match):
        offline_config(tmp_path, **settings)


def test_a_teacher_is_asked_to_score_some_rows(tmp_path):
    args = offline_config(tmp_path, teacher_model_name_or_path="t", teacher_consistency="warn")
    assert args.rescore_num_rows == 64


TOP_K, DRAWN = ("teacher_logps", "rollout_logps", "teacher_topk_ids"), ("teacher_logps", "rollout_logps")


@pytest.mark.parametrize(
    ("columns", "loss", "ratio"), [(TOP_K, "top_k_reverse_kl", "none"), (DRAWN, "sampled_token", "token")]
)
def test_the_loss_that_the_data_allow(tmp_path, columns, loss, ratio):
    args = offline_config(tmp_path, offline_loss="auto")
    resolved = args.resolved(columns)
    assert (resolved.offline_loss, resolved.importance_correction) == (loss, ratio)
    assert args.offline_loss == "auto" and resolved.resolved(columns) is resolved  # a config serves several trainers
    # The paper's is one word away
    paper = offline_config(tmp_path, offline_loss="sampled_token")
    assert paper.resolved(columns) is paper and paper.importance_correction == "none"


def test_data_that_allow_only_the_loss_of_the_paper(tmp_path):
    with pytest.raises(ConfigError, match="Set `offline_loss='sampled_token'` for the paper's loss"):
        offline_config(tmp_path, offline_loss="auto").resolved(["teacher_logps"])


def test_the_best_model_by_a_loss_that_turns_out_to_be_no_divergence(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    args = offline_config(tmp_path, offline_loss="auto", **best)
    assert args.resolved(TOP_K).uses_top_k
    with pytest.raises(ConfigError, match="metric_for_best_model='loss'"):
        args.resolved(DRAWN)


@pytest.mark.parametrize("metric", ["eval_offline/reverse_kl", "offline/drift_kl", "eval_math_offline/divergence"])
def test_the_best_model_is_the_closest(tmp_path, metric):
    assert offline_config(tmp_path, metric_for_best_model=metric).greater_is_better is False
    assert offline_config(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True


def test_packing_strategy_without_packing_is_left_alone(tmp_path):
    assert offline_config(tmp_path, packing_strategy="wrapped").packing_strategy == "wrapped"
