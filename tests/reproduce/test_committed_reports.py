"""What is committed of every study is what its script writes from the committed runs."""

import pytest

from reproduce import logit_mixing, off_task, offline_horizon, offline_opd, trust_region, zero_reward
from reproduce.study import RESULTS, Runs, write_report


STUDIES = [one.STUDY for one in (logit_mixing, zero_reward, trust_region, off_task, offline_opd, offline_horizon)]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_report_is_that_of_its_runs(study, tmp_path):
    write_report(study, Runs(RESULTS / f"{study.name}_runs.json"), tmp_path)
    written = [path for path in tmp_path.iterdir() if path.suffix != ".png"]
    assert {path.suffix for path in written} == {".md", ".csv"}
    for path in written:
        assert path.read_text(encoding="utf-8") == (RESULTS / path.name).read_text(encoding="utf-8"), path.name
    for figure in tmp_path.glob("*.png"):
        assert (RESULTS / figure.name).exists(), figure.name
