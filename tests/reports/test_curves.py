"""The plot of a run: which lines are drawn, with which points, and what is left out."""

import subprocess
import sys

import matplotlib
import pytest
from matplotlib import image

from trl_blend.reports.curves import CURVES_FILE, Curve, Panel, curves_figure, draw_curves, last_values, progress_text


WEIGHT = Panel("Weight", (Curve("mix/weight", "teacher", "weight"),), evaluation=False)
KL = Panel("KL", (Curve("mix/kl", "realised"), Curve("mix/budget", "budget", "budget", is_bound=True)), "nats")
REWARD = Panel("Reward", (Curve("reward"), Curve("eval_mixed/reward", "mixed"), Curve("eval_student/reward", "alone")))
HISTORY = [
    {"step": 2, "mix/weight": 0.4, "mix/kl": 0.02, "mix/budget": 0.05, "reward": 0.1},
    {"step": 4, "mix/weight": 0.3, "mix/kl": None, "mix/budget": 0.03, "reward": float("nan")},
    {"step": 4, "eval_mix/weight": 0.0, "eval_mix/kl": 0.01, "eval_reward": 0.5},
    {"step": 6, "mix/weight": 0.2, "mix/kl": float("inf"), "mix/budget": 0.0, "reward": 0.3},
    {"step": 6, "train_loss": 1.0},
]


