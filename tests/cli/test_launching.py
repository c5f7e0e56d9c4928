"""How a script is launched: its arguments and those of accelerate, the number of processes, exit codes, messages."""

import importlib
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser

from trl_blend import _resources, cli
from trl_blend.cli import training
from trl_blend.errors import ConfigError
from trl_blend.scripts import checks


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
CPU = ["--output_dir", "out", "--use_cpu", "--bf16", "false"]


@pytest.fixture(autouse=True)
def _nothing_has_to_be_named(monkeypatch):
    monkeypatch.setattr(checks, "check_required", lambda *_: None)


@pytest.fixture
def environment(monkeypatch):
    """The variables of this process, put back afterwards."""
    with monkeypatch.context() as context:
        for name in ("ACCELERATE_USE_CPU", "TRL_BLEND_NUM_PROCESSES", "TRL_BLEND_COMMAND", "PET_SHUTDOWN_TIMEOUT"):
            context.setenv(name, "")
            context.delenv(name)
        yield os.environ


@pytest.fixture
def launched(monkeypatch, environment):
    """What accelerate would run: `launched(arguments)` gives its options."""
    seen = []
    monkeypatch.setattr(accelerate_launch, "launch_command", seen.append)

    def launch(*arguments, name="grpo-mix"):
        assert cli.main([name, *map(str, arguments)]) == 0
        return seen.pop()

    yield launch
    logging.getLogger("torch.distributed.elastic").setLevel(logging.NOTSET)


