"""
Two CPU processes against one: equal parameters, equal updates, equal metrics, no deadlock; under DDP and FSDP2.

`worker.py` runs the trainer and keeps what it found; everything that is asserted is asserted here.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import worker
from tests.tiny import tiny_model


pytestmark = pytest.mark.distributed

LAUNCHES = ("ddp", "fsdp2")
SAMPLED = [(launch, name) for launch in LAUNCHES for name in worker.END_TO_END]
UPDATES = [(launch, name) for launch in LAUNCHES for name in worker.UPDATES]
UPDATES += [("ddp", name) for name in worker.PEFT_UPDATES]


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys() and first
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize(("launch", "name"), UPDATES)
def test_two_processes_take_the_steps_of_one(launched, launch, name):
    (single,), ranks = launched("single"), launched(launch)
    expected = single[name]["parameters"]
    assert largest_difference(expected, single[name]["before"]) > 1e-3
    for rank in ranks:
        assert largest_difference(rank[name]["parameters"], expected) < 1e-5


@pytest.mark.parametrize(("launch", "name"), UPDATES + SAMPLED)
def test_ranks_end_with_equal_parameters(launched, launch, name):
    first, second = launched(launch)
    assert largest_difference(first[name]["parameters"], second[name]["parameters"]) == 0.0


def test_a_forward_around_the_wrapper_is_seen(launched):
    """The two tests above can fail: with DDP bypassed, ranks part from each other and from the single process."""
    (single,), (first, second) = launched("single"), launched("ddp")
    parameters = [rank["mixed_logits_around_wrapper"]["parameters"] for rank in (first, second)]
    assert largest_difference(*parameters) > 1e-4
    assert largest_difference(parameters[0], single["mixed_logits"]["parameters"]) > 1e-4


@pytest.mark.parametrize(("launch", "name"), SAMPLED)
def test_sampling_with_ranks_that_finish_at_different_steps(launched, launch, name):
    first, second = (rank[name] for rank in launched(launch))
    assert len(first["log"]) == len(second["log"]) == 3
    longest = [(max(a), max(b)) for a, b in zip(first["lengths"], second["lengths"], strict=True)]
    assert any(a != b for a, b in longest), f"both ranks decode equally long in every step: {longest}"
    assert first["completions"] != second["completions"]


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


def test_base_of_a_sharded_peft_student_is_refused(launched):
    for rank in launched("fsdp2"):
        assert "`teacher_model=None`" in rank["peft_refused"] and "FSDP" in rank["peft_refused"]


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
