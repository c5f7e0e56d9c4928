import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from tests.consistency.worlds import make_world, rewritten, severities
from tests.models.checkpoints import SAMPLING, reference_logps
from tests.tiny import tiny_model
from trl_blend.consistency.check import _dtype_of, check_teacher_consistency
from trl_blend.consistency.score_checks import MAX_GAP, rescoring_tolerance
from trl_blend.errors import ConfigError, UnsupportedError
from trl_blend.models.fingerprint import identify_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# Re-scoring


def test_scores_at_another_temperature(world, tmp_path):
    hot = reference_logps(world.teacher_model, world.columns["prompt_ids"], world.columns["completion_ids"], 0.7)
    report = check_teacher_consistency(
        world.student, rewritten(world, tmp_path / "scored", teacher_logps=hot), world.teacher
    )
    assert [finding.name for finding in report.errors] == ["rescored"]
    finding = report["rescored"]
    assert "at temperature 1" in finding.remedy
    differences = [hot[row] - world.columns["teacher_logps"][row] for row in range(len(hot))]
    together = np.concatenate(differences)
    assert finding.evidence["mean_absolute_difference"] == pytest.approx(np.abs(together).mean(), abs=1e-5)
    assert finding.evidence["mean_difference"] == pytest.approx(together.mean(), abs=1e-5)
    assert finding.evidence["max_absolute_difference"] == pytest.approx(np.abs(together).max(), abs=1e-5)
    per_row = [np.abs(difference).mean() for difference in differences]
    worst = finding.evidence["worst_rows"][0]
    assert worst["row"] == world.columns["key"][int(np.argmax(per_row))]
    assert worst["mean_absolute_difference"] == pytest.approx(max(per_row), abs=1e-5)
    assert worst["row"] in finding.message


def test_rows_shuffled_against_their_scores(world, tmp_path):
    logps, lengths = world.columns["teacher_logps"], [len(row) for row in world.columns["completion_ids"]]
    whole = [row for row, length in enumerate(lengths) if length == max(lengths)]
    assert len(whole) >= 2
    shuffled = list(logps)
    shuffled[whole[0]], shuffled[whole[1]] = logps[whole[1]], logps[whole[0]]
    report = check_teacher_consistency(
        world.student, rewritten(world, tmp_path / "scored", teacher_logps=shuffled), world.teacher
    )
    assert [finding.name for finding in report.errors] == ["rescored"]
    assert report["rescored"].evidence["num_rows_beyond"] == 2
    worst = {entry["row"] for entry in report["rescored"].evidence["worst_rows"][:2]}
    assert worst == {world.columns["key"][whole[0]], world.columns["key"][whole[1]]}


def test_two_rows_are_found_by_their_rows_where_the_mean_hides_them(world, tmp_path):
    logps = [row.copy() for row in world.columns["teacher_logps"]]
    logps[3] -= 0.02
    scored = rewritten(world, tmp_path / "scored", teacher_logps=logps)
    finding = check_teacher_consistency(world.student, scored, world.teacher, tolerance=2.5e-3)["rescored"]
    assert finding.evidence["mean_absolute_difference"] < 2.5e-3
    assert (finding.severity, finding.evidence["num_rows_beyond"]) == ("error", 1)


@pytest.mark.parametrize(
    ("offset", "direction", "severity"),
    [(4e-3, lambda steps: 1.0 + 0 * steps, "error"), (4e-3, np.cos, "ok"), (2e-2, np.cos, "error")],
)
def test_a_bias_weighs_more_than_noise(world, tmp_path, offset, direction, severity):
    """Noise is let through up to the tolerance, the same amount in one direction is not."""
    logps = [
        np.minimum(row + offset * direction(np.pi * np.arange(len(row))), 0) for row in world.columns["teacher_logps"]
    ]
    scored = rewritten(world, tmp_path / "scored", teacher_logps=logps)
    finding = check_teacher_consistency(world.student, scored, world.teacher, tolerance=5e-3)["rescored"]
    assert finding.severity == severity
    assert finding.evidence["num_rows_beyond"] == 0


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"logps_dtype": "float32"}, 1e-3),
        ({"logps_dtype": "float16"}, 1e-2),
        ({"scoring": {"temperature": 1.0, "dtype": "bfloat16"}}, 0.05),
        ({"scoring": {"temperature": 1.0, "dtype": "4bit"}}, 0.25),
        ({"scoring": None}, 0.05),
    ],
)
def test_tolerance_follows_the_coarsest_dtype(world, tmp_path, fields, tolerance):
    scored = rewritten(world, tmp_path / "scored", **fields)
    finding = check_teacher_consistency(world.student, scored, world.teacher_model)["rescored"]
    assert finding.severity == "ok"
    assert finding.evidence["tolerance"] == tolerance
    assert finding.evidence["mean_absolute_difference"] < tolerance / 3


