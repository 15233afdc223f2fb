"""Decoding for many at once: requests join and leave a running batch between two tokens (continuous batching).

As in Orca (Yu et al., OSDI 2022), every step decodes one token for each request in work, whatever its age. A new
request's prompt is read in pieces between the steps, so that nobody waits long. All keys live in one cache, a slot for
each request; those in work stand first, without holes, so that a step reads views and no copies. What a request
leaves behind is kept until its slot is needed: a prompt that begins like an earlier one, as it does while somebody
types, is read from where they differ.

One thread does it all and calls each request's `deliver`. Every row has its own sampling parameters, and random numbers
that come from its seed alone: the answer is the one of `smelter.generate`, whoever else is being served.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from smelter.cache import KVCache
from smelter.generate import sample, uniforms_of
from smelter.healing import Healing
from smelter.model import Model
from smelter.serving.text import TextStream
from smelter.tokenizer import Tokenizer

PREFILL_TOKENS = 256
"""Tokens of a prompt that are read between two steps of the others."""
MIN_SHARED_TOKENS = 16
"""From how many equal tokens on an earlier prompt's keys are used again."""

Finish = Literal["stop", "length", "time", "cancelled", "error"]


class EngineBusy(Exception):
    """The queue is full."""


class EngineStopped(Exception):
    """The engine takes no more requests: it is being shut down, or it failed."""


@dataclass(frozen=True)
class Token:
    """A token of the answer: the bytes that it adds to the text, its log-probability, and the likeliest instead."""

    id: int
    raw: bytes
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class End:
    """Why an answer ended, and what it took. Times in seconds; `num_cached` prompt tokens needed no reading."""

    finish: Finish
    stop: str | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_tokens: int = 0
    wait_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Piece:
    """What comes of an answer: text, the tokens that it completes, and at last the end.

    `prompt` holds the prompt's tokens, where the request asked for their log-probabilities.
    """

    text: str
    tokens: tuple[Token, ...] = ()
    end: End | None = None
    prompt: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Request:
    """What to continue and how; `ids` and `pending` as in `generate.EncodedPrompt`.

    `num_top` likeliest tokens are told with each. `max_seconds` counts from the first token. `max_tokens` may be 0
    where `prompt_logprobs` are asked for.
    """

    ids: Sequence[int]
    pending: bytes = b""
    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    num_top: int = 0
    prompt_logprobs: bool = False
    max_seconds: float | None = None


