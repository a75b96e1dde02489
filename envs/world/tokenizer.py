"""The language's tokenizer: one token per word, with a chat template, loadable like any other."""

from __future__ import annotations

from typing import Any

from envs.world.language import EOS, PAD, SPECIAL, UNK

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    " <assistant> {{ message['content'] }} {{ eos_token }}"
    "{% else %} <user> {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def make_tokenizer(words: tuple[str, ...]) -> Any:
    """A left-padding ``PreTrainedTokenizerFast`` over ``words`` (token id = position)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[UNK])
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        unk_token=SPECIAL[UNK],
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
