"""Shards -> batches: documents permuted, packed into rows, rearranged for infilling.

A row is a window of `seq_len + 1` ids of the epoch's stream: all documents in an order drawn from
(seed, epoch), each followed by eos. The windows are drawn in random order too. Any row can be made
alone, so a batch is a pure function of (seed, step, rank), and the rows of a step are the same however
many ranks and micro-steps share them.

Fill-in-the-middle (Bavarian et al., arXiv 2207.14255) is applied inside the window, to each piece of a
document with probability `fim_rate`, at two character positions drawn uniformly, before tokenising:

    PSM  [fim_prefix] prefix [fim_suffix] suffix [fim_middle] middle eos
    SPM  [fim_prefix][fim_suffix] suffix [fim_middle] prefix middle eos     (their variant 2)

A rearranged piece has some more tokens than before; its text is cut first, so that the middle and its
eos always fit. What remains of a row is padding without loss.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from smelter.config import DataConfig
from smelter.errors import DataError
from smelter.shards import Split
from smelter.tokenizer import Tokenizer

IGNORED = -100
MIN_FIM_CHARACTERS = 8
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs, targets (IGNORED: no loss) and doc_ids [B, T]; weights [B, T], None for all 1."""

    inputs: Ids
    targets: Ids
    doc_ids: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None


def apply_fim(tokenizer: Tokenizer, text: str, rng: np.random.Generator, spm_rate: float) -> list[int]:
    """Ids of `text` rearranged at two uniformly drawn character positions, eos included."""
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if rng.random() < spm_rate:
        head = [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, *tokenizer.encode(suffix)]
        # Prefix and middle are one text here: no token boundary is forced between them (variant 2).
        return [*head, tokenizer.fim_middle_id, *tokenizer.encode(prefix + middle), tokenizer.eos_id]
    return [*tokenizer.fim_prompt(prefix, suffix), *tokenizer.encode(middle), tokenizer.eos_id]


