"""Rows that are read and written together: whoever asks, their tokens are chosen and ended here.

One cache holds the keys of all rows, a slot for each. Rows that write have the slots 0, 1, ..., so that a step reads
views and no copies; then come those whose prompts are being read. A row that leaves is replaced by the last one, and
what it has read stays in a free slot. Prompts that are read together are padded on the right, and each slot is filled
without holes, so one rule makes the mask of reading and writing alike: a query at position p sees the keys 0..p of its
own row. What a row writes does not depend on the rows beside it; its random numbers come from its seed alone. Keys stay
where they were written: a context that is full ends the text rather than being shifted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from smelter.decoding.healing import Healing
from smelter.decoding.infill import survivors
from smelter.decoding.kv_cache import KVCache
from smelter.decoding.request import Finish, Request, Token, Top
from smelter.decoding.sampling import MIN_TEMPERATURE, candidates, sample, uniforms_of
from smelter.decoding.text import Text
from smelter.model import Model
from smelter.tokens import Tokenizer


class Row:
    """A request on its way: what of its prompt is read, what it has yet to spell, what it has written.

    It ends at the first of: a stop id, a stop in its text, a line indented less, `max_tokens` new tokens, the end of
    the context. `finish` then says why. `ids` are the tokens written, without a stop id; `logprobs` theirs, where they
    were asked for. A token is new if it adds to what the caller has: those that spell pending bytes and no more do not
    count.
    """

    def __init__(self, request: Request, context: int) -> None:
        self.request = request
        room = context - len(request.ids)
        self.limit = min(request.max_tokens + len(request.pending), room) if request.max_tokens else 0
        """Most tokens, those included that only spell."""
        self.num_new = 0
        self.sampling = request.temperature, request.top_k, request.top_p, request.min_p
        self.uniforms = uniforms_of(request.seed, self.limit).tolist()
        greedy = request.temperature < MIN_TEMPERATURE and not request.infill_sampler
        self.wants_likeliest = greedy and request.num_top is None
        """And no more: no chance, no log-probabilities."""
        self.slot = -1
        self.to_read = request.scored_ids or request.ids
        """Of which `num_read` are read."""
        self.num_read = self.num_cached = 0
        self.pending = request.pending
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = Text(request.stops, len(request.pending), request.n_indent, request.line_end)
        self.prompt: list[Token] = []
        """With log-probabilities, where they were asked for."""
        self.finish: Finish | None = None

    @property
    def reads_twice(self) -> bool:
        """Whether something else is read for the prompt's log-probabilities than what is gone on from."""
        return self.limit > 0 and self.to_read is not self.request.ids and list(self.to_read) != list(self.request.ids)

    def take(self, token: int, raw: bytes, logprob: float | None = None, top: Top = ()) -> None:
        """The model chose `token`, which stands for `raw`, where the likeliest were `top`."""
        num_pending = len(self.pending)
        if num_pending and raw:  # what ends a text does not end it before that is spelled; the infill sampler does
            self.pending = self.pending[len(raw) :]
        elif token in self.request.stop_ids:
            self.finish = "stop"
            return
        self.ids.append(token)
        self.num_new += not num_pending or len(raw) > num_pending
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.text.push(raw):
            self.finish = "stop" if self.text.stop is not None else "length"
        elif self.num_new == self.request.max_tokens or len(self.ids) == self.limit:
            self.finish = "length"


R = TypeVar("R", bound=Row)


@dataclass
class Slot:
    """The tokens whose keys it holds, and the step in which a row last left it."""

    ids: list[int] = field(default_factory=list)
    left: int = 0


