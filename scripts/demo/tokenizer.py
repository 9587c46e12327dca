"""A small Qwen2 tokenizer (byte-level BPE) for ChatML, trained on the demo's own text."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

START = "<|im_start|>"
END = "<|im_end|>"
CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer of exactly `vocab_size` tokens, special ones included.

    Its end-of-sequence token is `<|im_end|>` and its padding token is `<|endoftext|>`.
    """
    tokenizer = Qwen2Tokenizer(eos_token=END).train_new_from_iterator(
        documents, vocab_size, new_special_tokens=[START], show_progress=False
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> list[list[int]]:
    """Return each document's token ids, between the tokens that delimit a ChatML message.

    A base model that has never met these tokens could not end an answer after a fine-tune that
    leaves the embeddings alone.
    """
    return tokenizer([f"{START}{document}{END}" for document in documents])["input_ids"]
