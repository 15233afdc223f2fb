"""A local teacher reads the training rows once; what it says is stored beside the shards: `smelter teach`.

A teacher that runs beside the student costs its forward pass in every step of every run. Here it runs once for each
row, and every later run reads the result from the disk (`cache` says how it is stored, `sparse`
what is kept). The random numbers of a row come from (seed, row) alone, so a run that was killed and goes on writes the
bytes of one that was not.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Interval, Le
from numpy.typing import NDArray
from torch import Tensor

from smelter.base import ConfigError, DataError, Progress, free_bytes, megabytes, only_writer, parse, short_duration
from smelter.config import Config, DataConfig, load_config
from smelter.data import Batch, BatchStream, philox, prefetch
from smelter.distillation import teach_chunks
from smelter.distillation.cache import DATA_KEYS, FORMAT, VERSION, Arrangement, Method, row_format
from smelter.distillation.cache_writer import CacheWriter, Resume, begin
from smelter.distillation.sparse import Entries, count_draws, draw, entropy, likeliest
from smelter.distillation.teacher import TeacherModel, is_hf_folder, load_teacher, teacher_name, weights_hash
from smelter.losses import TeacherHead
from smelter.run import Precision, StopSignal, load_checkpoint, pick_device, pick_dtype
from smelter.tokens import ShardSet

FLUSH_SECONDS = 5.0
"""What a kill costs, at most: what is told as done is safe."""
CHUNK_BYTES = 2**28
"""Memory for a chunk's logits, probabilities and their sums."""


@dataclass(frozen=True)
class TeachOptions:
    """Run a local teacher over the training rows and store its probabilities for `distillation.cached`.

    The rows are arranged as training will: by the recipe, by single values, or as the teacher itself was trained.
    A teacher with another tokenizer: `smelter teach --method chunks --help`.
    """

    teacher: Path
    """Run folder or checkpoint with the shards' tokenizer, or the folder of a Hugging Face causal language model."""
    shards: Path
    """Shards that the student will be trained on."""
    recipe: Path | None = None
    """Recipe of the student: its arrangement of the rows, vocabulary and temperature are taken."""
    seq_len: Annotated[int | None, Ge(1)] = None
    """Tokens a row: the student's max_seq_len."""
    fim_rate: Annotated[float | None, Interval(ge=0, le=1)] = None
    """The student's data.fim_rate."""
    fim_spm_rate: Annotated[float | None, Interval(ge=0, le=1)] = None
    """The student's data.fim_spm_rate."""
    fim_split_rate: Annotated[float | None, Interval(ge=0, le=1)] = None
    """The student's data.fim_split_rate."""
    fim_cursor_rate: Annotated[float | None, Interval(ge=0, le=1)] = None
    """The student's data.fim_cursor_rate."""
    fim_piece_tokens: Annotated[int | None, Ge(0)] = None
    """The student's data.fim_piece_tokens."""
    fim_peek_tokens: Annotated[int | None, Ge(0)] = None
    """The student's data.fim_peek_tokens."""
    fim_cut_rate: Annotated[float | None, Interval(ge=0, le=1)] = None
    """The student's data.fim_cut_rate."""
    use_document_mask: bool | None = None
    """The student's data.use_document_mask."""
    instruct_share: Annotated[float | None, Le(1)] = None
    """The student's data.instruct_share."""
    epochs: Annotated[int, Ge(1)] = 1
    """Times that every token is read, each time otherwise arranged; longer training repeats them."""
    rows: Annotated[int | None, Ge(1)] = None
    """Rows instead of epochs."""
    method: Method = "sampled"
    """sampled: unbiased draws. top_k: the likeliest ids. (chunks: for other tokenizers, with options of its own.)"""
    draws: Annotated[int, Interval(ge=1, le=255)] = 50
    """Draws a token (sampled), 255 at most."""
    top_k: Annotated[int, Ge(1)] = 12
    """Ids a token (top_k)."""
    log_prob_dtype: Literal["float16", "float32"] = "float16"
    """How top_k stores log-probabilities: float16 is right to three digits."""
    temperature: Annotated[float | None, Gt(0)] = None
    """The student's distillation.temperature; 1 without a recipe."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Seed of the rows' order and of the draws."""
    out: Path | None = None
    """Folder to write (default: SHARDS/teachers/ and the teacher's name)."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Rows per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Precision = "auto"
    """Matrix products' precision. auto: fp32 on a CPU, on CUDA bf16 or, where there is none, fp16."""
    resume: Resume = "auto"
    """auto: go on with what --out holds of the same cache. must: fail without. never: fail if there is any."""
    file_mb: Annotated[int, Ge(1)] = 1_024
    """Size of a file of rows."""


@dataclass(frozen=True)
class Plan:
    """What the options come to."""

    arrangement: Arrangement
    data: DataConfig
    temperature: float
    vocab_size: int
    out: Path


