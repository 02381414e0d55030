"""Types and value ranges of arguments, as annotations of signatures.

`check_annotations` enforces them in Python, and `dinoseg.config.checks` in config files, where it names the whole key.
"""

import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ParamSpec, SupportsIndex, TypeVar, Union, get_args, get_origin

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

P = ParamSpec("P")
R = TypeVar("R")
LIST = (list, tuple)
_LONGEST_VALUE = 200  # characters of a value in a message
PLAIN: dict[Any, Any] = {  # annotation to the types that a config may give for it
    **{int: Integral, float: Real, str: str, bool: bool, NoneType: NoneType},
    **{Path: (str, Path), Sequence: LIST, Iterable: LIST, tuple: LIST, Mapping: Mapping},
}
_WORDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"},
    **{Path: "a path", Mapping: "a mapping"},
}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a path": "paths"}
_PLAIN_VALUES = (NoneType, bool, int, float, str, *LIST, Mapping)


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, described by `rule`.

    Args:
        rule: what to give, such as "a number above 0".
        least: the smallest number.
        most: the largest number.
        open_at: ends that are excluded.
    """

    rule: str
    least: float = -math.inf
    most: float = math.inf
    open_at: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        """Return whether a number lies in the range."""
        return self.least <= value <= self.most and value not in self.open_at


def whole_number(value: Any, name: str, rule: Range) -> int:
    """Return an argument as an int, which may be an integer of another library, such as NumPy's.

    Args:
        value: of the argument.
        name: of the argument.
        rule: its allowed values.

    Raises:
        UserError: it is no integer, or outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or operator.index(value) not in rule:
        raise UserError(f"{name}={value}: give {rule.rule}.")
    return operator.index(value)


INTEGERS = Range("a whole number")
AT_LEAST_1 = Range("a whole number of at least 1", 1)
Count = Annotated[int, AT_LEAST_1]
Few = Annotated[int, Range("a whole number from 1 to 16", 1, 16)]
UpTo255 = Annotated[int, Range("a whole number from 1 to 255", 1, 255)]
Natural = Annotated[int, Range("a whole number of at least 0", 0)]
Byte = Annotated[int, Range("a whole number from 0 to 255", 0, 255)]
Positive = Annotated[float, Range("a number above 0", 0, open_at=(0,))]
NotNegative = Annotated[float, Range("a number of at least 0", 0)]
Share = Annotated[float, Range("a number from 0 to 1", 0, 1)]
LowShare = Annotated[float, Range("a number of at least 0 and below 1", 0, 1, open_at=(1,))]
HighShare = Annotated[float, Range("a number above 0 and at most 1", 0, 1, open_at=(0,))]
Scale = Annotated[float, Range("a number above 0 and at most 16", 0, 16, open_at=(0,))]
HalfShare = Annotated[float, Range("a number from 0 to 0.5", 0, 0.5)]
Temperature = Annotated[float, Range("a number from 0.01 to 100", 0.01, 100)]
OpenShare = Annotated[float, Range("a number above 0 and below 1", 0, 1, open_at=(0, 1))]
LEARNING_RATES = Range("a number above 0 and at most 100", 0, 100, open_at=(0,))
LearningRate = Annotated[float, LEARNING_RATES]
RateFactor = Annotated[float, Range("a number from 0 to 100", 0, 100)]
# RGB statistics are those of images in 0..1: means in 0..1, standard deviations up to 0.5. A model that takes values of
# another scale expresses it by them, such as 0..255 by mean 0 and std 1 / 255.
MEANS = Range("a number from -1 to 2 (of images in 0..1; divide statistics of 0..255 by 255)", -1, 2)
DEVIATIONS = Range("a number from 0.001 to 10 (of images in 0..1; divide statistics of 0..255 by 255)", 0.001, 10)
ColourMean = Annotated[float, MEANS]
ColourStd = Annotated[float, DEVIATIONS]


