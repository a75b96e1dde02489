"""What a person may give, and how a refusal reads: ``field=value; allowed: ...``.

A range is written as it is read, so that what is checked and what is said cannot differ:

    0 to 1      ends included          > 0, < 1    any of >=, >, <=, < joined by commas
    >= 1                               ""          any number that is finite
"""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal, Union, get_args, get_origin

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_NAMES = {type(None): "null", float: "a number", int: "a whole number", str: "text"}


class Interrupted(RuntimeError):
    """Something that a run needs has failed; what was recorded can be continued."""


class UsageError(ValueError):
    """Something that a person gave is wrong; its message is one line that says what is allowed."""


def check_ranges(values: Any, path: str = "", **allowed: str) -> None:
    """Compare numbers with their ranges.

    Args:
        values: a mapping, or an object with the fields as attributes; of a tuple every member
            counts.
        path: where the fields stand, with a closing dot.
        **allowed: ranges by field.

    Raises:
        UsageError: a value outside its range, not finite, or no number.
    """
    for name, wanted in allowed.items():
        value = values[name] if isinstance(values, Mapping) else getattr(values, name)
        if not all(_within(v, wanted) for v in (value if isinstance(value, tuple) else [value])):
            raise UsageError(f"{path}{name}={value!r}; allowed: {wanted or 'a finite number'}")


def _within(value: Any, wanted: str) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        return False
    if " to " in wanted:
        wanted = ">= {}, <= {}".format(*wanted.split(" to "))
    bounds = (bound.split() for bound in wanted.split(", ") if bound)
    # A whole bound stays whole: as a float 2**63 - 1 would be 2**63.
    return all(
        _COMPARE[sign](value, int(bound) if bound.isdigit() else float(bound))
        for sign, bound in bounds
    )


def matches(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type; True where an annotation tells nothing of data.

    A whole number is a number, and a list serves as a tuple: files and specs know no other.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in inner)
    if origin in (tuple, list):
        if not isinstance(value, tuple | list):
            return False
        if origin is list or inner[-1] is ...:
            inner = inner[:1] * len(value)
        return len(value) == len(inner) and all(map(matches, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(
            matches(k, inner[0]) and matches(v, inner[1]) for k, v in value.items()
        )
    if hint not in (bool, int, float, str, type(None)):
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], path: str = "") -> None:
    """Compare values with their annotated types.

    Args:
        values: by field.
        hints: annotations by field; what has none may be anything.
        path: where the fields stand, with a closing dot.

    Raises:
        UsageError: a value of another type.
    """
    for name, value in values.items():
        if not matches(value, hints.get(name, Any)):
            raise UsageError(f"{path}{name}={value!r}; allowed: {in_words(hints[name])}")


def in_words(hint: Any) -> str:
    """An annotated type, as a message says it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(option) for option in inner)
    if origin is tuple and inner[-1] is not ...:
        return f"{len(inner)} values: {', '.join(map(in_words, inner))}"
    if origin in (tuple, list):
        return f"a list of {in_words(inner[0])}"
    if origin is dict:
        return f"{in_words(inner[0])}: {in_words(inner[1])} pairs"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


@contextmanager
def blamed_on(what: str, allowed: str) -> Iterator[None]:
    """Around something of a person's own that is loaded or built: any failure is a refusal.

    Raises:
        UsageError: the block failed; names ``what``, the failure, and what is allowed.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{what} ({reason}); allowed: {allowed}") from error
