"""The split of a layer's experts: against every other one, on costs of all kinds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from kt_sft.scheduling.assignment import AllOnDevice, Assignment, HostOnly, ResidentOnly
from kt_sft.scheduling.costs import Curve, EndsFirst, LayerCosts, PassCosts, estimate

ROWS = (1, 8, 32, 128, 512)


def random_costs(draw: random.Random) -> LayerCosts:
    """Weights that take long to read or rows that take long to compute, in either place."""

    def curve(reading: float, row: float) -> Curve:
        free = draw.choice([0, 1, 20])  # rows that cost nothing more than reading
        return Curve(ROWS, tuple(reading + max(0, n - free) * row for n in ROWS))

    def one() -> PassCosts:
        return PassCosts(
            curve(draw.uniform(0.1, 2), draw.uniform(0.001, 0.1)),
            curve(draw.uniform(0.01, 1), draw.uniform(0.0001, 0.05)),
            host_fixed=draw.uniform(0, 1),
            device_fixed=draw.uniform(0, 3),
            stream=draw.uniform(0.05, 3),
            contention=draw.choice([0, 0.1, 0.5]),
        )

    return LayerCosts(one(), one())


def makespan(costs: LayerCosts, rows: Sequence[int], places: Assignment, backward: bool) -> float:
    passes = (costs.forward, costs.backward) if backward else (costs.forward,)
    return sum(estimate(one, rows, places).makespan for one in passes)


def every(rows: Sequence[int], resident: Sequence[int]) -> list[Assignment]:
    busy = [e for e, n in enumerate(rows) if n]
    chosen = (c for n in range(len(busy) + 1) for c in itertools.combinations(busy, n))
    return [
        Assignment(tuple(e for e in c if e in resident), tuple(e for e in c if e not in resident))
        for c in chosen
    ]


def test_within_a_tenth_of_the_best_split() -> None:
    """And never worse than one place alone."""
    draw, worst, all_kinds = random.Random(0), 0.0, set()
    for _ in range(400):
        costs = random_costs(draw)
        experts = draw.randint(1, 8)
        sizes = [draw.choice([0, 1, 3, 10, 50, 200, 1000]) for _ in range(experts)]
        rows = [int(size * draw.uniform(0.5, 1.5)) for size in sizes]
        part = draw.choice([0.0, 0.3, 0.7])
        resident = [e for e in range(experts) if draw.random() < part]
        backward = draw.random() < 0.5
        places = EndsFirst(costs).assign(rows, resident, backward)
        got = makespan(costs, rows, places, backward)
        best = min(makespan(costs, rows, other, backward) for other in every(rows, resident))
        assert got <= best * 1.1 + 1e-12
        for alone in (HostOnly(), AllOnDevice(), ResidentOnly()):
            other = makespan(costs, rows, alone.assign(rows, resident, backward), backward)
            assert got <= other * (1 + 1e-9)
        worst = max(worst, got / best if best else 1.0)
        here = len(places.on_device) < sum(map(bool, rows))
        all_kinds.add((bool(places.resident), bool(places.streamed), here))
    assert len(all_kinds) >= 7, "the costs leave some kind of split out"
    assert worst < 1.05


def test_many_experts() -> None:
    """Where splits cannot be counted: both sides end together, and the same comes out again."""
    generator = np.random.default_rng(0)
    host = Curve(ROWS, (1e-4, 1e-4, 1.3e-4, 4e-4, 1.5e-3))
    device = Curve((1, 512), (2e-5, 6e-5))
    one = PassCosts(host, device, 1e-4, 1e-4, stream=1.7e-4)
    policy = EndsFirst(LayerCosts(one, one))
    for experts, tokens in ((128, 2048), (256, 512), (128, 8192)):
        shares = generator.dirichlet(np.ones(experts) * 2)
        rows = generator.multinomial(tokens * 8, shares).tolist()
        resident = list(range(0, experts, 4))
        places = policy.assign(rows, resident, True)
        assert places == policy.assign(rows, resident, True)
        ends = estimate(one, rows, places)
        # But for the piece that the device waits for first.
        assert ends.host > 0.9 * ends.makespan and ends.link > 0.8 * ends.makespan
        assert ends.makespan < 0.5 * estimate(one, rows, Assignment()).makespan
        assert set(places.resident) <= set(resident)
        assert not set(places.streamed) & set(resident)
        # Streaming costs the same for each: those with the most rows go.
        left = [n for e, n in enumerate(rows) if e not in places.on_device]
        assert min(rows[e] for e in places.streamed) >= np.median(left)


def test_experts_without_rows_are_left_out() -> None:
    costs = random_costs(random.Random(1))
    for policy in (EndsFirst(costs), AllOnDevice(), ResidentOnly(), HostOnly()):
        assert policy.assign([0, 0, 0], [0, 2], True) == Assignment()
    assert AllOnDevice().assign([0, 5, 2], [1], False) == Assignment((1,), (2,))
    assert ResidentOnly().assign([0, 5, 2], [0, 1], False) == Assignment((1,))


def test_a_curve_between_and_beyond_its_points() -> None:
    curve = Curve((1, 8, 32), (1.0, 1.0, 4.0))
    got = curve(np.array([0, 1, 4, 20, 32, 56]))
    assert got.tolist() == pytest.approx([1.0, 1.0, 1.0, 2.5, 4.0, 7.0])
    assert Curve((4,), (2.0,))(np.array([1, 100])).tolist() == [2.0, 2.0]


def test_estimates() -> None:
    curve = Curve((1, 100), (1.0, 1.0))
    one = PassCosts(curve, Curve((1,), (0.5,)), 0.25, 0.125, stream=2.0, contention=0.5)
    nothing = estimate(one, [3, 0, 4], Assignment())
    assert (nothing.host, nothing.link, nothing.device, nothing.makespan) == (2.25, 0.0, 0.0, 2.25)
    both = estimate(one, [3, 1, 4], Assignment((0,), (2,)))
    assert (both.host, both.link, both.device) == (1.25, 2.0, 1.125)
    assert both.makespan == 4.0  # the link, and the expert that came last
    assert one.text(3) == (
        "3 rows: 1000.000 ms on the host, 500.000 ms on the accelerator, 2000.000 ms on the link"
    )
    resident = estimate(one, [3, 1, 4], Assignment((0, 1, 2)))
    assert resident.makespan == resident.device == 1.625


@pytest.mark.parametrize(
    "wrong",
    [{"rows": [1]}, {"rows": [2, 1], "seconds": [1, 2]}, {"rows": [], "seconds": []}],
)
def test_damaged_costs_are_refused(wrong: dict) -> None:
    costs = random_costs(random.Random(2))
    values = costs.as_dict()
    assert LayerCosts.from_dict(values) == costs
    values["backward"]["device"] = {**values["backward"]["device"], **wrong}
    with pytest.raises((ValueError, KeyError)):
        LayerCosts.from_dict(values)
