"""Decoding for many at once: requests join and leave a running batch between two tokens (continuous batching).

As in Orca (Yu et al., OSDI 2022), every step decodes one token for each request in work, whatever its age. A new
request's prompt is read in pieces between the steps, so that nobody waits long, and short prompts that wait together
are read together. What a request leaves behind is kept until its slot is needed: a prompt that begins like an earlier
one, as it does while somebody types, is read from where they differ.

One thread does it all and calls each request's `deliver`. The answer is the one of `smelter.decoding.generate`, whoever
else is being served.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from smelter.decoding.batch import Batch, Row, num_shared
from smelter.decoding.line_ends import LineEnds
from smelter.decoding.request import End, Finish, Piece, Request, Token, Top
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


class Answer(Row):
    """A request on its way through the engine: who waits for it, and what of it is not shown yet."""

    def __init__(self, request: Request, context: int, deliver: Callable[[Piece], None]) -> None:
        super().__init__(request, context)
        self.deliver = deliver
        self.submitted = time.monotonic()
        self.started = self.first = 0.0
        self.is_cancelled = False
        self.num_counted = 0
        self._held: list[tuple[Token, int]] = []  # with their beginnings in the text's bytes
        self._line_ends = LineEnds(request.line_end)

    def take(self, token: int, raw: bytes, logprob: float | None = None, top: Top = ()) -> None:
        """See `Row`; the token is kept until all of it may be shown."""
        start, num_ids = self.text.num_bytes, len(self.ids)
        super().take(token, raw, logprob, top)
        added = raw[max(0, self.text.skip - start) :]
        if added and len(self.ids) > num_ids:
            self._held.append((Token(token, added, logprob, top), start + len(raw) - len(added)))

    def piece(self) -> Piece:
        """What may be shown now and was not before."""
        return Piece(self.text.show(), self._shown())

    def last_piece(self, finish: Finish) -> Piece:
        """The rest, and the end."""
        now = time.monotonic()
        started, first = self.started or now, self.first or now
        end = End(
            finish,
            self.text.stop,
            num_prompt=len(self.request.ids),
            num_cached=self.num_cached,
            num_tokens=self.num_new,
            wait_seconds=started - self.submitted,
            prompt_seconds=first - started,
            decode_seconds=now - first,
        )
        return Piece(self.text.close(), self._shown(), end)

    def _shown(self) -> tuple[Token, ...]:
        """Tokens all of whose bytes have been shown, each once; at a stop what stands before it."""
        end = self.text.num_shown
        shown = [token for token, start in self._held if start + len(token.raw) <= end]
        del self._held[: len(shown)]
        if self._held and self.text.has_ended:
            token, start = self._held[0]
            shown += [replace(token, raw=token.raw[: end - start])] if start < end else []
        return tuple(replace(token, raw=self._line_ends.give(token.raw)) for token in shown)


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
        self.num_slots, self.max_queue = num_slots, max_queue
        self.context = model.config.max_seq_len
        self.counts = Counts()
        self.failure: str | None = None
        self._batch = Batch[Answer](model, tokenizer, num_slots, self.context)
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
        return self._batch.num_rows

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def submit(self, requests: Sequence[Request], deliver: Sequence[Callable[[Piece], None]]) -> list[Answer]:
        """Take requests, all or none. Each `deliver` is called in the engine's thread, the last time with an `end`.

        Raises EngineBusy or EngineStopped.
        """
        answers = [Answer(request, self.context, call) for request, call in zip(requests, deliver, strict=True)]
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
        batch = self._batch
        while self._wait_for_work():
            try:
                self._drop_cancelled()
                if batch.reading:
                    self._read_prompts()
                if batch.writing:
                    self._decode()
            except Exception as error:  # a defect: whoever waits must hear of it, and the others are served on
                traceback.print_exc()
                # The state of what is in work cannot be trusted. If nothing is, it is none of theirs that is broken.
                if broken := batch.clear():
                    for answer in broken:
                        self._finish(answer, "error")
                else:
                    with self._changed:
                        self.failure = f"{type(error).__name__}: {error}"
                    break
        for answer in [*batch.writing, *batch.reading, *self._waiting]:
            self._finish(answer, "error" if self.failure else "cancelled")

    def _wait_for_work(self) -> bool:
        """Until there is some; False to end. Takes out of the queue what can be begun."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self.num_active)
            for answer in [answer for answer in self._waiting if answer.is_cancelled]:
                self._waiting.remove(answer)
                self._finish(answer, "cancelled")
            if not self._batch.reading:
                while self._waiting and self.num_active < self.num_slots and self._fits(self._waiting[0]):
                    self._place(self._waiting.popleft())
            return not self._stopping

    def _fits(self, answer: Answer) -> bool:
        """Whether a prompt can be read with those chosen: padded to the longest, in one piece, inside the context.

        One that begins like one of them waits for it, and need not read that again.
        """
        reading = self._batch.reading
        ids, chosen = answer.to_read, [other.to_read for other in reading]
        longest = max(map(len, [ids, *chosen]))
        return not chosen or (
            longest * (len(chosen) + 1) <= PREFILL_TOKENS
            and 2 * longest <= self.context
            and not any(other.reads_twice for other in [answer, *reading])
            and all(num_shared(other, ids) < MIN_SHARED_TOKENS for other in chosen)
        )

    def _place(self, answer: Answer) -> None:
        """Give a request its slot: one that holds the beginning of its prompt, or the one unused for longest."""
        slots, request = self._batch.slots, answer.request
        shared = [0 if request.scored_ids else num_shared(slot.ids, request.ids) for slot in slots]
        source = max(range(self.num_slots), key=shared.__getitem__)
        length = shared[source] if shared[source] >= MIN_SHARED_TOKENS else 0
        free = range(self.num_active, self.num_slots)
        slot = source if length and source in free else min(free, key=lambda index: slots[index].left)
        self._batch.add(answer, slot, length, source)
        answer.started = time.monotonic()
        self.counts.requests += 1
        self.counts.cached_tokens += length

    def _drop_cancelled(self) -> None:
        for answer in [*self._batch.writing, *self._batch.reading]:
            if answer.is_cancelled:
                self._finish(answer, "cancelled")

    def _read_prompts(self) -> None:
        """The next piece of the prompts; whose prompt has ended gets its first token and joins the others."""
        started, reading = time.monotonic(), list(self._batch.reading)
        num_read = self._batch.num_prompt_tokens
        joined = self._batch.read(PREFILL_TOKENS // len(reading))
        self.counts.prompt_tokens += self._batch.num_prompt_tokens - num_read
        for answer in joined:
            answer.first = time.monotonic()
            if answer.prompt:
                answer.deliver(Piece("", prompt=tuple(answer.prompt)))
        self._tell(joined)
        self.counts.prompt_seconds += time.monotonic() - started

    def _decode(self) -> None:
        """One token for each row."""
        started = time.monotonic()
        self._batch.step()
        self.counts.steps += 1
        self._tell(list(self._batch.writing))
        self.counts.decode_seconds += time.monotonic() - started

    def _tell(self, answers: Sequence[Answer]) -> None:
        """Deliver what is new of answers that have one more token, or have ended."""
        for answer in answers:
            limit = answer.request.max_seconds
            self.counts.tokens += len(answer.ids) - answer.num_counted
            answer.num_counted = len(answer.ids)
            if answer.finish is not None:
                self._finish(answer, answer.finish)
                continue
            piece = answer.piece()
            if piece.text or piece.tokens:
                answer.deliver(piece)
            # Half a line helps nobody: like llama.cpp's server, stop with a line break only.
            if limit is not None and "\n" in piece.text and time.monotonic() - answer.first > limit:
                self._finish(answer, "time")

    def _finish(self, answer: Answer, why: Finish) -> None:
        """Deliver the end, and free the slot."""
        if answer.slot >= 0:
            self._batch.remove(answer)
        if why == "cancelled":
            self.counts.cancelled += 1
        answer.deliver(answer.last_piece(why))
