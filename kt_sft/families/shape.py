"""The dimensions of one layer's routed experts, and what their gate computes."""

from __future__ import annotations

from dataclasses import dataclass

from kt_sft.kernels import PROJECTIONS, Gate


@dataclass(frozen=True)
class ExpertsShape:
    """E experts of D hidden and F intermediate channels."""

    experts: int
    hidden: int
    intermediate: int
    gate: Gate

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections these experts have, in order."""
        return PROJECTIONS if self.gate.gated else PROJECTIONS[1:]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, D, F)."""
        return self.experts, self.hidden, self.intermediate

    @property
    def weights(self) -> int:
        """The number of weights in all experts together."""
        return len(self.projections) * self.experts * self.hidden * self.intermediate

    def of(self, projection: str) -> tuple[int, int]:
        """(outputs, inputs) of one expert's projection."""
        wide = (self.hidden, self.intermediate)
        return wide if projection == "down_proj" else (self.intermediate, self.hidden)
