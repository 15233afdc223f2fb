"""Batches: documents arranged for fill-in-the-middle, packed into rows, each a pure function of its number.

Packing: the documents of an epoch, in an order drawn from (seed, epoch), form one endless stream separated by eos.
Rows are windows of it that overlap by one token, so that each token is a target once an epoch; they are drawn in
random order, and the stream begins elsewhere each epoch. Fill-in-the-middle (`tokens.arrange`) happens to the piece of
a document that a row holds and lengthens it by a few tokens: what no longer fits at the end of a row is left out
*before* rearranging, and a few positions may stay empty.

Conversations (`tokens.chat`) are never rearranged. Their prompts are no targets, wherever a row cuts them; answers
and the tokens that end them are, so a model learns to stop. They come as they lie among the other documents, or,
with `instruct_share`, as a stream of their own that gets that share of the rows, spread as evenly as it can be.

Row g depends on (seed, g) alone: no state to save, any row at once, and the same set of rows in every optimizer
step however the step is divided among devices and micro-steps. Randomness comes from Philox, which counts instead
of remembering. So a teacher's distributions can be stored by row number (`distillation.cache`); a batch then brings
along what the teacher says, as the loss takes it, and the rows that were stored come round again and again.
"""

import itertools
import math
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smelter.base import ConfigError, DataError
from smelter.config import DataConfig
from smelter.losses import ChunkBatch, SparseTeacher
from smelter.tokens import IGNORED, Arranger, Split, Tokenizer, alignment


class RowTeacher(Protocol):
    """What a teacher says about rows 0 .. num_rows - 1 of a stream."""

    @property
    def num_rows(self) -> int:
        """Rows that it knows."""

    def rows(self, indices: Sequence[int]) -> SparseTeacher:
        """What it says about the tokens of these rows, one row after the other."""


class DocumentTeacher(Protocol):
    """What a teacher with another tokenizer says about the documents of the split."""

    def chunks(self, doc: int, begin: int, size: int) -> alignment.Chunks:
        """The chunks among tokens begin .. begin + size - 1 of a document."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs; B = device_batch_size, T = seq_len."""

    inputs: Tensor
    """[B, T]: token ids, int64."""
    targets: Tensor
    """[B, T]: the next token of each, int64; -100 where there is none, or none to be learnt."""
    doc_ids: Tensor | None = None
    """[B, T] int32: number of the document within the row; None without `use_document_mask`.

    eos counts to the document it begins, as it does in evaluation.
    """
    weights: Tensor | None = None
    """[B, T] float32: loss weight of each target; None if all are 1."""
    teachers: tuple[SparseTeacher, ...] = ()
    """What each stored teacher says about the B * T tokens."""
    chunks: tuple[ChunkBatch, ...] = ()
    """What each teacher with another tokenizer says about the targets."""
    positions: Tensor | None = None
    """[B, T] int64: where the student takes each token to stand; None for 0 .. T - 1. Teachers read without skips."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved: Batch = _moved(self, device)
        return moved

    @property
    def total_weight(self) -> float:
        """Sum of the targets' weights, of a batch in main memory: the loss of a step is divided by that of all."""
        is_target = self.targets.numpy() >= 0
        return float((is_target if self.weights is None else is_target * self.weights.numpy()).sum())


