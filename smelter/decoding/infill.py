"""When to stop filling a gap: at the first token that the model is not sure enough of.

Whoever types wants the few words that are certain, not as many as the model can write. So llama.cpp's `infill` sampler
(src/llama-sampler.cpp), which its editor plug-ins ask for, ends an answer early. Of the tokens that top_k, top_p and
min_p leave:

1. Where ending is more than 1 / (3 n) as likely as all n of them that go on, the answer ends.
2. A token whose bytes begin another's goes with that to the likelier of the two: they want the same text.
3. What is then under 0.2 is dropped; where nothing is left, nobody knows how to go on, and the answer ends.
4. Of n tokens left those under 1 / (n + 1) of their sum are dropped.

One of the rest is drawn, by the probabilities that the model gave it. As in llama.cpp's order of samplers, temperature
comes after all of this. A word that is being spelled again is under the same rules: where it is not clear how it goes
on, nothing is suggested.
"""

from collections.abc import Sequence

MIN_SHARE = 0.2
"""A token that is to be written has this probability at least."""


def survivors(
    ids: Sequence[int], probs: Sequence[float], bytes_of: Sequence[bytes], stop_ids: Sequence[int]
) -> list[int]:
    """From which of the candidates `ids`, by falling `probs` that sum to 1, the next token is to be drawn.

    A stop id, which need not be a candidate, where the answer is to end; without `stop_ids` it cannot.
    """
    ending = [token in stop_ids for token in ids]
    end = sum(prob for prob, ends in zip(probs, ending, strict=True) if ends)
    if 3 * end * len(ids) > sum(probs) - end:
        return [token for token, ends in zip(ids, ending, strict=True) if ends]
    shares = _merged(probs, [bytes_of[token] for token in ids])
    kept = [index for index, share in enumerate(shares) if share >= MIN_SHARE or ending[index]]
    num_text = sum(not ending[index] for index in kept)
    if not num_text:
        return list(stop_ids[:1] or ids[:1])
    least = sum(shares[index] for index in kept) / (num_text + 1)
    return [ids[index] for index in kept if shares[index] >= least or ending[index]]


def _merged(probs: Sequence[float], texts: Sequence[bytes]) -> list[float]:
    """`probs` with those of texts that begin one another put together, the likelier taking all; 0 for the other."""
    shares, is_left = list(probs), [True] * len(probs)
    longer = _longer(texts)
    for first, others in enumerate(longer):
        for second in others:
            if not is_left[first]:
                break
            if is_left[second]:
                winner, loser = (second, first) if shares[second] > shares[first] else (first, second)
                shares[winner] += shares[loser]
                shares[loser], is_left[loser] = 0.0, False
    return shares


def _longer(texts: Sequence[bytes]) -> list[list[int]]:
    """For each text the places of the others that begin with it, ascending; none for an empty one."""
    places: dict[bytes, list[int]] = {}
    for index, text in enumerate(texts):
        places.setdefault(text, []).append(index)
    longer: list[list[int]] = [[] for _ in texts]
    for index, text in enumerate(texts):
        for size in range(1, len(text) + 1):
            for beginning in places.get(text[:size], ()):
                if beginning != index:
                    longer[beginning].append(index)
    return longer