def check_annotations(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that refuses arguments of another type or range than its annotations.

    Numbers may be those of another library, such as NumPy's.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check_value(name, value, signature.parameters[name].annotation)
        return function(*args, **kwargs)

    return checked


def check_value(name: str, value: Any, annotation: Any, remedy: str | None = None) -> None:
    """Refuse a value of another type or range than an annotation.

    Args:
        name: of the value, for the message.
        value: any object; types that are not in `PLAIN` are not checked.
        annotation: a type, with ranges.
        remedy: what to do about another type; None: the allowed types.

    Raises:
        UserError: naming the value and what the annotation allows.
    """
    if not matches(value, annotation):
        remedy = remedy or f"Give {describe_type(annotation)}."
        raise UserError(f"{name}={_format_argument(value)} is of type {_type_name(value)}. {remedy}")
    rules = _broken_rules(value, annotation)
    if rules:
        rules += ["null"] * (NoneType in get_args(annotation))
        raise UserError(f"{name}={_format_argument(value)} is out of range. Give {', or '.join(dict.fromkeys(rules))}.")


def matches(value: Any, annotation: Any) -> bool:
    """Return whether a config value matches an annotation; annotations that are not in `PLAIN` allow everything."""
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    annotation = bare(annotation)
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(matches(value, part) for part in get_args(annotation))
    if isinstance(value, bool) and kind in (int, float):
        return False
    if is_part(kind) and isinstance(value, _PLAIN_VALUES):
        return isinstance(value, kind)
    if isinstance(value, LIST) and kind is tuple and get_args(annotation)[1:] != (...,):
        return len(value) == len(get_args(annotation)) and all(map(matches, value, get_args(annotation)))
    parts = _parts(value, annotation)
    return isinstance(value, PLAIN.get(kind, object)) and all(matches(item, part) for item, part in parts)


def _broken_rules(value: Any, annotation: Any) -> list[str]:
    """Return the rules of the ranges that a value of the right type violates.

    For a union, the list is empty if the value satisfies one member.
    """
    ranges = [rule for rule in get_args(annotation) if isinstance(rule, Range)]
    annotation = bare(annotation)
    if get_origin(annotation) in (Union, UnionType):
        broken = [_broken_rules(value, part) for part in get_args(annotation) if matches(value, part)]
        return [] if [] in broken else sum(broken, [])
    if isinstance(value, Real) and not isinstance(value, bool):
        number = value if isinstance(value, int) else float(value)
        finite = [] if abs(number) <= sys.float_info.max else ["a finite number"]  # integers may be larger
        return [rule.rule for rule in ranges if number not in rule] or finite
    of_items = [f"{rule} for each" for item, part in _parts(value, annotation) for rule in _broken_rules(item, part)]
    return [rule.replace(" for each for each", " for each") for rule in of_items]


def is_part(kind: Any) -> bool:
    """Return whether a type is a class of this package, which a config describes by a `_target_`."""
    return inspect.isclass(kind) and kind.__module__.partition(".")[0] == "dinoseg"


def _parts(value: Any, annotation: Any) -> list[tuple[Any, Any]]:
    """Return the items of a list or mapping, each with its annotation."""
    arguments = get_args(annotation)
    kind = PLAIN.get(get_origin(annotation))
    if kind is LIST and isinstance(value, LIST):
        return [(item, arguments[0]) for item in value]
    if kind is Mapping and isinstance(value, Mapping):
        return [(item, arguments[1]) for item in value.values()]
    return []


def bare(annotation: Any) -> Any:
    """Return an annotation without its ranges."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def describe_type(annotation: Any) -> str:
    """Return the values that an annotation allows, in words, such as `a whole number or null`."""
    annotation = bare(annotation)
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return " or ".join(map(describe_type, arguments))
    if PLAIN.get(kind) is LIST:
        count = "" if kind is not tuple or ... in arguments else f"{len(arguments)} "
        return f"a list of {count}{_PLURALS.get(describe_type(arguments[0]), 'lists')}" if arguments else "a list"
    return str(_WORDS.get(kind) or getattr(kind, "__name__", kind))


def _type_name(value: Any) -> str:
    inner = sorted({type(item).__name__ for item in value}) if isinstance(value, LIST) else []
    return type(value).__name__ + (f" of {' and '.join(inner)}" if inner else "")


def _format_argument(value: Any) -> str:
    return "null" if value is None else format_value(str(value), _LONGEST_VALUE)