def fails(capsys, *arguments, name="grpo-mix"):
    assert cli.main([name, *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("trl-blend: error: ")


# -------------------- whose arguments


@pytest.mark.parametrize("name", training.COMMANDS)
def test_the_script_gets_its_arguments_and_accelerate_the_others(launched, environment, name):
    options = launched(
        *CPU, "--num_processes", 1, "--max_steps", 3, "--main_process_port=29871", "--learning_rate=1e-3", name=name
    )
    assert options.training_script == str(_resources.examples_dir() / training.COMMANDS[name].script)
    assert options.training_script_args == [*CPU, "--max_steps", "3", "--learning_rate=1e-3"]
    assert (options.num_processes, options.main_process_port) == (1, 29871)
    assert environment["TRL_BLEND_COMMAND"].startswith(f"trl-blend {name} --output_dir out --use_cpu ")


def test_the_command_to_go_on_with_holds_no_token(launched, environment):
    options = launched(*CPU, "--hub_token", "hf_secret", "--hub-token=hf_secret", "--seed", 3)
    assert options.training_script_args.count("hf_secret") == 1
    assert environment["TRL_BLEND_COMMAND"].endswith("--hub_token TOKEN --hub-token=TOKEN --seed 3")


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("as_path", [False, True])
def test_accelerate_config_by_name_and_by_path(launched, monkeypatch, config, as_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    options = launched("--output_dir", "out", f"--accelerate_config={config if as_path else config.stem}")
    assert Path(options.config_file) == config and options.training_script_args == ["--output_dir", "out"]


def test_settings_of_both_in_one_file(launched, tmp_path, environment):
    config = tmp_path / "run.yaml"
    lines = ["output_dir: out", "use_cpu: true", "bf16: false", "num_processes: 1", "accelerate_config: cpu"]
    config.write_text("\n".join([*lines, "mixed_precision: 'no'", "debug: null", "env: {TRL_BLEND_TEST: 5}"]))
    options = launched("--config", config, "--max_steps", 2)
    assert Path(options.config_file) == CONFIGS / "cpu.yaml"
    assert (options.num_processes, options.mixed_precision) == (1, "no")
    assert options.training_script_args == ["--config", str(config), "--max_steps", "2"]
    assert environment.pop("TRL_BLEND_TEST") == "5"
    # The command line wins
    assert launched("--config", config, "--num_processes", 2).num_processes == 2
    assert Path(launched("--config", config, "--accelerate_config", "fsdp2_cpu").config_file).stem == "fsdp2_cpu"


def test_zeros_and_booleans_of_a_file_reach_accelerate(launched, tmp_path):
    config = tmp_path / "run.yaml"
    lines = ["output_dir: out", "use_cpu: true", "bf16: false", "num_processes: 4", "num_machines: 2"]
    lines += ["machine_rank: 0", "main_process_port: 0", "fsdp_use_orig_params: false", "fsdp_offload_params: true"]
    config.write_text("\n".join([*lines, "same_network: true", "tpu_use_sudo: false", "mixed_precision: no"]))
    options = launched("--config", config)
    assert (options.num_machines, options.machine_rank, options.main_process_port) == (2, 0, 0)
    assert (options.fsdp_use_orig_params, options.fsdp_offload_params) == ("false", "true")
    assert (options.same_network, options.tpu_use_sudo, options.mixed_precision) == (True, False, "no")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_processes: 0", "`--num_processes 0` must be at least 1."),
        ("same_network: 1", "run.yaml`: `same_network: 1` is no true/false."),
    ],
)
def test_what_is_wrong_among_the_keys_of_accelerate(capsys, launched, tmp_path, line, message):
    (tmp_path / "run.yaml").write_text(f"output_dir: out\nuse_cpu: true\nbf16: false\n{line}")
    assert fails(capsys, "--config", tmp_path / "run.yaml").endswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_process", 2], "unknown option `--num_process`; did you mean `--num_processes`?"),
        (["--max_step", 2], "unknown option `--max_step`; did you mean `--max_steps`?"),
        (["--max_steps", "few"], "argument --max_steps: invalid int value: 'few' (see `trl-blend grpo-mix --help`)"),
        (["--num_processes", "few"], "argument --num_processes"),
        (["--num_processes", 0], "`--num_processes 0` must be at least 1."),
        (["stray"], "unexpected argument `stray`"),
        (["--accelerate_config", "fsdp"], "neither a file nor one of cpu, fsdp2, fsdp2_cpu, multi_gpu, zero2, zero3"),
        (["--accelerate_config", "README.md"], "`--accelerate_config README.md` is not YAML: "),
        (["--accelerate_config", "examples/configs/grpo_mix_testbed.yaml"], "is no configuration of accelerate: "),
        (["--accelerate_config"], "`--accelerate_config` needs a value."),
        (["--cpu", "--multi_gpu"], "You can only use one of `--cpu`, `--multi_gpu`"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_launched(capsys, environment, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert message in fails(capsys, *CPU, *arguments)


def test_workers_get_the_time_to_save(launched, environment):
    launched(*CPU)
    assert environment["PET_SHUTDOWN_TIMEOUT"] == "3600"
    assert getattr(get_args_parser().parse_args(["script"]), "shutdown_timeout", 3600) == 3600  # torch 2.10 has none


# -------------------- how many processes


@pytest.mark.parametrize("how", [["--cpu"], ["--accelerate_config", "cpu"], ["--accelerate_config", "fsdp2_cpu"], []])
def test_processes_on_the_cpu_are_started_by_torchrun(launched, environment, capsys, how):
    options = launched("--output_dir", "out", *([] if how else ["--use_cpu"]), *how, "--num_processes", 3)
    assert (options.num_processes, options.cpu, options.main_process_port) == (3, False, 0)
    assert options.multi_gpu and environment["ACCELERATE_USE_CPU"] == "true"
    assert environment["TRL_BLEND_NUM_PROCESSES"] == "3"
    said = capsys.readouterr().err
    assert "3 processes on the CPU (gloo)" in said and ("does not shard" in said) == (how[-1:] == ["fsdp2_cpu"])


@pytest.mark.parametrize(
    ("lines", "given", "expected"),
    [
        (["num_machines: 1"], [], 0),
        (["num_machines: 1", "main_process_port: 29871"], [], None),  # accelerate reads it
        (["num_machines: 2", "main_process_port: 29871"], [], None),
        (["num_machines: 2"], [], None),
        (["num_machines: 1"], ["--num_machines", 2], None),
        (["num_machines: 2", "main_process_port: 29871"], ["--main_process_port", 29872], 29872),
    ],
)
def test_the_port_of_processes_on_the_cpu(launched, tmp_path, lines, given, expected):
    config = tmp_path / "accelerate.yaml"
    start = ["compute_environment: LOCAL_MACHINE", "debug: false", "distributed_type: MULTI_CPU", "num_processes: 4"]
    config.write_text("\n".join([*start, "use_cpu: true", "machine_rank: 0", *lines]))
    assert launched(*CPU, "--accelerate_config", config, *given).main_process_port == expected


def test_one_process_is_launched_as_accelerate_does(launched, environment, capsys):
    options = launched(*CPU, "--accelerate_config", "cpu")
    assert not options.multi_gpu and options.num_processes is None and "ACCELERATE_USE_CPU" not in environment
    assert environment["TRL_BLEND_NUM_PROCESSES"] == "1" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("devices", "arguments", "message"),
    [
        (0, ["--num_processes", 2], "`--num_processes 2` needs 2 accelerators per machine, but 0 are here. Set"),
        (1, ["--num_processes", 2], "but 1 is here. Set `--num_processes 1`, or `--use_cpu`"),
        (2, ["--accelerate_config", "multi_gpu"], "`--num_processes 8` (of multi_gpu.yaml) needs 8 accelerators"),
        (2, ["--accelerate_config", "fsdp2", "--use_cpu"], "fsdp2.yaml is for accelerators, and training is set to"),
        (2, ["--accelerate_config", "zero3", "--num_processes", 2, "--use_cpu"], "zero3.yaml is for accelerators"),
        (2, ["--num_processes", 2], None),
        (4, ["--num_processes", 8, "--num_machines", 2], None),
    ],
)
def test_fewer_accelerators_than_processes(launched, capsys, monkeypatch, devices, arguments, message):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    if message is None:
        assert launched("--output_dir", "out", *arguments).num_processes == arguments[1]
    else:
        assert message in fails(capsys, "--output_dir", "out", *arguments)


def test_a_script_refuses_another_number_than_asked_for(environment, monkeypatch, tmp_path):
    from trl_blend.scripts import running

    parser = importlib.import_module("grpo_mix").make_parser()
    monkeypatch.setattr(sys, "argv", ["grpo_mix.py", *CPU])
    environment["TRL_BLEND_NUM_PROCESSES"] = "2"
    with pytest.raises(ConfigError, match="2 processes were asked for, but this run has 1"):
        running._parse(parser)


# -------------------- how it ends


def raises(error):
    def launch_command(options):
        raise error

    return launch_command


KILLED = "trl-blend: error: process {} was ended by SIGKILL (was there enough memory?)\n"


@pytest.mark.parametrize(
    ("codes", "expected", "message"),
    [
        ([2], 2, ""),
        ([130], 130, ""),
        ([1], 1, ""),
        ([77], 1, ""),
        ([-signal.SIGKILL], 137, KILLED.format(0)),
        # torchrun ends the others with SIGTERM
        ([-signal.SIGTERM, 2], 2, ""),
        ([-signal.SIGTERM, 130], 130, ""),
        ([-signal.SIGTERM, 1], 1, ""),
        ([-signal.SIGTERM, 77], 1, ""),
        ([-signal.SIGTERM, -signal.SIGKILL], 137, KILLED.format(1)),
        ([1, -signal.SIGKILL], 137, KILLED.format(1)),  # the first lost its peer
        ([1, -signal.SIGTERM], 1, ""),
        ([-signal.SIGTERM, -signal.SIGTERM], 143, "trl-blend: error: process 0 was ended by SIGTERM\n"),
    ],
)
def test_exit_codes(monkeypatch, environment, capsys, codes, expected, message):
    if len(codes) > 1:
        failures = {
            rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="none")
            for rank, code in enumerate(codes)
        }
        error = ChildFailedError("script", failures)
    else:
        error = subprocess.CalledProcessError(codes[0], "script")
    monkeypatch.setattr(accelerate_launch, "launch_command", raises(error))
    before = signal.getsignal(signal.SIGINT)
    found = cli.main(["grpo-mix", *CPU])
    assert signal.getsignal(signal.SIGINT) is before
    assert (found, capsys.readouterr().err) == (expected, message)


def test_a_bug_of_the_launcher_keeps_its_traceback(monkeypatch, environment):
    monkeypatch.setattr(accelerate_launch, "launch_command", raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["grpo-mix", *CPU])


def run(command, **variables):
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


PROGRAM = [sys.executable, "-m", "trl_blend", "grpo-mix"]
WRONG = {
    "configuration": (["--teacher_weight", "2"], r"`teacher_weight\[0\]` is 2.0."),
    "model": (["--model_name_or_path", "nowhere/x", "--max_steps", "1"], "nowhere/x"),
}


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("one", "configuration"),
        pytest.param("two", "model", marks=pytest.mark.distributed),
        pytest.param("one", "model", marks=pytest.mark.slow),
        pytest.param("two", "configuration", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_the_user_is_one_line(tmp_path, how, what):
    arguments, message = WRONG[what]
    launch = {"one": PROGRAM, "two": [*PROGRAM, "--num_processes", "2"]}[how]
    done = run([*launch, "--config", "examples/configs/grpo_mix_testbed.yaml", "--output_dir", tmp_path, *arguments])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and re.match(rf"trl-blend: error: .*{message}", lines[0]), done.stderr
    assert done.stderr.splitlines()[-1] == lines[0]
