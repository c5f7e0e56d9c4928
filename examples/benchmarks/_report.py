"""Results of a benchmark: medians with quartiles, the machine they were measured on, JSON files and one table."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import trl

import trl_blend


RESULTS = Path(__file__).resolve().parent / "results"
_HEADER = """# Measured cost

Written by the scripts in `examples/benchmarks/`; do not edit. Every ratio compares arms of one run, on one machine, in
alternation: `median [lower quartile, upper quartile]` of n ratios. A load above the number of cores means that other
work was using them meanwhile. Ratios of wall time are then noisy; ratios of CPU time count only this process's own
work and hold up better.

| quantity | measured | bar | met | n | command | machine | load before / after |
|---|---|---|---|---|---|---|---|
"""


class Seconds(NamedTuple):
    """Wall time, and time that this process's threads spent on a core."""

    wall: float
    cpu: float


def seconds(function: Callable[[], Any]) -> Seconds:
    """Time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def show(summary: dict[str, float], unit: str = "") -> str:
    """`median [lower quartile, upper quartile]` with three decimals."""
    return f"{summary['median']:.3f} [{summary['lower_quartile']:.3f}, {summary['upper_quartile']:.3f}]{unit}"


class Report:
    """
    Collects what one benchmark measured and writes `results/NAME.json` and the table of all benchmarks.

    Args:
        name (`str`):
            Name of the result, without extension: the script's, with its sizes where it has several.
        settings (`dict[str, Any]`):
            Sizes and settings of the run.
    """

    def __init__(self, name: str, settings: dict[str, Any]):
        self.name = name
        self.data: dict[str, Any] = {
            "command": " ".join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "machine": machine(),
            "settings": settings,
            "rows": [],
            "measurements": {},
        }
        self._load_before = os.getloadavg()[0]

    def row(self, quantity: str, values: Sequence[float], bar: float | None, unit: str = "") -> None:
        """Add a line of the table: the median of `values` must not exceed `bar`, if there is one."""
        summary = quartiles(values)
        met = None if bar is None else summary["median"] <= bar
        line = {"quantity": quantity, "unit": unit, "bar": bar, "met": met, "n": len(values), **summary}
        self.data["rows"].append({**line, "values": list(values)})
        verdict = "no bar" if bar is None else f"bar {bar:g}{unit}: {'met' if met else 'MISSED'}"
        print(f"{quantity}: {show(summary, unit)}, {verdict}", flush=True)

    def note(self, name: str, values: Any) -> None:
        """Add a measurement that has no bar."""
        self.data["measurements"][name] = values
        text = show(quartiles(values)) if isinstance(values, list) and len(values) > 1 else values
        print(f"  {name}: {text}", flush=True)

    def write(self) -> None:
        """Write the JSON file and bring the table up to date."""
        self.data["load"] = {"before": self._load_before, "after": os.getloadavg()[0]}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps(self.data, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "README.md").write_text(_HEADER + "".join(map(_table_lines, sorted(RESULTS.glob("*.json")))))
        print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def machine() -> dict[str, Any]:
    """Cores, threads and versions."""
    return {
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "trl_blend": trl_blend.__version__,
    }


def _table_lines(path: Path) -> str:
    data = json.loads(path.read_text(encoding="utf-8"))
    host = f"{data['machine']['cpu_cores']} CPU cores, torch threads={data['machine']['torch_threads']}"
    load = f"{data['load']['before']:.1f} / {data['load']['after']:.1f}"
    lines = []
    for row in data["rows"]:
        unit = row["unit"]
        cells = (
            row["quantity"],
            show(row, unit),
            "none" if row["bar"] is None else f"{row['bar']:g}{unit}",
            {True: "yes", False: "**no**", None: ""}[row["met"]],
            str(row["n"]),
            f"`{data['command']}`",
            host,
            load,
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)
