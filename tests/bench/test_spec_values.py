from __future__ import annotations

import pytest

from moesaic.bench.plan import InputError
from moesaic.bench.spec_values import field_values


def test_ranges_have_both_ends_and_whole_numbers_once() -> None:
    assert field_values("a", {"linear": [4, 64], "n": 5}, int, repeats=False) == [4, 19, 34, 49, 64]
    assert field_values("a", {"log": [1, 8], "n": 8}, int, repeats=False) == [1, 2, 3, 4, 6, 8]
    assert field_values("a", {"linear": [0, 1], "n": 3}, float, repeats=False) == [0.0, 0.5, 1.0]
    tenth, third = field_values("a", {"log": [0.1, 1 / 3], "n": 2}, float, repeats=False)
    assert (tenth, third) == (0.1, 1 / 3)
    assert all(type(v) is int for v in field_values("a", {"log": [1, 8], "n": 3}, int, repeats=True))


def test_lists_stay_as_they_are() -> None:
    assert field_values("a", ["x", "y"], str, repeats=False) == ["x", "y"]
    assert field_values("a", [1, 1], int, repeats=True) == [1, 1]
    with pytest.raises(InputError, match="1 is in the list twice"):
        field_values("a", [1, 2, 1], int, repeats=False)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (3, int, "must be a list"),
        ([], int, "must be a list"),
        ({"log": [1, 2]}, float, "takes { log"),
        ({"log": [1, 2], "n": 3, "base": 2}, float, "takes { log"),
        ({"log": [1, 2], "n": 1}, float, "n = 1: takes an integer >= 2"),
        ({"log": [1, 2], "n": 2.5}, float, "n = 2.5"),
        ({"log": [1, 2], "n": True}, float, "n = True"),
        ({"log": [0, 2], "n": 2}, float, "numbers > 0"),
        ({"linear": [2, 1], "n": 2}, float, "the smaller first"),
        ({"linear": [1, 1], "n": 2}, float, "the smaller first"),
        ({"linear": [1, 2, 3], "n": 2}, float, "two finite numbers"),
        ({"linear": [1, float("inf")], "n": 2}, float, "two finite numbers"),
        ({"linear": ["a", "b"], "n": 2}, float, "two finite numbers"),
        ({"linear": [1, 2], "n": 2}, str, "the field holds a str"),
        ({"linear": [1, 2], "n": 2}, bool, "the field holds a bool"),
    ],
)
def test_what_is_no_range_is_refused_by_name(value: object, kind: type, words: str) -> None:
    with pytest.raises(InputError) as error:
        field_values("grid.a", value, kind, repeats=False)
    assert words in str(error.value)
    assert "grid.a" in str(error.value)
