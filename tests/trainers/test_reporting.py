"""
What wandb, trackio and TensorBoard have of a run, read back from their files: every metric, under its name, with its
value, and the completions tables. And that nothing documented goes unlogged.
"""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainers import wandb_file
from tests.trainers.documented_metrics import documented, is_among, table_metrics
from tests.trainers.reported_runs import DOCUMENTED_RUNS, STEPS
from trl_blend.serving.statistics import OF_DRAFTS


# Written to the summary of a wandb run by transformers, and to no history
ONCE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
WITH_COMPLETIONS = DOCUMENTED_RUNS[:2]
OWN_COLUMNS = {
    "logit_mix_grpo": ["reward", "teacher_weight", "advantage"],
    "trust_region_opd": ["reward", "kl_budget", "teacher_weight", "kl_behavior_student"],
}


class Reported(NamedTuple):
    folder: Path
    histories: dict[str, list[dict[str, Any]]]
    addresses: list[tuple[str, str]]
    loaded: list[str]


@pytest.fixture(scope="session")
def reported(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported")
    for name in ("home", "wandb"):
        (folder / name).mkdir()
    moved = {"HOME": "home", "WANDB_DIR": "wandb", "TRACKIO_DIR": "trackio"}
    moved |= {f"WANDB_{kind}_DIR": f"wandb/{kind.lower()}" for kind in ("CONFIG", "CACHE", "DATA")}
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_", "XDG_"))},
        **{name: str(folder / place) for name, place in moved.items()},
        "MPLCONFIGDIR": matplotlib.get_configdir(),  # its cache of fonts takes seconds to make
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    command = [sys.executable, "-m", "tests.trainers.reported_runs", str(models), str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "runs.json").read_text())
    return Reported(folder, found["histories"], [tuple(one) for one in found["addresses"]], found["loaded"])


def expected_rows(history):
    """Names and values of each log entry as transformers passes them on."""
    rows = []
    for entry in history:
        names = {name: value for name, value in entry.items() if name not in ONCE | {"step"}}
        row = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in names.items()
        }
        rows.append(row | {"train/global_step": entry["step"]})
    return rows


