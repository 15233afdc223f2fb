"""A teacher with another tokenizer reads the training documents once: `smelter teach --method chunks`.

Each document is read from its start in the teacher's own tokens, in windows of its context that overlap by half, and
of every chunk of text whose ends both tokenizers share the likelihood is kept (`tokens.alignment`,
`chunk_cache`). Documents that the teacher's tokens do not spell byte for byte are passed over and counted.

Documents are scored and written in blocks. A block is safe on the disk before the next begins, and what is computed
together depends on the block alone, so work that was killed and goes on writes the bytes of work that was not.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray

from smelter.base import (
    DataError,
    Progress,
    append_bytes,
    file_sha256,
    free_bytes,
    fsync,
    megabytes,
    only_writer,
    parse,
    short_duration,
)
from smelter.distillation.cache import VERSION
from smelter.distillation.cache_writer import Resume, begin_folder, finish_folder, state_of
from smelter.distillation.chunk_cache import (
    FORMAT,
    NOT_SPELT,
    NOT_TEXT,
    READ,
    STATES,
    VALUE_DTYPE,
    VALUES,
    ChunkTeacher,
)
from smelter.distillation.teacher import (
    CheckpointTeacher,
    FolderTeacher,
    TeacherModel,
    is_hf_folder,
    teacher_name,
    weights_hash,
)
from smelter.losses import target_log_probs
from smelter.run import Precision, StopSignal, load_model, pick_device, pick_dtype
from smelter.tokens import ShardSet, Split, alignment

BLOCK = 64
"""Documents scored together and written at once."""
CHUNK_BYTES = 2**28
"""Memory for a chunk of float32 logits and what is made of them."""


@dataclass(frozen=True)
class TeachChunksOptions:
    """Run a teacher with another tokenizer over the training documents, for `distillation.chunk_teachers`.

    The likelihood of every chunk of text whose ends both tokenizers share is stored: two bytes a token, for every
    arrangement of the rows. With the shards' tokenizer, the other methods keep more of what the teacher knows.
    """

    teacher: Path
    """Folder of a Hugging Face causal language model, or a run folder or checkpoint."""
    shards: Path
    """Shards that the student will be trained on."""
    out: Path | None = None
    """Folder to write (default: SHARDS/teachers/ and the teacher's name with -chunks)."""
    context: Annotated[int, Ge(2)] = 2_048
    """Tokens that the teacher reads at once, at most what it can; longer documents in windows that overlap by half."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Windows per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Precision = "auto"
    """Matrix products' precision. auto: fp32 on a CPU, on CUDA bf16 or, where there is none, fp16."""
    resume: Resume = "auto"
    """auto: go on with what --out holds of the same. must: fail without. never: fail if there is any."""


@dataclass(frozen=True)
class Window:
    """Part of a document for one row of a forward pass: predicts tokens start + 1 .. end, new from `done` + 1 on."""

    document: int
    start: int
    done: int
    end: int


def windows(document: int, size: int, context: int) -> Iterator[Window]:
    """Windows of at most `context` inputs that predict each of tokens 1 .. size once, after at least half a context."""
    done = start = 0
    while done < size:
        end = min(start + context, size)
        yield Window(document, start, done, end)
        done, start = end, start + (context + 1) // 2


class Reader:
    """A teacher with its own tokenizer."""

    def __init__(
        self, teacher: TeacherModel, tokenizer: alignment.TeacherTokenizer, first_id: int, context: int, batch: int
    ):
        """`first_id` is the token before a document's first one."""
        self.teacher, self.tokenizer, self.first_id = teacher, tokenizer, first_id
        self.context, self.batch_size = min(context, teacher.max_seq_len), batch
        self.device = teacher.head.device

    def log_probs(self, spellings: Sequence[alignment.Spelling]) -> list[NDArray[np.float64]]:
        """Log-probability of every token of each document, which is read from its start."""
        ids = [np.concatenate(([self.first_id], spelling.ids)) for spelling in spellings]
        log_probs = [np.zeros(len(spelling.ids)) for spelling in spellings]
        todo = [w for number, row in enumerate(ids) for w in windows(number, len(row) - 1, self.context)]
        todo.sort(key=lambda window: window.end - window.start)  # rows of like length are padded least
        for first in range(0, len(todo), self.batch_size):
            batch = todo[first : first + self.batch_size]
            values = self._score(batch, ids)
            for window, row in zip(batch, values, strict=True):
                log_probs[window.document][window.done : window.end] = row
        for row in log_probs:
            if not np.isfinite(row).all():
                raise DataError(f"{self.teacher.path}: probabilities that are not finite: try --precision fp32")
        return log_probs

    def _score(self, batch: Sequence[Window], ids: Sequence[alignment.Ids]) -> list[NDArray[np.float64]]:
        """The new log-probabilities of each window."""
        width = max(window.end - window.start for window in batch)
        inputs, targets = np.zeros((len(batch), width), dtype=np.int64), np.full((len(batch), width), -1)
        for row, window in enumerate(batch):
            inputs[row, : window.end - window.start] = ids[window.document][window.start : window.end]
            new = slice(window.done - window.start, window.end - window.start)
            targets[row, new] = ids[window.document][window.done + 1 : window.end + 1]
        wanted = torch.from_numpy(np.flatnonzero(targets >= 0)).to(self.device)
        # Padding stands behind the text, where nothing sees it.
        hidden = self.teacher.hidden(torch.from_numpy(inputs).to(self.device), None)[wanted]
        chosen = torch.from_numpy(targets[targets >= 0]).to(self.device)
        size = max(1, CHUNK_BYTES // (12 * len(self.teacher.head)))
        values = target_log_probs(hidden, self.teacher.head, chosen, self.teacher.soft_cap, size)
        counts = [window.end - window.done for window in batch]
        return np.split(values.double().cpu().numpy(), np.cumsum(counts)[:-1])

    def read(self, split: Split, shards: ShardSet, docs: range) -> tuple[bytes, bytes]:
        """Values and states of these documents, as they are written."""
        ids = [np.asarray(split.doc(doc), dtype=np.int64) for doc in docs]
        ends = [alignment.student_ends(shards.tokenizer, row) for row in ids]
        spelt = self.tokenizer.spell([shards.tokenizer.decode_bytes(row) for row in ids])
        states = np.full(len(ids), READ, dtype=np.uint8)
        states[[spelling is None for spelling in spelt]] = NOT_SPELT
        states[[end is None for end in ends]] = NOT_TEXT
        read = [number for number in range(len(ids)) if states[number] == READ]
        spellings = [spelling for number in read if (spelling := spelt[number]) is not None]
        for spelling in spellings:
            alignment.check_vocabulary(self.teacher.path, spelling, len(self.teacher.head))
        values = [np.full(len(row) + 1, np.nan) for row in ids]  # eos ends no chunk
        for number, spelling, of_tokens in zip(read, spellings, self.log_probs(spellings), strict=True):
            end = ends[number]
            assert end is not None
            values[number][:-1] = alignment.chunk_log_probs(end, spelling.ends, of_tokens)
        limit = float(np.finfo(np.float16).max)
        return np.clip(np.concatenate(values), -limit, 0).astype(VALUE_DTYPE).tobytes(), states.tobytes()


def _load(options: TeachChunksOptions) -> Reader:
    """The teacher. Raises UserError for one that cannot be used."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.precision, device)
    if is_hf_folder(options.teacher):
        tokenizer = alignment.TeacherTokenizer(options.teacher)
        folder = FolderTeacher(options.teacher, None, 2**31, device, dtype)
        first = folder.start_id if tokenizer.first_id is None else tokenizer.first_id
        if first is None:
            raise DataError(
                f"{options.teacher}: no token begins or ends a text (bos_token_id, eos_token_id), so its first token "
                "has no probability: set bos_token_id in its config.json"
            )
        return Reader(folder, tokenizer, first, options.context, options.batch_size)
    model, own, checkpoint = load_model(options.teacher, device=device, dtype=dtype)
    tokenizer = alignment.TeacherTokenizer(checkpoint.tokenizer_file)
    return Reader(CheckpointTeacher(checkpoint.path, model), tokenizer, own.eos_id, options.context, options.batch_size)


class _Writer:
    """The two files of a folder, block by block."""

    def __init__(self, folder: Path, settings: dict[str, Any], split: Split) -> None:
        """Begin, or go on after the last whole block that is safe."""
        self.folder = folder
        begin_folder(folder, settings)
        states = np.fromfile(folder / STATES, dtype=np.uint8) if (folder / STATES).is_file() else np.zeros(0, np.uint8)
        # States are written last, and 0 is none of them: a power cut may leave a tail of zeros.
        done = int(np.argmin(states)) if len(states) and not states.min() else len(states)
        self.num_docs = split.num_docs if done == split.num_docs else done // BLOCK * BLOCK
        size = int(split.offsets[self.num_docs]) * VALUE_DTYPE.itemsize
        for name, length in ((VALUES, size), (STATES, self.num_docs)):
            (folder / name).touch()
            if (folder / name).stat().st_size < length:
                raise DataError(f"{folder / name}: shorter than it was: remove {folder} and begin anew")
            os.truncate(folder / name, length)
        fsync(folder)

    def append(self, values: bytes, states: bytes) -> None:
        """Write a block, so that it is safe."""
        append_bytes(self.folder / VALUES, values)
        append_bytes(self.folder / STATES, states)
        self.num_docs += len(states)

    def finish(self, settings: dict[str, Any], split: Split) -> dict[str, Any]:
        """Count, and write the index; returns it."""
        values = np.memmap(self.folder / VALUES, dtype=VALUE_DTYPE, mode="r")
        states = np.fromfile(self.folder / STATES, dtype=np.uint8)
        num_chunks = num_tokens = num_bytes = 0
        nats = 0.0
        for doc in np.flatnonzero(states == READ).tolist():
            log_probs = np.asarray(values[int(split.offsets[doc]) : int(split.offsets[doc + 1])], dtype=np.float64)
            num_chunks += int(np.count_nonzero(~np.isnan(log_probs)))
            num_tokens += len(log_probs) - 1
            num_bytes += int(split.doc_num_bytes[doc])
            nats -= float(np.nansum(log_probs))
        index = settings | {
            "num_docs": split.num_docs,
            "num_not_spelt": int(np.count_nonzero(states == NOT_SPELT)),
            "num_not_text": int(np.count_nonzero(states == NOT_TEXT)),
            "num_chunks": num_chunks,
            "tokens_per_chunk": num_tokens / max(num_chunks, 1),
            "bits_per_byte": nats / np.log(2) / max(num_bytes, 1),
            "files": [
                {"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in (self.folder / VALUES, self.folder / STATES)
            ],
        }
        finish_folder(self.folder, index)
        return index


def teach_chunks(options: TeachChunksOptions) -> int:
    """Do what the command does and say what was done; returns the exit code. Raises UserError."""
    out = options.out or options.shards / "teachers" / f"{teacher_name(options.teacher)}-chunks"
    shards = ShardSet.open(options.shards)
    with only_writer(out, "--out"):
        return _teach_chunks(options, shards, out)


def _teach_chunks(options: TeachChunksOptions, shards: ShardSet, out: Path) -> int:
    split = shards.split("train")
    reader = _load(options)
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "shards": shards.hash,
        "tokenizer": shards.tokenizer.hash,
        "teacher": {
            "path": str(reader.teacher.path),
            "weights_sha256": weights_hash(reader.teacher.path),
            "tokenizer": reader.tokenizer.hash,
        },
        "context": reader.context,
        "first_id": reader.first_id,
    }
    state = state_of(out, settings, options.resume)
    if state == "complete":
        print(f"{out}: complete already")
        return 0
    needed = split.num_tokens * VALUE_DTYPE.itemsize
    if needed > free_bytes(out) and state == "new":
        raise DataError(f"{out}: needs {megabytes(needed)}, {megabytes(free_bytes(out))} are free: make room")
    begin = time.monotonic()
    writer = _Writer(out, settings, split)
    first = writer.num_docs
    progress = Progress("teaching", "tokens", split.num_tokens, done=int(split.offsets[first]))
    with StopSignal("finishing these documents") as stop:
        for start in range(first, split.num_docs, BLOCK):
            writer.append(*reader.read(split, shards, range(start, min(start + BLOCK, split.num_docs))))
            documents = f"{writer.num_docs:,} of {split.num_docs:,} documents"
            if stop.number and writer.num_docs < split.num_docs:
                print(f"stopped after {documents}; the same command goes on from there")
                return 128 + stop.number
            progress(int(split.offsets[writer.num_docs]), documents)
    index = writer.finish(settings, split)
    ChunkTeacher.open(out, shards)
    print(
        f"{index['num_chunks']:,} chunks of {index['tokens_per_chunk']:.2f} tokens, the teacher's "
        f"{index['bits_per_byte']:.4f} bits per byte"
    )
    if index["num_not_spelt"] or index["num_not_text"]:
        print(
            f"passed over of {split.num_docs:,} documents: {index['num_not_spelt']:,} whose bytes the teacher's tokens "
            f"do not spell, {index['num_not_text']:,} with tokens that stand for no text"
        )
    print(f"wrote {out} in {short_duration(time.monotonic() - begin)}; to learn from it: --chunk-teachers {out}")
    return 0


def without_method(argv: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--method chunks`, and whether it was among them."""
    for place, word in enumerate(argv):
        if word == "--method=chunks":
            return argv[:place] + argv[place + 1 :], True
        if word == "--method" and argv[place + 1 : place + 2] == ["chunks"]:
            return argv[:place] + argv[place + 2 :], True
    return argv, False


def main(argv: list[str]) -> int:
    """`smelter teach --method chunks`."""
    return teach_chunks(parse(TeachChunksOptions, argv, "smelter teach --method chunks"))
