"""Batches: documents arranged for fill-in-the-middle, packed into rows, each a pure function of its number.

Packing: the documents of an epoch, in an order drawn from (seed, epoch), form one endless stream separated by eos.
Rows are windows of it that overlap by one token, so that each token is a target once an epoch; they are drawn in
random order, and the stream begins elsewhere each epoch. Fill-in-the-middle (`smelter.fim`) happens to the piece of
a document that a row holds and lengthens it by a few tokens: what no longer fits at the end of a row is left out
*before* rearranging, and a few positions may stay empty.

Row g depends on (seed, g) alone: no state to save, any row at once, and the same set of rows in every optimizer
step however the step is divided among devices and micro-steps. Randomness comes from Philox, which counts instead
of remembering. So a teacher's distributions can be stored by row number (`smelter.teacher_cache`); with them a batch
brings along what the teacher says, and the rows that were stored come round again and again.
"""

import itertools
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from smelter.config import DataConfig
from smelter.errors import ConfigError, DataError
from smelter.fim import fit_fim
from smelter.shards import Split
from smelter.tokenizer import Tokenizer

IGNORED = -100
"""Target that counts for nothing (torch's `ignore_index`)."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TeacherRows:
    """A stored teacher's distribution at every token of B rows, in K entries each; unused entries have probability 0.

    A token without a target has no entries at all.
    """

    ids: Ids
    """[B, T, K]: token ids, int64."""
    probs: NDArray[np.float32]
    """[B, T, K]: their probabilities."""
    entropy: NDArray[np.float32]
    """[B, T]: entropy of the whole distribution, in nats."""


class RowTeacher(Protocol):
    """What a teacher says about rows 0 .. num_rows - 1 of a stream."""

    @property
    def num_rows(self) -> int:
        """Rows that it knows."""
        ...

    def rows(self, indices: Sequence[int]) -> TeacherRows:
        """What it says about these rows."""
        ...


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs; arrays are [device_batch_size, seq_len]."""

    inputs: Ids
    """Token ids, int64."""
    targets: Ids
    """The next token of each, int64; -100 where there is none."""
    doc_ids: NDArray[np.int32]
    """Number of the document within the row. eos counts to the document it begins, as it does in evaluation."""
    weights: NDArray[np.float32] | None = None
    """Loss weight of each target; None if all are 1."""
    teachers: tuple[TeacherRows, ...] = ()
    """What each stored teacher says about the tokens."""


@dataclass(frozen=True)
class _Epoch:
    """Order of documents and rows in one epoch."""

    docs: NDArray[np.int64]
    """[num_docs]: document at each place of the stream."""
    ends: NDArray[np.int64]
    """[num_docs]: where in the stream the document at each place ends."""
    rows: NDArray[np.int64]
    """[rows_per_epoch]: window that each row takes."""
    offset: int
    """Where in the stream the first window begins."""