def wandb_path(folder, name):
    """The runs follow one another, and so do the names of their folders with the time of the start in them."""
    files = sorted(folder.glob("wandb/wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == len(DOCUMENTED_RUNS)
    return files[DOCUMENTED_RUNS.index(name)]


def trackio_rows(folder, name):
    database = sqlite3.connect(folder / "trackio" / f"{name}.db")
    rows = database.execute("select metrics from metrics where run_name = ? order by id", (name,)).fetchall()
    database.close()
    return [json.loads(row) for (row,) in rows]


@pytest.mark.parametrize("name", DOCUMENTED_RUNS)
def test_every_metric_arrives_in_wandb(reported, name):
    path = wandb_path(reported.folder, name)
    rows = [row for row in wandb_file.history(path) if "train/epoch" in row]
    found = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    assert found == expected_rows(reported.histories[name]) and len(found) > STEPS
    once = {key: value for entry in reported.histories[name] for key, value in entry.items() if key in ONCE}
    assert once.items() <= wandb_file.summary(path).items() and "train_loss" in once


@pytest.mark.parametrize("name", DOCUMENTED_RUNS)
def test_every_metric_arrives_in_trackio(reported, name):
    rows = [row for row in trackio_rows(reported.folder, name) if "train/epoch" in row]
    assert rows == expected_rows(reported.histories[name]) and len(rows) > STEPS


@pytest.mark.parametrize("name", DOCUMENTED_RUNS)
def test_every_metric_arrives_in_tensorboard(reported, name):
    (folder,) = (reported.folder / name / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    expected = {}
    for entry, row in zip(reported.histories[name], expected_rows(reported.histories[name]), strict=True):
        row |= {f"train/{key}": value for key, value in entry.items() if key in ONCE}
        expected |= {(key, entry["step"]): value for key, value in row.items() if key != "train/global_step"}
    assert found == pytest.approx(expected, rel=1e-6)  # float32


def logged(reported, trainer):
    return {
        key
        for name, history in reported.histories.items()
        if name.startswith(trainer)
        for entry in history
        for key in entry
    }


@pytest.mark.parametrize("trainer", DOCUMENTED_RUNS)
def test_what_is_documented_is_logged(reported, trainer):
    names, promised = logged(reported, trainer), documented()[trainer]
    assert len(promised) > 5
    # What only an engine logs: `test_vllm.py` of each trainer
    promised = {name for name in promised if name.partition("/")[2] not in {*OF_DRAFTS, "draft_acceptance_bound"}}
    assert [name for name in sorted(promised) if not any(is_among(one, {name}) for one in names)] == []


@pytest.mark.parametrize(
    ("trainer", "prefixes"),
    [
        ("logit_mix_grpo", ("mixing/", "importance/", "adaptive/")),
        ("trust_region_opd", ("blend/",)),
        ("offline_opd", ("offline/",)),
    ],
)
def test_what_is_logged_is_documented(reported, trainer, prefixes):
    own = {name for name in logged(reported, trainer) if name.startswith(prefixes)}
    assert len(own) > 5
    assert [name for name in sorted(own) if not is_among(name, documented()[trainer])] == []


def test_names_are_read_from_a_table():
    rows = ["| metric | meaning |", "|---|---|", "| `a/b`, `c` | `a/no` |", "| `a/d/mean`, `/max` | x |"]
    text = "\n".join(["`a/no` |", "", *rows, "", "| `a/no` |"])
    assert table_metrics(text) == ["a/b", "a/c", "a/d/mean", "a/d/max"]
    assert is_among("rewards/exact/mean", {"rewards/…/mean"}) and not is_among("a/bc", {"a/b"})


@pytest.mark.parametrize("trainer", DOCUMENTED_RUNS)
def test_values_are_numbers(reported, trainer):
    for entry in reported.histories[trainer]:
        assert {key: value for key, value in entry.items() if type(value) not in (int, float)} == {}


# Completions


def parquet(reported, name, step):
    return pd.read_parquet(reported.folder / name / "completions" / f"completions_{step:05d}.parquet")


@pytest.mark.parametrize("name", WITH_COMPLETIONS)
def test_completions_tables_in_wandb_and_trackio(reported, name):
    run = wandb_path(reported.folder, name)
    written = [row["completions.path"] for row in wandb_file.history(run) if "completions.path" in row]
    tables = [json.loads((run.parent / "files" / path).read_text()) for path in written]
    from_wandb = [pd.DataFrame(table["data"], columns=table["columns"]) for table in tables]
    rows = [row["completions"]["_value"] for row in trackio_rows(reported.folder, name) if "completions" in row]
    from_trackio = [pd.DataFrame(table) for table in rows]
    assert len(from_wandb) == len(from_trackio) > STEPS  # evaluation has one of its own
    last = {int(table["step"][0]): index for index, table in enumerate(from_wandb)}
    assert sorted(last) == [1, 2, 3]
    for step, index in last.items():
        expected = parquet(reported, name, step)
        assert list(expected.columns) == ["step", "prompt", "completion", *OWN_COLUMNS[name]] and len(expected) == 8
        for table in (from_wandb[index], from_trackio[index]):
            pd.testing.assert_frame_equal(table[expected.columns], expected, check_dtype=False, rtol=1e-12)
    for first, second in zip(from_wandb, from_trackio, strict=True):
        pd.testing.assert_frame_equal(first, second[first.columns], check_dtype=False)


def test_the_weight_in_the_table_is_that_of_the_step(reported):
    """Adaptive: the weight moves after each step. The student decodes alone in evaluation, at the last two steps."""
    weights = {
        entry["step"]: entry["mixing/teacher_weight"]
        for entry in reported.histories["logit_mix_grpo"]
        if "mixing/teacher_weight" in entry
    }
    assert weights[1] != weights[3] and min(weights.values()) > 0
    logged = trackio_rows(reported.folder, "logit_mix_grpo")
    rows = [row["completions"]["_value"] for row in logged if "completions" in row]
    found = [(table[0]["step"], {row["teacher_weight"] for row in table}) for table in rows]
    trained = [(step, {weights[step]}) for step in (1, 2, 3)]
    evaluated = [(step, {0.0}) for step in (1, 2, 3)]
    assert found == [trained[0], trained[1], evaluated[1], trained[2], evaluated[2], evaluated[2]]


# Where it goes


def test_no_other_host_and_nothing_at_home(reported):
    """wandb's own service is asked through a socket file. Binding a port on loopback is urllib3's probe for IPv6."""
    local = ("'/tmp", "('127.0.0.1', ", "('::1', ", f"'{os.environ.get('TMPDIR', '/tmp')}")
    assert [one for one in reported.addresses if not one[1].startswith(local)] == []
    assert [one for one in reported.addresses if one[0] == "socket.bind" and not one[1].endswith(", 0)")] == []
    assert any(event == "socket.connect" for event, _ in reported.addresses), "wandb's socket was not seen"
    at_home = [str(path) for path in (reported.folder / "home").rglob("*") if path.is_file()]
    assert [path for path in at_home if "wandb" in path or "trackio" in path or "tensorboard" in path] == []


def test_matplotlib_is_loaded_when_there_is_something_to_draw(reported):
    assert reported.loaded == ["trl", "trl_blend.trainers._run"]
    drawn = {name for name in reported.histories if (reported.folder / name / "training_curves.png").is_file()}
    several = {name for name, log in reported.histories.items() if len({entry["step"] for entry in log}) > 1}
    assert drawn == several and set(DOCUMENTED_RUNS) <= drawn < set(reported.histories)