def test_a_live_teacher_that_cannot_score_the_rows(world, monkeypatch):
    small = tiny_model(vocab_size=20)
    finding = check_teacher_consistency(world.student, world.scored, small)["rescored"]
    assert finding.severity == "error"
    assert "cannot score the stored rows" in finding.message
    with pytest.raises(ConfigError, match="teacher='no/teacher'"):
        check_teacher_consistency(world.student, world.scored, "no/teacher")

    def unsupported(*args, **kwargs):
        raise UnsupportedError("an architecture that is not causal")

    monkeypatch.setattr("trl_blend.rollouts.engines.local.score_sequences", unsupported)
    finding = check_teacher_consistency(world.student, world.scored, world.teacher_model)["rescored"]
    assert finding.severity == "warning"  # a limit of this package, not of the data


# The numbers at step 0


def test_policy_gap(world, tmp_path):
    finding = check_teacher_consistency(world.student, world.scored)["policy_gap"]
    gaps = [
        own - other for own, other in zip(world.columns["student_logps"], world.columns["teacher_logps"], strict=True)
    ]
    total = sum(float(value) for row in gaps for value in row)
    assert finding.evidence["mean_gap"] == pytest.approx(total / sum(len(row) for row in gaps), abs=1e-5)
    assert finding.evidence["standard_error"] == pytest.approx(np.std([row.mean() for row in gaps], ddof=1) / 24**0.5)
    assert finding.evidence["is_reverse_kl"] is True
    assert finding.message.startswith("Sampled reverse KL of")
    far = [row - MAX_GAP - 0.1 for row in world.columns["teacher_logps"]]
    report = check_teacher_consistency(world.student, rewritten(world, tmp_path / "far", teacher_logps=far))
    assert report["policy_gap"].severity == "warning"
    assert report.ok  # a warning stops nothing


def test_policy_gap_without_log_probs_at_temperature_1(world, tmp_path):
    own = world.columns["student_logps"]
    cold = {**SAMPLING, "temperature": 0.7}
    for index, (sampling, columns, expected) in enumerate(
        [
            (SAMPLING, {"student_logps": None}, ("ok", "rollout_logps")),
            (cold, {"student_logps": None}, ("info", None)),
            ({**SAMPLING, "top_p": 0.9}, {"student_logps": None}, ("info", None)),
            (cold, {"rollout_logps": [row / 2 for row in own]}, ("ok", "student_logps")),
        ]
    ):
        scored = rewritten(world, tmp_path / f"{index}", sampling=sampling, **columns)
        finding = check_teacher_consistency(world.student, scored)["policy_gap"]
        assert (finding.severity, finding.evidence.get("student_logps")) == expected
        assert finding.evidence.get("is_reverse_kl", False) is (sampling is SAMPLING)


def test_unlikely_tokens(world, tmp_path):
    total = sum(len(row) for row in world.columns["teacher_logps"])
    for index, (share, severity) in enumerate([(0.0, "ok"), (0.005, "ok"), (0.03, "warning")]):
        logps = [np.full(len(row), -1.0) for row in world.columns["teacher_logps"]]
        positions = [(row, step) for row in range(len(logps)) for step in range(len(logps[row]))]
        for row, step in positions[: round(share * total)]:
            logps[row][step] = -10.5
        scored = rewritten(world, tmp_path / f"{index}", teacher_logps=logps)
        finding = check_teacher_consistency(world.student, scored)["unlikely_tokens"]
        assert finding.severity == severity
        assert finding.evidence["share"] == pytest.approx(round(share * total) / total)


