"""Prompts made from local code: what a teacher is asked is drawn from code that somebody wrote and uses.

Five kinds. `oss_instruct` shows a few lines of real code and asks for a new problem with its solution, after
OSS-Instruct (Wei et al., "Magicoder: Empowering Code Generation with OSS-Instruct", 2023): real snippets are more
varied than any list of subjects. The other kinds take a function apart, and the missing part is known:
`docstring_to_body`, `body_to_docstring`, `body_to_tests` and `body_to_calls`. That known part travels in the seed's
`material`, which only the local teacher reads; a model gets the words alone.

Files held out for validation are not read at all, so no question is made from code that a model is measured on.
Files come in random order and give one function a round, so a large file does not crowd out the small ones. Functions
whose tests are among the sources come first for `body_to_tests`; the others follow, for teachers that can write some.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from foundry.corpus import Options, Summary, corpus_records, find_trees
from foundry.seeds.builtin import pick, shuffled
from foundry.seeds.functions import FENCE, MIN_DOCSTRING, Function, Source, functions_of
from foundry.seeds.seed import Seed
from foundry.seeds.uses import UsageIndex
from smelter.base import UserError, nearest, read_records

SNIPPET_LINES = (5, 15)
"""Least and most lines of code that are shown to inspire a problem."""


_FORMS = {
    "oss_instruct": (
        "Make up a programming problem that a reader of this fragment might meet elsewhere, and solve it in Python.",
        "Take one idea from this fragment and make a new, self-contained Python exercise of it, with a model solution.",
        "Let this fragment inspire a practical task for a Python developer. State the task, then solve it.",
    ),
    "docstring_to_body": (
        "Complete this Python function.{place} Answer with the whole function in one code block.",
        "Write the body of this function so that it does what its docstring says.{place} Give the complete function.",
        "Here are a signature and a docstring.{place} Implement the function and answer with its full code only.",
        "Fill in the missing body.{place} Reply with one Python code block that holds the finished function.",
    ),
    "body_to_docstring": (
        "Write the docstring of this Python function.{place} Answer with the docstring alone, in triple quotes.",
        "This function has lost its docstring.{place} Write it anew, and answer with nothing but the quoted docstring.",
        "Document this function for its users in a docstring.{place} Reply with the docstring only, quotes included.",
    ),
    "body_to_tests": (
        "Write unit tests for this function of the module `{module}`.",
        "Which tests should `{module}.{name}` have? Write them.",
        "Test this function from `{module}`: the main case, the edge cases and the errors.",
    ),
    "body_to_calls": (
        "Show how this function of the module `{module}` is called in practice: a few realistic calls.",
        "Give examples of code that uses `{name}` from `{module}`.",
        "How would other code call this function of `{module}`? Answer with examples only.",
    ),
}
_ENDS = {
    "oss_instruct": (
        "State the problem so that it can be understood without the fragment. Do not copy the fragment.",
        "The problem must stand on its own, with an example of input and output. Do not mention the fragment.",
        "Give the problem under `Problem`, the code under `Solution`, and three asserts that test it.",
    ),
    "body_to_tests": (
        "Use `unittest`.",
        "Answer with one runnable Python test module.",
        "Import the function from its module.",
    ),
}
KINDS = tuple(_FORMS)


def code_prompts(corpus: Sequence[str], kinds: Sequence[str], seed: int) -> Iterator[Iterator[Seed]]:
    """One stream of prompts for each kind (all kinds if none is named), in an order that `seed` determines.

    `corpus` names JSONL files of records, or "stdlib". Raises UserError for an unknown kind and where there is
    no Python code.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"[seeds]: kinds = {kind!r}: unknown: {nearest(kind, KINDS)}")
    wanted = [kind for kind in KINDS if kind in kinds or not kinds]
    sources = [source for name in dict.fromkeys(corpus) for source in read_sources(name)]
    cache: dict[Source, list[Function]] = {}
    usage = UsageIndex(sources)
    makers: dict[str, Callable[[random.Random], Iterator[Seed]]] = {
        "oss_instruct": lambda rng: _oss_instruct(sources, rng),
        "docstring_to_body": lambda rng: _docstring_to_body(_rounds(sources, cache, rng), rng),
        "body_to_docstring": lambda rng: _body_to_docstring(_rounds(sources, cache, rng), rng),
        "body_to_tests": lambda rng: _body_to_tests(_rounds(sources, cache, rng), usage, rng),
        "body_to_calls": lambda rng: _body_to_calls(_rounds(sources, cache, rng), usage, rng),
    }
    # Each kind has random numbers of its own, so asking for fewer kinds does not change what the others give.
    return iter([makers[kind](random.Random(f"{seed} {kind}")) for kind in wanted])


