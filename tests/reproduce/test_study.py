"""What the studies share: runs that go on where they stopped, and curves that time training alone."""

import argparse
import time
from types import SimpleNamespace

import pytest

from reproduce.study import START, Curve, Runs, Study


def make_study(**settings):
    return Study("tried", options={"steps": 2}, arms=lambda found: ("a", "b"), work=work, report=None, **settings)


def work(name, seed, settings, scratch):
    if name == "b" and seed == 1:
        raise ValueError("out of luck")
    return {"name": name, "seed": seed, "steps": settings["steps"]}


def options(*seeds, arms=()):
    return argparse.Namespace(arms=list(arms), seeds=list(seeds), workers=1)


def test_what_is_finished_is_kept_and_a_failure_is_repeated(tmp_path, capsys):
    runs = Runs(tmp_path / "tried_runs.json")
    make_study().run(runs, {"steps": 2}, options(0))
    assert set(Runs(runs.path).results) == {START, "a-seed0", "b-seed0"}
    assert make_study().run(Runs(runs.path), {"steps": 2}, options(0, 1)) == 1
    assert "tried: 2 of 5 runs to do" in capsys.readouterr().out
    assert set(Runs(runs.path).results) == {START, "a-seed0", "b-seed0", "a-seed1"}
    with pytest.raises(SystemExit, match="steps=2, not 3: remove it"):
        make_study().run(Runs(runs.path), {"steps": 3}, options(0))
    with pytest.raises(SystemExit, match=r"Unknown arms \['c'\]. Choose among a, b."):
        make_study().run(Runs(runs.path), {"steps": 2}, options(0, arms=["c"]))


def test_what_does_not_depend_on_a_seed_comes_last(tmp_path, capsys):
    study = make_study(stages=lambda names, settings: [["a"], ["b"]])
    study.run(Runs(tmp_path / "tried_runs.json"), {"steps": 2}, options(0))
    assert capsys.readouterr().out == "tried: 1 of 1 runs to do\ntried: 2 of 2 runs to do\n"


def test_a_curve_times_training_and_not_its_measurements():
    def measure(model, step):
        time.sleep(0.2)
        return step

    curve = Curve(measure, interval=2, last=3)
    curve.on_train_begin(None, None, None)
    for step in (1, 2, 3):
        time.sleep(0.02)
        curve.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert curve.points == {"2": 2, "3": 3}
    assert 0.06 <= curve.wall < 0.2
