"""foundry.toml: which teachers, how they work together, and what they are asked. Frozen and strict.

Three tables: `[generate]` (strategy, in flight, spending cap), `[seeds]` (what is asked) and one `[[teacher]]` for each
teacher. An unknown key is an error that names the nearest known one. The file never holds a key: `key_env` names the
environment variable that does, so the file can be shared and committed. Paths are relative to the current folder, as
everywhere on the command line.
"""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from smelter.base import UserError, nearest

Strategy = Literal["all", "round_robin", "weighted", "fallback", "cascade", "best_of"]
Backend = Literal["openai", "opencode", "transformers", "local"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SeedSettings:
    """What is asked."""

    builtin: bool = True
    """Use the seeds that come with Foundry."""
    files: tuple[str, ...] = ()
    """Your own seeds: text files (a prompt a line) or JSONL."""
    corpus: tuple[str, ...] = ()
    """Code for code-seeded prompts: JSONL files of records, or "stdlib"."""
    kinds: tuple[str, ...] = ()
    """Kinds of code-seeded prompts: oss_instruct, docstring_to_body, body_to_docstring, body_to_tests, body_to_calls.
    Empty: all."""
    count: int = 1_000
    """Number of seeds."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        _require(self.count >= 1, f"count = {self.count}: must be at least 1")
        _require(
            self.builtin or bool(self.files) or bool(self.corpus),
            "builtin = false without files or corpus: nothing would be asked",
        )


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How the teachers work together."""

    strategy: Strategy = "round_robin"
    """all: every teacher answers. round_robin, weighted: one does, the seed decides which. fallback: the next one when
    one fails. cascade: the next one when an answer is not good enough (cheapest first). best_of: all answer, the judge
    picks."""
    judge: str = "execution"
    """For best_of: the name of the teacher that picks, or "execution" (the first answer whose code runs)."""
    samples: int = 1
    """For best_of: answers of each teacher."""
    in_flight: int = 64
    """Seeds that are worked on at once."""
    max_cost: float = 0.0
    """US dollars that may be spent in all, over every run with the same output; needed where a teacher has a price."""
    system: str = ""
    """System prompt for seeds that bring none."""
    grace_seconds: float = 5.0
    """How long calls in flight may take to finish after Ctrl-C."""

    def __post_init__(self) -> None:
        for name in ("samples", "in_flight"):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("max_cost", "grace_seconds"):
            _require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """One teacher: where it is, how it is asked, what it costs and how much it takes."""

    name: str
    """As it stands in the records, e.g. "zai/glm-4.7"."""
    backend: Backend = "openai"
    """openai: any OpenAI-compatible endpoint. opencode: an OpenCode server. transformers: a Hugging Face model in
    a local folder. local: mines local code, no model."""
    model: str = ""
    """The endpoint's name of the model; for opencode "provider/model", for transformers its folder."""
    base_url: str = ""
    """Endpoint up to and with the version, e.g. "http://127.0.0.1:8000/v1"."""
    server_url: str = "http://127.0.0.1:4096"
    """The OpenCode server (backend = "opencode")."""
    password_env: str = "OPENCODE_SERVER_PASSWORD"
    """Environment variable that holds the OpenCode server's password."""
    agent: str = "foundry"
    """The OpenCode server's agent."""
    device: str = "auto"
    """Where a transformers model runs: cuda, cpu; auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In what a transformers model computes; auto: as it is stored."""
    key_env: str = ""
    """Environment variable that holds the key; empty: no key is sent."""
    key_header: str = "Authorization"
    """Header that carries the key; all but Authorization ("Bearer KEY") carry the key alone, e.g. api-key."""
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 2_048
    """Most tokens of an answer, reasoning included."""
    use_seed: bool = False
    """Send a sampling seed (made from the question), for endpoints that take one."""
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The endpoint's name of that limit."""
    omit: tuple[str, ...] = ()
    """Parts of the request's body that this endpoint refuses, e.g. ["temperature"]."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More parts of the request's body, e.g. { reasoning_effort = "low" }; for transformers, values for the chat
    template, e.g. { enable_thinking = false }."""
    logprobs: bool = False
    """Ask for the log-probabilities of the answer's tokens and keep them in the record's meta."""
    keep_reasoning: bool = False
    """Keep what the teacher thought aloud in the record's meta; it is never part of the answer."""
    price_input: float = 0.0
    """US dollars per million tokens of input."""
    price_output: float = 0.0
    """US dollars per million tokens of output, reasoning included."""
    price_cache_read: float | None = None
    """US dollars per million tokens of input that the vendor had cached; not given: as other input."""
    requests_per_minute: float = 0.0
    """0: no limit."""
    tokens_per_minute: float = 0.0
    """Input and output; 0: no limit."""
    concurrency: int = 64
    """Calls in flight at this teacher."""
    timeout_seconds: float = 300.0
    """Longest wait for one answer."""
    retries: int = 5
    """How often a question is asked again after a failure; waiting for a teacher that is down does not count."""
    give_up_seconds: float = 300.0
    """A teacher that has answered nothing for so long is not asked any more in this run."""
    weight: float = 1.0
    """Share of the seeds under "weighted", and the weight of its answers under "all"."""

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "name is empty: name the teacher as it is to stand in the records")
        _require(self.backend == "local" or bool(self.model), f'model is missing: backend = "{self.backend}" needs it')
        if self.backend == "openai":
            _require(
                self.base_url.startswith(("http://", "https://")),
                f'base_url = {self.base_url!r}: must be a URL such as "http://127.0.0.1:8000/v1"',
            )
        if self.backend == "opencode":
            provider, slash, model = self.model.partition("/")
            _require(bool(provider and slash and model), f'model = {self.model!r}: must be "provider/model"')
            _require(
                self.server_url.startswith(("http://", "https://")),
                f'server_url = {self.server_url!r}: must be a URL such as "http://127.0.0.1:4096"',
            )
        for name in ("max_tokens", "concurrency"):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("timeout_seconds", "give_up_seconds", "weight"):
            _require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: must be positive")
        for name in ("price_input", "price_output", "requests_per_minute", "tokens_per_minute", "retries"):
            _require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")
        _require((self.price_cache_read or 0) >= 0, f"price_cache_read = {self.price_cache_read}: must not be negative")
        _require(0 <= self.temperature <= 2, f"temperature = {self.temperature}: must lie between 0 and 2")
        _require(0 < self.top_p <= 1, f"top_p = {self.top_p}: must lie above 0 and at most at 1")

    @property
    def has_price(self) -> bool:
        """Whether an answer costs money."""
        return self.price_input > 0 or self.price_output > 0

    def key(self) -> str:
        """The key from the environment, or "" where none is needed. Raises UserError where it is not set."""
        return _from_environment(self.name, "key_env", self.key_env)

    def password(self) -> str:
        """The OpenCode server's password from the environment. Raises UserError where it is not set."""
        return _from_environment(self.name, "password_env", self.password_env)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole of foundry.toml."""

    generate: GenerateSettings = field(default_factory=GenerateSettings)
    seeds: SeedSettings = field(default_factory=SeedSettings)
    teachers: tuple[TeacherSettings, ...]
    """In the order of the file, which is the order of fallback and cascade."""

    def __post_init__(self) -> None:
        names = [teacher.name for teacher in self.teachers]
        _require(bool(names), "no [[teacher]]: name at least one")
        for name in names:
            _require(names.count(name) == 1, f"two teachers are named {name!r}: give each its own name")
        generate = self.generate
        if generate.strategy == "best_of" and generate.judge != "execution":
            _require(
                generate.judge in names,
                f'[generate]: judge = {generate.judge!r}: must be "execution" or a teacher\'s name: '
                f"{nearest(generate.judge, names)}",
            )
            _require(len(names) > 1, "[generate]: the judge is the only teacher: name one that answers too")
        priced = [teacher.name for teacher in self.teachers if teacher.has_price]
        _require(
            not priced or generate.max_cost > 0,
            f"[generate]: max_cost is not set, but {', '.join(priced)} costs money: say how many US dollars"
            f" may be spent",
        )


def load_settings(path: Path | str) -> Settings:
    """Read foundry.toml. Raises UserError that names the file, the table, the key and the fix."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the settings: {error.strerror}: check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return settings_from_dict(values, str(path))


