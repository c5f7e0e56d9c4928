"""A byte-level tokenizer without merges: 256 bytes and 8 added tokens, 264 in all."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, EOS_TOKEN, "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
# Not special: TRL decodes completions with `skip_special_tokens=True`, and reward functions must still see these two.
THINK_TOKENS = ("<think>", "</think>")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(eos_token: str = EOS_TOKEN) -> PreTrainedTokenizerFast:
    """
    Build the tokenizer of the test-bed.

    Every byte is one token, so every digit is one token. The padding token is distinct from the end-of-sequence token.
    The chat template marks the assistant's turn with `{% generation %}` and ends every turn with `<|im_end|>`.

    Args:
        eos_token (`str`, *optional*, defaults to `"<|im_end|>"`):
            End-of-sequence token. `"<|endoftext|>"` gives a tokenizer that differs from the default one in nothing
            else, which is the base-model side of a pair with different end-of-sequence tokens.

    Raises:
        `ValueError`: if `eos_token` is not one of the special tokens, or is the padding token.
    """
    if eos_token not in SPECIAL_TOKENS or eos_token == PAD_TOKEN:
        raise ValueError(f"`eos_token` must be one of {SPECIAL_TOKENS[1:]}, got {eos_token!r}.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=eos_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
