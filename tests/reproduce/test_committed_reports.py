"""What is committed of every study is what its script writes from the committed runs."""

import pytest

from reproduce import (
    engines,
    importance_ratios,
    logit_mixing,
    off_task,
    offline_horizon,
    offline_opd,
    real_weights,
    trust_region,
    zero_reward,
)
from reproduce.study import RESULTS, Runs, write_report


ON_TWO_TASKS = [one.STUDY for one in (zero_reward, off_task, offline_horizon)]
ON_ONE = (logit_mixing, trust_region, offline_opd, engines, real_weights, importance_ratios)
STUDIES = [*ON_TWO_TASKS, *(one.STUDY for one in ON_ONE)]
RUNS = [(study, study.name) for study in STUDIES] + [(study, f"{study.name}_sorting") for study in ON_TWO_TASKS]


@pytest.mark.parametrize(("study", "name"), RUNS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_report_is_that_of_its_runs(study, name, tmp_path):
    write_report(study, Runs(RESULTS / f"{name}_runs.json"), tmp_path)
    written = [path for path in tmp_path.iterdir() if path.suffix != ".png"]
    assert {path.suffix for path in written} == {".md", ".csv"}
    for path in written:
        assert path.read_text(encoding="utf-8") == (RESULTS / path.name).read_text(encoding="utf-8"), path.name
    for figure in tmp_path.glob("*.png"):
        assert (RESULTS / figure.name).exists(), figure.name
