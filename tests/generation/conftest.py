import pytest

from tests.generation.teacher_forced import left_padded_prompts
from tests.tiny import PAD_ID, tiny_model


@pytest.fixture
def student():
    return tiny_model("qwen3", seed=1)


@pytest.fixture
def teacher():
    return tiny_model("llama", seed=2)


@pytest.fixture
def prompts():
    return left_padded_prompts(PAD_ID)
