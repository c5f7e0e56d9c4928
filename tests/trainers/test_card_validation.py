"""
Cards as `huggingface_hub` validates them: against the stand-in for the Hub, which checks types only. The documented
rules of the real Hub for metadata are in `card_reading.py`, which reads every card.
"""

import pytest
from huggingface_hub import ModelCard

from tests.hub.server import hub_endpoint  # noqa: F401
from tests.trainers import scored
from tests.trainers.card_reading import write_card


@pytest.fixture(params=["mixed", "student", "trust region", "offline"])
def trainer(request, build, build_opd, models, tmp_path):
    if request.param == "trust region":
        return build_opd()
    if request.param == "offline":
        rows = scored.scored_rollouts(scored.load(models, "student"), scored.load(models, "teacher"), num_rows=2)
        return scored.build_offline(models, tmp_path / "run", train_dataset=rows)
    return build(objective=request.param, teacher_weight=0.5)


def test_a_card_is_valid(trainer, hub_endpoint):  # noqa: F811
    trainer.card_results = {
        "rewards": ["accuracy"],
        "prompts": 20,
        "before": {"student": [(0.25, 0.01)]},
        "after": {"student": [(0.5, 0.02)]},
        "dataset": "openai/gsm8k",
        "policy": "student",
    }
    write_card(trainer, dataset_name="my-org/prompts", tags="mine")
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    card.validate()
    assert hub_endpoint.count("validate_yaml") == 1
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.datasets) == (
        "transformers",
        "text-generation",
        "my-org/prompts",
    )
    assert data.base_model is None and data.license is None and "mine" in data.tags
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.5, "openai/gsm8k")


def test_an_invalid_card_is_refused(hub_endpoint):  # noqa: F811
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: [a, b]\n---\n").validate()
