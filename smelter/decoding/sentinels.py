"""Prompts that bring their own sentinels: `<|fim_prefix|>...<|fim_suffix|>...<|fim_middle|>` as an editor laid it out.

They are read as they are, in whatever order. Only where one is longer than the context something must go, and then it
is what would go if prefix and suffix had come on their own (`fit_context`): the sentinels stay, and what stands before
them goes first. Cut at its left, such a prompt would lose the prefix's sentinel, and ask for something else.
"""

from smelter.decoding.healing import take_back
from smelter.decoding.line_ends import line_end_of, to_lf
from smelter.decoding.prompts import EncodedPrompt, fit_context, prompt_budget
from smelter.tokens import Tokenizer


def read_prompt(tokenizer: Tokenizer, context: int, prompt: str, *, max_tokens: int) -> EncodedPrompt:
    """A prompt as who asks laid it out, names of special tokens being these; without any it is `make_prompt`'s."""
    whole = tokenizer.parse(to_lf(prompt))
    used = fit_prompt(tokenizer, whole, prompt_budget(context, max_tokens))
    ids, pending = take_back(tokenizer, used)
    return EncodedPrompt(ids or [tokenizer.eos_id], pending, len(used), len(whole) - len(used), line_end_of(prompt))


def fit_prompt(tokenizer: Tokenizer, ids: list[int], budget: int) -> list[int]:
    """The end of a prompt, `budget` tokens at most; of one with each sentinel once, the part nearest to the gap."""
    sentinels = (tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, tokenizer.fim_middle_id)
    if len(ids) <= budget or any(ids.count(sentinel) != 1 for sentinel in sentinels):
        return ids[-budget:]
    places = sorted((ids.index(sentinel), sentinel) for sentinel in sentinels)
    ends = [place for place, _ in places[1:]] + [len(ids)]
    parts = {sentinel: ids[place + 1 : end] for (place, sentinel), end in zip(places, ends, strict=True)}
    prefix_id, suffix_id, middle_id = sentinels
    # What follows the middle's sentinel belongs to the prefix: it is where the model goes on.
    before = parts[prefix_id] + parts[middle_id]
    prefix, suffix = fit_context(before, parts[suffix_id], budget - len(sentinels))
    begun = min(len(parts[middle_id]), len(prefix))
    kept = {
        prefix_id: prefix[: len(prefix) - begun],
        middle_id: prefix[len(prefix) - begun :],
        suffix_id: suffix,
    }
    return [i for _, sentinel in places for i in (sentinel, *kept[sentinel])]
