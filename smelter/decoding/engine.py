"""Decoding for many at once: requests join and leave a running batch between two tokens (continuous batching).

As in Orca (Yu et al., OSDI 2022), every step decodes one token for each request in work, whatever its age. A new
request's prompt is read in pieces between the steps, so that nobody waits long. All keys live in one cache, a slot for
each request; those in work stand first, without holes, so that a step reads views and no copies, and short prompts
that wait together are read together. What a request leaves behind is kept until its slot is needed: a prompt that
begins like an earlier one, as it does while somebody types, is read from where they differ.

One thread does it all and calls each request's `deliver`. Every row has its own sampling parameters, and random numbers
that come from its seed alone: the answer is the one of `smelter.decoding.generate`, whoever else is being served.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smelter.decoding.healing import Healing
from smelter.decoding.kv_cache import KVCache
from smelter.decoding.request import Answer, End, Finish, Piece, Request, Token, Top
from smelter.decoding.sampling import MIN_TEMPERATURE, sample, uniforms_of
from smelter.decoding.text import TextStream
from smelter.model import Model
from smelter.tokens import Tokenizer

PREFILL_TOKENS = 256
"""Tokens of prompts that are read between two steps of the others."""
MIN_SHARED_TOKENS = 16
"""From how many equal tokens on an earlier prompt's keys are used again."""


class EngineBusy(Exception):
    """The queue is full."""


class EngineStopped(Exception):
    """The engine takes no more requests: it is being shut down, or it failed."""


@dataclass
class Counts:
    """What has been done since the start."""

    requests: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0


