"""The tokenizer and the chat template that training leaves beside an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

_TEXTS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# A list of its own of what was added, which SGLang refuses in an adapter's folder.
_ADDED = "added_tokens.json"


def copy_texts(adapter: Path, out: Path, whole: bool) -> None:
    """Puts them into a folder, in the place of the base's; whole: that of a model."""
    for name in (*_TEXTS, *((_ADDED,) if whole else ())):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, out / name)
