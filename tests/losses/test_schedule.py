import math

import pytest

from cbd_trl.losses.objective import SCHEDULES, WeightSchedule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", (0.3, 0.3, 0.3, 0.3)),
        ("linear", (0.3, 0.525, 0.75, 1.2)),
        ("cosine", (0.3, 0.3 + 0.9 * (1 - math.cos(math.pi / 4)) / 2, 0.75, 1.2)),
    ],
)
def test_hand_computed_values(shape: str, expected: tuple[float, ...]) -> None:
    schedule = WeightSchedule(0.3, 1.2, shape)
    assert [schedule.at(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected)


@pytest.mark.parametrize("shape", SCHEDULES)
def test_the_ends_are_exact_and_nothing_lies_outside(shape: str) -> None:
    schedule = WeightSchedule(0.7, 0.1, shape)
    end = 0.7 if shape == "constant" else 0.1
    assert schedule.at(0.0) == schedule.at(-3.0) == 0.7
    assert schedule.at(1.0) == schedule.at(1.5) == end
    assert all(end <= schedule.at(i / 50) <= 0.7 for i in range(51))


def test_a_term_that_fades_out_ends_at_exactly_zero() -> None:
    assert [WeightSchedule(0.3, 0.0, shape).at(1.0) for shape in ("linear", "cosine")] == [0.0, 0.0]


def test_the_highest_weight_tells_whether_a_term_is_ever_on() -> None:
    assert WeightSchedule(0.0, 0.5, "linear").highest == 0.5
    assert WeightSchedule(0.5, 0.0, "cosine").highest == 0.5
    assert WeightSchedule(0.0, 0.5, "constant").highest == 0.0
    assert WeightSchedule(0.0, 0.0, "linear").highest == 0.0


@pytest.mark.parametrize(
    ("start", "end", "shape", "message"),
    [
        (-1.0, 0.0, "linear", "start=-1.0: a weight of the loss must be finite and at least 0"),
        (1.0, float("inf"), "linear", "end=inf: a weight of the loss must be finite"),
        (float("nan"), 0.0, "cosine", "start=nan"),
        (1.0, 0.0, "cosin", "Unknown schedule 'cosin': there are constant, linear, cosine. Did you mean 'cosine'?"),
        (1.0, 0.0, "xyz", r"there are constant, linear, cosine\.$"),
    ],
)
def test_a_bad_value_is_refused(start: float, end: float, shape: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSchedule(start, end, shape)