class BatchStream:
    """The training data as an endless, randomly accessible sequence of rows."""

    def __init__(
        self,
        split: Split,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        seq_len: int,
        seed: int,
        device_batch_size: int,
        rows_per_step: int,
        cached: Sequence[RowTeacher] = (),
    ) -> None:
        """`rows_per_step` rows make an optimizer step, `device_batch_size` of them a batch.

        With `cached` teachers, which must know the same number of rows, those rows are repeated without end.

        Raises DataError if the tokenizer has other fill-in-the-middle tokens than `config`, and ConfigError for sizes
        that do not divide.
        """
        if min(seq_len, device_batch_size, rows_per_step) < 1 or rows_per_step % device_batch_size:
            raise ConfigError(
                f"{rows_per_step} rows a step, {device_batch_size} a batch, {seq_len} tokens a row: all must be "
                "positive and the first a multiple of the second"
            )
        self.split = split
        self.tokenizer = tokenizer
        self.config = config
        self.seq_len = seq_len
        self.seed = seed
        self.device_batch_size = device_batch_size
        self.rows_per_step = rows_per_step
        self.cached = tuple(cached)
        if config.fim_rate > 0:
            _check_fim_tokens(config, tokenizer)
        self.rows_per_epoch = max(1, split.num_tokens // seq_len)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, step: int, micro_step: int, rank: int, world_size: int) -> Batch:
        """Batch of a device in a micro-step of an optimizer step.

        All batches of a step together are rows [step * rows_per_step, (step + 1) * rows_per_step), whatever
        `world_size`.
        """
        first = (micro_step * world_size + rank) * self.device_batch_size
        if not (0 <= rank < world_size and micro_step >= 0 and first + self.device_batch_size <= self.rows_per_step):
            raise ValueError(f"micro_step {micro_step} of rank {rank} / {world_size} lies outside the step")
        start = step * self.rows_per_step + first
        indices = [start + i for i in range(self.device_batch_size)]
        if self.cached:
            indices = [index % self.cached[0].num_rows for index in indices]
        rows = [self._row(index) for index in indices]
        tokens = np.stack([row for row, _ in rows])
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        doc_ids = np.cumsum(inputs == self.tokenizer.eos_id, axis=1, dtype=np.int32)
        weights = None if self.split.weights is None else np.stack([weight for _, weight in rows])[:, 1:]
        return Batch(
            inputs=np.ascontiguousarray(inputs),
            targets=np.where(targets == self.tokenizer.pad_id, IGNORED, targets),
            weights=weights if weights is None else np.ascontiguousarray(weights),
            doc_ids=doc_ids,
            teachers=tuple(teacher.rows(indices) for teacher in self.cached),
        )

    def step(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """All batches of a device in an optimizer step."""
        micro_steps, rest = divmod(self.rows_per_step, self.device_batch_size * world_size)
        if rest:
            raise ValueError(f"{self.rows_per_step} rows do not divide among {world_size} x {self.device_batch_size}")
        return [self.batch(step, micro_step, rank, world_size) for micro_step in range(micro_steps)]

    def row(self, index: int) -> Ids:
        """Row `index` of the endless sequence, [seq_len + 1] ids."""
        return self._row(index)[0]

    def _row(self, index: int) -> tuple[Ids, NDArray[np.float32]]:
        """A row's ids and the loss weight of each, [seq_len + 1]."""
        epoch, number = divmod(index, self.rows_per_epoch)
        size = self.seq_len + 1
        tokens = np.full(size, self.tokenizer.pad_id, dtype=np.int64)
        weights = np.ones(size, dtype=np.float32)
        filled = 0
        for place, (doc, ids) in enumerate(self._pieces(epoch, number)):
            if filled == size:
                break
            made = self._arranged(ids, size - filled, (epoch, number, place))
            end = filled + len(made)
            tokens[filled:end] = made
            if self.split.weights is not None:
                weights[filled:end] = self.split.weights[doc]
            filled = end
        return tokens, weights

    def _pieces(self, epoch: int, number: int) -> Iterator[tuple[int, Ids]]:
        """Documents, or parts of them, that make up window `number` of the stream: seq_len + 1 tokens in all."""
        plan = self._epoch(epoch)
        missing = self.seq_len + 1
        start = (plan.offset + int(plan.rows[number]) * self.seq_len) % self.split.num_tokens
        place = int(np.searchsorted(plan.ends, start, side="right"))
        while missing:
            doc = int(plan.docs[place])
            ids = self.split.doc_with_eos(doc)
            begin = max(0, start - (int(plan.ends[place]) - len(ids)))
            ids = ids[begin : begin + missing]
            yield doc, ids
            missing -= len(ids)
            place = (place + 1) % len(plan.docs)
            if place == 0:
                start = 0

    def _arranged(self, ids: Ids, room: int, key: tuple[int, int, int]) -> "Ids | list[int]":
        """A piece, rearranged or as it is, in at most `room` tokens."""
        if self.config.fim_rate > 0:
            rng = philox(self.seed, "fim", *key)
            if rng.random() < self.config.fim_rate:
                made = fit_fim(self.tokenizer, ids, room, rng, self.config.fim_spm_rate)
                if made is not None:
                    return made
        return ids[:room]

    def _make_epoch(self, epoch: int) -> _Epoch:
        docs = _permutation(self.split.num_docs, philox(self.seed, "documents", epoch))
        return _Epoch(
            docs=docs,
            ends=np.cumsum(np.diff(self.split.offsets)[docs]),
            rows=_permutation(self.rows_per_epoch, philox(self.seed, "rows", epoch)),
            offset=int(philox(self.seed, "offset", epoch).integers(self.split.num_tokens)),
        )


def _check_fim_tokens(config: DataConfig, tokenizer: Tokenizer) -> None:
    for role in ("prefix", "middle", "suffix"):
        wanted, present = getattr(config, f"fim_{role}_token"), getattr(tokenizer.special, f"fim_{role}")
        if wanted != present:
            raise DataError(
                f"data.fim_{role}_token = {wanted!r}, but the shards' tokenizer has {present!r}: set it to that, or "
                f"tokenize again with --fim-{role}-token"
            )


_STREAMS = ("documents", "rows", "offset", "fim", "teacher")


def philox(seed: int, purpose: str, *counter: int) -> np.random.Generator:
    """Random numbers that depend on the arguments alone (Salmon et al., "Parallel random numbers", 2011)."""
    words = [0, *counter, 0, 0, 0][:4]  # the first word counts the numbers drawn
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, _STREAMS.index(purpose)], counter=words))


