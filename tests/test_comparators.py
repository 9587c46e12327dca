"""The comparator rejects every kind of wrong result that it is meant to catch."""

import pytest
import torch
from comparators import assert_matches, crest_factor, tolerance
from fixed_routing import RecordedChoices, RepeatedChoices

BOUND = tolerance("exact", 4.0, 3)


@pytest.fixture
def want() -> torch.Tensor:
    return torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).double()


def test_accepts_rounding(want: torch.Tensor) -> None:
    assert_matches(want * (1 + BOUND / 4), want, BOUND)


def wrong_element(x: torch.Tensor) -> torch.Tensor:
    x[3, 5] += 0.05
    return x


def flipped_sign(x: torch.Tensor) -> torch.Tensor:
    x[7, 11] *= -1
    return x


def with_nan(x: torch.Tensor) -> torch.Tensor:
    x[0, 0] = float("nan")
    return x


def with_inf(x: torch.Tensor) -> torch.Tensor:
    x[0, 0] = float("inf")
    return x


def zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.T.reshape(x.shape)


def swapped_rows(x: torch.Tensor) -> torch.Tensor:
    return x[[1, 0, *range(2, len(x))]]


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 1.01


@pytest.mark.parametrize(
    "fault",
    [
        wrong_element,
        flipped_sign,
        with_nan,
        with_inf,
        zeros,
        transposed,
        swapped_rows,
        scaled,
    ],
)
def test_rejects(fault, want: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_matches(fault(want.clone()), want, BOUND)


def test_rejects_a_reference_without_content(want: torch.Tensor) -> None:
    hollow = torch.zeros_like(want)
    hollow[0, 0] = 1
    with pytest.raises(AssertionError, match="mostly zero"):
        assert_matches(hollow, hollow, BOUND)


def test_rejects_missing_nan(want: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_matches(want, with_nan(want.clone()), BOUND)


def test_crest_factor() -> None:
    assert crest_factor(torch.ones(2, 8)) == pytest.approx(1.0)
    assert crest_factor(torch.tensor([[1.0, 0.0, 0.0, 0.0]])) == pytest.approx(2.0)


def choices_of(scores: torch.Tensor, within: RecordedChoices) -> tuple[torch.Tensor, torch.Tensor]:
    with within:
        return torch.topk(scores, 2)


def test_a_close_choice_is_made_as_it_was_recorded() -> None:
    recorded = RecordedChoices()
    values, indices = choices_of(torch.tensor([[3.0, 1.0, 2.0, 2.0001]]), recorded)
    tipped = torch.tensor([[3.0, 1.0, 2.0001, 2.0]])
    got_values, got = choices_of(tipped, RepeatedChoices(recorded, 1e-3))
    assert torch.equal(got, indices) and got.tolist() == [[0, 3]]
    assert got_values.tolist() == [[3.0, 2.0]] and values.tolist() != got_values.tolist()


def test_a_choice_that_is_not_close_is_refused() -> None:
    recorded = RecordedChoices()
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.1]])
    choices_of(scores, recorded)
    with pytest.raises(AssertionError, match="choice 0: relative error"):
        choices_of(-scores, RepeatedChoices(recorded, 1e-3))
    with pytest.raises(AssertionError, match="fewer choices"), RepeatedChoices(recorded, 1e-3):
        pass
    repeated = RepeatedChoices(recorded, 1e-3)
    with pytest.raises(AssertionError, match="choice 1 was not recorded"), repeated:
        torch.topk(scores, 2)
        torch.topk(scores, 2)  # of the same scores: the same choice
        torch.topk(scores + 1, 2)