class Engine:
    """`num_slots` requests at a time, `max_queue` more wait."""

    def __init__(self, model: Model, tokenizer: Tokenizer, *, num_slots: int = 8, max_queue: int = 64) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.num_slots, self.max_queue = num_slots, max_queue
        self.context = model.config.max_seq_len
        self.counts = Counts()
        self.failure: str | None = None
        self._device = model.embed_tokens.weight.device
        self._cache = KVCache(model.config, num_slots, self.context, model.compute_dtype, self._device)
        self._healing = Healing(tokenizer, [b""] * num_slots)
        self._stored: list[list[int]] = [[] for _ in range(num_slots)]  # tokens whose keys each slot holds
        self._used = [0] * num_slots  # when, in steps
        self._lanes = list(range(num_slots))
        self._rows: list[Answer] = []  # in work; rows[i] has slot i
        self._reading: list[Answer] = []  # read together, in slots side by side
        self._waiting: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the token at hand; what is in work is cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def num_active(self) -> int:
        """Requests in work."""
        return len(self._rows) + len(self._reading)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, requests: Sequence[Request], deliver: Sequence[Callable[[Piece], None]]) -> list[Answer]:
        """Take requests, all or none. Each `deliver` is called in the engine's thread, the last time with an `end`.

        Raises EngineBusy or EngineStopped.
        """
        answers = [
            Answer(
                request,
                each,
                TextStream(request.stops, len(request.pending)),
                uniforms_of(request.seed, request.max_tokens),
                min(request.max_tokens, self.context - len(request.ids)),
            )
            for request, each in zip(requests, deliver, strict=True)
        ]
        with self._changed:
            if self._stopping or self.failure is not None:
                raise EngineStopped(self.failure or "the server is shutting down")
            free = self.num_slots - self.num_active
            if len(self._waiting) + len(answers) > self.max_queue + free:
                raise EngineBusy(f"{self.num_active} requests are in work and {len(self._waiting)} wait")
            self._waiting.extend(answers)
            self._changed.notify_all()
        return answers

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Nobody waits for these any more; their slots are free after the token at hand."""
        with self._changed:
            for answer in answers:
                answer.is_cancelled = True
            self._changed.notify_all()

    # --- the engine's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work()
        finally:  # however it ends: nobody may wait for a thread that is gone
            with self._changed:
                self._stopping = True

    @torch.inference_mode()
    def _work(self) -> None:
        while self._wait_for_work():
            try:
                self._drop_cancelled()
                if self._reading:
                    self._read_prompts()
                if self._rows:
                    self._decode()
            except Exception as error:  # a defect: whoever waits must hear of it, and the others are served on
                traceback.print_exc()
                if not self._give_up():
                    with self._changed:
                        self.failure = f"{type(error).__name__}: {error}"
                    break
        for answer in [*self._rows, *self._reading, *self._waiting]:
            self._finish(answer, "error" if self.failure else "cancelled")

    def _give_up(self) -> bool:
        """End all that is in work, whose state cannot be trusted; False if it is none of theirs that is broken."""
        broken = [*self._rows, *self._reading]
        self._rows, self._reading, self._lanes = [], [], list(range(self.num_slots))
        self._stored = [[] for _ in range(self.num_slots)]
        for answer in broken:
            answer.lane = -1
            self._finish(answer, "error")
        return bool(broken)

    def _wait_for_work(self) -> bool:
        """Until there is some; False to end. Takes out of the queue what can be begun."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._reading or self._rows)
            for answer in [answer for answer in self._waiting if answer.is_cancelled]:
                self._waiting.remove(answer)
                self._finish(answer, "cancelled")
            if not self._reading:
                while self._waiting and self.num_active < self.num_slots and self._fits(self._waiting[0].request.ids):
                    self._place(self._waiting.popleft())
            return not self._stopping

    def _fits(self, ids: Sequence[int]) -> bool:
        """Whether a prompt can be read with those chosen: padded to the longest, in one piece, inside the context.

        One that begins like one of them waits for it, and need not read that again.
        """
        longest = max([len(ids), *(len(answer.request.ids) for answer in self._reading)])
        return not self._reading or (
            longest * (len(self._reading) + 1) <= PREFILL_TOKENS
            and 2 * longest <= self.context
            and all(_num_shared(answer.request.ids, ids) < MIN_SHARED_TOKENS for answer in self._reading)
        )

    def _place(self, answer: Answer) -> None:
        """Give a request its slot: one that holds the beginning of its prompt, or the one unused for longest.

        It is brought beside those of the prompts that are read with it.
        """
        ids = list(answer.request.ids)
        shared = [0 if answer.request.prompt_logprobs else _num_shared(stored, ids) for stored in self._stored]
        source = max(range(self.num_slots), key=shared.__getitem__)
        length = shared[source] if shared[source] >= MIN_SHARED_TOKENS else 0
        free = range(self.num_active, self.num_slots)
        slot = source if length and source in free else min(free, key=self._used.__getitem__)
        if length and slot != source:
            self._cache.copy(source, slot, length)
        self._stored[slot] = ids[:length]
        answer.slot = free[0]
        self._swap(slot, answer.slot)
        self._reading.append(answer)
        answer.num_read = answer.num_cached = length
        answer.lane = self._lanes.pop()
        answer.started = time.monotonic()
        self._healing.start(answer.lane, answer.request.pending)
        self.counts.requests += 1
        self.counts.cached_tokens += length

    def _read_prompts(self) -> None:
        """The next piece of the prompts; whose prompt has ended gets its first token and joins the others."""
        started = time.monotonic()
        reading = list(self._reading)
        starts, size = [answer.num_read for answer in reading], PREFILL_TOKENS // len(reading)
        pieces = [list(answer.request.ids[start : start + size]) for answer, start in zip(reading, starts, strict=True)]
        width = max(map(len, pieces))
        # What pads a shorter piece is overwritten before anybody sees it.
        tokens = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=self._device)
        positions = torch.tensor(starts, device=self._device)[:, None] + torch.arange(width, device=self._device)
        mask = self._cache.advance(positions, max(starts) + width, first=reading[0].slot)
        hidden = self.model(tokens, positions=positions, cache=self._cache, mask=mask)  # [B, T, C]
        for answer, piece, states in zip(reading, pieces, hidden, strict=True):
            self._stored[answer.slot] += piece
            self.counts.prompt_tokens += len(piece)
            if answer.request.prompt_logprobs:
                self._note_prompt(answer, states[: len(piece)], answer.num_read)
            answer.num_read += len(piece)
        done = [index for index, answer in enumerate(reading) if answer.num_read == len(answer.request.ids)]
        if done:
            self._join([reading[index] for index in done], hidden[done, [len(pieces[index]) - 1 for index in done]])
        self.counts.prompt_seconds += time.monotonic() - started

    def _join(self, answers: list[Answer], hidden: Tensor) -> None:
        """Answers whose prompts are read, with the last hidden states [B, C], join those in work."""
        for answer in answers:
            self._reading.remove(answer)
            self._swap(answer.slot, len(self._rows))
            answer.slot = len(self._rows)
            self._rows.append(answer)
            if answer.prompt:
                answer.deliver(Piece("", prompt=tuple(answer.prompt)))
            answer.first = time.monotonic()
        writing = [index for index, answer in enumerate(answers) if answer.limit]
        if writing:
            self._choose([answers[index] for index in writing], hidden[writing])
        for answer in answers:
            if not answer.limit:
                self._finish(answer, "length")

    def _note_prompt(self, answer: Answer, hidden: Tensor, start: int) -> None:
        """Log-probabilities of a prompt's tokens: hidden [T, C] at `start` and after tell those of the next tokens."""
        ids = answer.request.ids
        logprobs = self._logits(hidden).log_softmax(dim=-1)
        if start == 0:
            answer.prompt.append(Token(ids[0], self.tokenizer.decode_bytes(ids[:1]), None))
        for row, index in enumerate(range(start + 1, min(start + len(hidden) + 1, len(ids)))):
            raw = self.tokenizer.decode_bytes([ids[index]])
            answer.prompt.append(
                Token(ids[index], raw, float(logprobs[row, ids[index]]), _likeliest(logprobs[row], answer.request))
            )

    def _decode(self) -> None:
        """One token for each row."""
        started = time.monotonic()
        where = [len(stored) for stored in self._stored[: len(self._rows)]]
        tokens = torch.tensor([[row.next_id] for row in self._rows], device=self._device)
        positions = torch.tensor(where, device=self._device)[:, None]
        mask = self._cache.advance(positions, max(where) + 1)
        hidden = self.model(tokens, positions=positions, cache=self._cache, mask=mask)[:, 0]  # [B, C]
        for stored, row in zip(self._stored, self._rows, strict=False):
            stored.append(row.next_id)
        self.counts.steps += 1
        self._choose(list(self._rows), hidden)
        self.counts.decode_seconds += time.monotonic() - started

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., C] for the ids that are tokens: an embedding may have more rows."""
        return self.model.logits(hidden)[..., : self.tokenizer.vocab_size]

    def _choose(self, rows: list[Answer], hidden: Tensor) -> None:
        """Choose the next token of each row by its hidden state [B, C], and tell what comes of it."""
        is_greedy = [self._asks_for_the_likeliest(row) for row in rows]
        greedy, others = ([index for index, each in enumerate(is_greedy) if each is kind] for kind in (True, False))
        told: dict[int, tuple[int, float | None, Top]] = {}
        if greedy:
            chosen = self.model.likeliest(hidden if not others else hidden[greedy], self.tokenizer.vocab_size)
            told |= {index: (token, None, ()) for index, token in zip(greedy, chosen.tolist(), strict=True)}
        if others:
            logits = self._logits(hidden if not greedy else hidden[others])
            told |= zip(others, self._sample([rows[index] for index in others], logits), strict=True)
        for index, row in enumerate(rows):
            self._take(row, *told[index])

    def _asks_for_the_likeliest(self, row: Answer) -> bool:
        """And for no more: no chance, no log-probabilities, nothing to spell."""
        asked = row.request
        return asked.temperature < MIN_TEMPERATURE and asked.num_top is None and not self._healing.is_pending(row.lane)

    def _sample(self, rows: list[Answer], logits: Tensor) -> list[tuple[int, float | None, Top]]:
        """A token for each row by its logits [B, V]; with log-probabilities where they were asked for."""
        possible = self._healing.restrict(logits, [row.lane for row in rows])
        groups: dict[tuple[float, int, float], list[int]] = {}
        for index, row in enumerate(rows):
            asked = row.request
            groups.setdefault((asked.temperature, asked.top_k, asked.top_p), []).append(index)
        chosen = torch.empty(len(rows), dtype=torch.long, device=self._device)
        for (temperature, top_k, top_p), indices in groups.items():
            uniforms = torch.stack([rows[index].uniforms[rows[index].num_tokens] for index in indices])
            picked = possible if len(indices) == len(rows) else possible[indices]
            chosen[indices] = sample(picked, uniforms.to(self._device), temperature, top_k, top_p)
        found: list[tuple[int, float | None, Top]] = [(token, None, ()) for token in chosen.tolist()]
        for index, (row, (token, _, _)) in enumerate(zip(rows, found, strict=True)):
            if row.request.num_top is not None:
                logprobs = logits[index] - logits[index].logsumexp(dim=-1)
                found[index] = token, float(logprobs[token]), _likeliest(logprobs, row.request)
        return found

    def _take(self, row: Answer, token: int, logprob: float | None, top: Top) -> None:
        """Row `row` wrote `token`, where the likeliest were `top`."""
        request = row.request
        if self._healing.is_pending(row.lane):
            self._healing.advance(row.lane, token)
        elif token in request.stop_ids:
            self._finish(row, "stop")
            return
        row.next_id = token
        row.num_tokens += 1
        self.counts.tokens += 1
        raw = self.tokenizer.decode_bytes([token])
        added = raw[row.text.skip :]
        text = row.text.push(raw)
        if added:
            row.held.append((Token(token, added, logprob, top), row.num_bytes))
            row.num_bytes += len(added)
        if row.text.stop is not None:
            self._finish(row, "stop", text)
        elif row.num_tokens == row.limit:
            self._finish(row, "length", text)
        elif request.max_seconds is not None and time.monotonic() - row.first > request.max_seconds:
            self._finish(row, "time", text)
        else:
            tokens = self._shown(row)
            if text or tokens:
                row.deliver(Piece(text, tokens))

    def _shown(self, row: Answer) -> tuple[Token, ...]:
        """Tokens all of whose bytes have been shown, each once; at a stop string what stands before it."""
        end = row.text.num_shown
        shown = [token for token, start in row.held if start + len(token.raw) <= end]
        del row.held[: len(shown)]
        if row.held and row.text.stop is not None:
            token, start = row.held[0]
            shown += [replace(token, raw=token.raw[: end - start])] if start < end else []
        return tuple(shown)

    def _finish(self, answer: Answer, why: Finish, text: str = "") -> None:
        """Deliver the end, and free the slot."""
        now = time.monotonic()
        text += answer.text.close()
        end = End(
            why,
            answer.text.stop,
            len(answer.request.ids),
            answer.num_cached,
            answer.num_tokens,
            (answer.started or now) - answer.submitted,
            (answer.first or now) - (answer.started or now),
            now - (answer.first or now),
        )
        if why == "cancelled":
            self.counts.cancelled += 1
        if answer.lane >= 0:
            self._lanes.append(answer.lane)
            self._used[answer.slot] = self.counts.steps
            answer.lane = -1
        for group in (self._rows, self._reading):
            if answer in group:
                last = group[-1]
                self._swap(answer.slot, last.slot)
                group[group.index(answer)] = last
                last.slot = answer.slot
                group.pop()
        answer.deliver(Piece(text, self._shown(answer), end))

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self._cache.swap(a, b, max(len(self._stored[a]), len(self._stored[b])))
            self._stored[a], self._stored[b] = self._stored[b], self._stored[a]
            self._used[a], self._used[b] = self._used[b], self._used[a]

    def _drop_cancelled(self) -> None:
        for answer in [*self._rows, *self._reading]:
            if answer.is_cancelled:
                self._finish(answer, "cancelled")


def _num_shared(stored: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of a prompt a slot holds from the beginning on; the last must be read to know what follows."""
    most = min(len(stored), len(ids) - 1)
    return next((index for index in range(most) if stored[index] != ids[index]), most)


def _likeliest(logprobs: Tensor, request: Request) -> Top:
    """The tokens that the model finds likeliest by `logprobs` [V], as many as were asked for."""
    if not request.num_top:
        return ()
    values, ids = logprobs.topk(min(request.num_top, len(logprobs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
