"""Ctrl-C in a training, sent to a whole process group: a checkpoint, how to go on, and the same weights in the end."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from tests.tiny import tiny_model, tiny_tokenizer
from trl_blend.scripts.interrupt import StopOnInterrupt, how_to_go_on
from trl_blend.scripts.training import train_and_score


ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
STEPS = 12
SCRIPT = [sys.executable, "examples/grpo_mix.py"]
SETTINGS = {
    "dataset_name": "testbed",
    "num_test_prompts": 0,
    "reward_funcs": "tests.trainers.runs.reward",
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "save_only_model": "true",
    "report_to": "none",
    "disable_tqdm": "true",
    "dtype": "float32",
    "bf16": "false",
    "use_cpu": "true",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def options(models, output, **settings):
    names = ["--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher"]
    given = [item for name, value in (SETTINGS | settings).items() for item in (f"--{name}", value)]
    return [str(item) for item in [*names, "--output_dir", output, "--teacher_weight", 0.3, *given]]


def start(command):
    """A process group of its own, in which SIGINT is not ignored, as a shell starts a job in the foreground."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(process):
    try:
        return process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def program(*arguments):
    return [sys.executable, "-m", "trl_blend", *arguments]


def weights(folder):
    return load_file(folder / "model.safetensors")


def worker_of(process, rank):
    """Process id of one rank of a launch."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))


def interrupt_and_resume(launch, models, tmp_path, one_worker=False):
    """Interrupt after two steps; go on with the command that is printed."""
    process = start(program("grpo-mix", *launch, *options(models, tmp_path / "stopped")))
    logged = 0
    for line in process.stdout:
        logged += line.startswith("{'loss'")
        if logged == 2:
            break
    if one_worker:
        os.kill(worker_of(process, rank=1), signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, errors = finish(process)
    assert process.returncode == 130, errors[-3000:]
    assert "Traceback" not in errors and "Interrupted" not in errors
    assert errors.count("Stopping after this step") == (not one_worker)
    step = int(re.search(rf"Stopped after step (\d+) of {STEPS}; the checkpoint is", errors)[1])
    assert 2 <= step < STEPS
    checkpoint = tmp_path / "stopped" / f"checkpoint-{step}"
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    command = shlex.split(errors.strip().splitlines()[-1])
    assert command[0] == "trl-blend" and command[-2:] == ["--resume_from_checkpoint", str(checkpoint)]
    resumed = start(program(*command[1:]))
    output, errors = finish(resumed)
    assert resumed.returncode == 0, errors[-3000:]
    assert output.count("{'loss'") == STEPS - step  # it goes on and does not start again
    return weights(tmp_path / "stopped")


def assert_same(found, expected, start):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(start[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("processes", "one_worker"),
    [
        (1, False),
        pytest.param(2, False, marks=pytest.mark.distributed),
        pytest.param(2, True, marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
)
def test_a_run_that_is_interrupted_and_resumed_ends_like_one_that_is_not(models, tmp_path, processes, one_worker):
    launch = ["--accelerate_config", "cpu", "--num_processes", str(processes)]
    command = program("grpo-mix", *launch) if processes > 1 else SCRIPT
    whole = start([*command, *options(models, tmp_path / "whole")])
    _, errors = finish(whole)
    assert whole.returncode == 0, errors[-3000:]
    found = interrupt_and_resume(launch, models, tmp_path, one_worker)
    assert_same(found, weights(tmp_path / "whole"), weights(models / "student"))


# -------------------- in this process


def interrupted(callback, args):
    """A step during which SIGINT arrives, as the trainer calls it."""
    control, state = TrainerControl(), TrainerState(global_step=3)
    callback.on_train_begin(args, state, control)
    signal.raise_signal(signal.SIGINT)
    callback.on_step_end(args, state, control)
    assert (control.should_save, control.should_log, control.should_training_stop) == (True, True, False)
    callback.on_save(args, state, control)
    return control


def test_the_first_one_saves_and_the_second_one_is_pythons(sigint, tmp_path, capfd):
    callback = StopOnInterrupt(Accelerator(cpu=True))
    args = SimpleNamespace(output_dir=str(tmp_path), save_only_model=True)
    assert interrupted(callback, args).should_training_stop
    assert callback.checkpoint == tmp_path / "checkpoint-3" and not args.save_only_model
    assert "Stopping after this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_forks_of_a_process_stay_silent(sigint, tmp_path, capfd):
    callback = StopOnInterrupt(Accelerator(cpu=True))
    callback.on_train_begin(None, TrainerState(), TrainerControl())
    worker = os.fork()
    if not worker:
        signal.raise_signal(signal.SIGINT)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7  # it is left to the main process
    assert capfd.readouterr().err == "" and not callback.requested_anywhere()
    callback.restore()


def test_without_one_nothing_happens(sigint, tmp_path):
    callback, control = StopOnInterrupt(Accelerator(cpu=True)), TrainerControl()
    callback.on_train_begin(None, TrainerState(), control)
    callback.on_step_end(None, TrainerState(), control)
    callback.on_save(None, TrainerState(), control)
    assert callback.checkpoint is None and not control.should_save and not control.should_training_stop
    callback.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_it_goes_on_ignoring_it(sigint):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    StopOnInterrupt(Accelerator(cpu=True)).on_train_begin(None, TrainerState(), TrainerControl())
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_trained_model_is_saved_before_it_is_scored(sigint, tmp_path, capsys):
    events = []

    def score():
        events.append("score")
        raise KeyboardInterrupt

    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None),
        accelerator=Accelerator(cpu=True),
        add_callback=lambda callback: None,
        train=lambda resume_from_checkpoint: events.append("train"),
        save_model=lambda folder: events.append(folder),
    )
    with pytest.raises(KeyboardInterrupt):
        train_and_score(trainer, score)
    assert events == ["train", str(tmp_path), "score"]
    assert f"the model is in {tmp_path}; it has not been scored." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("trl-blend demo --output_dir 'a b'", "Go on with:\ntrl-blend demo --output_dir 'a b' {}"),
        ("trl-blend x --resume_from_checkpoint old --y 1", "Go on with:\ntrl-blend x --y 1 {}"),
        ("trl-blend x --resume_from_checkpoint=old --y 1", "Go on with:\ntrl-blend x --y 1 {}"),
        ("", "Go on with the same command and\n{}"),
    ],
)
def test_how_to_go_on(monkeypatch, command, expected):
    monkeypatch.setenv("TRL_BLEND_COMMAND", command)
    assert how_to_go_on(Path("c/checkpoint-3")) == expected.format("--resume_from_checkpoint c/checkpoint-3")


# -------------------- without the program


def test_the_second_one_stops_at_once(models, tmp_path):
    slow = {"max_steps": 2000, "per_device_train_batch_size": 128, "max_completion_length": 200}
    process = start([*SCRIPT, *options(models, tmp_path / "run", **slow)])
    next(line for line in process.stdout if line.startswith("{'loss'"))
    os.killpg(process.pid, signal.SIGINT)
    next(line for line in process.stderr if line.startswith("Stopping after this step"))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = finish(process)
    assert process.returncode == 130
    assert errors.endswith("trl-blend: Interrupted.\n") and "Traceback" not in errors
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_before_training_there_is_nothing_to_go_on_from(models, tmp_path):
    process = start(program("grpo-mix", *options(models, tmp_path / "run", num_test_prompts=4000)))
    next(line for line in process.stderr if "Loading weights" in line)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = finish(process)
    assert process.returncode == 130
    assert errors.endswith("trl-blend: Interrupted.\n") and "Traceback" not in errors
