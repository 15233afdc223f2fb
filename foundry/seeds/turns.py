"""What teachers are asked: built-in prompts, the user's own, and prompts made from local code.

The sources take turns, so any number of seeds holds a fair share of each for as long as each lasts; the built-in ones
do not run out in practice. The same settings and files give the same seeds in the same order, and a larger count
begins with those of a smaller one, so a run can be made longer without asking anything twice.
"""

from collections.abc import Iterator

from foundry.seeds.builtin import builtin_prompts
from foundry.seeds.code import code_prompts
from foundry.seeds.seed import Seed, read_seeds
from foundry.settings import SeedSettings
from smelter.base import UserError, content_id


def iterate(settings: SeedSettings) -> Iterator[Seed]:
    """At most `settings.count` seeds, without a repeated id or question.

    Raises UserError for a file that cannot be used, naming file and line, and where there is nothing to ask.
    """
    streams = [builtin_prompts(settings.seed)] if settings.builtin else []
    files = list(dict.fromkeys(settings.files))
    given_ids: dict[str, str] = {}
    for name in files:  # once through all, so a bad line is found before any answer is paid for
        for _ in read_seeds(name, given_ids):
            pass
    streams += [read_seeds(name) for name in files]
    if settings.corpus:
        streams.append(_in_turn(list(code_prompts(settings.corpus, settings.kinds, settings.seed))))
    ids: set[str] = set()
    questions: set[str] = set()
    for seed in _in_turn(streams):
        question = content_id(seed.system, seed.prompt)
        if seed.id in ids or question in questions:
            continue
        ids.add(seed.id)
        questions.add(question)
        yield seed
        if len(ids) == settings.count:
            return
    if not ids:
        raise UserError("[seeds]: nothing to ask: the files and the corpus hold no usable prompt")


def _in_turn(streams: list[Iterator[Seed]]) -> Iterator[Seed]:
    """One of each stream after the other; a stream that has ended drops out."""
    while streams:
        alive = []
        for stream in streams:
            seed = next(stream, None)
            if seed is not None:
                yield seed
                alive.append(stream)
        streams = alive
