"""`beta`: TRL's KL term is measured against its own reference policy, which is not mixed."""

import math

import pytest
from peft import LoraConfig

from tests.tiny import tiny_lora, tiny_model
from tests.trainers import forced, runs


WEIGHT, BETA, TEMPERATURE = 0.4, 0.5, 0.8
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


def student_of(kind, models):
    """Student of each kind, the arguments that go with it, and what its KL reference is."""
    if kind == "full":
        return {"student": "student"}, forced.frozen(0)
    if kind == "new adapter":
        config = LoraConfig(task_type="CAUSAL_LM", **LORA)
        return {"student": "student", "trainer_kwargs": {"peft_config": config}}, forced.frozen(0)
    base = tiny_model(seed=0)
    base.config._name_or_path = str(models / "student")
    initial = tiny_lora(tiny_model(seed=0), seed=3).double().requires_grad_(False)
    return {"student": tiny_lora(base, seed=3)}, initial


# A student without adapters has no base
COMBINATIONS = [
    ("full", "teacher"),
    ("new adapter", "teacher"),
    ("new adapter", None),
    ("trained adapter", "teacher"),
    ("trained adapter", None),
]


@pytest.mark.parametrize("objective", ["mixed", "student"])
@pytest.mark.parametrize(("kind", "teacher"), COMBINATIONS)
def test_reference_logps_are_not_mixed(build, models, kind, objective, teacher):
    student, reference_model = student_of(kind, models)
    settings = {
        "beta": BETA,
        "use_bias_correction_kl": False,
        "temperature": TEMPERATURE,
        "teacher_weight": WEIGHT,
        "objective": objective,
    }
    trainer = build(teacher=teacher, max_steps=2, loss_type="grpo", **student, **settings)
    record = runs.train(trainer)
    for call in record.calls:
        expected = forced.logps(reference_model, [], [], call.inputs, TEMPERATURE)
        forced.assert_close_rows(forced.kept(call.inputs["ref_per_token_logps"], call.inputs), expected, 1e-4)
    assert all(kl >= 0 and math.isfinite(kl) for kl in record.logged("kl"))

    # The KL estimate compares that reference with the policy of the objective
    first = record.calls[0]
    policy = trained_policy(kind, first.parameters)
    partners = {"teacher": forced.frozen(1), None: forced.frozen(0)}[teacher]
    mixture = ([partners], [WEIGHT]) if objective == "mixed" else ([], [])
    own = forced.logps(policy, *mixture, first.inputs, TEMPERATURE)
    reference = forced.logps(reference_model, [], [], first.inputs, TEMPERATURE)
    terms = [
        math.exp(r - p) - (r - p) - 1 for row, other in zip(reference, own) for r, p in zip(row, other, strict=True)
    ]
    assert record.logged("kl")[0] == pytest.approx(sum(terms) / len(terms), abs=1e-4)


def trained_policy(kind, parameters):
    if kind == "full":
        return forced.student_at(parameters)
    model = tiny_lora(tiny_model(seed=0))
    return forced.with_parameters(model, parameters)
