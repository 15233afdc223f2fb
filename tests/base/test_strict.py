"""Tables as dataclasses: strict types, ranges beside the fields, and one line that names place and fix."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from foundry.settings import GenerateSettings, SeedSettings, TeacherSettings
from smelter.base.errors import ConfigError
from smelter.base.strict import _ranges, check_ranges, from_table, read_toml
from smelter.config import DataConfig, DistillationConfig, ModelConfig, TrainingConfig


@dataclass(frozen=True)
class Tray:
    name: str = ""
    loaves: Annotated[int, Ge(1)] = 1

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Oven:
    degrees: Annotated[float, Interval(ge=0, le=300)] = 180.0
    door: Literal["open", "shut"] = "shut"
    minutes: tuple[float, ...] = ()
    humidity: Annotated[float | None, Interval(ge=0, lt=1)] = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    is_hot: bool = False
    tray: Tray = field(default_factory=Tray)
    others: tuple[Tray, ...] = field(default=(), metadata={"key": "other"})

    def __post_init__(self) -> None:
        check_ranges(self)


def test_a_table_becomes_a_dataclass() -> None:
    oven = from_table(
        Oven,
        {
            "degrees": 200,
            "minutes": [1, 2.5],
            "humidity": 0,
            "notes": {"of": ["any", 1]},
            "tray": {"loaves": 3},
            "other": [{"name": "a"}, {"loaves": 2}],
        },
        "oven.toml",
    )
    assert oven == Oven(
        degrees=200.0,
        minutes=(1.0, 2.5),
        humidity=0.0,
        notes={"of": ["any", 1]},
        tray=Tray(loaves=3),
        others=(Tray("a"), Tray(loaves=2)),
    )
    assert [type(number) for number in (oven.degrees, *oven.minutes, oven.humidity)] == [float] * 4


@dataclass(frozen=True)
class Bakery:
    owner: str | None
    trays: dict[str, Tray] = field(default_factory=dict)
    sold: dict[int, int] = field(default_factory=dict)


def test_tables_by_name_and_fields_that_must_be_there() -> None:
    bakery = from_table(Bakery, {"owner": None, "trays": {"a": {"loaves": 2}}, "sold": {"7": 3}}, "bakery.json")
    assert bakery == Bakery(None, {"a": Tray(loaves=2)}, {7: 3})
    with pytest.raises(ConfigError, match=r"^bakery\.json: owner is missing$"):
        from_table(Bakery, {}, "bakery.json")
    assert from_table(Bakery, {}, "bakery.json", bakery) == bakery
    for values, message in (
        ({"trays": {"a": {"loaves": 0}}}, "[trays]: [a]: loaves = 0: must be at least 1"),
        ({"trays": []}, "trays = []: must be a table"),
        ({"sold": {"7": "x"}}, "[sold]: 7 = 'x': must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(f'bakery.json: {message}')}$"):
            from_table(Bakery, {"owner": "x", **values}, "bakery.json")


def test_values_are_laid_over_the_base_also_in_its_tables() -> None:
    base = Oven(degrees=100.0, door="open", tray=Tray("a", 2))
    oven = from_table(Oven, {"degrees": 120, "tray": {"loaves": 5}}, "x", base)
    assert oven == replace(base, degrees=120.0, tray=Tray("a", 5))
    assert from_table(Oven, {}, "x", base) == base


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"degree": 1}, "unknown key 'degree': did you mean 'degrees'?"),
        ({"trey": {}}, "unknown table 'trey': did you mean 'tray'?"),
        ({"others": []}, "unknown key 'others': did you mean 'other'?"),
        ({"tray": {"loafs": 1}}, "[tray]: unknown key 'loafs': did you mean 'loaves'?"),
        ({"tray": 3}, "[tray] must be a table"),
        ({"tray": {"loaves": 1.0}}, "[tray]: loaves = 1.0: must be a whole number"),
        ({"tray": {"loaves": True}}, "[tray]: loaves = True: must be a whole number"),
        ({"tray": {"loaves": 0}}, "[tray]: loaves = 0: must be at least 1"),
        ({"tray": {"name": 0}}, "[tray]: name = 0: must be text in quotes"),
        ({"other": {}}, "[other] must be written [[other]]: there can be several"),
        ({"other": [1]}, "[[other]] number 1 must be a table"),
        ({"other": [{}, {"loaves": 0}]}, "[[other]] number 2: loaves = 0: must be at least 1"),
        ({"other": [{"name": "a", "loaves": "1"}]}, "[[other]] a: loaves = '1': must be a whole number"),
        ({"degrees": "1"}, "degrees = '1': must be a number"),
        ({"degrees": True}, "degrees = True: must be a number"),
        ({"degrees": math.inf}, "degrees = inf: must be a finite number"),
        ({"degrees": 301}, "degrees = 301.0: must lie between 0 and 300"),
        ({"humidity": "wet"}, "humidity = 'wet': must be a number"),
        ({"humidity": 1}, "humidity = 1.0: must lie in [0, 1)"),
        ({"humidity": math.nan}, "humidity = nan: must be a finite number"),
        ({"door": "ajar"}, "door = 'ajar': must be one of 'open', 'shut'"),
        ({"door": []}, "door = []: must be one of 'open', 'shut'"),
        ({"minutes": 1}, "minutes = 1: must be a list"),
        ({"minutes": [1, "2"]}, "minutes = '2': must be a number"),
        ({"minutes": [1, math.nan]}, "minutes = nan: must be a finite number"),
        ({"notes": 1}, "notes = 1: must be a table"),
        ({"is_hot": 1}, "is_hot = 1: must be true or false"),
    ],
)
def test_nothing_is_guessed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_table(Oven, values, "oven.toml")
    assert str(error.value).replace("oven.toml: ", "", 1) == message


@pytest.mark.parametrize(
    ("mark", "outside", "inside", "demand"),
    [
        ((Gt(0),), (0, -1), (1,), "must be positive"),
        ((Gt(2),), (2, 1), (3,), "must be above 2"),
        ((Ge(0),), (-1,), (0, 1), "must not be negative"),
        ((Ge(2),), (1,), (2, 3), "must be at least 2"),
        ((Lt(2),), (2, 3), (1,), "must be below 2"),
        ((Le(2),), (3,), (2, 1), "must be at most 2"),
        ((Interval(ge=1, le=3),), (0, 4), (1, 3), "must lie between 1 and 3"),
        ((Interval(ge=1, lt=3),), (0, 3), (1, 2), "must lie in [1, 3)"),
        ((Interval(gt=1, lt=3),), (1, 3), (2,), "must lie between 1 and 3, both excluded"),
        ((Interval(gt=1, le=3),), (1, 4), (2, 3), "must lie above 1 and at most at 3"),
        ((Ge(1), Le(3)), (0, 4), (1, 3), "must lie between 1 and 3"),
        ((Ge(0), "must be rare"), (-1,), (0,), "must be rare"),
    ],
)
def test_a_range_and_its_words(
    mark: tuple[Any, ...], outside: tuple[int, ...], inside: tuple[int, ...], demand: str
) -> None:
    @dataclass(frozen=True)
    class Table:
        key: Annotated[(int, *mark)] = inside[0]

        def __post_init__(self) -> None:
            check_ranges(self)

    for value in inside:
        assert Table(value).key == value
    for value in outside:
        for make in (Table, lambda value: replace(Table(), key=value)):
            with pytest.raises(ConfigError) as error:
                make(value)
            assert str(error.value) == f"key = {value}: {demand}"


def just_outside(bounds: dict[str, Any], is_float: bool) -> list[float]:
    """The values nearest to a range that are not in it."""
    steps = {"gt": 0, "ge": -1, "lt": 0, "le": 1}
    return [
        math.nextafter(bound, steps[name] * math.inf) if is_float and steps[name] else bound + steps[name]
        for name, bound in bounds.items()
    ]


LOCAL = {"name": "a", "backend": "local"}
TABLES: list[tuple[type[Any], dict[str, Any]]] = [
    *((kind, {}) for kind in (ModelConfig, DataConfig, DistillationConfig, TrainingConfig)),
    *((kind, {}) for kind in (SeedSettings, GenerateSettings)),
    (TeacherSettings, LOCAL),
]


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [(kind, values, item.name) for kind, values in TABLES for item in fields(kind)],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_every_range_of_both_programs_holds(kind: type[Any], values: dict[str, Any], key: str) -> None:
    bounds, demand = _ranges(kind)[key]  # type: ignore[arg-type]
    is_float = "float" in str(kind.__dataclass_fields__[key].type)
    for value in just_outside(bounds, is_float):
        with pytest.raises(ConfigError) as error:
            kind(**values | {key: value})
        assert str(error.value) == f"{key} = {value}: {demand}"
    if is_float:
        for value in (math.inf, -math.inf, math.nan):
            is_list = isinstance(kind.__dataclass_fields__[key].default, tuple)
            with pytest.raises(ConfigError, match=f"^{key} = {value}: must be a finite number$"):
                kind(**values | {key: (value,) if is_list else value})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=r": cannot read the oven: .+: check the path$") as error:
            read_toml(path, "oven")
        assert str(error.value).startswith(f"{path}: ")
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    (tmp_path / "open.toml").write_text("[oven\n")
    for name in ("latin", "open"):
        with pytest.raises(ConfigError, match=rf"{name}\.toml: not valid TOML: "):
            read_toml(tmp_path / f"{name}.toml", "oven")
    (tmp_path / "good.toml").write_text("[oven]\ndegrees = 1\n")
    assert read_toml(tmp_path / "good.toml", "oven") == {"oven": {"degrees": 1}}
    marked = tmp_path / "marked.toml"
    marked.write_text((tmp_path / "good.toml").read_text(), encoding="utf-8-sig")
    assert read_toml(marked, "oven") == {"oven": {"degrees": 1}}
