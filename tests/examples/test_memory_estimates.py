"""The memory that a settings file says it takes follows from its own numbers."""

import re
from math import prod

import pytest
import yaml

from tests.docs.markdown import ROOT


# Bytes of keys and values of a token, 8 heads of width 128: under autocast to bfloat16 those of float32 weights are
# float32. 28 layers are those of Qwen3-0.6B and 1.7B, 36 those of 4B and 8B
STUDENT, TEACHERS = 28 * 2 * 8 * 128 * 4, (28 * 2 * 8 * 128 * 2, 36 * 2 * 8 * 128 * 2)
CONFIGS = ROOT / "examples" / "configs"
ESTIMATED = [path for path in sorted(CONFIGS.glob("*.yaml")) if "rollouts x" in path.read_text()]


@pytest.mark.parametrize("path", ESTIMATED, ids=lambda path: path.stem)
def test_the_estimate_is_that_of_the_settings(path):
    text = path.read_text(encoding="utf-8")
    settings, words = yaml.safe_load(text), re.sub(r"\n# ?", " ", text).replace(",", "")
    caches = re.search(r"(\d+) rollouts x (\d+) tokens x \((\d+) \+ (\d+)\) bytes = (\d+) GB", words)
    rollouts, tokens, *rates, gigabytes = map(int, caches.groups())
    assert rollouts == prod(settings[name] for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert tokens >= settings["max_completion_length"] + 512
    assert rates[0] == STUDENT and rates[1] in TEACHERS
    assert gigabytes == round(rollouts * tokens * sum(rates) / 1e9)
    if together := re.search(r"Together (\d+) GB", words):
        parts = re.findall(r"([\d.]+) GB", words[words.index("Memory estimated:") : together.start()])
        assert len(parts) == 3 and abs(int(together[1]) - sum(map(float, parts))) <= 0.5 and int(together[1]) <= 60


def test_every_recipe_that_trains_on_a_gpu_has_one():
    assert len(ESTIMATED) == 4


def test_the_estimate_of_serving_follows_from_its_numbers():
    text = (CONFIGS / "serve_mixture_qwen3.yaml").read_text(encoding="utf-8")
    words = re.sub(r"\n# ?", " ", text).replace(",", "")
    caches = re.search(r"(\d+) sequences x (\d+) tokens x \((\d+) \+ (\d+)\) bytes = (\d+) GB", words)
    sequences, tokens, *rates, gigabytes = map(int, caches.groups())
    assert tuple(rates) == TEACHERS and gigabytes == round(sequences * tokens * sum(rates) / 1e9)
    models = re.findall(r"([\d.]+) GB \w+ \(([\d.]+)B bfloat16\)", words)
    assert len(models) == 2 and all(float(size) == round(2 * float(count), 1) for size, count in models)
    together = gigabytes + sum(float(size) for size, _ in models)
    assert int(re.search(r"Together (\d+) GB", words)[1]) == int(together)
