"""Intervals of fields: what is refused, and in which words."""

import dataclasses

import pytest

from fedlora_mpi.core.bounds import bounded


@dataclasses.dataclass(frozen=True)
class Block:
    share: float = 0.5
    count: int = 3


@pytest.mark.parametrize(
    "interval, inside, outside, words",
    [
        ("[0, inf)", (0, 1e9), (-1e-9,), "of at least 0"),
        ("(0, inf)", (1e-9,), (0, -1), "above 0"),
        ("(0, 1]", (1e-9, 1), (0, 1.1), "above 0 and at most 1"),
        ("(0, 1)", (1e-9, 0.9), (0, 1), "above 0 and below 1"),
        ("[0, 1)", (0, 0.9), (-0.1, 1), "from 0 to below 1"),
        ("[0, 1]", (0, 1), (-0.1, 1.1), "from 0 to 1"),
    ],
)
def test_a_field_outside_its_interval_is_refused_in_plain_words(interval, inside, outside, words):
    for value in inside:
        bounded(Block(share=value), share=interval)
    for value in (*outside, float("nan")):
        with pytest.raises(ValueError) as refusal:
            bounded(Block(share=value), count="[1, inf)", share=interval)
        assert str(refusal.value) == f"share = {value}: must be a number {words}"


def test_integers_are_called_integers():
    with pytest.raises(ValueError, match="^count = 0: must be an integer of at least 1$"):
        bounded(Block(count=0), count="[1, inf)")
