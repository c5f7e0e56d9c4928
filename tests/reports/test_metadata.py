"""The metadata of a card: what TRL writes is completed, what its publisher has set is kept."""

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from tests.reports.test_cards import RESULTS
from trl_blend.reports import metadata as card_metadata


def test_model_index_needs_a_data_set_on_the_hub_and_a_policy():
    named = {**RESULTS, "dataset": "openai/gsm8k", "policy": "student", "split": "test"}
    for incomplete in (None, RESULTS, {**named, "dataset": "/data/gsm8k"}, {**named, "policy": "another"}):
        assert card_metadata.model_index(incomplete) == []
    accuracy, form = card_metadata.model_index(named)
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.75)
    assert (form.metric_type, form.metric_value, form.dataset_split) == ("format", 0.5, "test")
    assert accuracy.dataset_type == accuracy.dataset_name == "openai/gsm8k"


@pytest.fixture
def path(tmp_path):
    """A card as TRL writes it."""
    data = ModelCardData(
        base_model="/home/me/base", library_name="transformers", licence="license", model_name="m", tags=["z", "a"]
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Title\n\n\n\ntext\n\n").save(tmp_path / "README.md")
    return tmp_path / "README.md"


def complete(path, **changes):
    settings = {"base_model": "org/base", "is_adapter": False, "library": "transformers", "kept": {}, **changes}
    card_metadata.complete_metadata(path, **settings)
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1]), text.split("---\n")[2]


def test_metadata(path):
    metadata, text = complete(path)
    assert metadata == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "model_name": "m",
        "pipeline_tag": "text-generation",
        "tags": ["a", "z"],
    }
    assert text == "\n# Title\n\ntext\n"


def test_metadata_of_an_adapter_and_of_a_local_base(path):
    metadata, _ = complete(path, is_adapter=True, library="peft")
    assert metadata["base_model_relation"] == "adapter" and metadata["library_name"] == "peft"
    metadata, _ = complete(path, base_model=None)
    assert "base_model" not in metadata and "base_model_relation" not in metadata


def test_what_the_publisher_has_set_is_kept(path):
    assert card_metadata.kept_metadata(path) == {}
    own = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["en"]}
    card = ModelCard.load(path)
    for name, value in {**own, "thumbnail": "x"}.items():
        card.data[name] = value
    card.save(path)
    assert card_metadata.kept_metadata(path) == own
    metadata, _ = complete(path, kept=own)
    assert {name: metadata[name] for name in own} == own


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "no metadata", "---\n- a\n---\n", ""])
def test_nothing_is_kept_of_a_card_without_metadata(path, text):
    path.write_text(text)
    assert card_metadata.kept_metadata(path) == {}


def test_nothing_is_kept_where_there_is_no_card(tmp_path):
    assert card_metadata.kept_metadata(tmp_path / "README.md") == {}


def test_metadata_with_results(path):
    named = {**RESULTS, "dataset": "openai/gsm8k", "policy": "student"}
    metadata, _ = complete(path, eval_results=card_metadata.model_index(named))
    (model,) = metadata["model-index"]
    assert model["name"] == "m" and len(model["results"][0]["metrics"]) == 2


# The license of the base


def base_card(folder, text):
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{text}\n---\n# Base\n")
    return folder


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("license: apache-2.0\nlanguage: en", {"license": "apache-2.0"}),
        ("license: other\nlicense_name: mine", {"license": "other", "license_name": "mine"}),
        ("license: other\nlicense_link: LICENSE", {"license": "other"}),  # a file that this repository lacks
        ("license: other\nlicense_link: https://a.b/c", {"license": "other", "license_link": "https://a.b/c"}),
        ("license: [mit, gpl]", {}),
        ("tags: [a]", {}),
        ("license: [", {}),
    ],
)
def test_the_license_of_a_base_in_a_folder(tmp_path, text, license):
    assert card_metadata.base_license(str(base_card(tmp_path / "base", text))) == license


def test_the_license_of_a_base_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """Nothing is fetched for it: what is not here has none."""
    commit = "1" * 40
    folder = tmp_path / "models--org--base"
    base_card(folder / "snapshots" / commit, "license: gemma")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for arguments in (("org/base",), ("org/base", commit), (str(folder / "snapshots" / commit),)):
        assert card_metadata.base_license(*arguments) == {"license": "gemma"}
    assert card_metadata.base_license("org/base", "2" * 40) == card_metadata.base_license("org/other") == {}


def test_a_base_without_a_name_has_no_license(tmp_path, monkeypatch):
    monkeypatch.chdir(base_card(tmp_path / "here", "license: mit"))
    assert card_metadata.base_license("") == {}


def test_the_license_of_a_model_from_another_base_is_not_kept(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nbase_model: me/one\nlicense: mit\nlanguage: en\n---\n")
    assert card_metadata.kept_metadata(card, "me/one") == {"license": "mit", "language": "en"}
    assert card_metadata.kept_metadata(card, "me/two") == {"language": "en"}
