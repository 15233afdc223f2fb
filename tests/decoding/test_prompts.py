"""Prompts: the orders that training shows, what is cut where they are too long, and other files before them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelter.decoding.prompts import FimOrder, fim_prompt, fit_context, fit_extra, make_prompt
from tests import tiny


def test_fim_prompt_is_the_tokenizers() -> None:
    tokens = tiny.tokenizer()
    psm = fim_prompt(tokens, "def f(", "):\n    pass", order="psm")
    assert psm == tokens.fim_prompt("def f(", "):\n    pass")
    assert fim_prompt(tokens, "def f(", "):\n    pass", order="psm", budget=len(psm)) == psm
    spm = fim_prompt(tokens, "def f(", "):\n    pass")
    assert spm == tokens.fim_prompt("def f(", "):\n    pass", use_spm=True)
    assert fim_prompt(tokens, "def f(", "):\n    pass", budget=len(spm)) == spm


def test_fim_prompt_cuts_what_is_furthest_from_the_gap() -> None:
    tokens = tiny.tokenizer()
    before, after = tiny.CODE[:2_000], tiny.CODE[2_000:]
    psm = fim_prompt(tokens, before, after, order="psm", budget=40)
    middle = psm.index(tokens.fim_suffix_id)
    assert (len(psm), psm[0], psm[-1]) == (40, tokens.fim_prefix_id, tokens.fim_middle_id)
    assert before.endswith(tokens.decode(psm[1:middle]))
    assert after.startswith(tokens.decode(psm[middle + 1 : -1]))
    spm = fim_prompt(tokens, before, after, budget=40)
    middle = spm.index(tokens.fim_middle_id)
    assert (len(spm), spm[:2]) == (40, [tokens.fim_prefix_id, tokens.fim_suffix_id])
    assert after.startswith(tokens.decode(spm[2:middle]))
    assert before.endswith(tokens.decode(spm[middle + 1 :]))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(-2, 80))
def test_context_keeps_what_is_nearest_and_fills_the_budget(prefix: int, suffix: int, budget: int) -> None:
    before, after = list(range(prefix)), list(range(100, 100 + suffix))
    kept_before, kept_after = fit_context(before, after, budget)
    assert before[len(before) - len(kept_before) :] == kept_before
    assert after[: len(kept_after)] == kept_after
    assert len(kept_before) + len(kept_after) == min(prefix + suffix, max(budget, 0))


@pytest.mark.parametrize("order", ["spm", "psm"])
@pytest.mark.parametrize("suffix", [None, "", "\n    return 1\n"])
def test_other_files_come_first_each_with_its_end(suffix: str | None, order: FimOrder) -> None:
    tokens = tiny.tokenizer()
    plain = make_prompt(tokens, 500, "def f", suffix, max_tokens=16, order=order)
    files = ("import os\n", "x = 1")
    asked = make_prompt(tokens, 500, "def f", suffix, max_tokens=16, order=order, extra=files)
    before = [i for text in files for i in (*tokens.encode(text), tokens.eos_id)]
    assert (asked.ids, asked.pending) == ([*before, *plain.ids], plain.pending)
    assert (asked.num_tokens, asked.num_dropped) == (plain.num_tokens + len(before), 0)
    if order == "psm" and suffix is not None:  # nothing of the prefix is taken back
        assert (asked.pending, asked.ids[-1]) == (b"", tokens.fim_middle_id)


def test_other_files_get_what_is_left() -> None:
    tokens, files = tiny.tokenizer(), (tiny.CODE[:2_000], tiny.CODE[2_000:3_000])
    whole = [i for text in files for i in (*tokens.encode(text), tokens.eos_id)]
    for count in range(0, 700, 3):
        prefix = "a\n" * (count // 2)
        plain = make_prompt(tokens, 512, prefix, "\n", max_tokens=100)
        asked = make_prompt(tokens, 512, prefix, "\n", max_tokens=100, extra=files)
        kept = len(asked.ids) - len(plain.ids)
        assert asked.ids == [*whole[len(whole) - kept :], *plain.ids]
        assert kept % 32 == 0
        assert min(412 - plain.num_tokens, 256) - 32 < kept <= min(412 - plain.num_tokens, 256)
        assert asked.num_dropped == plain.num_dropped + len(whole) - kept
    assert kept == 0
    # Sent ahead, with nothing beside, they are cut where they are cut beside a rest of half the context.
    ahead = make_prompt(tokens, 512, "", "", max_tokens=0, extra=files)
    later = make_prompt(tokens, 512, "a\n" * 60, "\n", max_tokens=100, extra=files)
    assert len(later.ids) > 360
    assert ahead.ids[:258] == later.ids[:258] == [*whole[-256:], tokens.fim_prefix_id, tokens.fim_suffix_id]
    assert fit_extra(list(range(5)), 5, 10) == list(range(5))
    assert fit_extra(list(range(5)), 0, 10) == []


def test_a_long_prompt_keeps_its_end() -> None:
    model, tokens = tiny.model(), tiny.tokenizer()
    text = tiny.CODE[: tiny.CODE.index("\n", 3_000) + 1]
    ids = tokens.encode(text)
    (row,) = tiny.write(model, [ids[-80:]], max_tokens=16, stop_ids=[tokens.eos_id])
    assert tiny.complete(text, max_tokens=16) == tokens.decode(row.ids)
    context = model.config.max_seq_len
    used = make_prompt(tokens, context, text, None, max_tokens=16)
    assert (used.num_tokens, used.num_dropped) == (80, len(ids) - 80)
    more = make_prompt(tokens, context, text, None, max_tokens=10_000)
    assert more.num_tokens == 48, "half of the context at least is the prompt's"
