"""`trl-blend env`: versions, devices, and an upstream that is not the one that this package was written for."""

import json
import sys
from importlib.metadata import version

import pytest
import torch

from trl_blend import __version__, _contract, cli
from trl_blend._contract import Seam
from trl_blend.cli import env


def test_what_is_printed(capsys):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["trl_blend"] == __version__ and lines["python"] == sys.version.split()[0]
    for name in ("trl", "transformers", "torch", "accelerate", "peft", "datasets"):
        assert lines[name] == version(name)
    assert lines["deepspeed"] == "not installed"
    assert lines["upstream"] == f"methods {len(_contract.SEAMS)} checked: as this package was written for"


def test_as_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["devices"] and found["contract"] == {"seams": len(_contract.SEAMS), "differences": []}


def test_every_difference_is_named(monkeypatch, capsys):
    seams = {
        "json.dumps": Seam("obj, other=", "a.py"),
        "json.loads_all": Seam("self", "b.py"),
        "no_such_module.f": Seam("self", "c.py"),
        "json.load": Seam(env.parameters(json.load), "d.py"),
    }
    attributes = {"args": "e.py", "_metrics": "e.py", "_metricks": "f.py"}
    monkeypatch.setattr(env, "SEAMS", seams)
    monkeypatch.setattr(env, "TRAINERS", {"trl.GRPOTrainer": attributes, "trl.NoTrainer": {}})
    assert cli.main(["env"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].endswith("4 checked: 5 differences")
    assert lines[-5].strip().startswith("`json.dumps` now takes (obj, skipkeys=, ensure_ascii=")
    assert lines[-5].endswith("it took (obj, other=). Check trl_blend/a.py.")
    assert "`json.loads_all` is gone" in lines[-4] and "b.py" in lines[-4]
    assert "`no_such_module.f` is gone" in lines[-3]
    assert lines[-2].strip() == "`trl.GRPOTrainer._metricks` is gone. trl_blend/f.py reads it."
    assert "`trl.NoTrainer` is gone" in lines[-1]


@pytest.mark.parametrize(
    ("path", "written"), [("json.load", "fp, cls=, object_hook=, parse_float=, parse_int="), ("os.path.join", "a, *p")]
)
def test_parameters_are_written_by_name(path, written):
    assert env.parameters(env.resolve(path)).startswith(written)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert env.devices() == [f"CPU ({torch.get_num_threads()} threads)"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert env.devices() == ["GPU 0", "GPU 1"]
