"""What a user is told when the Hub refuses, and when; and that nothing is lost by it."""

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.hub.server import READER, hub_endpoint  # noqa: F401
from tests.hub.test_server import impatient  # noqa: F401
from tests.rollouts.stores import write_store
from tests.trainers.pushing.pushing import KINDS, PUSHING, assert_same_weights, build, models  # noqa: F401
from trl_blend.errors import HubError


@pytest.fixture
def hub(hub_endpoint):  # noqa: F811
    return hub_endpoint


def unreachable(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def elsewhere(name):
    return {"hub_model_id": name}


# Case -> settings, environment, type of the client's error, what the message says
REFUSALS = {
    "no_token": ({}, {"HF_TOKEN": None}, HfHubHTTPError, "401.*No token was found: log in with `hf auth login`"),
    "wrong_token": ({}, {"HF_TOKEN": "hf_x"}, HfHubHTTPError, "Invalid credentials.*`hf auth login --force`"),
    "wrong_argument": ({"hub_token": "hf_x"}, {}, HfHubHTTPError, "Invalid credentials.*`hub_token` and .*`HF_TOKEN`"),
    "cannot_write": ({}, {"HF_TOKEN": READER}, HfHubHTTPError, "403.*write permission.*`hub_model_id`"),
    "private": (elsewhere("other/private"), {}, HfHubHTTPError, '403.*namespace "other".*`hub_model_id`'),
    "public": (elsewhere("other/public"), {}, HfHubHTTPError, "403.*write permission on other/public.*`hub_model_id`"),
    "malformed": (elsewhere("me/my model"), {}, HFValidationError, "`hub_model_id` must be a name, or an owner and"),
    "no_branch": ({"hub_revision": "v2"}, {}, RevisionNotFoundError, "404.*Create the branch first: `hf repos branch"),
    "offline": ({}, {"offline": "1"}, OfflineModeIsEnabled, "Offline mode is on: unset `HF_HUB_OFFLINE`"),
    "no_network": ({}, {"unreachable": "1"}, HTTPError, "Check the network and `HF_ENDPOINT`"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_comes_before_a_model_is_loaded(hub, models, tmp_path, monkeypatch, case):  # noqa: F811
    settings, environment, cause, says = REFUSALS[case]
    hub.create("other/private", private=True), hub.create("other/public")
    if "HF_TOKEN" in environment:
        monkeypatch.delenv("HF_TOKEN")
        if environment["HF_TOKEN"]:
            monkeypatch.setenv("HF_TOKEN", environment["HF_TOKEN"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "offline" in environment)
    if "unreachable" in environment:
        unreachable(monkeypatch)

    def load(*args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    name = settings.get("hub_model_id", "me/run")
    with pytest.raises(HubError, match=says) as raised:
        build("logit_mix", models, tmp_path / "out", **{**PUSHING, **settings})
    assert isinstance(raised.value.__cause__, cause)
    message = str(raised.value)
    assert message.startswith(f"Pushing to {name!r} failed: ") and "\n" not in message
    assert message.endswith("Nothing has been trained yet.")
    assert "hf_x" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_asks_before_it_loads(hub, models, tmp_path, monkeypatch, kind):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", READER)
    trainers = []
    with pytest.raises(HubError, match="403"):
        trainers.append(build(kind, models, tmp_path / "out", **PUSHING))
    assert hub.repositories == {} and not trainers


def test_a_push_that_was_not_announced_saves_before_it_is_refused(hub, models, tmp_path, monkeypatch):  # noqa: F811
    trainer = build("logit_mix", models, tmp_path / "out", max_steps=1)
    trainer.train()
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="403.*The model is saved in output_dir=") as raised:
        trainer.push_to_hub()
    assert isinstance(raised.value.__cause__, HfHubHTTPError)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), trainer.model)
    monkeypatch.setenv("HF_TOKEN", "hf_tokenOfMeWhoWrites")
    trainer.push_to_hub()
    assert_same_weights(AutoModelForCausalLM.from_pretrained("me/out", dtype=torch.float32), trainer.model)


def test_training_goes_on_when_pushes_fail(hub, models, tmp_path, impatient, caplog):  # noqa: F811
    trainer = build("logit_mix", models, tmp_path / "out", **{**PUSHING, "max_steps": 3})
    hub.fail("commit", 403, after=1, times=99)
    with caplog.at_level("WARNING"):
        output = trainer.train()
    assert output.global_step == 3
    assert hub.model("me/run").commits == [("main", "Training in progress, step 1")]
    said = [record.getMessage() for record in caplog.records if "a push of a checkpoint has failed" in record.message]
    assert said and all("403" in one and "`hub_model_id`" in one for one in said)
    assert said[-1].endswith("Call `trainer.push_to_hub()` to send what is missing.")
    assert sum("trainer.push_to_hub()" in one for one in said) == 1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3", dtype=torch.float32)
    assert_same_weights(saved, trainer.model)

    # Saving, and the push that goes with it
    with pytest.raises(HubError, match="403.*The model is saved in output_dir="):
        trainer.save_model()
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), trainer.model)
    hub.before.clear()
    trainer.push_to_hub()
    assert_same_weights(AutoModelForCausalLM.from_pretrained("me/run", dtype=torch.float32), trainer.model)