def plan(options: TeachOptions, shards: ShardSet) -> Plan:
    """Resolve the options against recipe, teacher and shards. Raises UserError for what does not fit."""
    student = None  # whose values are the defaults: the recipe's, else the teacher's own
    if options.recipe is not None:
        student = load_config(options.recipe)
    elif not is_hf_folder(options.teacher):
        student = load_checkpoint(options.teacher, with_state=False).config
    config = student or Config()
    seq_len = options.seq_len or config.model.max_seq_len
    changes = {key: getattr(options, key) for key in DATA_KEYS if getattr(options, key) is not None}
    values = {key: getattr(config.data, key) for key in DATA_KEYS} | changes
    special = shards.tokenizer.special
    data = DataConfig(
        shards=str(shards.path),
        **values,
        fim_prefix_token=special.fim_prefix,
        fim_middle_token=special.fim_middle,
        fim_suffix_token=special.fim_suffix,
    )
    arrangement = Arrangement(
        shards=shards.hash,
        tokenizer=shards.tokenizer.hash,
        seq_len=seq_len,
        **values,
        seed=options.seed,
        num_rows=options.rows or options.epochs * max(1, shards.split("train").num_tokens // seq_len),
    )
    temperature = options.temperature
    if temperature is None:
        temperature = config.distillation.temperature if options.recipe is not None else 1.0
    vocab_size = shards.tokenizer.vocab_size if student is None else config.model.vocab_size
    if vocab_size < shards.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {vocab_size} is smaller than the tokenizer of {shards.path} "
            f"({shards.tokenizer.vocab_size}): use a teacher and a recipe that fit the shards"
        )
    out = options.out or shards.path / "teachers" / teacher_name(options.teacher)
    return Plan(arrangement, data, temperature, vocab_size, out)


class Reader:
    """The teacher and what is kept of its distributions."""

    def __init__(self, teacher: TeacherModel, settings: dict[str, Any], device: torch.device) -> None:
        self.teacher, self.device = teacher, device
        self.head = teacher.head
        self.format = row_format(settings)
        self.seed: int = settings["arrangement"]["seed"]
        self.temperature: float = settings["temperature"]

    def records(self, batch: Batch, first_row: int) -> Iterator[bytes]:
        """The record of each row of a batch."""
        has_target = batch.targets.numpy() >= 0
        batch = batch.to(self.device)
        hidden = self.teacher.hidden(batch.inputs, batch.doc_ids).unflatten(0, batch.inputs.shape)
        self.head = self.head.to(hidden.dtype)  # once: the head of one of ours is kept in float32
        for number, wanted in enumerate(has_target):
            entries, nats = self._row(hidden[number], wanted, first_row + number)
            yield self.format.pack(entries, nats)

    @torch.no_grad()
    def _row(self, hidden: Tensor, wanted: NDArray[np.bool_], row: int) -> tuple[Entries, NDArray[np.float32]]:
        """Entries of the T tokens of a row [T, C'] and entropy [T]; none where no target is."""
        places = np.flatnonzero(wanted)
        said = TeacherHead(hidden[torch.from_numpy(places).to(self.device)], self.head, self.teacher.soft_cap)
        counts, nats = np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.float32)
        parts = [Entries(counts[:0], np.zeros(0, np.int64), np.zeros(0, np.int64))]
        uniforms = None
        if self.format.method == "sampled":
            uniforms = torch.from_numpy(_uniforms(self.seed, row, len(wanted), self.format.max_entries)[places])
        # float32 logits and probabilities and their sum in float64: 4 + 4 + 8 bytes and some.
        size = max(1, CHUNK_BYTES // (24 * len(self.head)))
        for start in range(0, len(places), size):
            chunk = slice(start, start + size)
            log_probs = said.log_probs(chunk, self.temperature)
            probs = log_probs.exp()
            nats[places[chunk]] = entropy(probs, log_probs).cpu().numpy()
            if uniforms is None:
                parts.append(likeliest(log_probs, self.format.max_entries))
            else:
                parts.append(count_draws(draw(probs, uniforms[chunk].to(self.device)).cpu().numpy()))
        if not np.isfinite(nats).all():
            raise DataError(
                f"{self.teacher.path}: probabilities that are not finite in row {row}: try --precision fp32"
            )
        counts[places] = np.concatenate([part.counts for part in parts])
        ids, values = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "values"))
        return Entries(counts, ids, values), nats


