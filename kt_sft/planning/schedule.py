"""What the split of a layer's experts would be, and why: for people, before a run.

Legend: T tokens, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kt_sft.kernels import WeightLayout
from kt_sft.scheduling.assignment import AllOnDevice, Assignment, HostOnly
from kt_sft.scheduling.costs import EndsFirst, Estimate, LayerCosts, estimate

_BAR = 40


def expected_rows(shares: Sequence[float], tokens: int, top_k: int) -> list[int]:
    """Rows of each expert, T * K together and at most T each; by largest remainder."""
    parts, open_, left = [0.0] * len(shares), set(range(len(shares))), float(top_k)
    while open_ and left > 0:
        total = sum(shares[e] for e in open_)
        wanted = {e: left * (shares[e] / total if total else 1 / len(open_)) for e in open_}
        # A token chooses an expert once: what is above that goes to the others.
        full = {e for e, part in wanted.items() if part >= 1}
        for e in full or open_:
            parts[e] = min(1.0, wanted[e])
        left = left - len(full) if full else 0.0
        open_ -= full
    exact = [part * tokens for part in parts]
    rows = [int(n) for n in exact]
    by_remainder = sorted(range(len(rows)), key=lambda e: rows[e] - exact[e])
    for e in by_remainder[: max(0, tokens * top_k - sum(rows))]:
        rows[e] += 1
    return rows


@dataclass(frozen=True)
class ExplainedSplit:
    """One layer's pass with so many tokens: where its experts go, and for how long.

    estimates: of forward and backward.
    """

    name: str
    tokens: int
    rows: tuple[int, ...]
    places: Assignment
    estimates: tuple[Estimate, Estimate]

    @property
    def seconds(self) -> float:
        """Forward and backward, until the last place has ended."""
        return sum(one.makespan for one in self.estimates)

    @property
    def on_host(self) -> int:
        """Experts with rows that the host computes."""
        return sum(n > 0 for n in self.rows) - len(self.places.on_device)


def explain(
    costs: LayerCosts, shares: Sequence[float], tokens: int, top_k: int, resident: Sequence[int]
) -> dict[str, ExplainedSplit]:
    """The splits of `schedule: host`, `device` and `auto`."""
    rows = expected_rows(shares, tokens, top_k)
    found = {}
    for name, policy in (
        ("host", HostOnly()), ("device", AllOnDevice()), ("auto", EndsFirst(costs)),
    ):  # fmt: skip
        places = policy.assign(rows, resident, backward_follows=True)
        both = estimate(costs.forward, rows, places), estimate(costs.backward, rows, places)
        found[name] = ExplainedSplit(name, tokens, tuple(rows), places, both)
    return found


def table(splits: Sequence[tuple[int, dict[str, ExplainedSplit]]]) -> Iterator[str]:
    """Lines, one for each number of resident experts and of tokens."""
    yield (
        f"{'tokens':>9} {'resident':>9} {'host':>11} {'device':>11} {'auto':>11}   "
        "auto: experts on the host, resident, streamed"
    )
    for resident, by_name in splits:
        auto = by_name["auto"]
        times = (f"{1e3 * by_name[n].seconds:8.2f} ms" for n in ("host", "device", "auto"))
        yield (
            f"{auto.tokens:>9,} {resident:>9} {' '.join(times)}   "
            f"{auto.on_host}, {len(auto.places.resident)}, {len(auto.places.streamed)}"
        )


def picture(split: ExplainedSplit, layout: WeightLayout) -> Iterator[str]:
    """Bars of how long each place is busy, forward and backward."""
    there = split.places.on_device
    rows_there = sum(split.rows[e] for e in there)
    rows_here = sum(split.rows) - rows_there
    sent = len(split.places.streamed) * layout.nbytes / layout.experts / 1e6
    says = {
        "host": f"{split.on_host} experts, {rows_here:,} rows",
        "link": f"{len(split.places.streamed)} experts, {sent:,.0f} MB",
        "device": f"{len(there)} experts, {rows_there:,} rows",
    }
    longest = max(one.makespan for one in split.estimates)
    for direction, one in zip(("forward", "backward"), split.estimates, strict=True):
        yield f"{direction}, {split.tokens:,} tokens: {1e3 * one.makespan:.2f} ms"
        for place, what in says.items():
            seconds = getattr(one, place)
            bar = "█" * round(_BAR * seconds / longest) if longest else ""
            yield f"  {place:<7}{bar:<{_BAR}} {1e3 * seconds:9.2f} ms   {what}"
