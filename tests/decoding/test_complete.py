"""Many completions at once are those of one at a time, and end where their pattern says."""

import re
from collections.abc import Callable

import pytest

from smelter.decoding import generate as decode
from smelter.decoding.generate import Prompt, complete_many
from smelter.decoding.prompts import FimOrder
from smelter.decoding.text import Stop
from smelter.evaluation.gaps import InfillCase, fill_in, samples
from tests import tiny

PROMPTS = [
    Prompt("def f(x):\n    retu"),
    Prompt(""),
    Prompt("import textwrap\n\n\ndef wrap(text, width=70):\n    ", "\n    return w.wrap(text)\n"),
    Prompt("class Text", ""),
    Prompt(tiny.CODE[:2_000], tiny.CODE[2_100:4_000]),
]


def test_they_are_those_of_one_at_a_time() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    expected = [tiny.complete(prompt.prefix, prompt.suffix, max_tokens=20) for prompt in PROMPTS]
    assert complete_many(model, tokenizer, PROMPTS, max_tokens=20) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    whole = complete_many(model, tokenizer, prompts, max_tokens=12, temperature=temperature, seed=5)
    monkeypatch.setattr(decode, "MAX_BATCH_SIZE", 3)
    done: list[int] = []
    seen: dict[int, str] = {}
    parts = complete_many(
        model,
        tokenizer,
        prompts,
        max_tokens=12,
        temperature=temperature,
        seed=5,
        progress=done.append,
        on_text=seen.__setitem__,
    )
    assert parts == whole
    assert done == [3, 6, 9, 10]
    assert seen == dict(enumerate(whole))
    assert (whole[0] == whole[1]) == (temperature == 0)


@pytest.mark.parametrize("kind", [str, lambda stop: re.compile(re.escape(stop.encode()))], ids=["text", "pattern"])
def test_a_stop_ends_a_row_and_is_cut_off(kind: Callable[[str], Stop]) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    (free,) = complete_many(model, tokenizer, PROMPTS[:1], max_tokens=30)
    stop = free[8:10]
    assert stop.isascii()
    assert len(free) > 12
    (cut,) = complete_many(model, tokenizer, [Prompt(PROMPTS[0].prefix, stops=["never", kind(stop)])], max_tokens=30)
    assert cut == free[: free.index(stop)]


@pytest.mark.parametrize("order", ["spm", "psm"])
def test_a_line_is_the_beginning_of_the_completion(order: FimOrder) -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    cases = [InfillCase(0, tiny.CODE[: 900 + 40 * i], "", tiny.CODE[1_000 + 40 * i : 1_500]) for i in range(12)]
    done: list[int] = []
    lines = fill_in(model, tokenizer, cases, order=order, max_tokens=40, progress=done.append)
    whole = [tiny.complete(case.prefix, case.suffix, max_tokens=40, order=order) for case in cases]
    assert lines == [text.split("\n")[0] for text in whole]
    assert lines != whole, "no line ended"
    assert done[-1] == len(cases)


def test_samples_repeat() -> None:
    tokens = tiny.tokenizer()
    docs = [tokens.encode(tiny.CODE[i : i + 3_000]) for i in (0, 5_000, 9_000)]
    made = samples(tiny.model(), tokens, 3, docs.__getitem__, num_samples=2, max_tokens=8)
    assert made == samples(tiny.model(), tokens, 3, docs.__getitem__, num_samples=2, max_tokens=8)
    assert len(made) == 2
    for sample in made:
        assert sample.prefix + sample.expected + sample.suffix in tiny.CODE
