"""What does a teacher cost that runs once and is read from the disk, beside one that runs in every step?

Real code (the running Python's standard library, 4,096 tokens of vocabulary) and a student of 2.6M parameters. Four
answers: tokens a second that `smelter teach` reads with a teacher ten times the student's size; the bytes a token takes
on the disk, of a model trained here for a while and of the same made sharper by a temperature, as a better teacher is;
tokens a second that one core makes into batches out of the cache; and forward and backward of a micro-batch with
cross-entropy alone, with the cache, and with the large teacher beside the student, in turn in the same minutes.

    python benchmarks/teach.py [--quick] [--json]
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without an installation

import torch

from foundry.corpus import main as corpus
from smelter.config import Config, DataConfig, DistillationConfig, ModelConfig, TrainingConfig, preset
from smelter.data import BatchStream
from smelter.distillation.cache import TeacherCache
from smelter.distillation.objective import Objective, load_teachers
from smelter.distillation.teach import TeachOptions, teach
from smelter.model import Model
from smelter.run.checkpoint import save_checkpoint
from smelter.run.device import pick_device, pick_dtype
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenize import main as tokenize
from smelter.train import train

SEQ_LEN = 512
ROWS = 4
TEMPERATURES = (1.0, 0.7, 0.5)
STUDENT = replace(preset("tiny").model, num_layers=2)
TEACHER = ModelConfig(
    vocab_size=4_096, hidden_size=768, num_layers=4, num_heads=12, num_kv_heads=4, max_seq_len=SEQ_LEN
)


def quietly(work: Any, *arguments: Any) -> Any:
    """`work(*arguments)` without what it says."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work(*arguments)


def save_random(folder: Path, model: ModelConfig, tokenizer_file: Path) -> Path:
    """A run folder with an untrained model: for speed alone."""
    torch.manual_seed(0)
    made = Model(model)
    save_checkpoint(
        folder, 1, config=Config(model=model), tensors=dict(made.state_dict()), tokenizer_file=tokenizer_file,
        state={}, keep=1,
    )  # fmt: skip
    return folder


def train_teacher(folder: Path, shards: Path, **length: Any) -> Path:
    """The student's architecture, trained for so long with the quickstart's values."""
    training = TrainingConfig(
        run_dir=str(folder),
        **length,
        device_batch_size=ROWS,
        total_batch_size=2 * ROWS * SEQ_LEN,
        muon_lr=0.03,
        embedding_lr=2e-2,
        warmup_steps=20,
        cooldown_fraction=0.5,
        eval_every=0,
        sample_every=0,
        use_torch_compile=False,
        muon_newton_schulz_steps=3,
    )
    quietly(train, Config(model=STUDENT, data=DataConfig(shards=str(shards)), training=training))
    return folder


def taught(teacher: Path, shards: Path, out: Path, rows: int, temperature: float = 1.0) -> tuple[TeacherCache, float]:
    """A cache of so many rows, and tokens a second."""
    options = TeachOptions(
        teacher=teacher, shards=shards, out=out, rows=rows, seq_len=SEQ_LEN, batch_size=ROWS, temperature=temperature
    )
    start = time.perf_counter()
    quietly(teach, options)
    return TeacherCache.open(out), rows * SEQ_LEN / (time.perf_counter() - start)


def reading(cache: TeacherCache, seconds: float) -> float:
    """Tokens that `cache.rows` makes ready in a second of one core's time."""
    cache.rows(range(ROWS))
    start, done, first = time.process_time(), 0, 0
    while time.process_time() - start < seconds:
        cache.rows([(first + i) % cache.num_rows for i in range(ROWS)])
        done, first = done + ROWS * SEQ_LEN, first + ROWS
    return done / (time.process_time() - start)


