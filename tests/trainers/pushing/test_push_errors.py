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
from tests.trainers.pushing.pushing import KINDS, PUSHING, assert_same_weights, build, models  # noqa: F401
from trl_blend.errors import HubError


@pytest.fixture
def hub(hub_endpoint):  # noqa: F811
    return hub_endpoint


# Case -> settings, token, type of the client's error, what it says
REFUSALS = {
    "no_token": ({}, "", HfHubHTTPError, "401"),
    "wrong_token": ({}, "hf_x", HfHubHTTPError, "Invalid credentials"),
    "private": ({"hub_model_id": "other/private"}, None, HfHubHTTPError, '403.*namespace "other"'),
    "offline": ({}, None, OfflineModeIsEnabled, "offline"),
    "wrong_argument": ({"hub_token": "hf_x"}, None, HfHubHTTPError, "Invalid credentials"),
    "cannot_write": ({}, READER, HfHubHTTPError, "403 Forbidden.*namespace"),
    "of_somebody_else": ({"hub_model_id": "other/public"}, None, HfHubHTTPError, "403.*write permission on other"),
    "malformed": ({"hub_model_id": "me/my model"}, None, HFValidationError, "Repo id must use alphanumeric chars"),
    "no_branch": ({"hub_revision": "v2"}, None, RevisionNotFoundError, "404.*Revision Not Found"),
    "no_network": ({}, None, HTTPError, "Connection refused"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_comes_before_a_model_is_loaded(hub, models, tmp_path, monkeypatch, case):  # noqa: F811
    settings, token, cause, says = REFUSALS[case]
    hub.create("other/public")
    hub.create("other/private", private=True)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)  # empty: none
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", case == "offline")
    if case == "no_network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def load(*args, **kwargs):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
    name = settings.get("hub_model_id", "me/run")
    with pytest.raises(HubError, match=says) as raised:
        build("logit_mix", models, tmp_path / "out", **{**PUSHING, **settings})
    assert isinstance(raised.value.__cause__, cause)
    message = str(raised.value)
    assert message.startswith(f"`hub_model_id={name!r}` cannot be pushed to. ") and "\n" not in message
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


def test_training_goes_on_when_pushes_fail(hub, models, tmp_path, caplog):  # noqa: F811
    trainer = build("logit_mix", models, tmp_path / "out", **{**PUSHING, "max_steps": 3})
    hub.fail("commit", 403, after=1, times=99)
    with caplog.at_level("WARNING"):
        output = trainer.train()
    assert output.global_step == 3
    assert hub.model("me/run").commits == [("main", "Training in progress, step 1")]
    said = [record.getMessage() for record in caplog.records if "a push of a checkpoint has failed" in record.message]
    assert len(said) == 2 and all("403" in one for one in said)  # of two pushes
    assert said[-1].endswith("Call `trainer.push_to_hub()` to send what is missing.")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3", dtype=torch.float32)
    assert_same_weights(saved, trainer.model)

    # Saving, and the push that goes with it
    with pytest.raises(HfHubHTTPError, match="403"):
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
    assert len(said) == 1 and "HfHubHTTPError: " in said[0] and "403" in said[0]
    assert "model.safetensors" in hub.model("me/run").files()
