"""All ranks do the same number of equal steps, and together what one rank would do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.data import ArrayImages
from hpc_dl.errors import OptionError
from hpc_dl.training import Plan
from hpc_dl.training.schedule import WarmupSteps


def images(n: int) -> ArrayImages:
    """Make images whose label is their number."""
    return ArrayImages(np.zeros((n, 1, 1, 1), np.float32), np.arange(n), max(n, 1))


def plans(n: int, size: int, batch_size: int, most_steps: int | None = None) -> list[Plan]:
    return [
        Plan(images(n), images(n), rank, size, 2, batch_size, seed=5, most_steps=most_steps)
        for rank in range(size)
    ]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 20), st.none() | st.integers(1, 9))
def test_steps_are_alike_on_all_ranks(
    n: int, size: int, batch_size: int, most_steps: int | None
) -> None:
    if n < size:
        return
    cut = [list(plan.training_batches(epoch=1)) for plan in plans(n, size, batch_size, most_steps)]
    lengths = [[len(batch.labels) for batch in mine] for mine in cut]
    plan = plans(n, size, batch_size, most_steps)[0]
    assert lengths == [lengths[0]] * size
    assert len(lengths[0]) == plan.steps
    assert [length * size for length in lengths[0]] == [
        plan.images_in(step) for step in range(plan.steps)
    ]


def test_a_step_has_the_same_images_for_any_number_of_ranks() -> None:
    """n ranks with batch b learn from what one rank with batch n b learns from."""
    steps = {
        size: [
            {int(label) for batch in step for label in batch.labels}
            for step in zip(
                *(plan.all_training_batches() for plan in plans(48, size, 12 // size)), strict=True
            )
        ]
        for size in (1, 2, 3, 4)
    }
    assert steps[2] == steps[1]
    assert steps[3] == steps[1]
    assert steps[4] == steps[1]
    assert len(steps[1]) == 8


@given(st.integers(1, 40), st.integers(1, 5))
def test_each_image_is_tested_once(n: int, size: int) -> None:
    if n < size:
        return
    tested = [
        int(label)
        for plan in plans(n, size, 7)
        for batch in plan.test_batches()
        for label in batch.labels
    ]
    assert sorted(tested) == list(range(n))


def test_no_test_images_give_no_test_batches() -> None:
    assert list(Plan(images(3), None, 0, 1, 1, 1, 0).test_batches()) == []


def test_more_ranks_than_images_are_refused() -> None:
    with pytest.raises(OptionError, match="3 images cannot be shared by 4 ranks"):
        plans(3, 4, 1)


@given(st.integers(1, 500), st.data())
def test_the_learning_rate_rises_then_falls(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps // 3))
    start = data.draw(st.floats(0.01, 1))
    factors = [WarmupSteps(steps, warmup, start)(step) for step in range(steps)]
    rise, fall = factors[:warmup], factors[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert set(fall) <= {1.0, 0.1, 0.01, 0.001}
    assert min(factors) >= min(start, 0.001)
    if warmup:
        assert factors[0] == start


@pytest.mark.parametrize(("warmup", "start"), [(31, 0.5), (-1, 0.5), (3, 0), (3, 1.5)])
def test_a_warmup_that_cannot_be_is_refused(warmup: int, start: float) -> None:
    with pytest.raises(OptionError, match="a third of all steps"):
        WarmupSteps(90, warmup, start)
