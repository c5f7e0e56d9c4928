import dataclasses
import json
import os

import pytest

from tests.rollouts.stores import make_manifest
from trl_blend._files import sha256_of, write_atomically
from trl_blend.errors import ConfigError, StoreError
from trl_blend.rollouts import format as manifest_module
from trl_blend.rollouts.format import SCHEMA_VERSION, Manifest


def full_manifest():
    return Manifest(
        kind="scored_rollouts",
        settings={"temperature": 0.7, "prompts": "abc", "eos": [1, 2]},
        complete=True,
        planned_shards=2,
        num_rows=3,
        num_prompt_tokens=4,
        num_completion_tokens=5,
        num_truncated=1,
        logps_dtype="float32",
        sampling={"top_p": 0.9},
        scoring={"temperature": 1.0},
        engine={"name": "vllm"},
        student={"name": "s"},
        teacher={"name": "t"},
        source={"digest": "d"},
        shards=[{"file": "data/part-00000.parquet", "rows": 3}],
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


def test_what_a_later_version_adds_within_the_schema_is_left_out():
    values = {**full_manifest().to_dict(), "colour": "green"}
    assert Manifest.from_dict(values) == full_manifest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1, "package_version": "9.9"}, r"schema_version=2, written by .* 9\.9"),
        ({"schema_version": "1"}, "schema_version='1'"),
        ({"schema_version": None}, "no manifest"),
        ({"kind": "tables"}, "kind='tables'"),
        ({"logps_dtype": "float8"}, "logps_dtype='float8'"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(tmp_path, change, message):
    values = {**full_manifest().to_dict(), **change}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match=message) as raised:
        Manifest.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_missing_values_and_broken_json_are_named(tmp_path):
    values = full_manifest().to_dict()
    del values["shards"], values["teacher"]
    with pytest.raises(StoreError, match=r"lacks \['shards', 'teacher'\].*--repair"):
        Manifest.from_dict(values)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(full_manifest().to_dict())[:-20])
    with pytest.raises(StoreError, match=r"manifest.json is broken .*--repair"):
        Manifest.load(tmp_path)
    path.write_text("[1]")
    with pytest.raises(StoreError, match="schema_version=None"):
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

    monkeypatch.setattr(manifest_module.os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    os.symlink("/dev/full", tmp_path / f".file.{os.getpid()}.tmp")
    with pytest.raises(StoreError, match=r"No space left for .*/file .*is kept.*same command"):
        write_atomically(path, b"new" * 10000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_checksum_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, example
    assert sha256_of(tmp_path / "file") == expected
