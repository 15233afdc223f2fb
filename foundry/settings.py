"""foundry.toml: which teachers, how they work together, and what they are asked. Frozen and strict.

Three tables: `[generate]` (strategy, in flight, spending cap), `[seeds]` (what is asked) and one `[[teacher]]` for each
teacher. An unknown key is an error that names the nearest known one. The file never holds a key: `key_env` names the
environment variable that does, so the file can be shared and committed. Paths are relative to the current folder, as
everywhere on the command line.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from smelter.base import check_ranges, from_table, key_from_environment, nearest, read_toml, require

Strategy = Literal["all", "round_robin", "weighted", "fallback", "cascade", "best_of"]
Backend = Literal["openai", "opencode", "transformers", "local"]
_HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)

_LIMIT = "set max_tokens instead, which the spending cap knows"
_SEVERAL = "several answers are billed and one is kept: leave it out"
_UNBOUNDED = {
    "max_tokens": _LIMIT,
    "max_completion_tokens": _LIMIT,
    "max_output_tokens": _LIMIT,
    "n": _SEVERAL,
    "best_of": _SEVERAL,
}
"""Parts of a request's body that let a call cost more than its worst case, and what to do."""


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
    count: Annotated[int, Ge(1)] = 1_000
    """Number of seeds."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(
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
    samples: Annotated[int, Ge(1)] = 1
    """For best_of: answers of each teacher."""
    in_flight: Annotated[int, Ge(1)] = 64
    """Seeds that are worked on at once."""
    max_cost: Annotated[float, Ge(0)] = 0.0
    """US dollars that may be spent in all, over every run with the same output; needed where a teacher has a price."""
    system: str = ""
    """System prompt for seeds that bring none."""
    grace_seconds: Annotated[float, Ge(0)] = 5.0
    """How long calls in flight may take to finish after Ctrl-C."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """One teacher: where it is, how it is asked, what it costs and how much it takes."""

    name: str = ""
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
    temperature: Annotated[float, Interval(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Ge(1)] = 2_048
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
    price_input: Annotated[float, Ge(0)] = 0.0
    """US dollars per million tokens of input."""
    price_output: Annotated[float, Ge(0)] = 0.0
    """US dollars per million tokens of output, reasoning included."""
    price_cache_read: Annotated[float | None, Ge(0)] = None
    """US dollars per million tokens of input that the vendor had cached; not given: as other input."""
    price_cache_write: Annotated[float | None, Ge(0)] = None
    """US dollars per million tokens of input that the vendor caches; not given: a quarter more than other input."""
    requests_per_minute: Annotated[float, Ge(0)] = 0.0
    """0: no limit."""
    tokens_per_minute: Annotated[float, Ge(0)] = 0.0
    """Input and output; 0: no limit."""
    concurrency: Annotated[int, Ge(1)] = 64
    """Calls in flight at this teacher."""
    timeout_seconds: Annotated[float, Gt(0)] = 300.0
    """Longest wait for one answer."""
    retries: Annotated[int, Ge(0)] = 5
    """How often a question is asked again after a failure; waiting for a teacher that is down does not count."""
    give_up_seconds: Annotated[float, Gt(0)] = 300.0
    """A teacher that has answered nothing for so long is not asked any more in this run."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Share of the seeds under "weighted", and the weight of its answers under "all"."""

    def __post_init__(self) -> None:
        check_ranges(self)
        require(bool(self.name.strip()), "name is missing: name the teacher as it is to stand in the records")
        require(self.backend == "local" or bool(self.model), f'model is missing: backend = "{self.backend}" needs it')
        if self.backend == "openai":
            require(
                bool(_HEADER_NAME.fullmatch(self.key_header)),
                f'key_header = {self.key_header!r}: must be the name of a header such as "Authorization" or "api-key"',
            )
            require(
                self.base_url.startswith(("http://", "https://")),
                f'base_url = {self.base_url!r}: must be a URL such as "http://127.0.0.1:8000/v1"',
            )
        if self.backend == "opencode":
            provider, slash, model = self.model.partition("/")
            require(bool(provider and slash and model), f'model = {self.model!r}: must be "provider/model"')
            require(
                self.server_url.startswith(("http://", "https://")),
                f'server_url = {self.server_url!r}: must be a URL such as "http://127.0.0.1:4096"',
            )
        if self.has_price:  # then max_tokens bounds what a call may cost, and with it the bill
            limit = self.max_tokens_key if self.backend == "openai" else "max_tokens"
            require(limit not in self.omit, f'omit = ["{limit}"]: the spending cap needs that limit: leave it in')
            for key in self.extra:
                require(key not in _UNBOUNDED, f"extra = {{ {key} = ... }}: {_UNBOUNDED.get(key)}")

    @property
    def has_price(self) -> bool:
        """Whether an answer costs money."""
        return self.price_input > 0 or self.price_output > 0

    @property
    def price_of_cache_read(self) -> float:
        """US dollars per million tokens of input that were cached."""
        return self.price_input if self.price_cache_read is None else self.price_cache_read

    @property
    def price_of_cache_write(self) -> float:
        """US dollars per million tokens of input that are cached now; not given: at Anthropic's share."""
        return 1.25 * self.price_input if self.price_cache_write is None else self.price_cache_write

    def key(self) -> str:
        """The key from the environment, or "" where none is needed. Raises UserError where it is not set."""
        key = key_from_environment(self.key_env, f"teacher {self.name}: ") if self.key_env else ""
        return _needed(key, self.name, "key_env", self.key_env)

    def password(self) -> str:
        """The OpenCode server's password from the environment. Raises UserError where it is not set."""
        password = os.environ.get(self.password_env, "").strip()
        return _needed(password, self.name, "password_env", self.password_env)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole of foundry.toml."""

    generate: GenerateSettings = field(default_factory=GenerateSettings)
    seeds: SeedSettings = field(default_factory=SeedSettings)
    teachers: tuple[TeacherSettings, ...] = field(default=(), metadata={"key": "teacher"})
    """In the order of the file, which is the order of fallback and cascade."""

    def __post_init__(self) -> None:
        names = [teacher.name for teacher in self.teachers]
        require(bool(names), "no [[teacher]]: name at least one")
        for name in names:
            require(names.count(name) == 1, f"two teachers are named {name!r}: give each its own name")
        generate = self.generate
        if generate.strategy == "best_of" and generate.judge != "execution":
            require(
                generate.judge in names,
                f'[generate]: judge = {generate.judge!r}: must be "execution" or a teacher\'s name: '
                f"{nearest(generate.judge, names)}",
            )
            require(len(names) > 1, "[generate]: the judge is the only teacher: name one that answers too")
        priced = [teacher.name for teacher in self.teachers if teacher.has_price]
        require(
            not priced or generate.max_cost > 0,
            f"[generate]: max_cost is not set, but {', '.join(priced)} costs money: say how many US dollars"
            f" may be spent",
        )


def load_settings(path: Path | str) -> Settings:
    """Read foundry.toml. Raises ConfigError that names the file, the table, the key and the fix."""
    return from_table(Settings, read_toml(path, "settings"), str(path))


def _needed(value: str, teacher: str, setting: str, variable: str) -> str:
    """`value` of an environment variable, which must be set unless none is named. Raises ConfigError."""
    is_set = bool(value or not variable)
    require(is_set, f'teacher {teacher}: {setting} = "{variable}" is not set in the environment: export it')
    return value
