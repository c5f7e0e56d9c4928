"""No access token is written or said anywhere: every file of a run, its reports, the repository and the output."""

import copy
import json
import pickle

import pytest
import torch

from tests.hub.repositories import Account
from tests.hub.server import hub_endpoint  # noqa: F401
from tests.rollouts.stores import write_store
from tests.trainers import runs
from tests.trainers.pushing.pushing import KINDS, PUSHING, build, models  # noqa: F401
from trl_blend import LogitMixGRPOConfig, OfflineOPDConfig, TrustRegionOPDConfig
from trl_blend.errors import HubError


PUSHES, LOADS, LOADS_TEACHER = "hf_secretThatPushes", "hf_secretThatLoads", "hf_secretThatLoadsTeachers"


@pytest.fixture
def hub(hub_endpoint, monkeypatch):  # noqa: F811
    hub_endpoint.accounts[PUSHES] = Account("me", True)
    monkeypatch.delenv("HF_TOKEN")  # what is pushed is pushed with the argument
    return hub_endpoint


def secrets(content):
    return [secret for secret in (PUSHES, LOADS, LOADS_TEACHER) if secret.encode() in content]


def test_the_search_finds_what_it_searches_for(tmp_path):
    torch.save({"hub_token": PUSHES}, tmp_path / "training_args.bin")
    assert secrets((tmp_path / "training_args.bin").read_bytes()) == [PUSHES]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_writes_no_token(hub, models, tmp_path, monkeypatch, capfd, kind):  # noqa: F811
    import wandb

    wandb.teardown()  # or it keeps the folder of the first run of this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "out" / "logs"))
    settings = {**PUSHING, "hub_strategy": "checkpoint", "hub_token": PUSHES, "report_to": ["wandb", "tensorboard"]}
    settings["model_init_kwargs"] = {"token": LOADS}
    if kind != "offline":
        settings["teacher_model_init_kwargs"] = {"token": LOADS_TEACHER}
    trainer = build(kind, models, tmp_path / "out", **settings)
    print(trainer.args, repr(trainer.args), trainer.args.to_json_string())
    trainer.train()
    trainer.push_to_hub()
    wandb.finish(), wandb.teardown()

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"training_args.bin", "README.md", "trainer_state.json", "optimizer.pt"} <= names
    assert any(name.endswith(".wandb") for name in names) and any("tfevents" in name for name in names)
    assert {str(path): secrets(path.read_bytes()) for path in written if secrets(path.read_bytes())} == {}
    files = hub.model("me/run").files()
    assert "training_args.bin" in files and "last-checkpoint/training_args.bin" in files
    assert {path for path, data in files.items() if secrets(data)} == set()
    assert secrets("".join(capfd.readouterr()).encode()) == []
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.model_init_kwargs == {"token": None}
    assert saved.learning_rate == trainer.args.learning_rate
    assert type(saved) is type(trainer.args)


@pytest.mark.parametrize("config_class", [LogitMixGRPOConfig, TrustRegionOPDConfig, OfflineOPDConfig])
def test_a_token_reaches_the_client_and_is_shown_to_nobody(tmp_path, config_class):
    given = {"token": LOADS, "eos_token": "<eos>"}
    args = config_class(str(tmp_path), hub_token=PUSHES, model_init_kwargs=given, use_cpu=True, bf16=False)
    for one in (args, copy.copy(args), copy.deepcopy(args)):
        assert f"Bearer {one.hub_token}" == f"Bearer {PUSHES}"
        assert f"Bearer {one.model_init_kwargs['token']}" == f"Bearer {LOADS}"
    assert given == {"token": LOADS, "eos_token": "<eos>"} and type(given["token"]) is str
    shown = [str(args), repr(args), args.to_json_string(), json.dumps(args.to_dict()), str(args.to_sanitized_dict())]
    assert [secrets(text.encode()) for text in shown] == [[]] * 5
    assert args.to_dict()["model_init_kwargs"] == {"token": "<TOKEN>", "eos_token": "<eos>"}
    assert args.model_init_kwargs["token"] == LOADS  # not masked where it is used
    assert secrets(pickle.dumps(args)) == []
    assert pickle.loads(pickle.dumps(args)).model_init_kwargs == {"token": None, "eos_token": "<eos>"}


def test_a_token_set_after_the_config_was_made_is_kept_out_too(hub, models, tmp_path):  # noqa: F811
    args = runs.config(tmp_path / "out", teacher_weight=0.0, push_to_hub=True, hub_model_id="me/run")
    args.hub_token = PUSHES
    from trl_blend import LogitMixGRPOTrainer

    trainer = LogitMixGRPOTrainer(
        model=str(models / "student"), reward_funcs=runs.reward, args=args, train_dataset=runs.dataset()
    )
    trainer.save_model(_internal_call=True)
    assert secrets((tmp_path / "out" / "training_args.bin").read_bytes()) == []


def test_a_refusal_does_not_repeat_the_token(hub, models, tmp_path):  # noqa: F811
    with pytest.raises(HubError) as raised:
        build("offline", models, tmp_path / "out", **{**PUSHING, "hub_model_id": "other/run", "hub_token": PUSHES})
    chain = [raised.value, raised.value.__cause__, raised.value.__cause__.__cause__]
    assert secrets("".join(map(str, chain)).encode()) == []


def test_a_pushed_store_holds_no_token(hub, tmp_path):
    write_store(tmp_path / "scored", 1, scored=True).push_to_hub("me/scored", token=PUSHES)
    assert {path for path, data in hub.dataset("me/scored").files().items() if secrets(data)} == set()
