"""Conditions on runs, such as ``top_k <= n_experts``: Python's syntax, read as a tree and never executed as code.

A condition has names of fields, numbers, strings, True and False, lists after ``in``, comparisons (chained too),
``+ - * / // % **`` on numbers, ``and``, ``or``, ``not`` and parentheses. Nothing else: no call, no attribute, no index.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moesaic.bench.plan import InputError, closest

Values = Mapping[str, object]
Condition = Callable[[Values], bool]
_Part = Callable[[Values], Any]

MOST_CHARACTERS = 1000
"""Longest condition: a deeper tree than Python's own recursion takes cannot be written in it."""
MOST_POWER = 64
"""Largest exponent: a tower of powers would take all memory."""
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_SAME: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_AMONG: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
ALLOWED = "field names, numbers, strings, lists after in, comparisons, + - * / // % **, and, or, not"


def condition(text: str, names: Iterable[str]) -> Condition:
    """What ``text`` says of a run's fields, as a function of their values.

    Args:
        text: the condition.
        names: the fields that it may name.

    Raises:
        InputError: it is no such expression, or names an unknown field. The function raises it too: for text where a
            number belongs, a division by zero, and a result that is neither true nor false.
    """
    known = list(names)
    try:
        if len(text) > MOST_CHARACTERS:
            raise InputError(f"takes at most {MOST_CHARACTERS} characters, got {len(text)}")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(f"is no expression: {getattr(error, 'msg', error)}; takes {ALLOWED}") from error
        part = _compile(tree.body, known)
    except InputError as error:
        raise InputError(f"where {text!r}: {error}") from error

    def holds(values: Values) -> bool:
        try:
            result = part(values)
            if not isinstance(result, bool):
                raise InputError(f"gives {result!r}; takes what is true or false, such as a comparison")
        except (InputError, ArithmeticError) as error:
            raise InputError(f"where {text!r}: {error}") from error
        return result

    return holds


def _compile(node: ast.expr, names: list[str]) -> _Part:
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            value = node.value
            return lambda values: value
        case ast.Name(id=name):
            if name not in names:
                raise InputError(f"unknown name {name!r}{closest(name, names)}; takes {', '.join(names)}")
            return lambda values: values[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            parts = [_compile(item, names) for item in items]
            return lambda values: [part(values) for part in parts]
        case ast.BoolOp(op=op, values=operands):
            terms = [_compile(operand, names) for operand in operands]
            every = isinstance(op, ast.And)
            return lambda values: (all if every else any)(_truth(term(values)) for term in terms)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _compile(operand, names)
            return lambda values: not _truth(inner(values))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _compile(operand, names)
            return lambda values: -_number(inner(values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            one, other = _compile(left, names), _compile(right, names)
            return _arithmetic(_ARITHMETIC[type(op)], one, other, power=isinstance(op, ast.Pow))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [_compile(side, names) for side in (left, *comparators)]
            tests = [_comparison(op) for op in ops]
            return lambda values: _chain(tests, sides, values)
        case _:
            raise InputError(f"has {ast.unparse(node)!r}; takes {ALLOWED}")


def _arithmetic(work: Callable[[Any, Any], Any], one: _Part, other: _Part, *, power: bool) -> _Part:
    def result(values: Values) -> Any:
        a, b = _number(one(values)), _number(other(values))
        if power and abs(b) > MOST_POWER:
            raise InputError(f"the exponent {b} is too large: takes at most {MOST_POWER}")
        found = work(a, b)
        if isinstance(found, complex):
            raise InputError(f"{a} ** {b} is no real number")
        return found

    return result


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], bool]:
    kind = type(op)
    if kind in _ORDER:
        order = _ORDER[kind]
        return lambda a, b: order(_number(a), _number(b))
    if kind in _SAME:
        same = _SAME[kind]
        return lambda a, b: same(a, b)
    if kind in _AMONG:
        among = _AMONG[kind]
        return lambda a, b: among(a, _list(b))
    raise InputError(f"compares by {kind.__name__}; takes < <= > >= == != in")


def _chain(tests: list[Callable[[Any, Any], bool]], sides: list[_Part], values: Values) -> bool:
    left = sides[0](values)
    for test, side in zip(tests, sides[1:], strict=True):
        right = side(values)
        if not test(left, right):
            return False
        left = right
    return True


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{value!r} stands where a number belongs")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{value!r} stands where something true or false belongs, such as a comparison")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{value!r} stands after in, which takes a list such as [1, 2]")
    return value
