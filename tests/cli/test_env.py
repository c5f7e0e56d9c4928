"""`trl-blend env`: versions, devices, and a package of a version that this one does not take."""

import json
import sys
from importlib.metadata import version

import torch

from trl_blend import cli
from trl_blend._version import __version__
from trl_blend.cli import env


def test_what_is_printed(capsys):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["trl_blend"] == __version__ and lines["python"] == sys.version.split()[0]
    for name in ("trl", "transformers", "torch", "accelerate", "peft", "datasets"):
        assert lines[name] == version(name)
    assert lines["deepspeed"] == "not installed"


def test_as_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["devices"] and found["differences"] == []


def test_a_version_that_is_not_taken_is_named(monkeypatch, capsys):
    required = ["trl<1.17,>=1.16", "torch>=2.8", 'no-such-package>=0.22; extra == "vllm"', "datasets>=900"]
    required += ['peft>=900; extra == "peft"', 'pytest>=900; extra == "dev"']
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: required)
    assert cli.main(["env"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"datasets {version('datasets')} is installed, and trl_blend needs >=900.",
        f"peft {version('peft')} is installed, and trl_blend needs >=900.",
    ]


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["no-such-package>=2"])
    assert cli.main(["env"]) == 1
    assert "no-such-package is not installed, and trl_blend needs >=2." in "".join(capsys.readouterr())


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert env.devices() == [f"CPU ({torch.get_num_threads()} threads)"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert env.devices() == ["GPU 0", "GPU 1"]
