"""Reminders of licenses: from the cards of what a model was made from, and from a few known families."""

import re

import pytest

from trl_blend.reports import licences
from trl_blend.reports.licences import Source, find_license, reminders


def card(folder, metadata):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A card\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("license", ["apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "odc-by", "bsd"])
def test_permissive_licenses_need_no_reminder(tmp_path, license):
    folder = card(tmp_path / "teacher", f"license: {license}")
    assert find_license(Source("teacher", folder)) == (license, None)
    assert reminders([Source("teacher", folder)]) == []


@pytest.mark.parametrize(
    ("license", "text"),
    [
        ("llama3.1", "“Llama” at the beginning of its name"),
        ("llama4", "“Built with Llama”"),
        ("llama3", "“Built with Meta Llama 3”"),
        ("llama2", "may not be used to improve other large language models"),
        ("gemma", "distilled from it or trained on its outputs"),
        ("cc-by-nc-4.0", "non-commercial use only."),
        ("cc-by-nc-nd-4.0", "non-commercial use only, no derivatives."),
        ("cc-by-nd-4.0", "no derivatives."),
        ("cc-by-sa-4.0", "shared under the same license"),
        ("agpl-3.0", "shared under the same license"),
        ("lgpl-3.0", "shared under the same license"),
        ("bigscience-openrail-m", "use restrictions have to be passed on"),
        ("bigscience-bloom-rail-1.0", "use restrictions have to be passed on"),
        ("other", "read what it asks for"),
        ("a-new-one", "read what it asks for"),
        ("mit-modern-variant", "read what it asks for"),
    ],
)
def test_other_licenses(tmp_path, license, text):
    (found,) = reminders([Source("teacher", card(tmp_path / "teacher", f"license: {license}"))])
    assert found.startswith(f"The teacher, `teacher` (a local model), has the license `{license}`: ") and text in found
    assert str(tmp_path) not in found


def test_the_name_of_an_own_license(tmp_path):
    folder = card(tmp_path / "base", "license: other\nlicense_name: qwen-research")
    (found,) = reminders([Source("base model", folder)])
    assert "The base model, `base` (a local model), has the license `other` (`qwen-research`)" in found


@pytest.mark.parametrize("metadata", ["tags: [x]", "license: [", "- a", "license:"])
def test_a_card_without_a_license(tmp_path, metadata):
    assert reminders([Source("teacher", card(tmp_path / "teacher", metadata))]) == []


def test_a_list_of_licenses(tmp_path):
    assert len(reminders([Source("dataset", card(tmp_path / "data", "license: [cc-by-nc-4.0]"))])) == 1


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "llama2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("meta-llama/Llama-4-Scout-17B-16E", "llama4"),
        ("google/gemma-2-2b-it", "gemma"),
        ("google/gemma-7b", "gemma"),
        ("google/gemma-3-1b-pt", "gemma"),
        ("google/gemma-4-e2b", None),
        ("google/gemma-30", None),
        ("Qwen/Qwen3-8B", None),
        ("someone/meta-llama-3-8b", None),
    ],
)
def test_known_families(name, license):
    assert find_license(Source("teacher", name)) == (license, None)
    assert len(reminders([Source("teacher", name)])) == (license is not None)


def test_its_own_card_counts_before_what_is_known_of_a_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card(tmp_path / "google" / "gemma-2-2b", "license: apache-2.0")
    assert reminders([Source("teacher", "google/gemma-2-2b")]) == []


def test_the_card_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    commit = "1" * 40
    folder = tmp_path / "models--org--teacher"
    card(folder / "snapshots" / commit, "license: cc-by-nc-4.0")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    found = licences.try_to_load_from_cache
    monkeypatch.setattr(licences, "try_to_load_from_cache", lambda *args, **kw: found(*args, cache_dir=tmp_path, **kw))
    for source in (Source("teacher", "org/teacher"), Source("teacher", "org/teacher", commit)):
        (reminder,) = reminders([source])
        assert "[org/teacher](https://huggingface.co/org/teacher)" in reminder and "`cc-by-nc-4.0`" in reminder
    assert reminders([Source("teacher", "org/teacher", "2" * 40)]) == []
    assert reminders([Source("dataset", "org/teacher")]) == []


def test_data_written_by_models_of_openai():
    both = reminders([Source("dataset", "tatsu-lab/alpaca")])
    assert len(both) == 2 and "`cc-by-nc-4.0`" in both[0]
    (found,) = reminders([Source("dataset", "Open-Orca/OpenOrca")])
    assert "written by models of OpenAI" in found and "compete with OpenAI" in found
    assert "](https://huggingface.co/datasets/Open-Orca/OpenOrca)" in found
    assert reminders([Source("teacher", "Open-Orca/OpenOrca")]) == []


def test_one_reminder_for_a_model_named_twice():
    source = Source("teacher", "google/gemma-2-2b")
    assert len(reminders([source, source])) == 1


def test_every_identifier_here_is_one_of_the_hub():
    """Of https://huggingface.co/docs/hub/repositories-licenses: the patterns match real identifiers."""
    identifiers = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0
    gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown
    other""".split()
    for pattern in licences.TERMS:
        assert any(re.fullmatch(pattern, identifier) for identifier in identifiers), pattern
    for _, license in licences.FAMILIES:
        assert license in identifiers and not re.fullmatch(licences.PERMISSIVE, license)
    permissive = [identifier for identifier in identifiers if re.fullmatch(licences.PERMISSIVE, identifier)]
    forbidden = ("nc", "nd", "sa", "gpl", "rail", "llama", "gemma", "other", "unknown", "sharing", "odbl", "mpl")
    assert len(permissive) > 15
    assert not [license for license in permissive if set(forbidden) & set(re.split(r"[-.\d]+", license))]
