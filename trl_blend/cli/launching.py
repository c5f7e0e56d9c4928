"""
Launching a script with accelerate: as many processes as were asked for, and one line where it fails.

accelerate starts a single CPU process whatever `--num_processes` says, and a single process where there are fewer
accelerators than processes. Here CPU processes are started by torchrun, through accelerate's own launcher, and
anything else that would not run as asked is refused.
"""

import logging
import os
import signal
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

from trl_blend import _resources
from trl_blend.errors import ConfigError
from trl_blend.scripts.messages import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, fail_in_one_line, say
from trl_blend.scripts.settings import NUM_PROCESSES_VARIABLE


# What a worker has said itself
_SAID = (EXIT_USER_ERROR, EXIT_INTERRUPTED)
# After Ctrl-C, workers finish their step and save; torch would kill them after 30 seconds. A second Ctrl-C does.
_SECONDS_TO_SAVE = "3600"


def launch(script: Path, launch_arguments: list[str], script_arguments: list[str], wants_cpu: bool) -> int:
    """Run a script, which may be told to train on the CPU, to its end; returns 0, or its exit code."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser = launch_command_parser()
    parser.prog = "accelerate launch"
    fail_in_one_line(parser)
    options = parser.parse_args([*launch_arguments, str(script), *script_arguments])
    if options.training_script != str(script):
        raise ConfigError(f"unexpected argument `{options.training_script}`")
    if wants_cpu and options.config_file is None and not os.path.isfile(default_config_file):
        # accelerate would guess, and warn that it does
        options.config_file = str(_resources.shipped_yaml("accelerate_configs")["cpu"])
    _settle_processes(options, _read_defaults(options), wants_cpu)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", _SECONDS_TO_SAVE)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The script handles Ctrl-C, and this process waits for it. Not SIG_IGN, which the script would inherit
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        return _exit_code({0: error.returncode})
    except (ValueError, ImportError, ConnectionError) as error:  # accelerate's own checks
        raise ConfigError(str(error)) from error
    except Exception as error:
        if type(error).__name__ == "SignalException":
            return EXIT_INTERRUPTED
        if type(error).__name__ != "ChildFailedError":
            raise
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
    finally:
        signal.signal(signal.SIGINT, previous)
    return 0


def _exit_code(codes: dict[int, int]) -> int:
    """The code to exit with, from those of the processes that failed; says what they could not say themselves."""
    for code in _SAID:
        if code in codes.values():
            return code
    # torchrun ends the others with SIGTERM. A process that was killed has said nothing; its peers fail because of it
    failed = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    rank, code = next((item for item in failed.items() if item[1] < 0), next(iter(failed.items())))
    if code < 0:
        killed = " (was there enough memory?)" if -code == signal.SIGKILL else ""
        say(f"error: process {rank} was ended by {signal.Signals(-code).name}{killed}")
        return 128 - code
    return EXIT_FAILED  # the traceback is above


def _read_defaults(options: Namespace) -> Any:
    """What accelerate's configuration file says: the given one, or the user's own."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    file = options.config_file
    if file is None and (options.cpu or not os.path.isfile(default_config_file)):
        return None
    try:
        return load_config_from_file(file)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"`--accelerate_config {file}` is no configuration of accelerate: {error}") from error


def _settle_processes(options: Namespace, defaults: Any, wants_cpu: bool) -> None:
    """Refuse or arrange what accelerate would run with another number of processes; tell the script its number."""
    import torch

    # `num_processes: -1` in a configuration leaves it to the command line
    wanted = options.num_processes if options.num_processes is not None else getattr(defaults, "num_processes", None)
    if wanted is None or options.mpirun_hostfile or options.tpu:
        return
    if wanted < 1:
        raise ConfigError(f"`--num_processes {wanted}` must be at least 1.")
    os.environ[NUM_PROCESSES_VARIABLE] = str(wanted)
    on_cpu = bool(wants_cpu or options.cpu or getattr(defaults, "use_cpu", False))
    if on_cpu:
        if wanted > 1:
            _use_cpu_processes(options, defaults, wanted)
        return
    machines = options.num_machines or getattr(defaults, "num_machines", None) or 1
    available = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if wanted > 1 and wanted // machines > available:
        from_file = options.num_processes is None and options.config_file is not None
        source = f" (of {Path(options.config_file).name})" if from_file else ""
        raise ConfigError(
            f"`--num_processes {wanted}`{source} needs {wanted // machines} accelerators per machine, but "
            f"{available} {'is' if available == 1 else 'are'} here. Set `--num_processes {max(available, 1)}`, or "
            "`--use_cpu` for processes on the CPU."
        )


def _use_cpu_processes(options: Namespace, defaults: Any, wanted: int) -> None:
    kind = getattr(getattr(defaults, "distributed_type", None), "value", "NO")
    for_accelerators = options.num_processes is None and not getattr(defaults, "use_cpu", False)
    if for_accelerators or options.use_deepspeed or kind == "DEEPSPEED":
        file = Path(options.config_file).name if options.config_file else "the default configuration of accelerate"
        raise ConfigError(
            f"{file} is for accelerators, and "
            "training is set to the CPU (`use_cpu`). Use `--accelerate_config cpu`, with `--num_processes N` for "
            "several processes."
        )
    # torchrun starts them where accelerate would start one; the script's training arguments read the variable
    options.cpu, options.multi_gpu = False, not options.use_fsdp
    os.environ["ACCELERATE_USE_CPU"] = "true"
    options.num_machines = options.num_machines or getattr(defaults, "num_machines", None) or 1
    configured = options.main_process_port is not None or getattr(defaults, "main_process_port", None) is not None
    if options.num_machines == 1 and not configured:
        options.main_process_port = 0  # any free one
    replicated = ", each with the whole model: accelerate does not shard on the CPU" if kind == "FSDP" else ""
    say(f"{wanted} processes on the CPU (gloo){replicated}")
