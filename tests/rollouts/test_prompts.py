"""Prompts as token ids: what a row may hold, and what the tokenizer adds."""

import json
import logging

import pytest
from datasets import Dataset, Image
from tokenizers.processors import TemplateProcessing

from tests.rollouts.collecting import save_prompts
from tests.tiny import EOS_ID, tiny_tokenizer
from trl_blend.errors import ConfigError
from trl_blend.rollouts.prompts import (
    PromptTokens,
    check_prompt_lengths,
    check_prompts,
    load_prompts,
    shard_bounds,
)


USER = {"role": "user", "content": "1+1"}


@pytest.fixture
def prompts(tmp_path):
    return save_prompts(tmp_path / "prompts.jsonl", count=11)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_rows_that_are_read_as_tensors(form):
    data = Dataset.from_dict({"prompt": [[USER], [USER]], "row_weight": [1.0, 2.0]})
    loaded = load_prompts(data.with_format(form))
    assert loaded.to_list() == data.to_list() and loaded[0] == data[0]


def texts_of(rows, tokenizer=None, **settings):
    """What the rows are as text, after one scan of them."""
    tokenizer = tokenizer or tiny_tokenizer()
    source = PromptTokens(Dataset.from_list(rows), tokenizer, **settings)
    source.scan(shard_bounds(len(source), 2))
    return [tokenizer.decode(ids) for ids in source.ids(0, len(source))]


def around(tokenizer, template):
    """The tokenizer, with special tokens around a text as `template` says."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in set(template.split()) - {"$A"}]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def messages_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("trl_blend")]


# -------------------- what a tokenizer adds


@pytest.mark.parametrize("template", ["$A <eos>", "<unk> $A <eos>", "<system> $A <user> <eos>"])
def test_what_the_tokenizer_puts_behind_a_text_is_left_out(caplog, template):
    tokenizer = around(tiny_tokenizer(chat_template=None), template)
    with caplog.at_level(logging.WARNING):
        texts = texts_of([{"prompt": "1+1"}, {"prompt": "2"}], tokenizer)
    in_front = template.split("$A")[0].strip()
    assert texts == [f"{in_front}1+1", f"{in_front}2"]
    (message,) = [message for message in messages_of(caplog) if "behind a text" in message]
    assert message.startswith("Row 0 and 1 more of the prompts: the tokenizer puts") and "<eos>" in message


def test_a_text_that_begins_with_the_first_token_has_it_once(caplog):
    tokenizer = around(tiny_tokenizer(bos_token="<system>"), "<system> $A")
    rows = [{"prompt": "<system>1"}, {"prompt": "1"}, {"prompt": "<system><system>1"}]
    assert texts_of(rows, tokenizer) == ["<system>1", "<system>1", "<system><system>1"]
    assert [message[:40] for message in messages_of(caplog) if "there once" in message] == [
        "Row 0 and 1 more of the prompts: the tex"
    ]
    # The template prints it, and nothing is put in front of it
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert texts_of([{"prompt": [USER]}], tokenizer) == ["<system>1+1"]


def test_a_prompt_that_ends_with_an_end_of_sequence_token_is_said(caplog):
    assert texts_of([{"prompt": "a"}, {"prompt": "b<eos>"}]) == ["a", "b<eos>"]
    assert any(message.startswith("Row 1 of the prompts: it ends with an end-of") for message in messages_of(caplog))
    caplog.clear()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}<user>"
    texts_of([{"prompt": [USER]}], tokenizer)
    assert messages_of(caplog) == []
    texts_of([{"prompt": [USER]}], tokenizer, eos_token_ids=[tokenizer.convert_tokens_to_ids("<user>"), EOS_ID])
    assert "end-of-sequence" in messages_of(caplog)[0]


def test_text_for_a_model_with_a_chat_template_is_said(caplog):
    texts_of([{"prompt": "a"}])
    assert "the tokenizer has a chat template. Write messages" in messages_of(caplog)[0]
    caplog.clear()
    texts_of([{"prompt": "a<user>b<assistant>"}])  # rendered already
    plain = tiny_tokenizer()
    plain.chat_template = None
    texts_of([{"prompt": "a"}], plain)
    assert messages_of(caplog) == []


# -------------------- the chat template


TOOLS_TEMPLATE = (
    "{%- for tool in tools or [] %}{{ '<system>' + tool.function.name }}"
    "{{ tool.function.keys() | sort | join }}{%- endfor %}"
    "{%- for m in messages %}{{ '<' + m.role + '>' + m.content + (m.keys() | list | length | string) }}{%- endfor %}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '()' }}{%- endif %}"
)


@pytest.mark.parametrize("as_json", [False, True])
def test_columns_of_the_conversational_format(as_json):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    write = json.dumps if as_json else lambda value: value
    tool = {"type": "function", "function": {"name": "add"}}
    described = {"type": "function", "function": {"name": "mul", "description": "x"}}
    rows = [
        {"prompt": [USER], "tools": write([tool]), "chat_template_kwargs": write({"enable_thinking": False})},
        {"prompt": [USER | {"name": "a"}], "tools": write([described, tool]), "chat_template_kwargs": None},
        {"prompt": [USER], "tools": None, "chat_template_kwargs": write({})},
    ]
    # Neither the description nor the name that other rows have
    first, second, third = (
        "<system>addname<user>1+12()",
        "<system>muldescriptionname<system>addname<user>1+13",
        "<user>1+12",
    )
    assert texts_of(rows, tokenizer) == [first, second, third]
    given = {"enable_thinking": False, "tools": [tool]}
    assert texts_of(rows, tokenizer, template_kwargs=given) == [first, second + "()", "<system>addname<user>1+12()"]


@pytest.mark.parametrize(("column", "value"), [("tools", "add"), ("tools", {"a": 1}), ("chat_template_kwargs", "[1]")])
def test_columns_that_are_something_else(column, value):
    with pytest.raises(ConfigError, match=f"Row 0 of the prompts: column `{column}` is .*, not a .*drop the column"):
        texts_of([{"prompt": [USER], column: value}])


def test_tools_of_a_text_are_said(caplog):
    texts_of([{"prompt": "a", "tools": [{"name": "add"}]}, {"prompt": "b", "tools": None}])
    assert any(message.startswith("Row 0 of the prompts: tools and chat") for message in messages_of(caplog))


def test_messages_go_through_the_chat_template():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "1+1"}]
    rows = [{"prompt": messages}, {"prompt": [*messages, {"role": "assistant", "content": "so"}]}]
    ids = PromptTokens(Dataset.from_list(rows), tokenizer).ids(0, 2)
    assert tokenizer.decode(ids[0]) == "<user>1+1<assistant>"
    assert tokenizer.decode(ids[1]) == "<user>1+1<assistant>so"  # to be continued, so without its end


PARTS_TEMPLATE = (
    "{% for message in messages %}<user>{% for part in message.content %}{% if part is mapping %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [None, PARTS_TEMPLATE])
def test_a_message_is_read_as_text_and_as_parts(template):
    """A template leaves out, or prints, the form that it was not written for."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    parts = [{"type": "text", "text": "1+1"}]
    as_text, as_parts = ([{"prompt": [{"role": "user", "content": content}]}] for content in ("1+1", parts))
    assert texts_of(as_text, tokenizer) == texts_of(as_parts, tokenizer)
    assert "<user>1+1" in texts_of(as_parts, tokenizer)[0] and "type" not in texts_of(as_parts, tokenizer)[0]