def test_a_push_that_nobody_waits_for_says_that_it_has_failed(hub, models, tmp_path, caplog):  # noqa: F811
    trainer = build("logit_mix", models, tmp_path / "out", push_to_hub=True, hub_model_id="me/run")
    hub.fail("commit", 403)
    with caplog.at_level("WARNING"):
        assert isinstance(trainer.push_to_hub(blocking=False).exception(timeout=60), HfHubHTTPError)
        trainer.push_to_hub(blocking=False).result(timeout=60)
    said = [record.getMessage() for record in caplog.records if "`blocking=False` has failed" in record.message]
    assert len(said) == 1 and "403" in said[0] and "`hub_model_id`" in said[0]
    assert "model.safetensors" in hub.model("me/run").files()


def test_a_fault_of_the_hub_is_waited_out_or_said(hub, models, tmp_path, impatient):  # noqa: F811
    trainer = build("logit_mix", models, tmp_path / "out", push_to_hub=True, hub_model_id="me/run")
    hub.fail("lfs_upload", 503)
    hub.fail("preupload", 429, retry_after="1")
    trainer.push_to_hub()
    assert "model.safetensors" in hub.model("me/run").files()
    hub.fail("preupload", 503, times=99)
    with pytest.raises(HubError, match="503.*busy or has a fault.*not sent a second time"):
        trainer.push_to_hub()
    hub.fail("preupload", None, times=99)
    with pytest.raises(HubError, match="Check the network"):
        trainer.push_to_hub()


@pytest.mark.parametrize(
    ("token", "name", "says"),
    [
        ("hf_x", "me/scored", "Invalid credentials.*`token` and the variable"),
        (READER, "me/scored", "403.*`repo_id`"),
        (None, "other/scored", '403.*namespace "other"'),
        (None, "me/a/b", "`repo_id` must be a name"),
    ],
)
def test_pushing_a_store_is_refused(hub, tmp_path, token, name, says):
    store = write_store(tmp_path / "scored", 1, scored=True)
    with pytest.raises(HubError, match=says) as raised:
        store.push_to_hub(name, token=token)
    assert str(raised.value).startswith(f"Pushing to {name!r} failed: ") and "\n" not in str(raised.value)
    assert str(store.folder) in str(raised.value)
    assert hub.repositories == {}


def test_other_errors_pass(hub, models, tmp_path, monkeypatch):  # noqa: F811
    trainer = build("logit_mix", models, tmp_path / "out", push_to_hub=True, hub_model_id="me/run")

    def broken(*args, **kwargs):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(trainer, "create_model_card", broken)
    with pytest.raises(ValueError, match="^a mistake of ours$"):
        trainer.push_to_hub()