def test_truncated_completions_that_are_not_marked(world, tmp_path):
    row = world.columns["truncated"].index(False)
    cut = {
        name: [values[:-1] if index == row else values for index, values in enumerate(world.columns[name])]
        for name in ("completion_ids", "rollout_logps", "student_logps", "teacher_logps")
    }
    report = check_teacher_consistency(world.student, rewritten(world, tmp_path / "scored", **cut))
    assert [finding.name for finding in report.errors] == ["eos"]
    assert report["eos"].evidence["rows"] == [world.columns["key"][row]]
    assert world.columns["key"][row] in report["eos"].message
    marked = [value or index == row for index, value in enumerate(world.columns["truncated"])]
    assert check_teacher_consistency(world.student, rewritten(world, tmp_path / "marked", truncated=marked, **cut)).ok


def test_truncated_marks_on_whole_completions(world, tmp_path):
    scored = rewritten(world, tmp_path / "scored", truncated=[True] * len(world.columns["truncated"]))
    report = check_teacher_consistency(world.student, scored)
    assert report["eos"].severity == "warning"
    assert "marked as truncated but end in" in report["eos"].message
    assert report["truncation"].severity == "warning"
    assert report["truncation"].evidence["share"] == 1.0


def test_truncation(world):
    finding = check_teacher_consistency(world.student, world.scored)["truncation"]
    assert finding.evidence["share"] == pytest.approx(np.mean(world.columns["truncated"]))
    assert 0 < finding.evidence["share"] <= 0.5


GOES_ON = [
    ([2], "it ends with another token ([2])", "`eos_token`"),
    ([2, 1], "it ends with the same token, but would not end there", "chat template"),
    ([], "the tokens that it ends with itself are not recorded", "See which token"),
]


@pytest.mark.parametrize(("ids", "why", "remedy"), GOES_ON)
def test_a_teacher_that_would_go_on(world, tmp_path, ids, why, remedy):
    logps = [
        np.where(np.arange(len(row)) == len(row) - 1, row if cut else -9.0, row)
        for row, cut in zip(world.columns["teacher_logps"], world.columns["truncated"], strict=True)
    ]
    teacher = dataclasses.replace(identify_model(world.teacher), eos_token_ids=ids)
    scored = rewritten(world, tmp_path / "scored", teacher_logps=logps, teacher=teacher.to_dict())
    finding = check_teacher_consistency(world.student, scored)["eos"]
    assert finding.severity == "warning"
    assert f"end-of-sequence tokens [1] a mean log-prob of -9.0: {why}" in finding.message
    assert remedy in finding.remedy


def test_without_end_of_sequence_ids_or_marks(world, tmp_path):
    dataset = Dataset.from_dict(
        {name: world.columns[name] for name in ("prompt_ids", "completion_ids", "teacher_logps")}
    )
    report = check_teacher_consistency(world.student, dataset)
    assert severities(report)["eos"] == "ok"
    assert report["truncation"].evidence["share"] == pytest.approx(np.mean(world.columns["truncated"]))
    model = tiny_model(eos_token_id=None)
    model.generation_config.eos_token_id = None
    report = check_teacher_consistency(model, dataset)
    assert severities(report)["eos"] == severities(report)["truncation"] == "info"


def test_tolerance_of_a_quantised_teacher_whichever_side_it_is_on():
    for scored, live in (("4bit", "float32"), ("bfloat16", "4bit"), ("float32", "8bit")):
        assert rescoring_tolerance("float32", {"dtype": scored}, live) == 0.25
    assert _dtype_of(SimpleNamespace(dtype="torch.bfloat16", is_loaded_in_4bit=True)) == "4bit"
    assert _dtype_of(SimpleNamespace(dtype="torch.bfloat16", is_quantized=True)) == "8bit"
    assert _dtype_of(SimpleNamespace(dtype="torch.float32")) == "float32"
