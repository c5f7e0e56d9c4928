"""The plot that a run leaves, whatever its end, and the method's quantity in the progress bar while it goes on."""

import logging

import pytest
from transformers import ProgressCallback, TrainerCallback
from trl import RichProgressCallback

from tests.trainers import runs, scored
from trl_blend.reports.curves import CURVES_FILE, curves_figure, draw_curves
from trl_blend.trainers import _cards
from trl_blend.trainers._run import MethodProgressCallback


DECAY = {"teacher_weight": 0.4, "teacher_weight_schedule": "linear", "teacher_weight_decay_steps": 4}
BUDGET = {"kl_budget": 0.02, "blend_warmup_steps": 2}


@pytest.fixture
def build_one(make):
    """`build_one(name, **settings)` makes the trainer of that name."""
    own = {"logit_mix_grpo": ("grpo", DECAY), "trust_region_opd": ("opd", BUDGET), "offline_opd": ("offline", {})}
    return lambda name, **settings: make(own[name][0], **own[name][1], **settings)


def picture(trainer):
    return trainer.args.output_dir + "/" + CURVES_FILE


def assert_drawn(trainer, path):
    """The run's picture is that of all that the trainer has logged."""
    draw_curves(trainer.state.log_history, trainer._panels, path / "expected.png", f"{trainer._name}: training")
    with open(picture(trainer), "rb") as found:
        assert found.read() == (path / "expected.png").read_bytes()


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


# Plot


@pytest.mark.parametrize(
    ("name", "first", "metrics"),
    [
        ("logit_mix_grpo", "Teacher weight", {"teacher": "mixing/teacher_weight"}),
        (
            "trust_region_opd",
            "KL(behaviour ‖ student)",
            {"realised": "blend/kl_behavior_student", "budget ε": "blend/kl_budget"},
        ),
        ("offline_opd", "Drift: KL(student ‖ its start)", {"training": "offline/drift_kl"}),
    ],
)
def test_a_run_that_stops_early_leaves_its_picture(build_one, tmp_path, name, first, metrics):
    """The first panel is the method's own quantity, with the values that were logged."""
    trainer = build_one(name, max_steps=5)
    trainer.add_callback(StopAfter(3))
    trainer.train()
    assert trainer.state.global_step == 3
    assert_drawn(trainer, tmp_path)
    axes, *others = curves_figure(trainer.state.log_history, trainer._panels).axes
    assert axes.get_title(loc="left") == first and len(others) >= 4
    drawn = {line.get_label(): list(zip(line.get_xdata().tolist(), line.get_ydata().tolist())) for line in axes.lines}
    assert drawn == {
        label: [(entry["step"], entry[metric]) for entry in trainer.state.log_history if metric in entry]
        for label, metric in metrics.items()
    }
    assert len(drawn[list(metrics)[-1]]) == 3


def test_every_teacher_and_every_reward_has_a_curve(build, build_opd):
    several = build(teacher=["teacher", "second"], teacher_weight=[0.2, 0.1])
    rewarded = build_opd(trainer_kwargs={"reward_funcs": runs.reward})
    for trainer, title, metrics in (
        (several, "Teacher weight", {"teacher 0": "mixing/teacher_weight_0", "teacher 1": "mixing/teacher_weight_1"}),
        (several, "Teacher log-prob of the rollouts", {"teacher 1": "mixing/teacher_logp_1"}),
        (rewarded, "Reward", {"reward": "rewards/reward/mean"}),
    ):
        if not trainer.state.log_history:
            trainer.train()
        (panel,) = [panel for panel in trainer._panels if panel.title == title]
        named = {curve.label: curve.metric for curve in panel.curves}
        assert metrics.items() <= named.items() and set(named.values()) <= set(trainer.state.log_history[0])
    progress = [curve.progress for curve in several._panels[0].curves]
    assert progress == ["teacher_weight_0", "teacher_weight_1"]


def test_a_resumed_run_draws_the_steps_before_it_too(build, tmp_path):
    settings = {**DECAY, "save_strategy": "steps", "save_steps": 2}
    first = build(**settings, max_steps=2)
    first.train()
    resumed = build(**settings, max_steps=3)
    resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    assert [entry["step"] for entry in resumed.state.log_history if "mixing/teacher_weight" in entry] == [1, 2, 3]
    assert_drawn(resumed, tmp_path)