def test_a_prompt_that_holds_its_answer_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        texts_of([{"prompt": [USER]}, {"prompt": [USER, {"role": "assistant", "content": "2"}]}])
    (message,) = [message for message in messages_of(caplog) if "of the assistant" in message]
    assert message.startswith("Row 1 of the prompts: ")


def test_where_prompts_may_come_from(tmp_path, prompts):
    assert len(load_prompts(prompts)) == 11
    assert load_prompts(["a", "b"])["prompt"] == ["a", "b"]
    assert load_prompts([{"prompt": "a", "answer": "b"}]).column_names == ["prompt", "answer"]
    dataset = Dataset.from_list([{"question": "a"}])
    assert load_prompts(dataset, column="question").to_list() == dataset.to_list()
    dataset.to_parquet(tmp_path / "x.parquet")
    assert load_prompts(str(tmp_path / "x.parquet"), column="question")["question"] == ["a"]


# -------------------- rows


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "Row 1 of `train_dataset` has no prompt: column `question` is None. Drop the row"),
        ("", "Row 1 of `train_dataset` has no prompt: column `question` is ''"),
        (" \n", "has no prompt"),
        ([], r"has no prompt: column `question` is \[\]"),
        ([{"role": "user", "content": ""}], "has no prompt"),
        ([{"role": "user", "content": None}], "has no prompt"),
        (7, r"Row 1 of `train_dataset` is 7, neither text.*with `prompt_column` \(now `question`\)"),
        (1.5, "is 1.5, neither"),
        (["a"], r"is \['a'\], neither text"),
        ([[1, 2]], "neither text"),
        ({"role": "user", "content": "a"}, "neither text"),
        ([{"content": "a"}], "without a `role`"),
        ([{"role": "user", "content": 3}], "whose `content` is no text"),
        ([USER, {"role": "user", "content": None}], "whose `content` is no text"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}], "a message with image"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_that_are_no_prompts(prompt, message, streamed):
    rows = [{"question": "a"}, {"question": prompt}]
    if prompt is not None and not isinstance(prompt, str):  # a column has one type
        rows, message = rows[1:], message.replace("Row 1", "Row 0")
    dataset = Dataset.from_list(rows)
    if streamed:
        dataset = dataset.to_iterable_dataset()
    with pytest.raises(ConfigError, match=message):
        check_prompts(dataset, "question", "`train_dataset`")


def test_rows_that_are_prompts():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    for prompt in ("a", [USER], [USER, call], [parts], [{"role": "system", "content": ""}, USER]):
        check_prompts(Dataset.from_list([{"prompt": prompt}]))


def test_columns_that_are_not_read_are_not_decoded():
    """At each start, of every row: here an image that is none."""
    rows = Dataset.from_dict({"prompt": ["a"], "image": [{"bytes": b"no image", "path": None}]})
    check_prompts(rows.cast_column("image", Image()))


def test_datasets_without_rows_or_the_column():
    with pytest.raises(ConfigError, match="There are no rows in the prompts. Pass at least one"):
        check_prompts(Dataset.from_dict({"prompt": []}))
    with pytest.raises(ConfigError, match=r"no column `question` in the prompts, only \['prompt'\]"):
        check_prompts(Dataset.from_dict({"prompt": ["a"]}), "question")


def test_lengths():
    source = PromptTokens(Dataset.from_dict({"prompt": ["a", "abc", "ab"]}), tiny_tokenizer())
    scan = source.scan(shard_bounds(3, 2))
    check_prompt_lengths(scan, 7, 10)
    check_prompt_lengths(scan, 7, None)
    with pytest.raises(ConfigError, match="Row 1 of `x` has 3 tokens.*Set `max_completion_length=6` or less"):
        check_prompt_lengths(scan, 7, 9, "`x`")
    with pytest.raises(ConfigError, match="the 3 tokens that the model takes. Drop the longest prompts"):
        check_prompt_lengths(scan, 7, 3)
