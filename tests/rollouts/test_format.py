import dataclasses
import json
import os

import pytest

from tests.rollouts.stores import make_manifest
from trl_blend._files import sha256_of, write_atomically
from trl_blend.errors import ConfigError, StoreError
from trl_blend.rollouts.format import SCHEMA_VERSION, Manifest


COUNTS = {"rows": 3, "num_prompt_tokens": 4, "num_completion_tokens": 5, "num_truncated": 1}


def full_manifest():
    return Manifest(
        kind="scored_rollouts",
        settings={"temperature": 0.7, "prompts": "abc", "eos": [1, 2]},
        complete=True,
        planned_shards=2,
        logps_dtype="float32",
        sampling={"top_p": 0.9},
        scoring={"temperature": 1.0},
        engine={"name": "vllm"},
        student={"name": "s"},
        teacher={"name": "t"},
        source={"digest": "d"},
        shards=[{"file": f"data/part-0000{index}.parquet", **COUNTS} for index in range(2)],
    )


def test_everything_comes_back(tmp_path):
    manifest = full_manifest()
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert os.listdir(tmp_path) == ["manifest.json"]
    defaults = {entry.name for entry in dataclasses.fields(Manifest)} - {"schema_version", "package_version"}
    blank = Manifest(kind="rollouts", settings={}, created_at="")
    # Every field differs from its default here, so none can be lost unnoticed
    assert not [name for name in defaults if getattr(manifest, name) == getattr(blank, name)]
    written = json.loads((tmp_path / "manifest.json").read_text())
    sums = {name.replace("rows", "num_rows"): 2 * count for name, count in COUNTS.items()}
    assert {name: written[name] for name in sums} == sums == {name: getattr(manifest, name) for name in sums}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "green"}, None),  # what a later version adds within the schema is left out
        ({"schema_version": SCHEMA_VERSION + 1, "package_version": "9.9"}, r"schema_version=2, written by .* 9\.9"),
        ({"schema_version": "1"}, "schema_version='1'"),
        ({"schema_version": None}, "no manifest"),
        ({"kind": "tables"}, "kind='tables'"),
        ({"logps_dtype": "float8"}, "logps_dtype='float8'"),
        ({"shards": ..., "teacher": ...}, r"lacks \['shards', 'teacher'\].*--repair"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(tmp_path, change, message):
    values = {name: value for name, value in {**full_manifest().to_dict(), **change}.items() if value is not ...}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    if message is None:
        assert Manifest.load(tmp_path) == full_manifest()
        return
    with pytest.raises(StoreError, match=message) as raised:
        Manifest.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_broken_json_is_named(tmp_path):
    path = tmp_path / "manifest.json"
    for text, message in [
        (json.dumps(full_manifest().to_dict())[:-20], r"manifest.json is broken .*--repair"),
        ("[1]", "schema_version=None"),
    ]:
        path.write_text(text)
        with pytest.raises(StoreError, match=message):
            Manifest.load(tmp_path)
    with pytest.raises(StoreError, match="no manifest.json"):
        Manifest.load(tmp_path / "nowhere")


@pytest.mark.parametrize("fields", [{"kind": "x", "settings": {}}, {"settings": {"model": object()}}])
def test_arguments_are_checked(fields):
    with pytest.raises(ConfigError, match="kind='x'|has to be JSON"):
        Manifest(**{"kind": "rollouts", **fields})


def test_differences_name_every_setting():
    old = make_manifest(settings={"top_p": 0.9, "gone": 1, "eos": [1, 2], "quoted": None})
    new = make_manifest(settings={"top_p": 0.8, "new": "x" * 100, "eos": [1, 3]}, logps_dtype="float32")
    assert old.differences(new) == [
        "eos: [1, 2] -> [1, 3]",
        "gone: 1 -> not set",
        "logps_dtype: 'float16' -> 'float32'",
        f"new: not set -> '{'x' * 76}...",
        "quoted: None -> not set",
        "top_p: 0.9 -> 0.8",
    ]
    assert old.settings_digest != new.settings_digest
    assert make_manifest(scored=True).differences(make_manifest()) == ["kind: 'scored_rollouts' -> 'rollouts'"]


def test_one_number_has_one_spelling(tmp_path):
    # A command line gives 1.0, a Python call 1; a tuple comes back from JSON as a list
    old = make_manifest(settings={"temperature": 1.0, "eos": (1, 2), "greedy": False})
    new = make_manifest(settings={"temperature": 1, "eos": [1, 2], "greedy": False})
    old.save(tmp_path)
    for manifest in (old, Manifest.load(tmp_path)):
        assert manifest.differences(new) == []
        assert manifest.settings_digest == new.settings_digest


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_checksum_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, example
    assert sha256_of(tmp_path / "file") == expected