def test_a_failure_to_draw_does_not_lose_the_run(build_one, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("no font found")

    monkeypatch.setattr(_cards, "draw_curves", fail)
    trainer = build_one("offline_opd", max_steps=2)
    with caplog.at_level(logging.WARNING, "trl_blend"):
        output = trainer.train()
    assert output.global_step == 2
    (message,) = [record.getMessage() for record in caplog.records if "curves" in record.getMessage()]
    assert "RuntimeError: no font found" in message and picture(trainer) in message and "draw_curves(" in message


def test_only_the_main_process_draws_and_only_what_there_is(build_one, tmp_path, monkeypatch):
    trainer = build_one("offline_opd")
    assert trainer.write_curves() is None  # nothing logged yet
    trainer.state.log_history = [{"step": step, "offline/drift_kl": 0.1} for step in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_world_process_zero", lambda: False)
        assert trainer.write_curves() is None
    assert not any(tmp_path.rglob("*.png"))
    path = trainer.write_curves()
    assert str(path) == picture(trainer) and path.is_file()


# Progress


class Bars(TrainerCallback):
    """What the bars say after each log entry; added last, so that it sees what the other callbacks have done."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.texts = []
        trainer.add_callback(self)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                self.texts.append(callback.training_bar.postfix)
            if isinstance(callback, RichProgressCallback) and callback.training_bar is not None:
                (task,) = callback.training_bar.tasks
                self.texts.append(task.description)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("logit_mix_grpo", {"teacher_weight": "mixing/teacher_weight"}),
        ("trust_region_opd", {"kl_budget": "blend/kl_budget", "teacher_weight": "blend/teacher_weight/mean"}),
        ("offline_opd", {"drift": "offline/drift_kl", "reverse_kl": "offline/reverse_kl"}),
    ],
)
def test_the_bar_shows_the_quantity_of_the_latest_step(build_one, capsys, name, shown):
    trainer = build_one(name, max_steps=3, disable_tqdm=False)
    bars = Bars(trainer)
    trainer.train()
    expected = [
        " ".join(f"{short}={entry[metric]:.3g}" for short, metric in shown.items() if metric in entry)
        for entry in trainer.state.log_history
    ]
    assert all(expected[:3]) and len(set(expected)) > 2 and not expected[3]
    expected[3] = expected[2]  # the summary of the run leaves it standing
    assert bars.texts == expected
    assert expected[2] in capsys.readouterr().err


def test_an_evaluation_leaves_the_bar_alone(build_one, models):
    rollouts = scored.scored_rollouts(*(scored.load(models, name) for name in ("student", "teacher")), num_rows=4)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "trainer_kwargs": {"eval_dataset": rollouts}}
    trainer = build_one("offline_opd", max_steps=2, disable_tqdm=False, **settings)
    bars = Bars(trainer)
    trainer.train()
    assert "eval_offline/drift_kl" in trainer.state.log_history[1]
    assert bars.texts[0] == bars.texts[1] != bars.texts[2] == bars.texts[3]


def test_the_rich_bar_shows_it_too(build):
    trainer = build(**DECAY, max_steps=2)
    trainer.add_callback(RichProgressCallback)
    bars = Bars(trainer)
    trainer.train()
    assert bars.texts == [f"[blue]Training[/] teacher_weight={weight}" for weight in ("0.4", "0.3", "0.3")]


def test_no_bar_is_asked_for(build, capsys):
    trainer = build(**DECAY, max_steps=2, disable_tqdm=True)
    bars = Bars(trainer)
    trainer.train()
    assert bars.texts == [] and "teacher_weight=" not in capsys.readouterr().err


def test_other_processes_show_nothing(build):
    trainer = build(**DECAY, max_steps=1, disable_tqdm=False)
    shown = []
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback))
    callback.training_bar = type("Bar", (), {"set_postfix_str": lambda self, text: shown.append(text)})()
    method = next(one for one in trainer.callback_handler.callbacks if isinstance(one, MethodProgressCallback))
    for is_main in (False, True):
        trainer.state.is_world_process_zero = is_main
        method.on_log(trainer.args, trainer.state, trainer.control, logs={"mixing/teacher_weight": 0.25})
    assert shown == ["teacher_weight=0.25"]