def read_sources(name: str) -> list[Source]:
    """The Python files of a file of records, or of the running Python's library with its tests ("stdlib").

    Left out are records that are held out for validation, other languages and records of other kinds. Raises
    UserError where nothing is left.
    """
    if name == "stdlib":
        options = Options(source=("stdlib",), include_tests=True)
        records = corpus_records(find_trees(options), options, Summary())
    else:
        records = read_records(name)
    sources = [
        Source(record.source or f"unnamed/{record.id}.py", record.text, record.license)
        for record in records
        if record.kind == "text" and record.language == "python" and record.split != "val"
    ]
    if not sources:
        raise UserError(f"{name}: no Python text in the training split: make records with `foundry corpus`")
    return sorted(sources, key=lambda source: source.name)


def _rounds(sources: Sequence[Source], cache: dict[Source, list[Function]], rng: random.Random) -> Iterator[Function]:
    """Functions of files that are no tests: one of each file, then the next of each, files in random order."""
    files = shuffled([source for source in sources if not source.is_test], rng)
    orders: list[list[Function]] = []
    for source in files:
        if source not in cache:
            cache[source] = functions_of(source)
        order = shuffled(cache[source], rng)
        if order:
            orders.append(order)
            yield order[0]
    for number in range(1, max(map(len, orders), default=0)):
        yield from (order[number] for order in orders if number < len(order))


def _fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _ask(kind: str, function: Function, shown: str, rng: random.Random, **known: Any) -> Seed:
    """The question about a function, of which `shown` is seen under the imports that it needs."""
    place = f" It is a method of `{function.owner.rstrip(':')}`." if function.owner else ""
    ask = pick(_FORMS[kind], rng).format(place=place, module=function.source.module, name=function.name)
    if kind in _ENDS:
        ask += f" {pick(_ENDS[kind], rng)}"
    code = _fenced(f"{function.imports}\n\n\n{shown}" if function.imports else shown)
    place_of = {"name": function.name, "file": function.source.name, "line": function.line}
    return _seed(kind, f"{ask}\n\n{code}", function.source, **place_of, **known)


def _seed(kind: str, prompt: str, source: Source, **material: Any) -> Seed:
    return Seed(
        kind=kind, prompt=prompt, source=source.name, license=source.license, material={"task": kind, **material}
    )


def _oss_instruct(sources: Sequence[Source], rng: random.Random) -> Iterator[Seed]:
    """A few lines of a file, dedented; three rounds through the files."""
    files = [source for source in sources if not source.is_test]
    for _ in range(3):
        for source in shuffled(files, rng):
            lines = source.text.split("\n")
            starts = [i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith(("#", '"'))]
            if len(starts) < SNIPPET_LINES[0]:
                continue
            first = pick(starts[: -SNIPPET_LINES[0] + 1], rng)
            low, high = SNIPPET_LINES
            snippet = "\n".join(lines[first : first + low + int(rng.random() * (high - low + 1))]).rstrip()
            if FENCE in snippet:
                continue
            form, end = (pick(texts["oss_instruct"], rng) for texts in (_FORMS, _ENDS))
            prompt = f"{form}\n\n{_fenced(snippet)}\n\n{end}"
            yield _seed("oss_instruct", prompt, source, file=source.name, line=first + 1, snippet=snippet)


def _docstring_to_body(functions: Iterator[Function], rng: random.Random) -> Iterator[Seed]:
    for function in functions:
        if len(function.docstring) >= MIN_DOCSTRING:
            shown = f"{function.header}\n{function.docstring}"
            yield _ask("docstring_to_body", function, shown, rng, answer=function.text)


def _body_to_docstring(functions: Iterator[Function], rng: random.Random) -> Iterator[Seed]:
    for function in functions:
        if len(function.docstring) >= MIN_DOCSTRING:
            shown = f"{function.header}\n{function.body}"
            yield _ask("body_to_docstring", function, shown, rng, answer=_dedented(function.docstring))


def _dedented(docstring: str) -> str:
    """A docstring at the margin: its first line starts there, the others keep their indentation to each other."""
    first, _, rest = docstring.partition("\n")
    lines = rest.split("\n")
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join([first.lstrip(), *(line[indent:] for line in lines)]).rstrip()


def _body_to_tests(functions: Iterator[Function], usage: UsageIndex, rng: random.Random) -> Iterator[Seed]:
    untested = []
    for function in functions:
        if function.owner or not function.is_public:
            continue
        tests = usage.tests(function)
        known = {"answer": tests.code, "tests_file": tests.file} if tests else {}
        seed = _ask("body_to_tests", function, function.text, rng, **known)
        if tests:
            yield seed
        else:
            untested.append(seed)
    yield from untested


def _body_to_calls(functions: Iterator[Function], usage: UsageIndex, rng: random.Random) -> Iterator[Seed]:
    for function in functions:
        calls = usage.calls(function) if function.is_public else []
        if calls:
            # Each under the place where it stands: examples of one answer come from several files.
            answer = "\n\n".join(f"# {call.file}:{call.line}\n{call.code}" for call in calls)
            yield _ask("body_to_calls", function, function.text, rng, answer=answer)
