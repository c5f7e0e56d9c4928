"""The pilot on real weights, from end to end on models of the test-bed."""

import json
import re
from string import ascii_letters

import pytest

from reproduce import real_weights
from reproduce.logit_mixing import KINDS
from reproduce.real_weights import ANCHOR, ARMS, STUDY, equation, load_problems, read_problems
from reproduce.study import Runs, run_key, write_report
from testbed.evaluate import CHECKPOINTS


def test_problems_have_one_equation_and_no_twin_in_the_other_part(tmp_path):
    assert equation("There are 8 oranges. 89 oranges more are added.", 97.0) == "8 + 89"
    assert equation("David removes 7 of 27 eggs from 3 jars.", 20.0) == "27 - 7"
    assert equation("There are 9 students and 3 seats on each bus.", 3.0) == "9 / 3"
    assert equation("2 boxes with 2 pens", 4.0) is None  # a sum or a product
    assert equation("It costs 1.5 dollars for 2", 3.0) is None
    assert equation("7 of 2", 3.5) is None
    file = tmp_path / "problems.jsonl"
    write_problems(file)
    parts = load_problems(str(file))
    wordings = [{re.sub(r"\d", "", row["prompt"][1]["content"]) for row in part} for part in parts.values()]
    assert all(wordings) and not wordings[0] & wordings[1]
    assert parts["test"][0]["completion"][0]["content"].endswith("= " + parts["test"][0]["solution"])


def test_files_of_both_forms_are_read_together(tmp_path):
    (tmp_path / "mawps.jsonl").write_text(json.dumps({"input": "Joan has 2  pens .", "target": 2.0}), encoding="utf-8")
    problem = {"Body": "Joan has 2 pens. Sam has 3.", "Question": "How many\nin all?", "Answer": 5.0}
    (tmp_path / "svamp.jsonl").write_text(json.dumps(problem), encoding="utf-8")
    files = ",".join(str(tmp_path / name) for name in ("mawps.jsonl", "svamp.jsonl"))
    assert list(read_problems(files)) == [
        ("Joan has 2 pens .", 2),
        ("Joan has 2 pens. Sam has 3. How many in all?", 5),
    ]


def write_problems(file):
    rows = [{"input": f"{a} {thing}s, and 20 more?", "target": 20.0 + a} for thing in ascii_letters for a in (3, 4)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_the_pilot_runs_and_reports(tmp_path, monkeypatch):
    write_problems(tmp_path / "problems.jsonl")
    monkeypatch.setattr(real_weights, "ROLLOUTS", 4)
    settings = STUDY.options | {"model": str(CHECKPOINTS / "base"), "data": str(tmp_path / "problems.jsonl")}
    settings |= {"work_dir": str(tmp_path), "steps": 2, "sft_steps": 2, "n_test": 4}
    runs = Runs(tmp_path / "runs.json")
    for name in (ANCHOR, *ARMS):
        runs.add(run_key(name, 0), STUDY.work(name, 0, settings, str(tmp_path / "scratch")))
    anchor, mixed, kl = (runs.of(name)[0] for name in (ANCHOR, "mixed", "grpo_kl"))
    assert all(len(scores[kind]) == 4 for scores in anchor["start"].values() for kind in KINDS)
    assert mixed["final"]["kl_to_anchor"] > 0.03  # between it and a model that is far from it
    assert kl["final"]["kl_to_anchor"] == pytest.approx(0, abs=1e-6)  # without reward nothing moves
    assert str(tmp_path) not in runs.path.read_text(encoding="utf-8")
    assert "**This is a pilot: 1 seed(s) and 2 steps decide nothing.**" in write_report(STUDY, runs, tmp_path)


def test_what_is_missing_is_said_first(tmp_path):
    with pytest.raises(SystemExit, match="`--model`='nowhere' is not there"):
        STUDY.arms(STUDY.options | {"model": "nowhere", "data": str(tmp_path)})