def _permutation(size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of range(size), from the bit stream itself, which NumPy promises never to change."""
    raw = rng.bit_generator.random_raw(size)
    return np.argsort(np.asarray(raw, dtype=np.uint64), kind="stable").astype(np.int64)


def prefetch(
    stream: BatchStream, first_step: int, rank: int, world_size: int, depth: int = 4
) -> Generator[list[Batch], None, None]:
    """The batches of each step from `first_step` on, made ahead by a thread, at most `depth` steps.

    An error in the thread is raised here; closing the generator (or leaving it to the garbage collector) ends the
    thread.
    """
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: list[Batch] | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in itertools.count(first_step):
                if stop.is_set():
                    return
                put(stream.step(step, rank, world_size))
        except BaseException as error:  # raised again where the batches are used
            put(error)

    thread = threading.Thread(target=work, name="smelter-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def eval_windows(split: Split, seq_len: int, stride: int, max_tokens: int | None = None) -> Iterator[tuple[Ids, Ids]]:
    """Windows (inputs [seq_len], targets [seq_len]) in which every document token is a target exactly once.

    A document is read from left to right with eos before it (its final eos is no target). Windows of long documents
    begin every `stride` tokens; what the window before has scored is context here, its targets are -100, as are those
    of empty positions. With `max_tokens`, documents come in a fixed random order until that many were scored,
    whole windows only.
    """
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"stride = {stride}: must lie between 1 and the window's length, {seq_len}")
    order = np.arange(split.num_docs) if max_tokens is None else _permutation(split.num_docs, philox(0, "documents"))
    scored = 0
    for doc in order.tolist():
        ids = np.concatenate(([split.eos_id], split.doc(doc))).astype(np.int64)
        size, done = len(ids) - 1, 0
        for start in range(0, size, stride):
            if done == size:
                break
            if max_tokens is not None and scored >= max_tokens:
                return
            end = min(start + seq_len, size)
            inputs, targets = np.full(seq_len, split.eos_id), np.full(seq_len, IGNORED)
            inputs[: end - start] = ids[start:end]
            targets[done - start : end - start] = ids[done + 1 : end + 1]
            yield inputs, targets
            scored += end - done
            done = end
