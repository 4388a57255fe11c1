"""`Index`: the values of each key, in little memory."""

from __future__ import annotations

import sys

import pytest

from sse_batcher.streams.index import FEW, Index

SIZES = [1, 2, FEW, FEW + 1, 3 * FEW]


@pytest.mark.parametrize("size", SIZES)
def test_the_values_of_a_key_are_kept_in_order(size: int) -> None:
    index: Index[str, int] = Index()
    for value in range(size):
        index.add("a", value)
        index.add("a", value)  # nothing changes
    index.add("b", 0)
    assert list(index.of("a")) == list(range(size))
    assert index.count("a") == size
    assert list(index) == ["a", "b"]
    assert len(index) == 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_values_leave_one_by_one_and_a_key_leaves_with_its_last_one(size: int, order: int) -> None:
    index: Index[str, int] = Index()
    for value in range(size):
        index.add("a", value)
    left = list(range(size))
    for value in range(size)[::order]:
        index.discard("a", value)
        index.discard("a", value)  # it is gone
        left.remove(value)
        assert list(index.of("a")) == left
        assert ("a" in index) == bool(left)
    assert not index
    index.discard("a", 0)
    assert (index.count("a"), list(index.of("a"))) == (0, [])


def test_a_few_values_take_less_than_half_of_a_dict() -> None:
    index: Index[str, int] = Index()
    for value in range(FEW):
        index.add("a", value)
    assert sys.getsizeof(index.of("a")) < sys.getsizeof({0: None}) / 2
