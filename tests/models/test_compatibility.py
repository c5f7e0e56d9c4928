from types import SimpleNamespace

import pytest
from transformers import BartConfig, BartForConditionalGeneration

from tests.tiny import tiny_lora, tiny_model, tiny_tokenizer
from trl_blend.errors import TokenizerMismatchError, UnsupportedError
from trl_blend.models.compatibility import check_partner_model, check_tokenizers, check_vocab_sizes


def fake_tokenizer(vocab):
    return SimpleNamespace(get_vocab=lambda: vocab)


def test_tokenizers_that_differ_in_special_roles_only():
    check_tokenizers(tiny_tokenizer(), tiny_tokenizer())
    check_tokenizers(tiny_tokenizer(), tiny_tokenizer(eos_token="<pad>"))
    check_tokenizers(tiny_tokenizer(), SimpleNamespace(tokenizer=tiny_tokenizer(pad_token="<eos>")))


def test_added_tokens_count():
    partner = tiny_tokenizer()
    partner.add_tokens(["<tool>"])
    with pytest.raises(TokenizerMismatchError, match="id 64 is no token for the student and '<tool>' for `teachers"):
        check_tokenizers(tiny_tokenizer(), partner, partner_name="teachers[1]")
    with pytest.raises(TokenizerMismatchError, match="id 64 is '<tool>' for the student and no token"):
        check_tokenizers(partner, tiny_tokenizer())
    student = tiny_tokenizer()
    student.add_tokens(["<tool>"])
    check_tokenizers(student, partner)


def test_first_differing_id_is_named():
    student = {"a": 0, "b": 1, "c": 2, "d": 3}
    with pytest.raises(TokenizerMismatchError) as error:
        check_tokenizers(fake_tokenizer(student), fake_tokenizer({"d": 3, "b": 2, "c": 1, "a": 0}))
    message = str(error.value)
    assert "id 1 is 'b' for the student and 'c' for `teacher_model` (2 of 4 ids differ)" in message
    assert "same family" in message
    # Two spellings of one id are no difference, a lost spelling is
    check_tokenizers(fake_tokenizer({**student, "D": 3}), fake_tokenizer({"D": 3, **student}))
    with pytest.raises(TokenizerMismatchError, match="id 3 is 'D' or 'd' for the student and 'd'"):
        check_tokenizers(fake_tokenizer({**student, "D": 3}), fake_tokenizer(student))


def test_vocab_sizes():
    tokenizer = tiny_tokenizer()
    check_vocab_sizes(64, 64, tokenizer)
    check_vocab_sizes(72, 64, tokenizer)
    check_vocab_sizes(151_936, 152_064, tokenizer)
    with pytest.raises(TokenizerMismatchError, match=r"`teachers\[0\]` has 63 rows, fewer than the 64 tokens"):
        check_vocab_sizes(72, 63, tokenizer, partner_name="teachers[0]")
    tokenizer.add_tokens(["<image>"])  # of its relatives, beyond the rows of both
    check_vocab_sizes(64, 64, tokenizer)
    tokenizer.pad_token = "<image>"
    with pytest.raises(TokenizerMismatchError, match=r"`model` has 64 rows.*`pad_token` '<image>'.*embeddings\(65\)"):
        check_vocab_sizes(64, 65, tokenizer)


def test_without_a_tokenizer_every_row_is_a_token():
    check_vocab_sizes(64, 64)
    check_vocab_sizes(64, 72)
    with pytest.raises(TokenizerMismatchError, match="`teacher_model` has 64 rows, fewer than the 72 tokens"):
        check_vocab_sizes(72, 64)


def test_partner_model():
    model = tiny_model("llama")
    check_partner_model(model)
    check_partner_model(tiny_lora(model))
    seq2seq = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
        )
    )
    with pytest.raises(UnsupportedError, match="`reference` is an encoder-decoder model"):
        check_partner_model(seq2seq, "reference")
    for wrong in (model.model, object(), SimpleNamespace(generate=len, can_generate=lambda: False)):
        with pytest.raises(UnsupportedError, match="`teacher_model` is a .* cannot generate"):
            check_partner_model(wrong)