def _moved(part: Any, device: torch.device) -> Any:
    """A tensor, or all tensors of a dataclass or tuple, on a device."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, tuple):
        return tuple(_moved(item, device) for item in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{item.name: _moved(getattr(part, item.name), device) for item in fields(part)})
    return part


class _Row(NamedTuple):
    """A row before inputs and targets are told apart; arrays are [seq_len + 1]."""

    tokens: alignment.Ids
    is_target: NDArray[np.bool_]
    weights: NDArray[np.float32]
    chunks: list[alignment.Chunks]
    """Of each teacher with another tokenizer."""


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


class _Documents:
    """Some of a split's documents as an endless sequence of windows of seq_len + 1 tokens."""

    def __init__(self, split: Split, docs: NDArray[np.int64], seq_len: int, seed: int, number: int) -> None:
        """`number` tells the sequences of one seed apart."""
        self.split = split
        self.docs = docs
        self.seq_len = seq_len
        self._key = (seed, number)
        self._lengths = np.diff(split.offsets)
        self.num_tokens = int(self._lengths[docs].sum())
        self.rows_per_epoch = max(1, self.num_tokens // seq_len)
        self.epoch = lru_cache(maxsize=2)(self._make_epoch)

    def pieces(self, epoch: int, number: int) -> Iterator[tuple[int, int, alignment.Ids]]:
        """What makes up window `number`: documents or parts of them, as (document, first token's place in it, ids)."""
        plan = self.epoch(epoch)
        missing = self.seq_len + 1
        start = (plan.offset + int(plan.rows[number]) * self.seq_len) % self.num_tokens
        place = int(np.searchsorted(plan.ends, start, side="right"))
        while missing:
            doc = int(plan.docs[place])
            ids = self.split.doc_with_eos(doc)
            begin = max(0, start - (int(plan.ends[place]) - len(ids)))
            ids = ids[begin : begin + missing]
            yield doc, begin, ids
            missing -= len(ids)
            place = (place + 1) % len(plan.docs)
            if place == 0:
                start = 0

    def _make_epoch(self, epoch: int) -> _Epoch:
        seed, number = self._key
        docs = self.docs[_permutation(len(self.docs), philox(seed, "documents", epoch, number))]
        return _Epoch(
            docs=docs,
            ends=np.cumsum(self._lengths[docs]),
            rows=_permutation(self.rows_per_epoch, philox(seed, "rows", epoch, number)),
            offset=int(philox(seed, "offset", epoch, number).integers(self.num_tokens)),
        )


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
        chunk_teachers: Sequence[DocumentTeacher] = (),
    ) -> None:
        """`rows_per_step` rows make an optimizer step, `device_batch_size` of them a batch.

        With `cached` teachers, which must know the same number of rows, those rows are repeated without end.

        Raises DataError if the tokenizer has other fill-in-the-middle tokens than `config`, or the split no documents
        of a kind that `config` asks for; ConfigError for sizes that do not divide.
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
        self.chunk_teachers = tuple(chunk_teachers)
        self._arranger = Arranger(tokenizer, config, partial(philox, seed))
        self._weights = _document_weights(split, config)
        self._share, kinds = _kinds(split, config.instruct_share)
        self._kinds = [_Documents(split, docs, seq_len, seed, number) for number, docs in enumerate(kinds)]

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
        tokens = np.stack([row.tokens for row in rows])
        inputs = np.ascontiguousarray(tokens[:, :-1])
        targets = np.stack([self._targets(row) for row in rows])
        doc_ids = weights = None
        if self.config.use_document_mask:
            doc_ids = torch.from_numpy(np.cumsum(inputs == self.tokenizer.eos_id, axis=1, dtype=np.int32))
        if self._weights is not None:
            weights = torch.from_numpy(np.stack([row.weights[1:] for row in rows]))
        skipping = [self._arranger.positions(*each) for each in zip(inputs, indices, strict=True)]
        positions = [row for row in skipping if row is not None]
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            doc_ids=doc_ids,
            weights=weights,
            teachers=tuple(teacher.rows(indices) for teacher in self.cached),
            chunks=tuple(chunk_batch(of_rows) for of_rows in zip(*(row.chunks for row in rows), strict=True)),
            positions=torch.from_numpy(np.stack(positions)) if positions else None,
        )

    def step(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """All batches of a device in an optimizer step."""
        micro_steps, rest = divmod(self.rows_per_step, self.device_batch_size * world_size)
        if rest:
            raise ValueError(f"{self.rows_per_step} rows do not divide among {world_size} x {self.device_batch_size}")
        return [self.batch(step, micro_step, rank, world_size) for micro_step in range(micro_steps)]

    def row(self, index: int) -> alignment.Ids:
        """Row `index` of the endless sequence, [seq_len + 1] ids."""
        return self._row(index).tokens

    def _row(self, index: int) -> _Row:
        kind, number = self._allotted(index)
        documents = self._kinds[kind]
        epoch, number = divmod(number, documents.rows_per_epoch)
        size = self.seq_len + 1
        row = _Row(
            tokens=np.full(size, self.tokenizer.pad_id, dtype=np.int64),
            is_target=np.zeros(size, dtype=np.bool_),
            weights=np.ones(size, dtype=np.float32),
            chunks=[alignment.Chunks.empty(size) for _ in self.chunk_teachers],
        )
        prompts = self.split.num_prompt
        filled = 0
        for place, (doc, begin, ids) in enumerate(self._shortened(documents.pieces(epoch, number), epoch, number)):
            if filled == size:
                break
            num_prompt = 0 if prompts is None else int(prompts[doc])
            room, key = size - filled, (epoch, number, place)
            piece = ids[:room] if num_prompt else self._arranger.arrange(ids, room, key)
            end = filled + len(piece)
            answer = min(end, filled + max(0, num_prompt - begin))
            row.tokens[filled:end] = piece
            row.is_target[answer:end] = True
            if self._weights is not None:
                row.weights[filled:answer] = 0
                row.weights[answer:end] = self._weights[doc]
                row.weights[filled + self._arranger.middle_in_psm(piece) : end] *= self.config.fim_middle_weight
            for chunks, teacher in zip(row.chunks, self.chunk_teachers, strict=True):
                shift, num_read = alignment.read_as_written(ids, piece, self.tokenizer)
                chunks.put(filled + shift, teacher.chunks(doc, begin, num_read))
            filled = end
        return row

    def _targets(self, row: _Row) -> NDArray[np.int64]:
        """[seq_len]: the next token of each but the last."""
        targets = np.where(row.is_target, row.tokens, IGNORED)[1:]
        self._arranger.bridge(row.tokens, targets)
        return targets

    def _shortened(
        self, pieces: Iterator[tuple[int, int, alignment.Ids]], epoch: int, number: int
    ) -> Iterator[tuple[int, int, alignment.Ids]]:
        """The pieces of a window, plain documents' cut into lengths (`Arranger.lengths`)."""
        prompts = self.split.num_prompt
        rng = philox(self.seed, "lengths", epoch, number)
        for doc, begin, ids in pieces:
            if prompts is not None and prompts[doc]:
                yield doc, begin, ids
                continue
            for size in self._arranger.lengths(len(ids), rng):
                yield doc, begin, ids[:size]
                begin, ids = begin + size, ids[size:]

    def _allotted(self, index: int) -> tuple[int, int]:
        """Kind of documents in row `index`, and how many rows of that kind come before it.

        Of the first n rows, floor(n * share) are conversations, so no stretch of rows is off by more than one.
        """
        if len(self._kinds) == 1:
            return 0, index
        before, after = (math.floor(n * self._share) for n in (index, index + 1))
        return (1, before) if after > before else (0, index - before)


