"""The README against the files it speaks of: links resolve, numbers are those of the result files."""

import ast
import csv
import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "examples" / "reproduce" / "results"
OPD_PAGE = "examples/trust_region_opd.md"
OFFLINE_PAGE = "examples/offline_opd.md"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    OPD_PAGE,
    OFFLINE_PAGE,
    "examples/testbed/README.md",
    "examples/benchmarks/results/README.md",
    "examples/reproduce/results/trust_region.md",
    "examples/reproduce/results/offline_opd.md",
]


def rows(text, first_cell):
    """Rows of the Markdown table whose header starts with `first_cell`, as dictionaries."""
    lines = iter(text.splitlines())
    header = next(line for line in lines if line.startswith(f"| {first_cell} |"))
    names = [cell.strip() for cell in header.strip("|").split("|")]
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append(dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return table


@pytest.mark.parametrize("page", PAGES)
def test_local_links_resolve(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link
    assert links or page != "README.md"


def test_the_results_table_is_that_of_the_runs():
    full = {(row["arm"], row["policy"]): row for row in rows((RESULTS / "logit_mixing.md").read_text(), "arm")}
    shown = rows(README, "arm")
    assert len(shown) == len(full)
    for row in shown:
        expected = full[row["arm"], row["policy"]]
        assert row == {name: expected[name] for name in row}


@pytest.mark.parametrize(("shown_as", "column"), [("method", "arm"), ("rollouts at step 0", "policy")])
def test_the_trust_region_tables_are_those_of_the_runs(shown_as, column):
    full = {row[column]: row for row in rows((RESULTS / "trust_region.md").read_text(), column)}
    shown = rows(README, shown_as)
    assert len(shown) == len(full)
    for row in shown:
        expected = full[row.pop(shown_as)]
        assert row == {name: expected[name] for name in row}


def test_the_numbers_of_the_offline_page_are_those_of_the_runs():
    page, report = ((ROOT / path).read_text(encoding="utf-8") for path in (OFFLINE_PAGE, RESULTS / "offline_opd.md"))
    tables = [{row["arm"]: row for row in rows(part, "arm")} for part in report.split("## Cost")]
    shown = rows(page, "arm")
    assert [row["arm"] for row in shown] == list(tables[0])
    for row in shown:
        expected = tables[0][row["arm"]] | {"tokens/CPU s": tables[1][row["arm"]]["tokens/CPU s"]}
        assert row == {name: expected[name] for name in row}
    # What the text repeats stands in the report
    text = " ".join(page.partition("## What we measured")[2].partition("## Memory")[0].split())
    text = re.sub(r"\|[^.]*?\|", "", text)
    for number in re.findall(r"(?<![\w.])[-+]?\d+\.\d{2,}", text):
        assert number in report, number
    assert (
        re.search(r"takes ([\d.]+) bytes on disk.*?and ([\d.]+) with", " ".join(page.split())).groups()
        == re.search(r"On disk: ([\d.]+) bytes.*?, ([\d.]+) with", report).groups()
    )


def test_the_rewards_on_the_page_are_those_of_the_runs():
    reward = {row["policy"]: row["reward"] for row in rows((RESULTS / "trust_region.md").read_text(), "policy")}
    text = " ".join((ROOT / OPD_PAGE).read_text(encoding="utf-8").split())
    values = [reward[policy].split()[0] for policy in ("student (ε = 0)", "ε = 0.01", "ε = 0.05")]
    assert "{} without, {} at ε = 0.01, {} at 0.05".format(*values) in text


def test_the_offline_table_is_that_of_the_runs():
    full = {row["arm"]: row for row in rows((RESULTS / "offline_opd.md").read_text(), "arm")}
    shown = rows(README, "offline study: arm")
    assert len(shown) == 10
    for row in shown:
        expected = full[row.pop("offline study: arm")]
        assert row == {name: expected[name] for name in row}


def test_the_sweep_numbers_are_those_of_the_sweep():
    with open(RESULTS / "weight_sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for space in ("logits", "probs"):
        best = max(table, key=lambda row: float(row[f"{space}_solve"]))
        assert float(best["weight"]) == 0.5 and f"{float(best[f'{space}_solve']):.3f}" in README


def test_the_cost_table_is_that_of_the_benchmarks():
    measured = {
        row["quantity"]: row for row in rows((ROOT / "examples/benchmarks/results/README.md").read_text(), "quantity")
    }
    shown = rows(README, "quantity")
    assert shown
    for row in shown:
        assert row == {name: measured[row["quantity"]][name] for name in row}


@pytest.mark.parametrize("page", ["README.md", OPD_PAGE, OFFLINE_PAGE])
def test_python_blocks_parse(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_runs_have_three_seeds_each():
    seeds = {}
    for path in (RESULTS / "runs").glob("*-seed*.json"):
        run = json.loads(path.read_text())
        seeds.setdefault(run["arm"], set()).add(run["seed"])
    assert len(seeds) == 11 and all(len(found) >= 3 for found in seeds.values())
    seeds = {}
    for path in (RESULTS / "trust_region_runs").glob("*-seed*.json"):
        name, seed = path.stem.split("-seed")
        seeds.setdefault(name, set()).add(seed)
    assert len(seeds) == 10 and all(len(found) >= 3 for found in seeds.values())
    seeds = {}
    for path in (RESULTS / "offline_opd_runs").glob("*-seed*.json"):
        name, seed = path.stem.split("-seed")
        seeds.setdefault(name, set()).add(seed)
    assert len(seeds) == 15 + 6 and all(len(found) >= 3 for found in seeds.values())
