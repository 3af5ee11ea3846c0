"""Building blocks of settings: sections, bounds of their fields, and conversion from files and from command lines.

A section is a dataclass. The annotation of a field gives its bounds, as in ``Annotated[int, above(0)]``. A key is the dotted
name of a field, such as ``optim.lr``. Fields marked `Hidden` are no keys: they follow from other fields and do not appear in
files, on the command line or in saved configurations. A script's arguments are such a dataclass too, so numbers, lists and
paths have one form everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

from recurrent_db.errors import UserError
from recurrent_db.files import expand_user

T = TypeVar("T")

MOST_INTEGER = (1 << 63) - 1
"""Largest signed integer of 64 bits."""
MOST_FLOAT = int(sys.float_info.max)


# ---------------------------------------------------------------------------------------------------------------------
# Fields


@dataclass(frozen=True)
class Bound:
    """A bound on a number."""

    holds: Callable[[float], bool]
    """Whether a number is within the bound; must be False for NaN."""
    words: str
    """The bound in words, for the error message "KEY must be ..."."""


def above(low: float) -> Bound:
    """Numbers greater than ``low``."""
    return Bound(lambda value: value > low, f"above {low}")


def at_least(low: float) -> Bound:
    """Numbers greater than or equal to ``low``."""
    return Bound(lambda value: value >= low, f"{low} or more")


def at_most(high: float) -> Bound:
    """Numbers less than or equal to ``high``.

    Some bounds are far above any useful value. They keep an untrusted configuration from allocating the whole memory.
    """
    return Bound(lambda value: value <= high, f"at most {high}")


Positive = Annotated[float, above(0)]
PositiveInt = Annotated[int, at_least(1)]
NotNegative = Annotated[float, at_least(0)]
Count = Annotated[int, at_least(0)]
Share = Annotated[float, Bound(lambda value: 0 <= value <= 1, "in [0, 1]")]
ShareBelowOne = Annotated[float, Bound(lambda value: 0 <= value < 1, "in [0, 1)")]

_PATH = object()
PathText = Annotated[str, _PATH]
"""Text that is a path or empty. `expand_paths` expands it as a shell does."""

_HIDDEN = object()
Hidden = Annotated[T, _HIDDEN, tyro.conf.Fixed, tyro.conf.Suppress]
"""Marks a field as no key: ``Hidden[bool]``."""


class Section:
    """Base class of the configuration's dataclasses."""

    def check(self, config: Any) -> None:
        """Check that fields do not contradict each other or another section. Bounds have been checked before.

        ``config`` is the whole configuration. Raises `UserError` for a contradiction.
        """


def need(ok: bool, message: str) -> None:
    """Raise `UserError` with ``message`` unless ``ok``."""
    if not ok:
        raise UserError(message)


