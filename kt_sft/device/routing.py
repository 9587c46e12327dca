"""Routed rows on the device: sorted by expert, and summed back to their tokens.

Legend: T tokens, K top-k, n experts that are computed, R routed rows of theirs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kt_sft.device.bringing import bring


@dataclass(frozen=True)
class Routing:
    """The rows of some experts, in an order of experts that is given.

    begins: where each expert's rows begin, and their number at the end. slot_of_row: token * K +
    choice. row_of_slot: R for choices of other experts.
    """

    begins: tuple[int, ...]
    slot_of_row: Tensor  # int64 [R]
    row_of_slot_TK: Tensor  # int64

    @classmethod
    def of(cls, index_TK: Tensor, order: Sequence[int], counts: Sequence[int]) -> Routing:
        """Of experts in `order`, from choices on the device; counts: the rows of each, as known on
        the host, so that nothing waits."""
        device, rows = index_TK.device, sum(counts)
        places = torch.full((1 + max([*order, 0]),), len(order))
        places[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        places = bring(places, device)
        # Experts beyond the last one in the order are others, as is the number that skips.
        index = index_TK.flatten().long()
        known = places[index.clamp(max=len(places) - 1)]
        place = torch.where(index < len(places), known, len(order))
        slot_of_row = place.sort(stable=True).indices[:rows]
        row_of_slot = torch.full((index_TK.numel(),), rows, device=device)
        row_of_slot[slot_of_row] = torch.arange(rows, device=device)
        return cls((0, *accumulate(counts)), slot_of_row, row_of_slot.view(index_TK.shape))

    @property
    def rows(self) -> int:
        """R."""
        return self.begins[-1]

    def tokens(self, begin: int, end: int) -> Tensor:
        """The tokens of some rows."""
        return self.slot_of_row[begin:end] // max(1, self.row_of_slot_TK.shape[1])

    def add_rows(
        self, total_TD: Tensor, rows: Tensor, first: int, weight_TK: Tensor | None = None
    ) -> None:
        """Adds rows `first` and following to their tokens, each token's choices in their order, so
        that sums repeat. rows: [their number + 1, D], with zeros at the end."""
        count = len(rows) - 1
        for k in range(self.row_of_slot_TK.shape[1]):
            row_T = self.row_of_slot_TK[:, k] - first
            row_T = torch.where((row_T >= 0) & (row_T < count), row_T, count)
            picked = rows.index_select(0, row_T).float()
            if weight_TK is None:
                total_TD += picked
            else:
                total_TD.addcmul_(picked, weight_TK[:, k : k + 1])
