"""The ranks that tests use answer what they are asked, also after one of them failed."""

import pytest

from .pool import Pool


def test_no_answer_is_that_to_an_earlier_question(two: Pool) -> None:
    """Rank 0 waits in a sum that rank 1, which raises, never joins; the next question is answered by both anew."""
    with pytest.raises(AssertionError, match=r"rank 1:\n(.*\n)*ArithmeticError: asked for"):
        two.run("added_up", number=1.0, raises={1})
    assert two.run("added_up", number=2.0, raises=set()) == [4.0, 4.0]