def settings_from_dict(values: Mapping[str, Any], where: str) -> Settings:
    """The same from tables that are read already; `where` names them in errors."""
    known = ("generate", "seeds", "teacher")
    for key in values:
        _require(key in known, f"{where}: unknown table {key!r}: {nearest(key, known)}")
    teachers = values.get("teacher", [])
    _require(isinstance(teachers, list), f"{where}: [teacher] must be written [[teacher]]: there can be several")
    tables = []
    for number, table in enumerate(teachers, start=1):
        name = table.get("name") if isinstance(table, dict) else None
        tables.append(_table(TeacherSettings, table, f"{where}: [[teacher]] {name if name else f'number {number}'}"))
    generate = _table(GenerateSettings, values.get("generate", {}), f"{where}: [generate]")
    seeds = _table(SeedSettings, values.get("seeds", {}), f"{where}: [seeds]")
    try:
        return Settings(generate=generate, seeds=seeds, teachers=tuple(tables))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _table(kind: type[T], values: Any, where: str) -> T:
    _require(isinstance(values, dict), f"{where} must be a table")
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        _require(key in known, f"{where}: unknown key {key!r}: {nearest(key, known)}")
    checked = {key: _checked(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    _require("name" not in known or "name" in checked, f"{where}: name is missing: it stands in the records")
    try:
        return kind(**checked)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, without guessing: an int may stand for a float, a list for a tuple."""
    origin = get_origin(hint)
    if origin is UnionType:
        (hint,) = (arg for arg in get_args(hint) if arg is not NoneType)
    if origin is Literal:
        _require(value in get_args(hint), f"{where} = {value!r}: must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin is tuple:
        _require(isinstance(value, list), f"{where} = {value!r}: must be a list")
        return tuple(_checked(item, get_args(hint)[0], where) for item in value)
    if origin is Mapping:
        _require(isinstance(value, dict), f"{where} = {value!r}: must be a table")
        return value
    if hint is float and type(value) is int:
        value = float(value)
    names = {"str": "text in quotes", "int": "a whole number", "float": "a number", "bool": "true or false"}
    _require(type(value) is hint, f"{where} = {value!r}: must be {names.get(getattr(hint, '__name__', ''), hint)}")
    _require(hint is not float or math.isfinite(value), f"{where} = {value}: must be a finite number")
    return value


def _from_environment(teacher: str, setting: str, variable: str) -> str:
    if not variable:
        return ""
    value = os.environ.get(variable, "").strip()
    _require(bool(value), f'teacher {teacher}: {setting} = "{variable}" is not set in the environment: export it')
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