def _read_kinds(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [f.name for f in dataclasses.fields(kind)]
    return {name: hints[name] for name in names if _HIDDEN not in getattr(hints[name], "__metadata__", ())}


_kinds: Callable[[Any], dict[str, Any]] = functools.cache(_read_kinds)
"""Fields of a section and their types, without hidden fields."""


def _key(name: str) -> str:
    return name.rstrip("_")  # `from_` is written `from`


def keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a section and of the sections inside it."""
    for name, hint in _kinds(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from keys(typing.cast(type, hint), f"{prefix}{_key(name)}.")
        else:
            yield prefix + _key(name)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check_value(value: Any, kind: Any, key: str, bounds: tuple[Bound, ...] = ()) -> None:
    """Check that numbers are within the bounds of the annotation ``kind``, finite, and at most 64 bits long."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        _check_value(value, inner, key, (*bounds, *(mark for mark in marks if isinstance(mark, Bound))))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(item, get_args(kind)[0], key)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_value(item, get_args(kind)[1], f"{key}.{name}")
    elif isinstance(value, int | float):
        need(not isinstance(value, int) or abs(value) <= MOST_INTEGER, f"{key} must fit into 64 bits")
        for bound in bounds:
            need(bound.holds(value), f"{key} must be {bound.words}, got {value}")
        need(not isinstance(value, float) or math.isfinite(value), f"{key} must be finite, got {value}")


def check_bounds(section: Any, prefix: str = "") -> None:
    """Check the bounds of all fields of ``section`` and of the sections inside it. Raises `UserError`.

    ``prefix`` stands before the names in messages. With "--" they are written as options.
    """
    for name, kind in _kinds(type(section)).items():
        value, key = getattr(section, name), prefix + _key(name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
        else:
            _check_value(value, kind, key.replace("_", "-") if key.startswith("--") else key)


def check(section: Any, config: Any) -> None:
    """Call `Section.check` of ``section`` and of the sections inside it. Raises `UserError`."""
    section.check(config)
    for f in dataclasses.fields(section):
        if isinstance(inside := getattr(section, f.name), Section):
            check(inside, config)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _suggest(key: str, known: list[str], root: type) -> str:
    """A hint for an unknown key: keys of the same name in other sections, else the most similar of ``known``."""
    if places := [place for place in keys(root) if place.rpartition(".")[2] == key]:
        return f"; did you mean {' or '.join(map(repr, places))}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"


def plain_type(kind: Any) -> Any:
    """A type without annotations and without None."""
    while get_origin(kind) in (Annotated, types.UnionType):
        kind = get_args(kind)[0]
    return kind


def _may_be_none(kind: Any) -> bool:
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return get_origin(kind) is types.UnionType


_WORDS = {
    int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), bool: ("true or false", "true or false"),
    str: ("text", "names"),
}  # fmt: skip
"""What a value of a type is called, and several of them."""


def _name(kind: Any, several: bool = False) -> str:
    """What a value of the type ``kind`` is, in words."""
    kind = plain_type(kind)
    inside = get_args(kind)
    if get_origin(kind) is Literal:
        return f"{'some' if several else 'one'} of {', '.join(map(str, inside))}"
    if get_origin(kind) in (list, tuple):
        return f"a list of {_name(inside[0], several=True)}"
    if get_origin(kind) is dict:
        return f"a table of {_name(inside[1], several=True)}"
    return _WORDS[kind][several]


def _given(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


class _WrongTypeError(ValueError):
    """A value has another type than its field."""


def _value(value: Any, kind: Any) -> Any:
    """Convert a TOML or JSON value to a field's type: an int to a float, and a whole float such as 4e6 to an int.

    Raises `_WrongTypeError` for a value of another type.
    """
    if value is None and _may_be_none(kind):
        return None
    kind = plain_type(kind)
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal and value in inside:
        return value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_value(item, inside[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(name): _value(item, inside[1]) for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < MOST_FLOAT else math.inf
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if (
        not isinstance(kind, type)
        or origin
        or not isinstance(value, kind)
        or (kind is not bool and isinstance(value, bool))
    ):
        raise _WrongTypeError
    return value


def _convert(value: Any, kind: Any, where: str, root: type) -> Any:
    """`_value` for the key ``where``, which may be a section. Raises `UserError` for a value of another type."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config key {where} must be a table, got {_given(value)}")
        return from_dict(typing.cast(type, kind), value, where + ".", root)
    try:
        return _value(value, kind)
    except _WrongTypeError:
        raise UserError(f"config key {where} must be {_name(kind)}, got {_given(value)}{_hint(value, kind)}") from None


def _hint(value: Any, kind: Any) -> str:
    """The most similar choice of a Literal."""
    choices = [str(choice) for choice in get_args(plain_type(kind))] if get_origin(plain_type(kind)) is Literal else []
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def number(word: str) -> int | float:
    """A number as it is written in files and on command lines: 16384, 16_384, 1.6e4. Raises ValueError for other text."""
    try:
        return int(word)
    except ValueError:
        return float(word)


def _from_word(word: str, kind: Any) -> Any:
    """The TOML value that a word on a command line stands for, in a field of the type ``kind``."""
    if kind in (int, float):
        return number(word)
    return {"true": True, "false": False}[word.lower()] if kind is bool else word


def from_words(words: Sequence[str], kind: Any) -> Any:
    """Read a field of the type ``kind`` from words on a command line.

    The items of a list are separated by commas or spaces. A table is written ``NAME=NUMBER,NAME=NUMBER``.

    Raises:
        ValueError: the words are something else. The message says what the field takes.
    """
    plain = plain_type(kind)
    origin, inside = get_origin(plain), get_args(plain)
    items = " ".join(words).removeprefix("[").removesuffix("]").replace(",", " ").split()
    try:
        if origin in (list, tuple):
            value: Any = [_from_word(item, plain_type(inside[0])) for item in items]
            if not value:
                raise ValueError
        elif origin is dict:
            parts = [part for item in items for part in item.split("=")]
            value = {
                name: _from_word(item, plain_type(inside[1]))
                for name, item in zip(parts[::2], parts[1::2], strict=True)
            }
            if len(value) < len(parts[::2]):
                raise ValueError
        elif words[0] == "None" and _may_be_none(kind):
            value = None
        else:
            value = _from_word(words[0], plain)
        return _value(value, kind)
    except (ValueError, KeyError):
        given, takes = " ".join(words), _name(kind)
        if origin in (list, tuple):
            takes = f"{_name(inside[0], several=True)}, separated by commas"
        elif origin is dict:
            takes = f"pairs NAME=VALUE of a name and {_name(inside[1])}, separated by commas, each name once"
        raise ValueError(f"takes {takes}, got {given!r}{_hint(given, kind)}") from None


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    return Path(expand_user(str(value))) if isinstance(value, Path) else value


def expand_paths(section: Any, expand: Callable[[str], str] = expand_user) -> None:
    """Apply ``expand`` to all paths of ``section`` and of the sections inside it, in place."""
    for name, kind in _kinds(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            expand_paths(value, expand)
        elif _PATH in getattr(kind, "__metadata__", ()):
            setattr(section, name, expand(value))
        elif (expanded := _expanded(value)) != value:
            setattr(section, name, expanded)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and files


def from_dict(kind: type[T], values: dict[str, Any], prefix: str = "", root: type | None = None) -> T:
    """Build the section ``kind`` from nested tables.

    Args:
        kind: the dataclass.
        values: keys and values.
        prefix: dotted name of the section with a final dot, for error messages.
        root: section whose keys are suggested for an unknown key; ``kind`` by default.

    Raises:
        UserError: a key is unknown, or a value has the wrong type.
    """
    kinds = _kinds(kind)
    names = {_key(name): name for name in kinds}
    root = root or kind
    for key in values:
        if key not in names:
            raise UserError(f"unknown config key {prefix + key!r}{_suggest(key, list(names), root)}")
    return kind(**{names[key]: _convert(value, kinds[names[key]], prefix + key, root) for key, value in values.items()})


def to_dict(section: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: nested tables of plain values, ready for JSON. Sections without keys are left out."""
    values = {}
    for name in _kinds(type(section)):
        value = getattr(section, name)
        if not dataclasses.is_dataclass(value):
            values[_key(name)] = value
        elif inside := to_dict(value):
            values[_key(name)] = inside
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises `UserError` if it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no config file {path}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a number with thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from None
