"""
Two CPU processes against one, for logit mixing beside `test_common.py`: metrics, the adaptive weight, loading, saving.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import worker
from tests.distributed.test_common import largest_difference
from tests.tiny import tiny_model


pytestmark = pytest.mark.distributed

LAUNCHES = ("ddp", "fsdp2")
SAMPLED = [(launch, name) for launch in LAUNCHES for name in worker.END_TO_END]


@pytest.mark.parametrize(("launch", "name"), SAMPLED)
def test_metrics_are_those_of_all_ranks_on_every_rank(launched, launch, name):
    first, second = (rank[name] for rank in launched(launch))
    for step, (ours, theirs) in enumerate(zip(first["log"], second["log"], strict=True)):
        names = {key for key in ours if key.startswith(("mixing/", "importance/"))}
        assert {"mixing/teacher_weight", "mixing/kl_behavior_student", "mixing/teacher_logp"} <= names
        assert ("importance/ratio_max" in names) == (name == "sampled_student")
        assert {key: ours[key] for key in names} == {key: theirs[key] for key in names}
        for statistic, (total, count) in first["statistics"][step].items():
            other_total, other_count = second["statistics"][step][statistic]
            assert total / count != pytest.approx(other_total / other_count, rel=1e-3)
            mean = (total + other_total) / (count + other_count)
            assert ours[f"mixing/{statistic}"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_adaptive_weight_is_that_of_one_process(launched, launch):
    (single,), ranks = launched("single"), launched(launch)
    expected = single["adaptive"]
    assert len(worker.VALIDATION_PROMPTS) % 2 == 1
    assert expected["log"][0]["adaptive/net_gain"] != 0.0 and expected["weight"][0] != 0.5
    for rank in ranks:
        found = rank["adaptive"]
        assert found["weight"] == expected["weight"]
        for weight, rewards in expected["rewards"].items():
            assert rewards.shape == (len(worker.VALIDATION_PROMPTS), 1)
            torch.testing.assert_close(found["rewards"][weight], rewards, rtol=0, atol=0)
        for key in ("net_gain", "mixed_accuracy", "student_accuracy"):
            assert found["log"][0][f"adaptive/{key}"] == expected["log"][0][f"adaptive/{key}"]


@pytest.mark.parametrize("rank", [0, 1])
def test_partner_and_student_are_whole_where_weights_are_loaded_on_one_rank(launched, rank):
    found = launched("fsdp2")[rank]["efficient_loading"]
    assert largest_difference(found["partner"], worker.tensors(tiny_model(seed=1))) == 0.0
    assert largest_difference(found["parameters"], dict(tiny_model(seed=0).named_parameters())) == 0.0


@pytest.mark.parametrize(
    ("launch", "name"), [("ddp", "mixed_logits"), ("fsdp2", "mixed_logits"), ("ddp", "peft_mixed")]
)
def test_what_two_processes_save_decodes_the_mixed_policy_of_one(launched, launch, name, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    (single,), (first, second) = launched("single"), launched(launch)
    assert first[name]["output_dir"] == second[name]["output_dir"] != single[name]["output_dir"]
    folders = [Path(found[name]["output_dir"]) for found in (single, first)]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if wanted(path)) for folder in folders]
    assert files[0] == files[1] and Path("mixing.json") in files[0]
    if name == "mixed_logits":
        assert Path("checkpoint-2/mixing.json") in files[0] and Path("reference/model.safetensors") in files[0]
    scores = [step_scores(folder) for folder in folders]
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    # It is the mixture, and that of the last step
    alone = step_scores(folders[0], mixed=False)
    assert (scores[0] - alone).abs().max() > 1e-2


def wanted(path):
    """What belongs to the saved policy rather than to the state of one process."""
    return path.is_file() and not path.name.startswith(("rng_state", "optimizer", "scheduler", "pytorch_model_fsdp"))


def step_scores(folder, mixed=True):
    """Log-probabilities of the first decoding step, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = AutoTokenizer.from_pretrained(folder)("3+4=", return_tensors="pt")
    generate = model.generate if mixed else lambda **kwargs: type(model).generate(model, **kwargs)
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    return generate(**inputs, **settings).scores[0].log_softmax(-1)
