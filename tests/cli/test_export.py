"""`trl-blend export`: the same files as the Python call makes, pushed on request; errors name the options."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hub.server import hub_endpoint  # noqa: F401
from tests.rollouts.collecting import save_model
from trl_blend import cli, export_mixed_policy
from trl_blend.export.spec import MixingSpec, ModelSource


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, seed=seed) for seed, name in enumerate(("student", "first", "second"))}


def command(models, output, *teachers):
    names = ["--teacher_model_name_or_path", *(models.get(name, name) for name in teachers)] if teachers else []
    return ["export", "--model_name_or_path", models["student"], *names, "--output_dir", str(output)]


def files(folder):
    """Contents of a folder, without the times and random names that files may hold."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "teachers", "weight", "settings"),
    [
        (["--teacher_weight", "0.3"], ["first"], 0.3, {}),
        (["--teacher_weight", "0.3", "--mixing_space=probs"], ["first"], 0.3, {"mixing_space": "probs"}),
        (["--teacher_weight", "0.3", "0.2", "--copy_reference"], ["first", "second"], [0.3, 0.2], {}),
        (
            ["--teacher_weight", "1", "-0.5", "--mixing_space", "arithmetic"],
            ["first", "second"],
            [1.0, -0.5],
            {"mixing_space": "arithmetic"},
        ),
    ],
)
def test_it_writes_what_the_python_call_writes(models, tmp_path, capsys, options, teachers, weight, settings):
    assert cli.main([*command(models, tmp_path / "cli" / "mixed", *teachers), *options]) == 0
    assert capsys.readouterr().out == f"Mixed policy written to {tmp_path / 'cli' / 'mixed'}.\n"
    references = [models[name] for name in teachers]
    reference = references if len(references) > 1 else references[0]
    export_mixed_policy(models["student"], reference, weight, tmp_path / "python" / "mixed", **settings)
    assert files(tmp_path / "cli" / "mixed") == files(tmp_path / "python" / "mixed")


def test_lists_zeros_and_switches_of_a_configuration_file(models, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("trl_blend.export.mixed_policy.export_mixed_policy", lambda **settings: calls.append(settings))
    config = tmp_path / "export.yaml"
    lines = ["model_name_or_path: a", "output_dir: out", "copy_reference: false"]
    for teachers, weights in (("[b, c]", "[0.3, 0]"), ("b", "0.0")):
        given = [*lines, f"teacher_model_name_or_path: {teachers}", f"teacher_weight: {weights}"]
        config.write_text("\n".join(given))
        assert cli.main(["export", "--config", str(config)]) == 0
    assert [(one["student"], one["reference"], one["teacher_weight"], one["copy_reference"]) for one in calls] == [
        ("a", ["b", "c"], [0.3, 0.0], False),
        ("a", ["b"], [0.0], False),
    ]


def test_a_training_checkpoint_says_what_it_is_mixed_with(models, tmp_path):
    checkpoint = shutil.copytree(models["student"], tmp_path / "checkpoint-20")
    references = tuple(ModelSource(path=models[name]) for name in ("first", "second"))
    MixingSpec((0.3, 0.2), references, "probs", "f" * 64, step=20).write(checkpoint)
    assert cli.main(["export", "--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "as")]) == 0
    given = [[models["first"], models["second"]], [0.3, 0.2]]
    export_mixed_policy(models["student"], *given, tmp_path / "python", mixing_space="probs")
    found, expected = (MixingSpec.read(tmp_path / name) for name in ("as", "python"))
    assert found == replace(expected, step=20)
    options = ["--teacher_weight", "0.1", "--mixing_space", "logits"]
    other = command({**models, "student": str(checkpoint)}, tmp_path / "other", "second")
    assert cli.main([*other, *options]) == 0
    found = MixingSpec.read(tmp_path / "other")
    assert (found.weights, found.space) == ((0.1,), "logits") and found.references[0].files == expected.references[
        1
    ].files


@pytest.mark.parametrize(
    ("teachers", "options", "message"),
    [
        (["first"], [], "`--teacher_weight` is not given, and there is no mixing.json"),
        (["first"], ["--teacher_weight", "2"], "`--teacher_weight[0]` is 2.0."),
        (["first", "second"], ["--teacher_weight", "0.3"], "has 1 value(s) for 2 reference(s)"),
        (["nowhere/x"], ["--teacher_weight", "0.3"], "'nowhere/x' is neither a folder with a model"),
        (["first"], ["--teacher_weight", "0.3", "--mixing_space", "sums"], "argument --mixing_space: invalid choice"),
        (["first"], ["--teacher_weight", "0.3", "--teacher", "x"], "unknown option `--teacher`"),
    ],
)
def test_errors_name_the_options(models, tmp_path, capsys, teachers, options, message):
    assert cli.main([*command(models, tmp_path / "out", *teachers), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_it_is_pushed(hub_endpoint, models, tmp_path, capsys):  # noqa: F811
    push = ["--teacher_weight", "0.3", "--push_to_hub", "me/mixed", "--private"]
    assert cli.main([*command(models, tmp_path / "out", "first"), *push]) == 0
    assert "Pushed: " in capsys.readouterr().out
    repository = hub_endpoint.model("me/mixed")
    assert repository.private
    assert set(repository.files()) - {".gitattributes"} == set(files(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained("me/mixed", trust_remote_code=True)
    own = AutoModelForCausalLM.from_pretrained(models["student"])
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), own.parameters(), strict=True))


def test_a_refused_push_says_what_to_do_and_where_the_files_are(hub_endpoint, models, tmp_path, capsys):  # noqa: F811
    push = ["--teacher_weight", "0.3", "--push_to_hub", "other/mixed"]
    assert cli.main([*command(models, tmp_path / "out", "first"), *push]) == 2
    error = capsys.readouterr().err
    folder = str(tmp_path / "out")
    again = f"The mixed policy is in {folder!r}: `hf upload other/mixed {folder}` sends it."
    assert len(error.strip().splitlines()) == 1 and "403 Forbidden" in error and again in error
