import shutil

import pytest
import torch
from accelerate.utils import is_peft_model
from transformers import AutoModelForCausalLM

from tests.models.checkpoints import hub_snapshot
from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from tests.trainers import runs
from trl_blend.errors import TokenizerMismatchError, UnsupportedError
from trl_blend.trainers import _partners


@pytest.mark.parametrize(
    ("given", "listed"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), (("a",), ["a"]), ([], [])]
)
def test_as_list(given, listed):
    assert _partners.as_list(given) == listed


def test_a_model_is_one_teacher():
    model = tiny_model()
    assert _partners.as_list(model) == [model]


@pytest.fixture
def loads(monkeypatch):
    """What is asked of the loader, for each teacher given by name."""
    calls = []

    def load(name, argument, **kwargs):
        calls.append((name, kwargs))
        return tiny_model(seed=1).requires_grad_(False).eval()

    monkeypatch.setattr(_partners, "load_frozen", load)
    monkeypatch.setattr(_partners, "find_config", lambda *args, **kwargs: tiny_model(seed=1).config)
    return calls


def test_a_named_teacher_is_loaded_as_the_trainer_asks_or_as_its_checkpoint_says(loads, tmp_path):
    args = runs.config(tmp_path, trust_remote_code=True)
    _partners.load_partners(["some/teacher"], args, {"dtype": torch.bfloat16, "attn_implementation": "sdpa"})
    _partners.load_partners(["some/teacher"], args)
    (name, kwargs), (_, undecided) = loads
    assert name == "some/teacher"
    assert kwargs == {"dtype": torch.bfloat16, "attn_implementation": "sdpa", "trust_remote_code": True}
    assert undecided == {"dtype": None, "trust_remote_code": True}


def test_load_settings_have_the_last_word(loads, tmp_path):
    settings = {"dtype": "float32", "attn_implementation": "eager"}
    args = runs.config(tmp_path, teacher_model_init_kwargs=settings, teacher_model_revision="v2")
    _partners.load_partners(["some/teacher"], args, {"dtype": torch.bfloat16, "attn_implementation": "sdpa"})
    ((_, kwargs),) = loads
    assert kwargs["dtype"] == "float32" and kwargs["attn_implementation"] == "eager" and kwargs["revision"] == "v2"
    assert args.teacher_model_init_kwargs == settings


def test_what_says_which_files_are_meant_is_given_to_every_read(tmp_path):
    given = {"revision": "v2", "subfolder": "inner", "token": "hf_mine", "dtype": "float32"}
    args = runs.config(tmp_path, teacher_model_init_kwargs=given, teacher_model_revision="v1")
    assert _partners.teacher_arguments(args) == given | {"trust_remote_code": False}
    files = {"revision": "v2", "subfolder": "inner", "token": "hf_mine", "trust_remote_code": False}
    assert _partners.teacher_files(args) == files
    trusted = runs.config(tmp_path, teacher_model_init_kwargs={"trust_remote_code": True}, teacher_model_revision="v1")
    assert _partners.teacher_files(trusted) == {"revision": "v1", "trust_remote_code": True}


@pytest.mark.parametrize("trainer", ["build", "build_opd"])
def test_a_teacher_in_a_subfolder(request, trainer, models, tmp_path):
    shutil.copytree(models / "teacher", tmp_path / "outer" / "inner")
    make, outer = request.getfixturevalue(trainer), str(tmp_path / "outer")
    loaded = make(teacher=outer, teacher_model_init_kwargs={"subfolder": "inner"}).partners[0]
    runs.assert_same_tensors(runs.snapshot(loaded), runs.snapshot(make().partners[0]))


@pytest.mark.parametrize("trainer", ["build", "build_opd"])
def test_a_revision_in_the_settings_of_loading_comes_first(
    request, trainer, models, other_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    revisions = {"main": other_tokenizer, "v1": other_tokenizer, "v2": tmp_path / "ends_elsewhere"}
    shutil.copytree(models / "teacher", revisions["v2"])
    tiny_tokenizer(eos_token="<pad>").save_pretrained(revisions["v2"])
    for number, (branch, folder) in enumerate(revisions.items(), start=1):
        snapshot = hub_snapshot(tmp_path, "org/teacher", str(number) * 40, branch)
        shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    make = request.getfixturevalue(trainer)
    with pytest.raises(TokenizerMismatchError):
        make(teacher="org/teacher")
    for revision in (None, "v1"):
        settings = {"teacher_model_revision": revision, "teacher_model_init_kwargs": {"revision": "v2"}}
        built = make(teacher="org/teacher", **settings)
        if trainer == "build_opd":
            assert 0 in built.eos.merged  # that of the tokenizer at v2


def test_partners_are_frozen_and_keep_their_order(loads, tmp_path):
    given = tiny_model(seed=2).train()
    partners = _partners.load_partners(["some/teacher", given], runs.config(tmp_path))
    assert partners[1] is given and len(partners) == 2
    for partner in partners:
        assert not partner.training
        assert not any(parameter.requires_grad for parameter in partner.parameters())


def test_a_model_without_generation_is_refused(tmp_path):
    backbone = tiny_model().model
    with pytest.raises(UnsupportedError, match="`teacher_model` is a Qwen3Model"):
        _partners.load_partners([backbone], runs.config(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_loads_the_teacher_in_the_students_dtype(build, dtype):
    trainer = build(model_init_kwargs={"dtype": dtype})
    assert trainer.model.dtype == getattr(torch, dtype)
    assert trainer.partners[0].dtype == getattr(torch, dtype)
    explicit = build(model_init_kwargs={"dtype": dtype}, teacher_model_init_kwargs={"dtype": "float32"})
    assert explicit.partners[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_distillation_trainer_loads_the_teacher_as_trl_does(build_opd, dtype):
    settings = {"rollout_policy": "student", "model_init_kwargs": {"dtype": dtype}}
    parent = build_opd(parent=True, model_init_kwargs={"dtype": dtype})
    ours = build_opd(**settings)
    assert ours.teacher_model.dtype == parent.teacher_model.dtype == torch.float32
    assert ours.model.dtype == getattr(torch, dtype)
    explicit = build_opd(teacher_model_init_kwargs={"dtype": "bfloat16"}, **settings)
    assert explicit.teacher_model.dtype == torch.bfloat16


@pytest.mark.parametrize("trainer", ["build", "build_opd"])
def test_an_adapter_folder_is_a_teacher(request, trainer, models, tmp_path):
    """The same run as with the adapter merged into its base, up to rounding."""
    adapted = tiny_lora(AutoModelForCausalLM.from_pretrained(models / "teacher"))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    runs_of = {}
    for teacher in ("adapter", "merged"):
        runs_of[teacher] = request.getfixturevalue(trainer)(teacher=str(tmp_path / teacher), max_steps=2)
        torch.manual_seed(0)  # loading an adapter draws numbers
        runs_of[teacher].train()
    losses = {
        name: [entry["loss"] for entry in run.state.log_history if "loss" in entry] for name, run in runs_of.items()
    }
    assert is_peft_model(runs_of["adapter"].partners[0])
    named = runs_of["adapter"].card_fields()["teachers"][0]
    assert named.name == str(tmp_path / "adapter")  # not its base
    runs_of["adapter"].args.teacher_model_init_kwargs = {"revision": "v2"}
    assert runs_of["adapter"].card_fields()["teachers"][0].commit == "v2"
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-4)
    student = runs_of["merged"].model.state_dict()
    for name, tensor in runs_of["adapter"].model.state_dict().items():
        torch.testing.assert_close(tensor, student[name], atol=1e-5, rtol=1e-4)
