import os
from pathlib import Path

import pytest

from trl_blend.reports.names import ShownName, shown_name, without_paths


COMMIT = "1234567890abcdef1234567890abcdef12345678"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2", "my-org/a_b.c"])
def test_a_repository_is_itself(name):
    assert shown_name(name) == ShownName(name, name, None)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/models/my-sft", "my-sft"),
        ("/home/me/models/my-sft/", "my-sft"),
        ("runs/2024/my-sft", "my-sft"),
        ("../my-sft", "my-sft"),
        ("~/my-sft", "my-sft"),
        (r"C:\models\my-sft", "my-sft"),
        ("prompts.jsonl.git", "prompts.jsonl.git"),
        (Path("/data/x"), "x"),
    ],
)
def test_a_path_is_its_last_part(name, shown):
    assert shown_name(name) == ShownName(shown, None, None)


def test_what_exists_here_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/model")
    assert shown_name("org/model") == ShownName("model", None, None)
    assert shown_name("org/other").hub_id == "org/other"
    assert shown_name(".") == ShownName(tmp_path.name, None, None)


def test_the_cache_of_the_hub_gives_repository_and_commit():
    path = f"/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/{COMMIT}"
    for name in (path, f"{path}/"):
        assert shown_name(name) == ShownName("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", COMMIT)
    data = f"/cache/datasets--org--my-data/snapshots/{COMMIT}"
    assert shown_name(data).hub_id == "org/my-data"


@pytest.mark.parametrize("name", [None, ""])
def test_no_name(name):
    assert shown_name(name) == ShownName("", None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the teacher, /tmp/a/teacher@12ab (weights 1), and", "the teacher, teacher@12ab (weights 1), and"),
        ("see '/home/me/x/y.json'.", "see 'y.json'."),
        ("differs from /a/b.", "differs from b."),
        ("`/a/b/` and (/c/d)", "`b` and (d)"),
        (r"C:\users\me\model is it", "model is it"),
        ("~/models/sft", "sft"),
        ("path=/a/b/c", "path=c"),
    ],
)
def test_absolute_paths_are_hidden(text, expected):
    assert without_paths(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B) at commit `12`",
        "rewards/accuracy/mean",
        "loss / tokens and a/b",
        "1/2, 3 / 4",
        "and/or",
        "http://localhost:8080/a/b",
    ],
)
def test_what_is_no_path_stays(text):
    assert without_paths(text) == text


def test_names_that_nothing_marks_as_paths_are_hidden():
    names = ["runs/a/teacher", "runs/a/teacher/my best", "/a b/c d/e", None, ".", "Qwen/Qwen3-8B"]
    text = "runs/a/teacher/my best, runs/a/teacher, /a b/c d/e. Qwen/Qwen3-8B v1.2"
    assert without_paths(text, names) == "my best, teacher, e. Qwen/Qwen3-8B v1.2"
