"""The test-bed: the task against independent arithmetic, the tokenizer, the rewards, the shipped checkpoints."""

import ast
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from testbed.evaluate import CHECKPOINTS, EvalResult, evaluate, load_checkpoint
from testbed.samples import build_teacher_dataset
from testbed.task import (
    MAX_NEW_TOKENS,
    accuracy_reward,
    answer_reward,
    build_prompt_dataset,
    build_sft_dataset,
    completion_text,
    format_and_answer_reward,
    format_reward,
    prompt_text,
    sample_operands,
    split_of,
)
from testbed.tasks import TASKS
from testbed.tokenizer import CHAT_TEMPLATE, build_tokenizer
from trl_blend.consistency.provenance import read_provenance
from trl_blend.models.fingerprint import identify_model


ROLES = ("base", "student", "sft_student", "teacher")
SPLITS = ("train", "validation", "test")
REWARDS = (accuracy_reward, format_reward, format_and_answer_reward, answer_reward)
RIGHT = r"<think>3+6+0=09,2+5+0=07,1+4+0=05</think>\boxed{579}"


def add_by_columns(completion: str) -> tuple[int, int, int]:
    """Read the operands and the sum back from a chain of thought, checking every column; no code of the task."""
    chain, answer = re.fullmatch(r"<think>(.*)</think>\\boxed\{(\d+)\}", completion).groups()
    operand_a = operand_b = total = carry = 0
    for place, column in enumerate(chain.split(",")):
        digit_a, digit_b, carry_in, two_digits = re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", column).groups()
        assert int(carry_in) == carry
        assert int(two_digits) == int(digit_a) + int(digit_b) + int(carry_in)
        carry, digit = divmod(int(two_digits), 10)
        operand_a += int(digit_a) * 10**place
        operand_b += int(digit_b) * 10**place
        total += digit * 10**place
    assert total + carry * 10 ** (place + 1) == int(answer)
    return operand_a, operand_b, int(answer)


def test_reference_completion_of_the_documentation():
    assert prompt_text(123, 456) == "123+456=?"
    assert completion_text(123, 456) == RIGHT
    assert completion_text(5, 97) == r"<think>5+7+0=12,0+9+1=10</think>\boxed{102}"
    assert completion_text(5, 97, "bare") == "<think>5+7+0=12,0+9+1=10</think>102"


def test_reference_completions_are_right_sums():
    rng = random.Random(1)
    pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(3000)]
    for a, b in [*pairs, (0, 0), (999, 999), (0, 999), (9, 1), (100, 0), (7, 500)]:
        assert add_by_columns(completion_text(a, b)) == (a, b, a + b)


