"""A model's input embeddings in host memory, from where the rows of its tokens go up.

The table of a large vocabulary is read by rows, a few thousand of a hundred thousand in a step, and
has no gradient where it is frozen: on a small device it is the easiest to do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kt_sft.errors import SettingsError


class _Table:
    """Frozen, so that copies of a model share it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> _Table:
        return self


class HostEmbedding(nn.Module):
    """`nn.Embedding` whose table [tokens, D] is no parameter, so that `.to()` leaves it."""

    def __init__(self, stock: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.padding_idx = stock.padding_idx
        self._table = _Table(stock.weight.detach().to("cpu"))

    @property
    def weight(self) -> Tensor:
        """The table, on the host."""
        return self._table.rows

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ids [...], [..., D] where they are."""
        rows = nn.functional.embedding(ids.to("cpu"), self.weight)
        return rows.to(ids.device)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, on the host"


def require_table(model: PreTrainedModel) -> nn.Embedding:
    """The input embeddings. Raises SettingsError where they cannot be on the host alone."""
    found = model.get_input_embeddings()
    config = model.config.get_text_config()
    if type(found) is not nn.Embedding or found.max_norm is not None:
        raise SettingsError(
            f"embeddings: got host for a {type(found).__name__}, expected a plain nn.Embedding; "
            "leave embeddings out"
        )
    if config.tie_word_embeddings:
        raise SettingsError(
            "embeddings: got host, but this model's output head is the same table, which the "
            "device needs whole; leave embeddings out"
        )
    return found


def move_embeddings(model: PreTrainedModel) -> None:
    """After the weights are read."""
    with torch.no_grad():
        model.set_input_embeddings(HostEmbedding(require_table(model)))