def _uniforms(seed: int, row: int, num_tokens: int, num_draws: int) -> NDArray[np.float64]:
    """[num_tokens, num_draws] numbers in [0, 1) that depend on seed and row alone.

    32 bits each, from the bit stream itself, which NumPy promises never to change.
    """
    size = num_tokens * num_draws
    raw = np.asarray(philox(seed, "teacher", row).bit_generator.random_raw((size + 1) // 2), dtype="<u8")
    return (raw.view("<u4")[:size] * 2.0**-32).reshape(num_tokens, num_draws)


def _settings(options: TeachOptions, work: Plan, teacher: TeacherModel, digest: str) -> dict[str, Any]:
    """What the index says before anything is written."""
    vocab_size = len(teacher.head)
    if work.arrangement.seq_len > teacher.max_seq_len:
        raise ConfigError(
            f"{teacher.path}: reads rows of at most {teacher.max_seq_len:,} tokens, not {work.arrangement.seq_len:,}: "
            f"use --seq-len {teacher.max_seq_len} and as much for the student's model.max_seq_len"
        )
    if options.method == "top_k" and options.top_k > vocab_size:
        raise ConfigError(f"--top-k = {options.top_k}: the vocabulary has {vocab_size} ids: use fewer")
    return {
        "format": FORMAT,
        "version": VERSION,
        "arrangement": asdict(work.arrangement),
        "teacher": {"path": str(teacher.path), "weights_sha256": digest},
        "method": options.method,
        "draws": options.draws if options.method == "sampled" else 0,
        "top_k": options.top_k if options.method == "top_k" else 0,
        "log_prob_dtype": options.log_prob_dtype,
        "temperature": work.temperature,
        "vocab_size": vocab_size,
    }


def teach(options: TeachOptions) -> int:
    """Do what `smelter teach` does and say what was done; returns the exit code. Raises UserError."""
    shards = ShardSet.open(options.shards)
    work = plan(options, shards)
    with only_writer(work.out, "--out"):
        return _teach(options, shards, work)


def _teach(options: TeachOptions, shards: ShardSet, work: Plan) -> int:
    device = pick_device(options.device)
    dtype = pick_dtype(options.precision, device)
    teacher = load_teacher(
        options.teacher,
        shards.tokenizer,
        work.vocab_size,
        device=device,
        dtype=dtype,
        use_document_mask=work.data.use_document_mask,
    )
    settings = _settings(options, work, teacher, weights_hash(teacher.path))
    done = begin(work.out, settings, options.resume)
    if done is None:
        print(f"{work.out}: complete already")
        return 0
    reader = Reader(teacher, settings, device)
    stream = BatchStream(
        shards.split("train"),
        shards.tokenizer,
        work.data,
        seq_len=work.arrangement.seq_len,
        seed=work.arrangement.seed,
        device_batch_size=options.batch_size,
        rows_per_step=options.batch_size,
    )
    with StopSignal("finishing these rows") as stop:
        return _run(reader, stream, work, settings, done, options.file_mb * 2**20, stop)


def _run(
    reader: Reader,
    stream: BatchStream,
    work: Plan,
    settings: dict[str, Any],
    done: int,
    file_bytes: int,
    stop: StopSignal,
) -> int:
    """Read and write from row `done` on, to the end or until a signal."""
    size, total, seq_len = stream.device_batch_size, work.arrangement.num_rows, work.arrangement.seq_len
    start = time.monotonic()
    progress = Progress("teaching", "rows", total, done=done, seconds=FLUSH_SECONDS)
    writer: CacheWriter | None = None
    try:
        with closing(prefetch(stream, done // size, 0, 1)) as batches:
            for step in range(done // size, -(-total // size)):
                # Whole batches even at the ends: a batch's size may change the last bit of what a teacher computes.
                records = list(reader.records(next(batches)[0], step * size))
                if writer is None:
                    _say_need(work.out, sum(map(len, records)) / size, total - done, total, seq_len)
                    writer = CacheWriter(work.out, settings, file_bytes)
                for record in records[max(0, done - step * size) : total - step * size]:
                    writer.append(record)
                if progress.is_due or stop.number:
                    writer.flush()
                    progress(writer.num_rows, now=stop.number != 0)
                if stop.number and writer.num_rows < total:
                    print(f"stopped after {writer.num_rows:,} of {total:,} rows; the same command goes on from there")
                    return 128 + stop.number
        writer = writer or CacheWriter(work.out, settings, file_bytes)  # all rows were there, only the index was not
        cache = writer.finish()
    finally:
        if writer is not None:
            writer.close()
    index = cache.index
    print(
        f"{index['num_tokens']:,} tokens: {index['bytes_per_token']:.1f} bytes and {index['mean_entries']:.1f} ids "
        f"each, mean entropy {index['mean_entropy']:.3f} nats"
    )
    seconds = time.monotonic() - start
    print(f"wrote {cache.path} in {short_duration(seconds)}; to learn from it: --cached {cache.path}")
    return 0


def _say_need(out: Path, bytes_per_row: float, num_rows: int, total: int, seq_len: int) -> None:
    """Say what the rest will take on the disk, by the first rows; DataError where it does not fit."""
    needed, free = int(bytes_per_row * num_rows), free_bytes(out)
    text = f"{megabytes(needed)} ({bytes_per_row / seq_len:.1f} bytes a token), {megabytes(free)} are free"
    print(f"{out}: {num_rows:,} of {total:,} rows to go, about {text}", file=sys.stderr, flush=True)
    if needed > free:
        raise DataError(f"{out}: needs about {text}: make room, or lower --draws, --top-k, --epochs or --rows")


def main(argv: list[str]) -> int:
    """`smelter teach`; with `--method chunks` it is `teach_chunks`, which has options of its own."""
    rest, is_chunks = teach_chunks.without_method(argv)
    if is_chunks:
        return teach_chunks.main(rest)
    return teach(parse(TeachOptions, argv, "smelter teach"))