def chunk_batch(rows: Sequence[alignment.Chunks]) -> ChunkBatch:
    """The chunks of rows, [seq_len + 1] each, as those of their targets."""
    targets = [row.as_targets() for row in rows]
    return ChunkBatch(
        *(torch.from_numpy(np.stack([getattr(row, item.name) for row in targets])) for item in fields(ChunkBatch))
    )


def _document_weights(split: Split, config: DataConfig) -> NDArray[np.float32] | None:
    """[num_docs] loss weights; None if all are 1 and no part of a document has another."""
    is_chat = np.zeros(split.num_docs, dtype=np.bool_) if split.num_prompt is None else split.num_prompt > 0
    chats_differ = config.instruct_weight != 1 and is_chat.any()
    if split.weights is None and not chats_differ and config.fim_middle_weight == 1:
        return None
    weights = np.ones(split.num_docs, dtype=np.float32) if split.weights is None else split.weights
    return np.where(is_chat, weights * np.float32(config.instruct_weight), weights)


def _kinds(split: Split, share: float) -> tuple[Fraction, list[NDArray[np.int64]]]:
    """The documents of each kind that has rows of its own, and the share of the second, the conversations."""
    if share < 0:
        return Fraction(0), [np.arange(split.num_docs)]
    is_chat = np.zeros(split.num_docs, dtype=np.bool_) if split.num_prompt is None else split.num_prompt > 0
    plain, chats = np.flatnonzero(~is_chat), np.flatnonzero(is_chat)
    if share == 0 or share == 1:
        only, what = (chats, "conversations") if share else (plain, "plain documents")
        if not len(only):
            raise DataError(f"data.instruct_share = {share:g}: the {split.name} split has no {what}: leave it out")
        return Fraction(0), [only]
    for docs, what, kind in ((chats, "conversations", "instruct"), (plain, "plain documents", "text")):
        if not len(docs):
            raise DataError(
                f"data.instruct_share = {share:g}: the {split.name} split has no {what}: leave it out, or tokenize "
                f'records of kind "{kind}" too'
            )
    return Fraction(share).limit_denominator(1_000_000), [plain, chats]


_STREAMS = ("documents", "rows", "offset", "fim", "teacher", "lengths", "peeks", "skips")


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
