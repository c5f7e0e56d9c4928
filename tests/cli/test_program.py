"""`trl-blend` as a program: its name, its help, and how fast it is."""

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def test_it_is_installed_under_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"trl-blend": "trl_blend.cli:main"}


def test_help_loads_nothing_heavy():
    code = (
        "import sys, trl_blend.cli as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    light = [["--help"], ["score", "--help"], ["demo", "--help"], ["rollouts", "--temprature"], ["grpo-mx"]]
    light += [
        ["grpo-mix", "--help"],
        ["trust-region-opd", "--kl_budgt", "1"],
        ["grpo-mix", "--config", "nowhere.yaml"],
    ]
    light += [["offline-opd", "--accelerate_config", "nowhere"]]
    for arguments in light:
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_fast_and_names_the_commands():
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        start = time.perf_counter()
        command = [sys.executable, "-m", "trl_blend", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5
    commands = set(re.findall(r"^    ([a-z-]+)(?: |$)", done.stdout, re.MULTILINE))
    assert commands == {
        *("grpo-mix", "trust-region-opd", "offline-opd", "rollouts", "score", "inspect", "record-teacher"),
        *("export", "env", "demo"),
    }
