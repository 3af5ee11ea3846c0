"""Building blocks of the configuration: sections, bounds of their fields, and conversion from and to nested tables.

A section is a dataclass. The annotation of a field gives its bounds, as in ``Annotated[int, above(0)]``. A key is the dotted
name of a field, such as ``optim.lr``. Fields marked `Hidden` are no keys: they follow from other fields and do not appear in
files, on the command line or in saved configurations.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

from recurrent_db.errors import UserError

T = TypeVar("T")

MOST_INTEGER = (1 << 63) - 1
"""Largest signed integer of 64 bits."""


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
PositiveInt = Annotated[int, above(0)]
NotNegative = Annotated[float, at_least(0)]
Count = Annotated[int, at_least(0)]
Share = Annotated[float, Bound(lambda value: 0 <= value <= 1, "in [0, 1]")]
ShareBelowOne = Annotated[float, Bound(lambda value: 0 <= value < 1, "in [0, 1)")]

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
    elif isinstance(value, list):
        for item in value:
            _check_value(item, get_args(kind)[0], key)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_value(item, get_args(kind)[1], f"{key}.{name}")
    elif isinstance(value, int | float):
        for bound in bounds:
            need(bound.holds(value), f"{key} must be {bound.words}, got {value}")
        need(not isinstance(value, float) or math.isfinite(value), f"{key} must be finite, got {value}")
        need(not isinstance(value, int) or abs(value) <= MOST_INTEGER, f"{key} must fit into 64 bits")


def check_bounds(section: Any, prefix: str = "") -> None:
    """Check the bounds of all fields of ``section`` and of the sections inside it. Raises `UserError`."""
    for name, kind in _kinds(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{prefix}{_key(name)}.")
        else:
            _check_value(value, kind, prefix + _key(name))


def check(section: Any, config: Any) -> None:
    """Call `Section.check` of ``section`` and of the sections inside it. Raises `UserError`."""
    section.check(config)
    for f in dataclasses.fields(section):
        if isinstance(inside := getattr(section, f.name), Section):
            check(inside, config)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


def _suggest(key: str, known: list[str], root: type) -> str:
    """A hint for an unknown key: keys of the same name in other sections, else the most similar of ``known``."""
    if places := [place for place in keys(root) if place.rpartition(".")[2] == key]:
        return f"; did you mean {' or '.join(map(repr, places))}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"


def _convert(value: Any, kind: Any, where: str, root: type) -> Any:
    """Convert a TOML or JSON value to a field's type: an int to a float, and a whole float such as 4e6 to an int.

    Raises `UserError` for a value of another type.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config key {where} must be a table, got {value!r}")
        return from_dict(typing.cast(type, kind), value, where + ".", root)
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _convert(value, choices[0], where, root)
    if origin is Literal:
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"config key {where} must be one of {', '.join(map(str, choices))}, got {value!r}{hint}")
        return value
    if origin is types.UnionType:
        return None if value is None else _convert(value, choices[0], where, root)
    if origin is list and isinstance(value, list):
        return [_convert(item, choices[0], where, root) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(name): _convert(item, choices[1], where, root) for name, item in value.items()}
    if isinstance(value, int) and abs(value) > MOST_INTEGER:
        raise UserError(f"config key {where} must fit into 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(kind, type) or not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        name = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
        raise UserError(f"config key {where} = {value!r} must be of type {name}")
    return value


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config file {path}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a number with thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from None
