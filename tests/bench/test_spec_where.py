from __future__ import annotations

import pytest

from moesaic.bench.plan import InputError
from moesaic.bench.spec_where import condition

VALUES = {"n": 8, "k": 2, "lr": 0.5, "gate": "paper", "tied": True}

TRUE = (
    "n == 8", "n * k == 16 and not n < k", "1 < k < n", "k in [1, 2]", "gate in ['paper', 'switch']", "n not in (1, 2)",
    "n // 3 == 2 and n % 3 == 2", "n / 16 == lr", "-n < 0", "tied", "not tied or k == 2", "n ** 2 == 64", "gate != 'x'",
    "tied == True", "k == 2 or n / 0 == 1",
)  # fmt: skip
FALSE = ("n != 8", "1 < k < 2", "n > k > 3", "k in [1]", "gate == 'switch'", "not tied", "n < 8", "n <= 7", "k >= 3")


@pytest.mark.parametrize("text", TRUE + FALSE)
def test_a_condition_says_what_python_would(text: str) -> None:
    assert condition(text, VALUES)(VALUES) is (text in TRUE)


REFUSED = {
    "m == 2": "unknown name 'm'",
    "__import__('os')": "takes field names",
    "n.real == 8": "has 'n.real'",
    "[n][0] == 8": "takes field names",
    "(lambda: 1)() == 1": "takes field names",
    "n if tied else k": "takes field names",
    "f'{n}' == '8'": "takes field names",
    "n is 8": "compares by Is",
    "n == 8j": "has '8j'",
    "n | k == 2": "takes field names",
    "n ==": "is no expression",
    "n == 8; k": "is no expression",
    "n = 8": "is no expression",
    "": "is no expression",
    "n == 1" + " and n == 1" * 100: "at most 1000 characters",
    "(" * 400 + "n" + ")" * 400: "is no expression",
}


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_anything_else_is_refused_before_it_is_asked(text: str) -> None:
    with pytest.raises(InputError) as error:
        condition(text, VALUES)
    assert REFUSED[text] in str(error.value)


WRONG = {
    "n": "gives 8",
    "n and k": "8 stands where something true or false belongs",
    "gate < 3": "'paper' stands where a number belongs",
    "tied + 1 == 2": "True stands where a number belongs",
    "gate * 3 == 'x'": "stands where a number belongs",
    "n in 3": "stands after in",
    "n in gate": "'paper' stands after in",
    "n / 0 == 1": "division by zero",
    "9 ** 9 ** 9 > 1": "exponent 387420489 is too large",
    "(-n) ** lr == 1": "is no real number",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_value_that_does_not_fit_is_refused_with_the_condition(text: str) -> None:
    holds = condition(text, VALUES)
    with pytest.raises(InputError) as error:
        holds(VALUES)
    assert WRONG[text] in str(error.value)
    assert repr(text) in str(error.value)