class Batch(Generic[R]):
    """Up to `num_slots` rows of up to `max_len` tokens, prompts included."""

    def __init__(self, model: Model, tokenizer: Tokenizer, num_slots: int, max_len: int) -> None:
        self.model = model
        self.writing: list[R] = []  # writing[i] has slot i
        self.reading: list[R] = []  # in slots side by side
        self.slots = [Slot() for _ in range(num_slots)]
        self.num_steps = 0
        self.num_prompt_tokens = 0
        """Read so far."""
        self._device = model.embed_tokens.weight.device
        self._cache = KVCache(model.config, num_slots, max_len, model.compute_dtype, self._device)
        self._healing = Healing(tokenizer)
        self._bytes_of = self._healing.bytes_of
        self._vocab_size = tokenizer.vocab_size  # an embedding may have more rows than there are tokens

    @property
    def num_rows(self) -> int:
        """Rows that write or are read; the slots from here on are free while none is being read."""
        return len(self.writing) + len(self.reading)

    def add(self, row: R, slot: int, num_cached: int = 0, source: int | None = None) -> None:
        """Begin with a row in the free `slot`, which, or `source`, holds the first `num_cached` tokens of its prompt.

        It is brought beside the rows that are read with it.
        """
        if source is not None and source != slot:
            self._cache.copy(source, slot, num_cached)
            self.slots[slot].ids = self.slots[source].ids[:num_cached]
        del self.slots[slot].ids[num_cached:]
        row.slot = self.num_rows
        self._swap(slot, row.slot)
        row.num_read = row.num_cached = num_cached
        self.reading.append(row)

    def remove(self, row: R) -> None:
        """Let go of a row; what it has read stays in its slot until another row takes that."""
        self.slots[row.slot].left = self.num_steps
        group = self.writing if row in self.writing else self.reading
        last = group[-1]
        self._swap(row.slot, last.slot)
        group[group.index(row)] = last
        last.slot, row.slot = row.slot, -1
        group.pop()

    def clear(self) -> list[R]:
        """Let go of all rows, and forget what was read. Returns the rows."""
        rows = [*self.writing, *self.reading]
        for row in rows:
            row.slot = -1
        self.writing, self.reading, self.slots = [], [], [Slot() for _ in self.slots]
        return rows

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            slots = self.slots
            self._cache.swap(a, b, max(len(slots[a].ids), len(slots[b].ids)))
            slots[a], slots[b] = slots[b], slots[a]

    def read(self, num_tokens: int) -> list[R]:
        """Read up to `num_tokens` more of each prompt; returns the rows whose prompts end: they write from now on.

        Those have their first token. All prompts end together; a single one may be read in pieces, or twice.
        """
        rows = self.reading
        starts = [row.num_read for row in rows]
        pieces = [list(row.to_read[start : start + num_tokens]) for row, start in zip(rows, starts, strict=True)]
        width = max(map(len, pieces))
        # What pads a shorter piece is overwritten before anybody sees it.
        tokens = [piece + [0] * (width - len(piece)) for piece in pieces]
        positions = torch.tensor(starts, device=self._device)[:, None] + torch.arange(width, device=self._device)
        hidden = self._hidden(tokens, positions, max(starts) + width, first=rows[0].slot)  # [B, T, C]
        for row, piece, states in zip(rows, pieces, hidden, strict=True):
            slot = self.slots[row.slot]
            slot.ids += piece
            self.num_prompt_tokens += len(piece)
            if len(row.prompt) < len(row.request.scored_ids):
                self._note_prompt(row, states[: len(piece)])
            row.num_read += len(piece)
            if row.reads_twice and row.num_read == len(row.to_read):
                row.to_read, row.num_read = row.request.ids, num_shared(slot.ids, row.request.ids)
                del slot.ids[row.num_read :]
                return []
        if any(row.num_read < len(row.to_read) for row in rows):
            return []
        joining = list(rows)
        for row in joining:
            rows.remove(row)
            self._swap(row.slot, len(self.writing))
            row.slot = len(self.writing)
            self.writing.append(row)
            if not row.limit:
                row.finish = "length"
        choosing = [index for index, row in enumerate(joining) if row.limit]
        if choosing:
            last = [len(pieces[index]) - 1 for index in choosing]
            self._choose([joining[index] for index in choosing], hidden[choosing, last])
        return joining

    def step(self) -> None:
        """One more token for each row that writes; those with a `finish` must have been removed."""
        rows = self.writing
        slots = self.slots[: len(rows)]
        lengths = [len(slot.ids) for slot in slots]
        positions = torch.tensor(lengths, device=self._device)[:, None]
        hidden = self._hidden([[row.ids[-1]] for row in rows], positions, max(lengths) + 1)[:, 0]  # [B, C]
        for slot, row in zip(slots, rows, strict=True):
            slot.ids.append(row.ids[-1])
        self.num_steps += 1
        self._choose(rows, hidden)

    def _hidden(self, tokens: list[list[int]], positions: Tensor, end: int, first: int = 0) -> Tensor:
        """Hidden states [B, T, C] of tokens [B, T] at `positions` below `end`, in the slots from `first` on."""
        ids, mask = torch.tensor(tokens, device=self._device), self._cache.advance(positions, end, first)
        hidden: Tensor = self.model(ids, positions=positions, cache=self._cache, mask=mask)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C] for the ids that are tokens."""
        return self.model.logits(hidden)[..., : self._vocab_size]

    def _choose(self, rows: Sequence[R], hidden: Tensor) -> None:
        """Choose the next token of each row by its hidden state [B, C]."""
        likeliest = [index for index, row in enumerate(rows) if row.wants_likeliest and not row.pending]
        others = [index for index, row in enumerate(rows) if not row.wants_likeliest or row.pending]
        if likeliest:
            chosen = self.model.likeliest(hidden[likeliest] if others else hidden, self._vocab_size)
            for index, token in zip(likeliest, chosen.tolist(), strict=True):
                rows[index].take(token, self._bytes_of[token])
        if others:
            self._sample([rows[index] for index in others], self._logits(hidden[others] if likeliest else hidden))

    def _sample(self, rows: Sequence[R], logits: Tensor) -> None:
        """Choose the next token of each row by its logits [B, V]; with log-probabilities where they were asked for."""
        possible = self._healing.restrict(logits, [row.pending for row in rows])
        groups: dict[tuple[float, int, float, float], list[int]] = {}
        chosen = torch.empty(len(rows), dtype=torch.long, device=self._device)
        for index, row in enumerate(rows):
            if row.request.infill_sampler:
                chosen[index] = self._infill(row, possible[index])
            else:
                groups.setdefault(row.sampling, []).append(index)
        for sampling, group in groups.items():
            numbers = [rows[index].uniforms[len(rows[index].ids)] for index in group]
            uniforms = torch.tensor(numbers, dtype=torch.float64, device=self._device)
            chosen[group] = sample(possible if len(group) == len(rows) else possible[group], uniforms, *sampling)
        tokens = chosen.tolist()
        scores: list[tuple[float | None, Top]] = [(None, ())] * len(rows)
        asking = [index for index, row in enumerate(rows) if row.request.num_top is not None]
        if asking:
            logprobs = logits[asking].log_softmax(dim=-1)
            for index, row_logprobs in zip(asking, logprobs, strict=True):
                scores[index] = float(row_logprobs[tokens[index]]), _likeliest(row_logprobs, rows[index].request)
        for row, token, (logprob, top) in zip(rows, tokens, scores, strict=True):
            row.take(token, self._bytes_of[token], logprob, top)

    def _infill(self, row: R, logits: Tensor) -> int:
        """The next token of a row by its logits [V], or a stop id where `infill` says that it should end."""
        temperature, top_k, top_p, min_p = row.sampling
        left = survivors(*candidates(logits, top_k, top_p, min_p), self._bytes_of, row.request.stop_ids)
        if len(left) == 1:
            return left[0]
        uniform = torch.tensor([row.uniforms[len(row.ids)]], dtype=torch.float64, device=self._device)
        return left[int(sample(logits[left][None], uniform, temperature, 0, 1.0))]

    def _note_prompt(self, row: R, hidden: Tensor) -> None:
        """Log-probabilities of a prompt's tokens: hidden [T, C] of the next to be read tell those that follow each."""
        ids, start = row.to_read, row.num_read
        logprobs = self._logits(hidden).log_softmax(dim=-1)
        if start == 0:
            row.prompt.append(Token(ids[0], self._bytes_of[ids[0]], None))
        for token, of_next in zip(ids[start + 1 : start + 1 + len(hidden)], logprobs, strict=False):
            top = _likeliest(of_next, row.request)
            row.prompt.append(Token(token, self._bytes_of[token], float(of_next[token]), top))


def num_shared(stored: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of a prompt a slot holds from the beginning on; the last must be read to know what follows."""
    most = min(len(stored), len(ids) - 1)
    return next((index for index in range(most) if stored[index] != ids[index]), most)


def _likeliest(logprobs: Tensor, request: Request) -> Top:
    """The tokens that the model finds likeliest by `logprobs` [V], as many as were asked for."""
    if not request.num_top:
        return ()
    values, ids = logprobs.topk(min(request.num_top, len(logprobs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
