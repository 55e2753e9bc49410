"""What a run says of the examples that it reads."""

import pytest

from rwkv_rlhf.data.batch import PairExample, RatedExample
from rwkv_rlhf.training.inputs import one_class


@pytest.mark.parametrize("good", [True, False])
def test_answers_of_one_class_are_said(good):
    """If this breaks, KTO trains or is judged on good answers only, which shows nothing, and nobody is told."""
    some = [RatedExample([1], [2], [3], good=good) for _ in range(3)]
    said = one_class(some, "held-out answers")
    here, lacking = ("good", "bad") if good else ("bad", "good")
    assert said.startswith(f"all 3 held-out answers are {here} ones") and f"so {lacking} ones are missing" in said
    assert not one_class([*some, RatedExample([1], [2], [3], good=not good)], "answers")
    assert not one_class([PairExample([1], [2], [3])], "answers")  # pairs have both
