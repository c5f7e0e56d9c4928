"""Ctrl-C in the loop of transformers: whatever it saves, deletes and evaluates, there is a checkpoint to go on."""

import signal

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from trl_blend.scripts.interrupt import StopOnInterrupt, say_how_to_go_on
from trl_blend.scripts.training import train_and_score


STEPS = 6


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"x": torch.ones(3) * index, "labels": torch.tensor(float(index))}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        output = self.layer(x)[:, 0]
        return {"loss": ((output - labels) ** 2).mean(), "logits": output}


class Began(TrainerCallback):
    """Which step the training began after."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


class Interrupt(TrainerCallback):
    """SIGINT in a step, or at the end of an evaluation; keeps the steps of the evaluations."""

    def __init__(self, step, in_evaluation=False):
        self.step, self.in_evaluation = step, in_evaluation
        self.evaluated = []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.in_evaluation and state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGINT)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)
        if self.in_evaluation and state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def sigint(monkeypatch):
    """The handler of this process, put back afterwards; the name of the program is not set."""
    monkeypatch.delenv("TRL_BLEND_COMMAND", raising=False)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def make_trainer(folder, interrupt=None, **settings):
    """Four steps are an epoch. The loss grows, so the first evaluation is the best one."""
    args = TrainingArguments(
        str(folder), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        logging_strategy="no", learning_rate=1e3, optim="sgd", metric_for_best_model="eval_loss", **settings,
    )  # fmt: skip
    callbacks = [] if interrupt is None else [interrupt]
    return Trainer(model=Model(), args=args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=callbacks)


OFTEN = {"eval_strategy": "steps", "eval_steps": 1}
LIMITED = {**OFTEN, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


@pytest.mark.parametrize(
    ("settings", "step", "evaluated"),
    [
        (LIMITED, 3, [1, 2]),
        ({**LIMITED, "load_best_model_at_end": True}, 3, [1, 2]),
        ({**OFTEN, "save_strategy": "best"}, 3, [1, 2]),
        ({**OFTEN, "save_strategy": "best", "save_only_model": True}, 3, [1, 2]),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, 3, []),
        ({"eval_strategy": "epoch", "save_strategy": "best"}, 5, [4]),
    ],
)
def test_the_checkpoint_is_there(tmp_path, capsys, settings, step, evaluated):
    interrupt = Interrupt(step)
    trainer = make_trainer(tmp_path, interrupt, **settings)
    with pytest.raises(SystemExit) as stopped:
        train_and_score(trainer, score=dict)
    assert stopped.value.code == 130
    checkpoint = tmp_path / f"checkpoint-{step}"
    command = f"Go on with the same command and\n--resume_from_checkpoint {checkpoint}\n"
    said = f"Stopped after step {step} of {STEPS}; the checkpoint is {checkpoint}.\n{command}"
    assert capsys.readouterr().err.endswith(said)
    assert interrupt.evaluated == evaluated
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    assert not state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    assert (checkpoint / "optimizer.pt").is_file()
    # The rest of the run
    resumed = make_trainer(tmp_path, **settings | {"save_strategy": "no", "load_best_model_at_end": False})
    began = Began()
    resumed.add_callback(began)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == STEPS and began.step == step


def test_after_the_last_step_the_model_is_saved_and_not_scored(tmp_path, capfd):
    scored = []
    trainer = make_trainer(tmp_path, Interrupt(STEPS, True), **OFTEN, save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        train_and_score(trainer, score=lambda: scored.append(trainer.state.global_step))
    assert scored == [0]
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors"}
    output = capfd.readouterr().out
    assert f"Training is complete: the model is in {tmp_path}; it has not been scored." in output


def test_every_process_learns_of_it_after_the_last_step(tmp_path, monkeypatch):
    """Scoring is collective: one process alone must not leave it out."""
    answers = iter([False] * STEPS + [True])
    monkeypatch.setattr(StopOnInterrupt, "requested_anywhere", lambda self: next(answers))
    with pytest.raises(KeyboardInterrupt):
        train_and_score(make_trainer(tmp_path, save_strategy="no"), score=dict)
    assert next(answers, None) is None


def test_a_checkpoint_that_is_gone_is_not_named_to_go_on_from(tmp_path, capsys):
    say_how_to_go_on("Stopped after step 3 of 6", tmp_path / "checkpoint-3")
    said = capsys.readouterr().err
    assert said.startswith(f"Stopped after step 3 of 6, but the checkpoint {tmp_path / 'checkpoint-3'} is gone")
    assert "Go on" not in said


def test_scores_before_are_of_the_step_that_a_run_goes_on_from(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    steps = []
    first = train_and_score(trainer, score=lambda: steps.append(trainer.state.global_step))
    resumed = make_trainer(tmp_path, save_strategy="no", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    second = train_and_score(resumed, score=lambda: resumed.state.global_step)
    assert (first.first_step, steps) == (0, [0, STEPS]) and second == (2, STEPS, 2)