def undo_fim(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """The text that `apply_fim` rearranged. ValueError for ids without the three tokens."""
    ids = [i for i in ids if i != tokenizer.eos_id]
    suffix_at, middle_at = ids.index(tokenizer.fim_suffix_id), ids.index(tokenizer.fim_middle_id)
    prefix, suffix, middle = ids[1:suffix_at], ids[suffix_at + 1 : middle_at], ids[middle_at + 1 :]
    return tokenizer.decode_bytes(prefix) + tokenizer.decode_bytes(middle) + tokenizer.decode_bytes(suffix)


class BatchStream:
    """Every batch of a run, by number. `rows_per_step` rows make one optimizer step over all ranks."""

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
    ) -> None:
        if split.num_tokens <= seq_len:
            raise DataError(
                f"{split.num_tokens} tokens of training data do not fill one row of {seq_len + 1}: "
                "give more data, or lower max_seq_len"
            )
        for name, token, known in (
            ("fim_prefix_token", config.fim_prefix_token, tokenizer.fim_prefix_id),
            ("fim_middle_token", config.fim_middle_token, tokenizer.fim_middle_id),
            ("fim_suffix_token", config.fim_suffix_token, tokenizer.fim_suffix_id),
        ):
            if config.fim_rate and tokenizer.token_to_id(token) != known:
                raise DataError(
                    f"data.{name} = {token!r} is not the tokenizer's: see special tokens in its tokenizer.json"
                )
        self.split, self.tokenizer, self.config = split, tokenizer, config
        self.seq_len, self.seed = seq_len, seed
        self.device_batch_size, self.rows_per_step = device_batch_size, rows_per_step
        self.rows_per_epoch = (split.num_tokens - 1) // seq_len
        # The order of the documents costs a permutation of all of them; neighbouring epochs share a step.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[Ids, Ids, Ids, int]:
        """Order of the documents, start of each in the epoch's stream, order of the rows, start of the first row."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.split.num_docs)
        lengths = np.diff(self.split.offsets)[order]
        starts = np.concatenate(([0], np.cumsum(lengths)))
        # Neighbouring windows often come from one file: a batch of them would be far from a fair sample.
        rows = rng.permutation(self.rows_per_epoch)
        return order, starts, rows, int(rng.integers(0, self.split.num_tokens))

    def _pieces(self, row: int) -> list[Ids]:
        """The window of row `row`, as pieces of documents; eos ends a piece where its document ends."""
        epoch, index = divmod(row, self.rows_per_epoch)
        order, starts, rows, shift = self._epoch(epoch)
        total = self.split.num_tokens
        pieces: list[Ids] = []
        position, left = (shift + int(rows[index]) * self.seq_len) % total, self.seq_len + 1
        while left:
            at = int(np.searchsorted(starts, position, side="right")) - 1
            inside = position - int(starts[at])
            count = min(left, int(starts[at + 1]) - position)
            begin = int(self.split.offsets[order[at]]) + inside
            pieces.append(self.split.read(begin, begin + count))
            left -= count
            position = (position + count) % total
        return pieces

    def _rearranged(self, piece: Ids, room: int, rng: np.random.Generator) -> list[int] | None:
        """The piece rearranged in at most `room` ids, or None where it is too short or not text."""
        ids = piece[:-1] if piece[-1] == self.split.eos_id else piece
        # A window may begin or end inside a character: those bytes are left out.
        text = self.tokenizer.decode_bytes(ids).decode("utf-8", "ignore")
        state = rng.bit_generator.state
        while len(text) >= MIN_FIM_CHARACTERS:
            rng.bit_generator.state = state
            made = apply_fim(self.tokenizer, text, rng, self.config.fim_spm_rate)
            if len(made) <= room:
                return made
            # About 3 characters a token; at least one.
            text = text[: len(text) - max(1, 2 * (len(made) - room))]
        return None

    def row(self, row: int) -> tuple[Ids, NDArray[np.int32]]:
        """Ids [seq_len + 1] and document numbers of one row; padding has document number -1."""
        rng = np.random.default_rng((self.seed, 1, row))
        size = self.seq_len + 1
        ids = np.full(size, self.tokenizer.pad_id, dtype=np.int64)
        docs = np.full(size, -1, dtype=np.int32)
        filled = 0
        for number, piece in enumerate(self._pieces(row)):
            room = size - filled
            made = self._rearranged(piece, room, rng) if rng.random() < self.config.fim_rate else None
            taken = piece[:room] if made is None else np.array(made)
            ids[filled : filled + len(taken)] = taken
            docs[filled : filled + len(taken)] = number
            filled += len(taken)
            if filled == size:
                break
        return ids, docs

    def batch(self, step: int, micro_step: int, rank: int, world_size: int) -> Batch:
        """Micro-batch `micro_step` of `rank` in optimizer step `step`."""
        first = step * self.rows_per_step + (micro_step * world_size + rank) * self.device_batch_size
        rows = [self.row(first + i) for i in range(self.device_batch_size)]
        ids, docs = np.stack([ids for ids, _ in rows]), np.stack([docs for _, docs in rows])
        targets = np.where(docs[:, 1:] < 0, IGNORED, ids[:, 1:])
        return Batch(ids[:, :-1].copy(), targets, docs[:, :-1].copy())

    def step(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """All micro-batches of `rank` in optimizer step `step`."""
        micro_steps = self.rows_per_step // (self.device_batch_size * world_size)
        return [self.batch(step, micro_step, rank, world_size) for micro_step in range(micro_steps)]


def prefetch(
    stream: BatchStream, first_step: int, rank: int, world_size: int, depth: int = 4
) -> Generator[list[Batch], None, None]:
    """The micro-batches of each step from `first_step`, made ahead by a thread; close the generator to end it.

    An error in the thread is raised here.
    """
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: list[Batch] | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        step = first_step
        try:
            while not stopped.is_set():
                put(stream.step(step, rank, world_size))
                step += 1
        except Exception as error:
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def eval_windows(split: Split, seq_len: int, stride: int) -> Iterator[tuple[Ids, Ids]]:
    """Windows (inputs [T], targets [T]) that score each id of each document once, left to right.

    A document is read after eos; a window begins `stride` after the one before and scores only what that
    one did not. Shorter windows are padded with eos, without loss.
    """
    for index in range(split.num_docs):
        ids = np.concatenate(([split.eos_id], split.doc(index)))
        scored = 0
        for start in range(0, max(1, len(ids) - 1), stride):
            end = min(start + seq_len, len(ids) - 1)
            inputs, targets = np.full(seq_len, split.eos_id), np.full(seq_len, IGNORED)
            inputs[: end - start] = ids[start:end]
            targets[scored - start : end - start] = ids[scored + 1 : end + 1]
            scored = end
            yield inputs, targets
            if end == len(ids) - 1:
                break