def test_splits_share_no_sum_in_either_order():
    seen = {}
    for split in SPLITS:
        for a, b in sample_operands(split, 4000):
            assert split_of(a, b) == split_of(b, a) == split
            assert seen.setdefault(frozenset((a, b)), split) == split
    # Different datasets of one split, for example the SFT and the RL prompts, cannot reach another split either.
    train = {frozenset(pair) for seed in (0, 1) for pair in sample_operands("train", 4000, seed)}
    assert not train & {frozenset(pair) for pair in sample_operands("test", 4000)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_holds_every_last_digit_equally(split):
    pairs = sample_operands(split, 5000)
    for digit_of in (lambda a, b: (a + b) % 10, lambda a, b: a % 10, lambda a, b: (a + b) // 200):
        counts = Counter(digit_of(a, b) for a, b in pairs)
        if digit_of(199, 1) == 1:  # the leading part of a sum is triangular, so only its presence can be asked for
            assert set(counts) == set(range(10))
        else:
            # 5000 draws into 10 equal bins: standard deviation 21, five of them on either side
            assert all(394 <= counts[digit] <= 606 for digit in range(10)), counts


def test_split_sizes():
    rng = random.Random(2)
    counts = Counter(split_of(rng.randrange(1000), rng.randrange(1000)) for _ in range(20_000))
    assert abs(counts["test"] / 20_000 - 0.1) < 0.015
    assert abs(counts["validation"] / 20_000 - 0.1) < 0.015


def test_sampling_is_seeded_distinct_and_checked():
    assert sample_operands("test", 50) == sample_operands("test", 100)[:50]
    assert sample_operands("test", 50) != sample_operands("test", 50, seed=1)
    assert len(set(sample_operands("validation", 2000))) == 2000
    with pytest.raises(ValueError, match="`split`"):
        sample_operands("dev", 1)
    with pytest.raises(ValueError, match="`n`"):
        sample_operands("test", 100_000)


def test_datasets():
    prompts = build_prompt_dataset("test", 20)
    sft = build_sft_dataset("train", 400, boxed_fraction=0.25)
    for row in prompts:
        (message,) = row["prompt"]
        a, b = re.fullmatch(r"(\d+)\+(\d+)=\?", message["content"]).groups()
        assert message["role"] == "user"
        assert (row["answer"], row["solution"]) == (str(int(a) + int(b)), f"\\boxed{{{int(a) + int(b)}}}")
    completions = list(sft["completion"])
    answers = [sum(map(int, p[-1]["content"].removesuffix("=?").split("+"))) for p in sft["prompt"]]
    assert answer_reward(completions, answers) == [1.0] * 400
    assert 60 <= sum(format_reward(completions)) <= 140
    assert format_reward(list(build_sft_dataset("train", 50)["completion"])) == [1.0] * 50


@pytest.mark.parametrize(
    ("text", "accuracy", "well_formed", "answer"),
    [
        (RIGHT, 1, 1, 1),
        (RIGHT.replace("{579}", "{578}"), 0, 1, 0),  # wrong answer, right format
        (RIGHT.replace(r"\boxed{579}", "579"), 0, 0, 1),  # no box
        (RIGHT.replace(r"\boxed{579}", "578"), 0, 0, 0),
        (RIGHT + "!", 1, 0, 1),  # trailing garbage
        (RIGHT + "\n", 1, 0, 1),
        (RIGHT + "12", 1, 0, 0),
        (" " + RIGHT, 1, 0, 1),
        (RIGHT.replace("</think>", "</think>\n"), 1, 0, 1),
        (RIGHT + r"\boxed{579}", 1, 0, 1),  # two boxes
        (r"<think></think>\boxed{579}\boxed{1}", 0, 0, 0),  # the last box counts
        (r"<think></think>\boxed{1}\boxed{579}", 1, 0, 1),
        (r"\boxed{579}", 1, 0, 1),
        (r"<think></think>\boxed{579}", 1, 1, 1),
        (r"<think><think></think>\boxed{579}", 1, 0, 1),
        ("<think>3+6\n</think>\\boxed{579}", 1, 1, 1),  # the thoughts may hold anything
        (r"<think>\boxed{579}", 1, 0, 1),
        (r"<think>579</think>", 0, 0, 0),  # the answer stands only inside the thoughts
        (r"<think></think>\boxed{579", 0, 0, 1),
        (r"<think></think>\boxed{5 79}", 0, 0, 0),
        (r"<think></think>\boxed{}", 0, 0, 0),
        (r"<think></think>\boxed{0579}", 1, 1, 1),
        (r"<think></think>\boxed{-579}", 0, 0, 1),
        (r"<think></think>\boxed{" + "9" * 5000 + "}", 0, 1, 0),
        ("the sum is 579", 0, 0, 1),
        ("", 0, 0, 0),
    ],
)
def test_rewards(text, accuracy, well_formed, answer):
    expected = [float(accuracy), float(well_formed), float(accuracy and well_formed), float(answer)]
    for completion in (text, [{"role": "assistant", "content": text}]):
        got = [reward(completions=[completion], answer=["579"], prompts=[None])[0] for reward in REWARDS]
        assert got == expected
    assert accuracy_reward([text], [579]) == [float(accuracy)]


def test_rewards_score_each_completion_against_its_own_answer():
    other = RIGHT.replace("579", "80")
    assert accuracy_reward([RIGHT, other, RIGHT], ["579", "80", "80"]) == [1.0, 1.0, 0.0]
    assert answer_reward([RIGHT, other, RIGHT], ["579", "80", "80"]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("answer", [579, 579.0, "579", "0579", " 579 ", "so it is 500+79.\n#### 579", "#### $579"])
def test_reference_answers_are_numbers_or_end_in_one(answer):
    for reward in (accuracy_reward, format_and_answer_reward, answer_reward):
        assert reward([RIGHT, RIGHT], [answer, "#### 1,579"]) == [1.0, 0.0]


@pytest.mark.parametrize("answer", [None, "", "unknown", "-579", "5.79", 579.5, "#### 5,79"])
def test_a_reference_answer_that_is_no_number_gives_no_reward(answer):
    for reward in (accuracy_reward, format_and_answer_reward, answer_reward):
        assert reward([RIGHT, RIGHT], [answer, 579]) == [None, 1.0]


def test_tokenizer_round_trip():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 264
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in (RIGHT, "123+456=?", " a  b .\n\t", "é✓", "<think> x </think>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer("<think>12</think>")["input_ids"]) == 4
    assert len(tokenizer("é")["input_ids"]) == 2


def test_only_the_special_tokens_are_dropped_by_decoding():
    tokenizer = build_tokenizer()
    ids = tokenizer(RIGHT + "<|im_end|><|pad|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == RIGHT
    assert len(tokenizer(completion_text(999, 999) + "<|im_end|>")["input_ids"]) <= MAX_NEW_TOKENS


def test_chat_template():
    tokenizer = build_tokenizer()
    prompt = [{"role": "user", "content": "1+2=?"}]
    conversation = [*prompt, {"role": "assistant", "content": "<think>1+2+0=03</think>3"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == "<|user|>1+2=?<|im_end|><|assistant|><think>1+2+0=03</think>3<|im_end|>"
    assert text.startswith(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "<think>1+2+0=03</think>3<|im_end|>"


def test_tokenizer_pair_that_differs_in_its_end_token_only():
    chat, base = build_tokenizer(), build_tokenizer("<|endoftext|>")
    assert (chat.eos_token, base.eos_token) == ("<|im_end|>", "<|endoftext|>")
    assert chat.get_vocab() == base.get_vocab()
    with pytest.raises(ValueError, match="`eos_token`"):
        build_tokenizer("<|pad|>")


def test_evaluation_counts_what_a_generate_function_returns():
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"  # evaluation must pad on the left all the same
    dataset = build_prompt_dataset("test", 10)
    calls = []
    padded = 0

    def generate(input_ids, attention_mask, **kwargs):
        """Answer by arithmetic: the first prompt of a batch wrong, the second without a box, all others right."""
        nonlocal padded
        padded += int((attention_mask == 0).sum())
        assert attention_mask[:, -1].all()
        assert torch.equal(attention_mask, (input_ids != tokenizer.pad_token_id).long())
        assert not kwargs["do_sample"] and kwargs["max_new_tokens"] == MAX_NEW_TOKENS
        texts = []
        for row, ids in enumerate(input_ids):
            a, b = re.search(r"(\d+)\+(\d+)=\?", tokenizer.decode(ids, skip_special_tokens=True)).groups()
            texts.append(completion_text(int(a), int(b) + (row == 0), "bare" if row == 1 else "boxed") + "<|im_end|>")
        calls.append(len(texts))
        return torch.cat([input_ids, tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]], dim=1)

    model = Echo(None)
    model.generate = generate
    result = evaluate(model, tokenizer, dataset, batch_size=4)
    assert calls == [4, 4, 2] and padded > 0
    assert (result.answer_rate, result.format_rate, result.boxed_rate, result.reward_rate) == (0.7, 0.7, 0.4, 0.4)
    assert result.answer_se == pytest.approx((0.7 * 0.3 / 10) ** 0.5)
    assert result.n == len(result.completions) == 10


class Echo(torch.nn.Module):
    """Answers every prompt with one fixed text and records how it was called."""

    device = torch.device("cpu")

    def __init__(self, text):
        super().__init__()
        self.text, self.seen = text, []

    def generate(self, input_ids, attention_mask, **kwargs):
        self.seen.append((self.training, torch.is_grad_enabled(), kwargs))
        ids = build_tokenizer()([self.text] * len(input_ids), return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], dim=1)


def test_evaluation_of_a_model_follows_a_patched_generate_and_restores_training_mode():
    tokenizer, dataset, model = build_tokenizer(), build_prompt_dataset("test", 3), Echo("no").train()
    assert evaluate(model, tokenizer, dataset, do_sample=True).format_rate == 0.0
    assert model.training
    assert model.seen[0][:2] == (False, False)
    expected = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": MAX_NEW_TOKENS}
    assert model.seen[0][2] == expected
    model.eval()
    model.generate = Echo(RIGHT).generate
    assert evaluate(model, tokenizer, dataset).format_rate == 1.0
    assert not model.training


def test_checkpoints_are_small_bfloat16_and_complete():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000_000
    names = {name for task in TASKS.values() for name in map(task.checkpoints.get, ROLES, ROLES)}
    assert {path.name for path in CHECKPOINTS.iterdir()} == names
    for folder in CHECKPOINTS.iterdir():
        tokenizer = build_tokenizer()
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["eos_token_id"] == tokenizer.eos_token_id
        assert generation["pad_token_id"] == tokenizer.pad_token_id
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        header_size = int.from_bytes((folder / "model.safetensors").open("rb").read(8), "little")
        with (folder / "model.safetensors").open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(header_size))
        assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"BF16"}


def evaluate_shipped(name: str) -> EvalResult:
    model, tokenizer = load_checkpoint(name)
    assert model.dtype == torch.float32
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    return evaluate(model, tokenizer, build_prompt_dataset("test", 64), batch_size=64)


def test_student_knows_the_format_and_half_of_the_sums():
    result = evaluate_shipped("student")
    assert 0.2 < result.boxed_rate < 0.7, result
    assert result.format_rate > 0.9, result


def test_sft_student_knows_the_format_and_a_third_of_the_sums():
    result = evaluate_shipped("sft_student")
    assert 0.2 < result.boxed_rate < 0.6, result
    assert result.format_rate > 0.9, result


def test_sft_student_names_the_teacher_whose_samples_it_was_trained_on():
    provenance, teacher = (
        read_provenance(str(CHECKPOINTS / "sft_student")),
        identify_model(str(CHECKPOINTS / "teacher")),
    )
    assert provenance.how == "recorded"
    assert provenance.teacher.weights.sha256 == teacher.weights.sha256
    assert provenance.teacher.name == "examples/testbed/checkpoints/teacher"


def test_teacher_samples_are_what_the_teacher_says():
    model, tokenizer = load_checkpoint("teacher")
    state = torch.get_rng_state()
    data = build_teacher_dataset(model, tokenizer, 40, seed=3, batch_size=16)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)  # the samples follow from their own seed
    assert data.to_list() == build_teacher_dataset(model, tokenizer, 40, seed=3, batch_size=16).to_list()
    asked = {row["content"] for (row,) in build_prompt_dataset("train", 40, 3)["prompt"]}
    assert 35 < len(data) <= 40 and {row["content"] for (row,) in data["prompt"]} <= asked
    texts = [completion[0]["content"] for completion in data["completion"]]
    answers = [str(sum(map(int, row["content"].rstrip("=?").split("+")))) for (row,) in data["prompt"]]
    # Right and wrong samples alike, most of them right
    assert 0.7 < sum(accuracy_reward(texts, answers)) / len(texts) <= 1.0


def test_teacher_samples_without_an_end_are_left_out():
    tokenizer = build_tokenizer()
    for text, kept in (("1" * MAX_NEW_TOKENS, 0), ("1" * (MAX_NEW_TOKENS - 1), 5)):
        assert len(build_teacher_dataset(Echo(text), tokenizer, 5)) == kept


def test_base_adds_better_than_the_student_but_without_the_format():
    result = evaluate_shipped("base")
    assert 0.4 < result.answer_rate < 0.95, result
    assert result.format_rate < 0.2, result


def test_teacher_adds():
    result = evaluate_shipped("teacher")
    assert result.boxed_rate > 0.95, result


def test_train_module_names_the_shipped_checkpoints():
    tree = ast.parse((CHECKPOINTS.parent / "train.py").read_text())
    recipes = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "RECIPES"
    )
    assert {key.value for key in recipes.keys} == {path.name for path in Path(CHECKPOINTS).iterdir()}