class Contestant:
    """A student with one kind of teaching; `seconds` takes a micro-batch forward and backward."""

    def __init__(self, shards: ShardSet, cached: tuple[TeacherCache, ...], teachers: tuple[Path, ...]) -> None:
        self.device = pick_device("auto")
        dtype = pick_dtype("auto", self.device)
        config = Config(
            model=STUDENT,
            data=DataConfig(shards=str(shards.path)),
            distillation=DistillationConfig(
                teachers=tuple(map(str, teachers)), cached=tuple(str(cache.path) for cache in cached)
            ),
        )
        torch.manual_seed(0)
        model = Model(STUDENT, dtype).to(self.device)
        model.quantize_weights()
        loaded = load_teachers(config, shards.tokenizer, dtype, self.device)
        self.objective = Objective(model, config, loaded, use_compile=False)
        self.stream = BatchStream(
            shards.split("train"), shards.tokenizer, config.data, seq_len=SEQ_LEN, seed=0,
            device_batch_size=ROWS, rows_per_step=ROWS, cached=cached,
        )  # fmt: skip
        self.step = 0

    def seconds(self) -> float:
        """Time of the next micro-batch; making it, which a thread does in training, is not counted."""
        batch = self.stream.batch(self.step, 0, 0, 1)
        self.step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        self.objective(batch.to(self.device), torch.tensor(1_000.0, device=self.device)).total.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.objective.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little text, four steps of training, few rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    length, rows, repeats = ({"num_steps": 4}, 8, 1) if options.quick else ({"train_minutes": 2.0}, 32, 7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, shards_path = folder / "corpus.jsonl", folder / "shards"
        library = Path(json.__file__).parent.parent
        some = [f"{name}={library / name}" for name in ("asyncio", "email", "json")]
        sources = [word for name in (some if options.quick else ["stdlib"]) for word in ("--source", name)]
        quietly(corpus, [*sources, "--out", str(raw)])
        quietly(tokenize, [str(raw), "--out", str(shards_path), "--vocab-size", "4096"])
        shards = ShardSet.open(shards_path)
        large = save_random(folder / "large", TEACHER, shards_path / "tokenizer.json")
        _, teaching = taught(large, shards_path, folder / "large_cache", max(8, rows // 4))
        trained = train_teacher(folder / "trained", shards_path, **length)
        caches = {t: taught(trained, shards_path, folder / f"at_{t}", rows, t)[0] for t in TEMPERATURES}
        first = caches[1.0]
        speed = reading(first, 1.0 if options.quick else 5.0)
        contestants = {
            "cross-entropy": Contestant(shards, (), ()),
            "cached": Contestant(shards, (first,), ()),
            "teacher beside": Contestant(shards, (), (large,)),
        }
        times: dict[str, list[float]] = {key: [] for key in contestants}
        for number in range(repeats + 1):
            for key, contestant in contestants.items():
                taken = contestant.seconds()
                if number:  # the first warms up
                    times[key].append(taken)
        step_ms = {key: 1_000 * statistics.median(taken) for key, taken in times.items()}
        disk = [
            {"temperature": t} | {key: cache.index[key] for key in ("mean_entropy", "mean_entries", "bytes_per_token")}
            for t, cache in caches.items()
        ]
    ratio = TEACHER.num_params_estimate / STUDENT.num_params_estimate
    size, device = STUDENT.num_params_estimate, pick_device("auto")
    print(f"student {size:,} parameters, teacher {ratio:.1f} times as many, on {device}")
    print(f"{'teaching with it, tokens/s':44} {teaching:12,.0f}")
    print(f"{'batches out of the cache, tokens/s a core':44} {speed:12,.0f}")
    print(f"{'entropy of the teacher, nats':44} {'ids a token':>12} {'bytes a token':>14}")
    for row in disk:
        print(f"{row['mean_entropy']:44.2f} {row['mean_entries']:12.1f} {row['bytes_per_token']:14.1f}")
    for key, value in step_ms.items():
        against = value / step_ms["cross-entropy"]
        print(f"{f'{ROWS} x {SEQ_LEN} tokens forward and backward, {key}':60} {value:8.1f} ms {against:6.2f} x")
    if options.json:
        found = {"teach_tokens_per_s": teaching, "read_tokens_per_s": speed, "disk": disk, "step_ms": step_ms}
        print(json.dumps({"benchmark": "teach", "quick": options.quick, "size_ratio": ratio, **found}))


if __name__ == "__main__":
    main()
