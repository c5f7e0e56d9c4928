"""
The metrics tables of the pages: what is in the code is documented, as far as source text can tell, and every number in
them was measured. `tests/trainers/test_reporting.py` compares the tables with real runs.
"""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import trl_blend
from reproduce import metric_ranges
from reproduce.study import RESULTS, Runs
from tests.docs.markdown import TRAINER_PAGES, read, section, table
from tests.trainers.documented_metrics import is_among, table_metrics


TRAINERS = {
    "examples/grpo_mix.md": ("LogitMixGRPOTrainer", ("mixing/", "importance/", "adaptive/", "eval_")),
    "examples/trust_region_opd.md": ("TrustRegionOPDTrainer", ("blend/", "rewards/")),
    "examples/offline_opd.md": ("OfflineOPDTrainer", ("offline/",)),
}
PAGES = [pytest.param(page, *TRAINERS[page], id=page) for page in TRAINER_PAGES]


def metric_table(page: str) -> list[dict[str, str]]:
    return table(section(read(page), "Logged metrics"), "metric")


def files_of(trainer: str) -> list[Path]:
    folder = Path(__import__(getattr(trl_blend, trainer).__module__, fromlist=[""]).__file__).parent
    # The plot reads metrics, it makes none
    return [path for path in folder.glob("*.py") if path.name not in ("panels.py", "config.py")]


def strings(path: Path) -> Iterator[str]:
    """Strings of a file that are no docstrings; of an f-string what stands before its first value, with `{` behind."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            yield f"{node.values[0].value}{{"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.value


@pytest.mark.parametrize(("page", "trainer", "prefixes"), PAGES)
def test_metrics_of_the_code_are_documented(page, trainer, prefixes):
    names = table_metrics(section(read(page), "Logged metrics"))
    assert len(names) == len(set(names)) >= 7
    for name in names:
        assert name.startswith(prefixes), name
    documented = {re.sub(r"<\w+>", "…", name) for name in names}
    found = {
        text.rstrip("{")
        for path in files_of(trainer)
        for text in strings(path)
        if re.fullmatch(r"[a-z]+/[a-z_/]+\{?", text) and text.startswith(prefixes)
    }
    report = import_module(f"{getattr(trl_blend, trainer).__module__.rpartition('.')[0]}.report")
    curves = [curve.metric for panel in report.PANELS for curve in panel.curves]
    found |= {name for name in curves if name.startswith(prefixes)}
    assert len(found) > 2
    for name in found - {"rewards/", "eval_mixed/reward", "eval_student/reward"}:
        assert is_among(name, documented), f"`{name}` is not on {page}"


def test_the_report_is_that_of_the_runs():
    assert read("examples/reproduce/results/metric_ranges.md") == metric_ranges.report(
        Runs(RESULTS / "metric_ranges_runs.json"), RESULTS
    )


@pytest.mark.parametrize(("page", "trainer", "prefixes"), PAGES)
def test_measured_values_are_those_of_the_runs(page, trainer, prefixes):
    """A number in the last column stands in a row of that metric in the report of the runs."""
    ranges = section(read("examples/reproduce/results/metric_ranges.md"), trainer)
    rows = table(ranges, "metric")
    checked = 0
    for shown in metric_table(page):
        names = re.findall(r"`([^`]+)`", shown["metric"])
        measured = {cell for row in rows if row["metric"].strip("`") in names for cell in row.values()}
        values = re.sub(r"(weight|ε =|top-|x) ?[\d.]+|\d+ x", "", shown["measured"])
        for number in re.findall(r"-?\d[\d.]*\d|\d", values):
            assert number in measured, f"{shown['metric']}: {number}"
            checked += 1
    assert checked >= 8
    # and what the text around the table says of them
    text = section(read(page), "Logged metrics").replace("\n", " ")
    text = re.sub(r"\|.*\|", "", text)
    for number in re.findall(r"\d\.\d{3,}", text):
        assert number in ranges, number
