"""Tables, of TOML or JSON, as frozen dataclasses: read strictly, with the ranges of the values beside the fields.

    @dataclass(frozen=True)
    class Oven:
        degrees: Annotated[float, Interval(ge=0, le=300)] = 180.0

        def __post_init__(self) -> None:
            check_ranges(self)

Reading guesses nothing: an unknown key is an error that names the nearest known one, and a value is of its annotated
type. Ranges are those of the package annotated-types; a text beside one says in better words what it demands. They hold
however the dataclass is made: from a table, by its constructor, by `dataclasses.replace` or on the command line. Its
own errors begin with the key; reading puts file and table before it: `x.toml: [oven]: degrees = 301.0: must lie ...`.
"""

import math
import operator
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from smelter.base.errors import ConfigError, nearest, require

T = TypeVar("T")

HOLDS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
TYPE_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def read_toml(path: Path | str, what: str) -> dict[str, Any]:
    """The tables of a file, a `what` in errors. Raises ConfigError that names the file and the line of bad syntax."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the {what}: {error.strerror}: check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def from_table(kind: type[T], values: Any, where: str, base: T | None = None) -> T:
    """A dataclass with the values of a table laid over `base`, or over its defaults; it may hold dataclasses in turn.

    A field's key is its name, or the "key" of its metadata; one without a default must be in the table. Raises
    ConfigError that names `where`, the key, and the nearest known one or the fix.
    """
    require(isinstance(values, dict), f"{where} must be a table")
    known = {item.metadata.get("key", item.name): item.name for item in fields(kind)}  # type: ignore[arg-type]
    needed = {item.name for item in fields(kind) if item.default is item.default_factory is MISSING}  # type: ignore[arg-type]
    for key, name in known.items():
        require(key in values or name not in needed or base is not None, f"{where}: {key} is missing")
    for key, value in values.items():
        what = "table" if isinstance(value, dict) else "key"
        require(key in known, f"{where}: unknown {what} {key!r}: {nearest(key, known)}")
    hints = get_type_hints(kind)
    checked = {
        known[key]: _checked(value, hints[known[key]], where, key, getattr(base, known[key], None))
        for key, value in values.items()
    }
    try:
        return kind(**checked) if base is None else replace(base, **checked)  # type: ignore[type-var]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _checked(value: Any, hint: Any, table: str, key: str, base: Any = None) -> Any:
    """`value` as the annotated type, without guessing: an int may stand for a float, a list for a tuple."""
    where, origin, args = f"{table}: {key} = {value!r}", get_origin(hint), get_args(hint)
    if _is_table(hint):
        return from_table(hint, value, f"{table}: [{key}]", base)
    if origin is UnionType:
        (hint,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else _checked(value, hint, table, key)
    if origin is Literal:
        require(value in args, f"{where}: must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple and _is_table(args[0]):
        require(isinstance(value, list), f"{table}: [{key}] must be written [[{key}]]: there can be several")
        tables = []
        for number, item in enumerate(value, start=1):
            name = item.get("name") if isinstance(item, dict) else None
            tables.append(from_table(args[0], item, f"{table}: [[{key}]] {name or f'number {number}'}"))
        return tuple(tables)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where}: must be a list")
        return tuple(_checked(item, args[0], table, key) for item in value)
    if origin in (dict, Mapping):
        require(isinstance(value, dict), f"{where}: must be a table")
        if args[1] is Any:
            return value
        return {args[0](name): _checked(entry, args[1], f"{table}: [{key}]", name) for name, entry in value.items()}
    if hint is float and type(value) is int:
        value = float(value)
    require(type(value) is hint, f"{where}: must be {TYPE_NAMES[hint]}")
    return value


def _is_table(hint: Any) -> bool:
    return hasattr(hint, "__dataclass_fields__")


def check_ranges(table: Any, *, as_options: bool = False) -> None:
    """ConfigError that names the first value of a dataclass which is not finite, or not in the range beside its field.

    A list's numbers must be finite too; None is in every range. `as_options` names it as the command line does.
    """
    for key, (bounds, demand) in _ranges(table.__class__).items():
        value = getattr(table, key)
        if as_options:
            key = f"--{key.replace('_', '-')}"
        for number in value if isinstance(value, tuple) else (value,):
            is_finite = not isinstance(number, float) or math.isfinite(number)
            require(is_finite, f"{key} = {number}: must be a finite number")
        is_inside = value is None or all(HOLDS[name](value, bound) for name, bound in bounds.items())
        require(is_inside, f"{key} = {value}: {demand}")


@cache
def _ranges(kind: type[Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Of each field the bounds beside it (`{"ge": 0, "lt": 1}`), and in words what they demand."""
    ranges = {}
    for key, hint in get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        pairs = ((name, getattr(mark, name, None)) for mark in marks for name in HOLDS)
        bounds = {name: bound for name, bound in pairs if bound is not None}
        ranges[key] = (bounds, next((mark for mark in marks if isinstance(mark, str)), _demand(bounds)))
    return ranges


def _demand(bounds: dict[str, Any]) -> str:
    match bounds:
        case {"ge": low, "le": high}:
            return f"must lie between {low} and {high}"
        case {"ge": low, "lt": high}:
            return f"must lie in [{low}, {high})"
        case {"gt": low, "le": high}:
            return f"must lie above {low} and at most at {high}"
        case {"gt": low, "lt": high}:
            return f"must lie between {low} and {high}, both excluded"
        case {"gt": low}:
            return "must be positive" if low == 0 else f"must be above {low}"
        case {"ge": low}:
            return "must not be negative" if low == 0 else f"must be at least {low}"
        case {"le": high}:
            return f"must be at most {high}"
        case {"lt": high}:
            return f"must be below {high}"
    return ""
