"""The ranks that tests use answer what they are asked, also after one of them failed."""

import pytest

from .pool import Pool


def test_no_answer_is_that_to_an_earlier_question(two: Pool) -> None:
    """Rank 1 raises, and rank 0 answers later; to the next question both give that question's answer."""
    with pytest.raises(AssertionError, match=r"rank 1:\n(.*\n)*ArithmeticError: asked for"):
        two.run("answered", answer="first", raises={1})
    assert two.run("answered", answer="second", raises=set()) == ["second", "second"]


def test_ranks_that_wait_for_one_that_failed_are_replaced(two: Pool) -> None:
    """Rank 0 is in a sum that rank 1 never joins; the next sum is of both."""
    with pytest.raises(AssertionError, match="ArithmeticError: asked for"):
        two.run("added_up", number=1.0, raises={1})
    assert two.run("added_up", number=2.0, raises=set()) == [4.0, 4.0]