@dataclass(eq=False)
class Answer:
    """A request on its way through the engine."""

    request: Request
    deliver: Callable[[Piece], None]
    text: TextStream
    uniforms: Tensor
    limit: int
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first: float = 0.0
    slot: int = -1
    lane: int = -1
    num_read: int = 0
    num_cached: int = 0
    num_tokens: int = 0
    next_id: int = 0
    num_bytes: int = 0
    held: list[tuple[Token, int]] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    is_cancelled: bool = False


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
        self._reading: Answer | None = None
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
        return len(self._rows) + (self._reading is not None)

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

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                if self._reading is not None:
                    self._read_prompt(self._reading)
                if self._rows:
                    self._decode()
        except Exception as error:  # a defect: whoever waits must hear of it
            traceback.print_exc()
            with self._changed:
                self.failure = f"{type(error).__name__}: {error}"
        for answer in [*self._rows, *([self._reading] if self._reading else []), *self._waiting]:
            self._finish(answer, "error" if self.failure else "cancelled")

    def _wait_for_work(self) -> bool:
        """Until there is some; False to end. Takes the next request out of the queue if it can be begun."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._reading or self._rows)
            for answer in [answer for answer in self._waiting if answer.is_cancelled]:
                self._waiting.remove(answer)
                self._finish(answer, "cancelled")
            if self._waiting and self._reading is None and len(self._rows) < self.num_slots:
                self._reading = self._waiting.popleft()
                self._place(self._reading)
            return not self._stopping

    def _place(self, answer: Answer) -> None:
        """Give a request its slot: one that holds the beginning of its prompt, or the one unused for longest."""
        ids = list(answer.request.ids)
        shared = [0 if answer.request.prompt_logprobs else _num_shared(stored, ids) for stored in self._stored]
        source = max(range(self.num_slots), key=shared.__getitem__)
        length = shared[source] if shared[source] >= MIN_SHARED_TOKENS else 0
        free = range(len(self._rows), self.num_slots)
        answer.slot = source if length and source in free else min(free, key=self._used.__getitem__)
        if length and answer.slot != source:
            self._cache.copy(source, answer.slot, length)
        self._stored[answer.slot] = ids[:length]
        answer.num_read = answer.num_cached = length
        answer.lane = self._lanes.pop()
        answer.started = time.monotonic()
        self._healing.start(answer.lane, answer.request.pending)
        self.counts.requests += 1
        self.counts.cached_tokens += length

    def _read_prompt(self, answer: Answer) -> None:
        """The next piece of a prompt; after the last its first token is chosen, and it joins the others."""
        started = time.monotonic()
        ids, start = answer.request.ids, answer.num_read
        end = min(start + PREFILL_TOKENS, len(ids))
        tokens = torch.tensor([list(ids[start:end])], device=self._device)
        positions = torch.arange(start, end, device=self._device)[None]
        mask = self._cache.advance(positions, end, first=answer.slot)
        hidden = self.model(tokens, positions=positions, cache=self._cache, mask=mask)[0]  # [T, C]
        self._stored[answer.slot] += ids[start:end]
        self.counts.prompt_tokens += end - start
        if answer.request.prompt_logprobs:
            self._note_prompt(answer, hidden, start)
        answer.num_read = end
        if end == len(ids):
            self._reading = None
            self._swap(answer.slot, len(self._rows))
            answer.slot = len(self._rows)
            self._rows.append(answer)
            if answer.prompt:
                answer.deliver(Piece("", prompt=tuple(answer.prompt)))
            answer.first = time.monotonic()
            if answer.limit:
                self._choose([answer], self._logits(hidden[-1:]))
            else:
                self._finish(answer, "length")
        self.counts.prompt_seconds += time.monotonic() - started

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
        self._choose(list(self._rows), self._logits(hidden))
        self.counts.decode_seconds += time.monotonic() - started

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., C] for the ids that are tokens: an embedding may have more rows."""
        return self.model.logits(hidden)[..., : self.tokenizer.vocab_size]

    def _choose(self, rows: list[Answer], logits: Tensor) -> None:
        """Choose the next token of each row by its logits [B, V], and tell what comes of it."""
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
        logprobs = logits.log_softmax(dim=-1)
        values = logprobs.gather(-1, chosen[:, None]).squeeze(-1).tolist()
        for index, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            self._take(row, token, values[index], logprobs[index])

    def _take(self, row: Answer, token: int, logprob: float, logprobs: Tensor) -> None:
        """Row `row` wrote `token`."""
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
            row.held.append((Token(token, added, logprob, _likeliest(logprobs, request)), row.num_bytes))
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
        if answer is self._reading:
            self._reading = None
        elif answer in self._rows:
            last = len(self._rows) - 1
            self._swap(answer.slot, last)
            self._rows[answer.slot] = self._rows[last]
            self._rows[answer.slot].slot = answer.slot
            self._rows.pop()
        answer.deliver(Piece(text, self._shown(answer), end))

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self._cache.swap(a, b, max(len(self._stored[a]), len(self._stored[b])))
            self._stored[a], self._stored[b] = self._stored[b], self._stored[a]
            self._used[a], self._used[b] = self._used[b], self._used[a]

    def _drop_cancelled(self) -> None:
        for answer in [*self._rows, *([self._reading] if self._reading else [])]:
            if answer.is_cancelled:
                self._finish(answer, "cancelled")


def _num_shared(stored: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of a prompt a slot holds from the beginning on; the last must be read to know what follows."""
    most = min(len(stored), len(ids) - 1)
    return next((index for index in range(most) if stored[index] != ids[index]), most)


def _likeliest(logprobs: Tensor, request: Request) -> tuple[tuple[int, float], ...]:
    """The tokens that the model finds likeliest by `logprobs` [V], as many as were asked for."""
    if not request.num_top:
        return ()
    values, ids = logprobs.topk(min(request.num_top, len(logprobs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))