def lines(figure):
    """Title of each panel with the label, steps and values of its lines."""
    return {
        axes.get_title(loc="left"): [
            (line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines
        ]
        for axes in figure.axes
    }


def test_lines_have_the_logged_points_in_their_order():
    assert lines(curves_figure(HISTORY, (KL, WEIGHT, REWARD))) == {
        "KL": [
            ("realised", [2], [0.02]),
            ("budget", [2, 4, 6], [0.05, 0.03, 0.0]),
            ("realised, evaluation", [4], [0.01]),
        ],
        "Weight": [("teacher", [2, 4, 6], [0.4, 0.3, 0.2])],
        "Reward": [("training", [2, 6], [0.1, 0.3]), ("evaluation", [4], [0.5])],
    }


def test_evaluations_named_by_the_panel_take_the_place_of_the_general_one():
    history = [{"step": 1, "reward": 0.0}, {"step": 1, "eval_reward": 1.0, "eval_student/reward": 2.0}]
    assert lines(curves_figure(history, [REWARD]))["Reward"] == [("training", [1], [0.0]), ("alone", [1], [2.0])]


def test_panels_without_a_point_are_left_out_and_no_axes_is_empty():
    figure = curves_figure(HISTORY, (Panel("Nothing", (Curve("loss"),)), KL, Panel("None", ())))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["KL"]
    history = [{"step": step, **{f"m{index}": 1.0 for index in range(7)}} for step in range(3)]
    figure = curves_figure(history, [Panel(str(index), (Curve(f"m{index}"),)) for index in range(7)])
    assert len(figure.axes) == 7 and all(axes.lines for axes in figure.axes)


def test_nothing_to_draw(tmp_path):
    dots = [{"step": 1, "mix/kl": 0.1, "mix/weight": 0.5}, {"step": 2, "eval_mix/kl": 0.2}]
    for history in ([], [{"step": 1, "train_runtime": 1.0}], [{"step": 1, "mix/kl": None}], dots):
        assert draw_curves(history, (KL, WEIGHT), tmp_path / CURVES_FILE) is False
    assert list(tmp_path.iterdir()) == []


def test_what_was_logged_once_is_a_table():
    history = [
        {"step": 1, "mix/kl": 0.1, "mix/weight": 0.5},
        {"step": 2, "mix/kl": 0.25},
        {"step": 3, "eval_mix/kl": 2},
    ]
    assert last_values(history, (WEIGHT, KL, Panel("Loss", (Curve("loss"),)))) == (
        ("last logged", "step", "value"),
        [("Weight: teacher", "1", "0.5"), ("KL: realised", "2", "0.25"), ("KL: realised, evaluation", "3", "2")],
    )
    assert last_values([{"step": 1, "train_loss": 1.0}], (KL,)) is None


def test_few_points_are_markers_and_evaluations_are_hollow():
    drawn = {line.get_label(): line for line in curves_figure(HISTORY, (KL,)).axes[0].lines}
    assert drawn["realised"].get_marker() == "o"
    assert drawn["realised, evaluation"].get_markerfacecolor() == "white"
    assert drawn["realised, evaluation"].get_color() == drawn["realised"].get_color() != drawn["budget"].get_color()
    assert drawn["budget"].get_linestyle() == ":"
    many = [{"step": step, "mix/kl": step} for step in range(200)]
    (line,) = curves_figure(many, (KL,)).axes[0].lines
    assert line.get_marker() == ""


def test_evaluation_sets_that_share_a_name_are_not_joined():
    history = [{"step": step, "reward": 1.0} for step in (1, 1, 2, 2)]
    evaluations = [{"step": entry["step"], "eval_reward": index} for index, entry in enumerate(history)]
    _, line = curves_figure(history + evaluations, (REWARD,)).axes[0].lines
    assert line.get_linestyle() == "None" and line.get_ydata().tolist() == [0, 1, 2, 3]


def test_all_panels_have_the_same_steps_units_and_one_name_of_the_axis():
    figure = curves_figure(HISTORY, (KL, WEIGHT, Panel("First", (Curve("mix/kl"),), evaluation=False)), title="Run")
    first, second, third = figure.axes
    assert first.get_xlim() == second.get_xlim() == third.get_xlim() and len(third.lines[0].get_xdata()) == 1
    assert first.get_xlim()[0] < 2 and first.get_xlim()[1] > 6
    assert (first.get_ylabel(), second.get_ylabel()) == ("nats", "") and second.get_legend() is None
    assert figure.get_supxlabel() == "optimizer step" and figure.get_suptitle() == "Run"
    legend = [text.get_text() for text in first.get_legend().get_texts()]
    assert legend == ["realised", "budget", "realised, evaluation"]


@pytest.mark.parametrize(
    ("values", "from_zero"),
    [
        ([0.0], False),
        ([0.3], True),
        ([-0.3], False),
        ([1.0, 1.01], False),
        ([0.2, 0.9], True),
        ([-1.0, 2.0], False),
        ([5e-7, 6e-7], False),
    ],
)
def test_every_point_is_inside_its_panel(values, from_zero):
    history = [{"step": step, "reward": value} for step, value in enumerate(values)]
    (axes,) = curves_figure(history, (REWARD,)).axes
    low, high = axes.get_ylim()
    assert low <= min(values) and max(values) <= high and low < high
    assert (low == 0.0) == from_zero


def test_a_file_is_drawn_and_drawn_again(tmp_path):
    path = tmp_path / "new" / CURVES_FILE
    assert draw_curves(HISTORY[:2], (KL,), path) is True
    before = image.imread(path)
    assert draw_curves(HISTORY, (KL,), path) is True
    assert image.imread(path).shape == before.shape and (image.imread(path) != before).any()
    assert [one.name for one in path.parent.iterdir()] == [CURVES_FILE]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / CURVES_FILE
    draw_curves(HISTORY, (KL,), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="Input/output error"):
        draw_curves(HISTORY[:2], (KL,), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_style_is_neither_taken_from_the_user_nor_left_to_him(tmp_path):
    expected = tmp_path / "plain.png"
    draw_curves(HISTORY, (KL,), expected)
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "black", "text.usetex": True}):
        mine = dict(matplotlib.rcParams)
        draw_curves(HISTORY, (KL,), tmp_path / "styled.png")
        assert dict(matplotlib.rcParams) == mine
    assert (tmp_path / "styled.png").read_bytes() == expected.read_bytes()


def test_neither_pyplot_nor_a_backend_is_touched(tmp_path):
    code = (
        "import sys; from trl_blend.reports.curves import *; assert 'matplotlib' not in sys.modules;"
        "log = [{'step': 1, 'a': 1.0}, {'step': 2, 'a': 2.0}];"
        f"assert draw_curves(log, [Panel('A', (Curve('a'),))], {str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.figure' in sys.modules; print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.parametrize(
    ("logs", "text"),
    [
        ({"mix/weight": 0.273, "mix/budget": 0.00812345, "mix/kl": 1.0, "loss": 2.0}, "budget=0.00812 weight=0.273"),
        ({"mix/weight": None, "mix/budget": float("nan")}, ""),
        ({"eval_mix/weight": 0.5, "train_loss": 1.0}, ""),
        ({}, ""),
    ],
)
def test_progress_text(logs, text):
    assert progress_text(logs, (KL, WEIGHT)) == text
