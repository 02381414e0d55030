"""Types and value ranges of arguments, as annotations of signatures.

`check_annotations` enforces them in Python, and `dinoseg.config.nodes` in config files. Both name the parameter;
`dinoseg.utils.errors.name_parameters` puts the config key in front.
"""

import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, SupportsIndex, TypeVar, Union, get_args, get_origin

from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_override, format_text, format_value

P = ParamSpec("P")
R = TypeVar("R")
_LIST = (list, tuple)
_LONGEST_VALUE = 200  # characters of a value in a message
_PLAIN: dict[Any, Any] = {  # annotation to the types that a config may give for it
    **{int: Integral, float: Real, str: str, bool: bool, NoneType: NoneType},
    **{Path: (str, Path), PathLike: PathLike, Sequence: _LIST, Iterable: _LIST, tuple: _LIST, Mapping: Mapping},
    Callable: Callable,
}
_CONFIG_WORDS: dict[Any, str] = {  # types in messages about configs
    **{int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"},
    **{Path: "a path", PathLike: "a path", Mapping: "a mapping", Callable: "a function"},
}
_PYTHON_WORDS = {**_CONFIG_WORDS, bool: "True or False", NoneType: "None"}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a path": "paths"}
_PLAIN_VALUES = (NoneType, bool, int, float, str, *_LIST, Mapping)


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
        raise UserError(f"{name}={format_value(value)}: give {rule.rule}.")
    return operator.index(value)


INTEGERS = Range("a whole number")
AT_LEAST_1 = Range("a whole number of at least 1", 1)
Count = Annotated[int, AT_LEAST_1]
Few = Annotated[int, Range("a whole number from 1 to 16", 1, 16)]
UpTo255 = Annotated[int, Range("a whole number from 1 to 255", 1, 255)]
Channels = Annotated[int, Range("a whole number from 1 to 1024", 1, 1024)]
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
OnError = Literal["stop", "skip"]  # what an unreadable file does
RateFactor = Annotated[float, Range("a number from 0 to 100", 0, 100)]


def check_annotations(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that refuses arguments of another type or range than its annotations.

    Numbers may be those of another library, such as NumPy's. Those of `*args` are not checked.
    """
    signature = inspect.signature(function)
    annotations = {
        each.name: Any if each.kind is each.VAR_POSITIONAL else each.annotation
        for each in signature.parameters.values()
    }

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            check_value(name, value, annotations[name], _PYTHON_WORDS)
        return function(*args, **kwargs)

    return wrapper


def check_value(name: str, value: Any, annotation: Any, words: Mapping[Any, str] = _CONFIG_WORDS) -> None:
    """Refuse a value of another type or range than an annotation.

    Args:
        name: of the value, for the message.
        value: any object; types that are not in `_PLAIN` are not checked.
        annotation: a type, with ranges.
        words: for types in the message.

    Raises:
        UserError: naming the value and what the annotation allows.
    """
    rules = _find_broken_rules(value, annotation)
    if rules == []:
        return
    shown = format_override(value) if isinstance(value, str) else format_text(str(value), _LONGEST_VALUE)
    given = words[NoneType] if value is None else shown
    if rules is None:
        remedy = _explain_type(name, value, annotation, words)
        raise UserError(f"{name}={given} is of type {_type_name(value)}. {remedy}")
    if isinstance(value, str):
        raise UserError(f"{name}={given} is unknown. Choose {_describe_type(annotation, words)}.")
    rules += [words[NoneType]] * (NoneType in get_args(annotation))
    raise UserError(f"{name}={given} is out of range. Give {', or '.join(dict.fromkeys(rules))}.")


def _find_broken_rules(value: Any, annotation: Any) -> list[str] | None:
    """Return the rules of the ranges that a value violates; None if it is of another type.

    Of a union, the member counts whose rules fit best. Types that are not in `_PLAIN` allow everything.
    """
    ranges = [rule for rule in get_args(annotation) if isinstance(rule, Range)]
    annotation = _strip_ranges(annotation)
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if isinstance(value, Mapping) and "_target_" in value:  # a part, whose own arguments are checked
        return []
    if kind in (Union, UnionType):
        members = [_find_broken_rules(value, member) for member in arguments]
        return min((rules for rules in members if rules is not None), key=len, default=None)
    if kind is Literal:
        if not isinstance(value, str):
            return None
        return [] if value in arguments else [_describe_type(annotation, _CONFIG_WORDS)]
    if not _is_of_kind(value, kind, arguments):
        return None
    if isinstance(value, Real) and not isinstance(value, bool):
        number = value if isinstance(value, int) else float(value)
        finite = [] if abs(number) <= sys.float_info.max else ["a finite number"]  # integers may be larger
        return [rule.rule for rule in ranges if number not in rule] or finite
    of_items = [_find_broken_rules(*item) for item in _items(value, kind, arguments)]
    if None in of_items:
        return None
    return [f"{rule.removesuffix(' for each')} for each" for rules in of_items for rule in rules or ()]


def _is_of_kind(value: Any, kind: Any, arguments: Sequence[Any]) -> bool:
    """Return whether a value, apart from its items, is of a type with these arguments."""
    if isinstance(value, bool) and kind in (int, float):
        return False
    if _is_part(kind) and isinstance(value, _PLAIN_VALUES):
        return isinstance(value, kind)
    if not isinstance(value, _PLAIN.get(kind, object)):
        return False
    return kind is not tuple or arguments[1:] == (...,) or len(value) == len(arguments)


def _is_part(kind: Any) -> bool:
    """Return whether a type is a class of this package, which a config describes by a `_target_`."""
    return inspect.isclass(kind) and kind.__module__.partition(".")[0] == "dinoseg"


def _items(value: Any, kind: Any, arguments: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return the items of a list or mapping, each with its annotation."""
    if not arguments:
        return []
    if _PLAIN.get(kind) is _LIST:
        return [(item, arguments[0]) for item in value]
    return [(item, arguments[1]) for item in value.values()] if _PLAIN.get(kind) is Mapping else []


def _strip_ranges(annotation: Any) -> Any:
    """Return an annotation without its ranges."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _explain_type(name: str, value: Any, annotation: Any, words: Mapping[Any, str]) -> str:
    """Return what to give instead of a value of another type, in Python, on the command line or in a YAML file."""
    kind = _describe_type(annotation, words)
    if _is_part(_strip_ranges(annotation)):
        return f"A config describes a {kind} by a group of keys: set one of them, as {name}.KEY=VALUE."
    remedy = f"Give {kind}."
    if not isinstance(value, _LIST) and _find_broken_rules([value], annotation) is not None:
        remedy += f" A list is written in brackets: {name}=[{value}]."
    elif isinstance(value, bool) and _find_broken_rules("off", annotation) is not None:
        remedy += ' In a YAML file, off, on, yes and no mean false and true: write such a word in quotes ("off").'
    return remedy


def _describe_type(annotation: Any, words: Mapping[Any, str]) -> str:
    """Return the values that an annotation allows, in words, such as `a whole number or null`."""
    annotation = _strip_ranges(annotation)
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return " or ".join(_describe_type(member, words) for member in arguments)
    if kind is Literal:
        return arguments[0] if len(arguments) == 1 else f"one of {', '.join(arguments)}"
    if _PLAIN.get(kind) is _LIST:
        count = "" if kind is not tuple or ... in arguments else f"{len(arguments)} "
        return f"a list of {count}{_describe_items(arguments[0], words)}" if arguments else "a list"
    if _PLAIN.get(kind) is Mapping and arguments:
        return f"a mapping to {_describe_items(arguments[1], words)}"
    return str(words.get(kind) or getattr(kind, "__name__", kind))


def _describe_items(annotation: Any, words: Mapping[Any, str]) -> str:
    """Return the items that an annotation of a list allows, in words, such as `texts or lists of texts`."""
    annotation = _strip_ranges(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_describe_items(member, words) for member in get_args(annotation))
    kind = _describe_type(annotation, words)
    return _PLURALS.get(kind, kind.replace("a list", "lists", 1))


def _type_name(value: Any) -> str:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, _LIST) else ()
    inner = sorted({type(item).__name__ for item in items})
    return type(value).__name__ + (f" of {' and '.join(inner)}" if inner else "")
