"""What a teacher said, from the disk: the loss of the teacher beside it; killed or not, the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smelter.__main__ import main
from smelter.base.errors import ConfigError, DataError
from smelter.config import Config
from smelter.data import Batch
from smelter.distillation import teach as teach_module
from smelter.distillation.cache import TeacherCache, open_caches
from smelter.distillation.cache_writer import CacheWriter
from smelter.distillation.objective import Objective, load_teachers
from smelter.distillation.teach import Reader, TeachOptions, plan, teach
from smelter.model import Model
from smelter.tokens.shards import ShardSet
from tests import tiny
from tests.distillation.teaching import CUT, SEQ_LEN, make_cache, make_shards, stream_of, student_config

WHOLE: dict[str, Any] = {"method": "top_k", "top_k": 512, "log_prob_dtype": "float32"}
"""Every id with its probability: what the teacher says, all of it."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("teach"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("run") / "big", tiny.model())


@pytest.fixture(scope="module")
def cache(teacher: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return make_cache(teacher, shards, tmp_path_factory.mktemp("cache") / "c")


# ---------------------------------------------------------------- what training sees


def gradient(config: Config, shards: ShardSet, batch: Batch) -> list[Tensor]:
    """Loss, KL and every gradient of a fresh student on one batch."""
    torch.manual_seed(3)
    student = Model(config.model)
    student.quantize_weights()
    teachers = load_teachers(config, shards.tokenizer, torch.float32, torch.device("cpu"))
    loss = Objective(student, config, teachers, use_compile=False)(batch, torch.tensor(100.0))
    loss.total.backward()
    grads = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    return [loss.total.detach(), loss.kl.detach(), torch.cat([grad.flatten() for grad in grads])]


def with_data(config: Config, **changes: Any) -> Config:
    return replace(config, data=replace(config.data, **changes))


@pytest.mark.parametrize("use_document_mask", [False, True])
@pytest.mark.parametrize("fim_rate", [0.0, 0.9])
def test_from_the_disk_or_beside_the_student_it_is_the_same_loss(
    teacher: Path, shards: Path, tmp_path: Path, fim_rate: float, use_document_mask: bool
) -> None:
    changes: dict[str, Any] = {"fim_rate": fim_rate, "use_document_mask": use_document_mask}
    made = make_cache(teacher, shards, tmp_path / "c", **changes, **WHOLE, seed=4)
    opened = ShardSet.open(shards)
    online = with_data(student_config(shards, teachers=(teacher,)), **changes)
    stored = with_data(student_config(shards, cached=(tmp_path / "c",)), **changes)
    (read,) = open_caches(stored, opened)
    assert read.arrangement == made.arrangement
    some_fim = False
    for step in (0, 2):
        beside = stream_of(online, opened, seed=4).batch(step, 0, 0, 1)
        batch = stream_of(stored, opened, seed=read.arrangement.seed, cached=(read,)).batch(step, 0, 0, 1)
        assert (batch.inputs == beside.inputs).all()
        some_fim |= bool((batch.inputs == opened.tokenizer.fim_middle_id).any())
        for ours, theirs in zip(gradient(stored, opened, batch), gradient(online, opened, beside), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    assert some_fim == (fim_rate > 0)


def test_draws_give_the_gradient_of_the_whole_distribution_on_average(
    teacher: Path, shards: Path, cache: TeacherCache
) -> None:
    opened = ShardSet.open(shards)
    online, stored = student_config(shards, teachers=(teacher,)), student_config(shards, cached=(cache.path,))
    batch = stream_of(stored, opened).batch(0, 0, 0, 1)
    expected = gradient(online, opened, batch)[2]
    (model,) = load_teachers(online, opened.tokenizer, torch.float32, torch.device("cpu"))
    reader = Reader(model, cache.index, torch.device("cpu"))
    found = []
    for seed in range(24):
        reader.seed = seed
        records = [np.frombuffer(record, np.uint8) for record in reader.records(batch, 0)]
        read = [cache.format.unpack(record) for record in records]
        cache.row = lambda index, read=read: read[index]  # type: ignore[method-assign, misc]
        found.append(gradient(stored, opened, replace(batch, teachers=(cache.rows([0, 1, 2]),)))[2])
    del cache.row
    one = float(torch.stack([(each - expected).norm() for each in found]).mean())
    mean = float((torch.stack(found).mean(0) - expected).norm())
    assert one > 0.01 * float(expected.norm())  # each differs ...
    assert mean < 1.5 * one / 24**0.5  # ... and the mean goes to it as the mean of unbiased ones does


def test_rows_come_round_again(shards: Path, cache: TeacherCache) -> None:
    opened = ShardSet.open(shards)
    config = student_config(shards, cached=(cache.path,))
    stream = stream_of(config, opened, cached=(cache,))
    rows = [stream.batch(step, 0, 0, 1).inputs.numpy() for step in range(11)]
    flat = np.concatenate(rows)
    assert (flat[:22] == flat[11:]).all()
    assert len({row.tobytes() for row in flat}) == 11
    again = stream.batch(8, 0, 0, 1).teachers[0]  # rows 24, 25, 26 = 2, 3, 4
    direct = cache.rows([2, 3, 4])
    assert (again.ids == direct.ids).all()
    assert (again.probs == direct.probs).all()


def test_a_row_says_what_the_teacher_says(teacher: Path, shards: Path, tmp_path: Path, cache: TeacherCache) -> None:
    whole = make_cache(teacher, shards, tmp_path / "whole", **WHOLE).rows([0, 1])
    few = make_cache(teacher, shards, tmp_path / "few", method="top_k", top_k=5).rows([0, 1])
    drawn = cache.rows([0, 1])
    dense = torch.zeros(2 * SEQ_LEN, 512).scatter_(-1, whole.ids, whole.probs)
    has_target = (drawn.probs[:, 0] > 0).float()
    assert torch.allclose(dense.sum(-1), has_target, atol=1e-5)
    assert torch.allclose(dense.gather(-1, few.ids), few.probs, rtol=5e-3, atol=1e-6)
    assert torch.allclose(few.probs[:, 0], dense.amax(-1), rtol=5e-3)
    assert torch.allclose(drawn.probs.sum(-1), has_target, atol=1e-5)
    assert dense.gather(-1, drawn.ids)[drawn.probs > 0].min() > 0
    nats = -torch.xlogy(dense, dense).sum(-1)
    for rows in (whole, few, drawn):
        assert rows.entropy is not None
        assert torch.allclose(rows.entropy, nats, rtol=2e-3, atol=2e-3)
    assert 0.1 < float(nats.mean()) < 6.0  # a teacher that has opinions, and not only one


def test_what_has_no_target_is_stored_empty(teacher: Path, shards: Path, tmp_path: Path) -> None:
    opened = ShardSet.open(shards)
    made = make_cache(teacher, shards, tmp_path / "c", fim_rate=1.0)
    config = with_data(student_config(shards), fim_rate=1.0)
    targets = torch.cat([stream_of(config, opened).batch(step, 0, 0, 1).targets for step in range(4)])[:11].numpy()
    counts = np.stack([made.row(row)[0].counts for row in range(11)])
    assert (targets < 0).any()
    assert ((counts == 0) == (targets < 0)).all()
    rows = made.rows(range(11))
    assert (rows.probs.sum(-1).numpy()[targets.flatten() < 0] == 0).all()
    assert made.index["num_tokens"] == (targets >= 0).sum()


def test_the_batch_size_decides_no_draw(teacher: Path, shards: Path, tmp_path: Path, cache: TeacherCache) -> None:
    """But for what it does to the last bit of the teacher's logits."""
    other = make_cache(teacher, shards, tmp_path / "c", batch_size=8)
    for row in range(11):
        (a, _), (b, _) = cache.row(row), other.row(row)
        assert float((a.counts == b.counts).mean()) > 0.95


# ---------------------------------------------------------------- stopped, and going on


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("flush_seconds", [0.0, 1e9])
def test_stopped_at_any_row_it_goes_on_to_the_same_bytes(
    teacher: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_seconds: float
) -> None:
    options = {"file_mb": 1, "draws": 255, "rows": 11}
    monkeypatch.setattr(teach_module, "FLUSH_SECONDS", flush_seconds)
    original = CacheWriter.__init__

    def small_files(self: CacheWriter, folder: Path, settings: dict[str, Any], file_bytes: int) -> None:
        original(self, folder, settings, file_bytes // 100)  # a new file every few rows

    monkeypatch.setattr(CacheWriter, "__init__", small_files)
    whole = make_cache(teacher, shards, tmp_path / "whole", **options)
    assert len(whole.index["files"]) > 2
    append = CacheWriter.append
    for stop_after in (1, 2, 5, 9, 10):

        def stopping(self: CacheWriter, record: bytes, stop_after: int = stop_after) -> None:
            if self.num_rows == stop_after:
                assert self._file is not None
                self._file.write(record[:99])
                self._file.flush()
                raise Stopped
            append(self, record)

        monkeypatch.setattr(CacheWriter, "append", stopping)
        with pytest.raises(Stopped):
            make_cache(teacher, shards, tmp_path / "c", **options)
        with pytest.raises(DataError, match="not finished: run the same"):
            TeacherCache.open(tmp_path / "c")
        monkeypatch.setattr(CacheWriter, "append", append)
    make_cache(teacher, shards, tmp_path / "c", **options)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_stopped_while_it_begins_again_it_goes_on_all_the_same(
    teacher: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being made is written down anew by whoever goes on: never half of it."""

    def stopped(*arguments: object, **options: object) -> None:
        raise Stopped

    out = tmp_path / "c"
    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "finish", stopped)
        with pytest.raises(Stopped):
            make_cache(teacher, shards, out)
    before = contents(out)
    settings = json.loads(before["unfinished.json"])
    with monkeypatch.context() as patched:
        for name in ("dump", "dumps"):
            patched.setattr(json, name, stopped)
        with pytest.raises(Stopped):
            CacheWriter(out, settings, 2**20)
    assert contents(out) == before
    make_cache(teacher, shards, out)


KILLED = """
import os, signal, sys
from smelter.distillation import teach
from smelter.distillation.cache_writer import CacheWriter
teach.FLUSH_SECONDS = 0.0
where, after = sys.argv[1], int(sys.argv[2])
original, calls = getattr(CacheWriter, where), iter(range(1000))
def killed(self, *arguments):
    if next(calls) == after:
        self._file.write(b"half")
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
setattr(CacheWriter, where, killed)
sys.exit(teach.main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_give_the_same_bytes(teacher: Path, shards: Path, tmp_path: Path) -> None:
    words = ["--seq-len", "64", "--rows", "11", "--batch-size", "3", "--device", "cpu"]
    command = ["--teacher", str(teacher), "--shards", str(shards), *words, "--out"]
    whole, out = tmp_path / "whole", tmp_path / "c"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "smelter", "teach", *command, str(whole)], check=True, env=environment)
    for where, after in (("append", 4), ("_sync_rows", 1), ("append", 2)):
        killed = [sys.executable, "-c", KILLED, where, str(after), *command, str(out)]
        assert subprocess.run(killed, check=False, env=environment).returncode == -signal.SIGKILL
    assert 0 < (out / "row_bytes.bin").stat().st_size < 44
    subprocess.run([sys.executable, "-m", "smelter", "teach", *command, str(out)], check=True, env=environment)
    assert contents(out) == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_after_the_rows_at_hand(
    teacher: Path, shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = ["--seq-len", "64", "--rows", "20000", "--batch-size", "3", "--device", "cpu"]
    command = ["--teacher", str(teacher), "--shards", str(shards), *words, "--out", str(tmp_path / "c")]
    process = subprocess.Popen(
        [sys.executable, "-m", "smelter", "teach", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert "20,000 of 20,000 rows to go, about" in process.stderr.readline()
    assert "rows/s" in process.stderr.readline()  # the first of the lines that come every few seconds
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the same command goes on" in out
    assert "Traceback" not in error
    assert (tmp_path / "c" / "row_bytes.bin").stat().st_size > 0


def test_resume_as_asked(
    teacher: Path, shards: Path, tmp_path: Path, cache: TeacherCache, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="--resume auto to begin"):
        make_cache(teacher, shards, tmp_path / "none", resume="must")
    with pytest.raises(DataError, match="never leaves alone"):
        make_cache(teacher, shards, cache.path, resume="never")
    before = contents(cache.path)
    make_cache(teacher, shards, cache.path)
    assert "complete already" in capsys.readouterr().out
    assert contents(cache.path) == before
    with pytest.raises(
        ConfigError, match=r"draws = 20 \(there: 50\), arrangement.seed = 1|arrangement.seed = 1"
    ) as caught:
        make_cache(teacher, shards, cache.path, draws=20, seed=1)
    assert "draws = 20 (there: 50)" in str(caught.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="not a teacher's cache"):
        make_cache(teacher, shards, tmp_path / "mine")


def test_a_full_disk_is_said_before_or_when_it_is_full(
    teacher: Path, shards: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = small_disk / "c", {**WHOLE, "rows": 20}  # 4 MB
    with pytest.raises(DataError, match=r"needs about .* MB .* are free: make room, or lower --draws"):
        make_cache(teacher, shards, out, **options)
    assert not out.exists()
    monkeypatch.setattr(teach_module, "free_bytes", lambda folder: 2**60)
    with pytest.raises(DataError, match=r"No space left on device after [\d,]+ rows: .* make room and run the same"):
        make_cache(teacher, shards, out, **options)
    assert (out / "row_bytes.bin").is_file()
    shutil.move(out, tmp_path / "c")
    make_cache(teacher, shards, tmp_path / "c", **options)
    make_cache(teacher, shards, tmp_path / "whole", **options)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


# ---------------------------------------------------------------- the command


def test_defaults_come_from_the_recipe_or_the_teacher(teacher: Path, shards: Path, tmp_path: Path) -> None:
    opened = ShardSet.open(shards)
    own = plan(TeachOptions(teacher=teacher, shards=shards), opened)
    assert (own.arrangement.seq_len, own.data.fim_rate, own.temperature, own.vocab_size) == (96, 0.5, 1.0, 512)
    assert own.arrangement.num_rows == opened.split("train").num_tokens // 96
    assert own.out == shards / "teachers" / "big"
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'preset = "tiny"\n[model]\nmax_seq_len = 48\nvocab_size = 600\n[data]\nfim_rate = 0.25\n'
        "use_document_mask = true\n[distillation]\ntemperature = 2.0\n"
    )
    taken = plan(TeachOptions(teacher=teacher, shards=shards, recipe=recipe, epochs=2, fim_spm_rate=1.0), opened)
    assert (taken.arrangement.seq_len, taken.temperature, taken.vocab_size) == (48, 2.0, 600)
    assert (taken.data.fim_rate, taken.data.fim_spm_rate, taken.data.use_document_mask) == (0.25, 1.0, True)
    assert taken.arrangement.num_rows == 2 * (opened.split("train").num_tokens // 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draws", "256"], "--draws = 256: must lie between 1 and 255"),
        (["--method", "top_k", "--top-k", "513"], "--top-k = 513"),
        (["--seq-len", "97"], "at most 96 tokens, not 97"),
        (["--temperature", "0"], "--temperature = 0"),
        (["--shards", "nowhere"], "smelter tokenize"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--precision", "fp16"], "needs a GPU"),
        (["--recipe", "none.toml"], "check the path"),
    ],
)
def test_bad_options_are_one_line(
    teacher: Path, shards: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["teach", "--teacher", str(teacher), "--shards", str(shards), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "c"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_a_teacher_of_other_shards(shards: Path, tmp_path: Path) -> None:
    other = tiny.checkpoint(tmp_path / "other", tiny.model(vocab_size=480), tiny.tokenizer(480))
    with pytest.raises(ConfigError, match=r"tokenizer is not that of the shards \(480 and 512 tokens\)|smaller than"):
        make_cache(other, shards, tmp_path / "c")


def test_a_teacher_that_has_gone_mad(shards: Path, tmp_path: Path) -> None:
    made = tiny.model()
    with torch.no_grad():
        made.norm.weight[3] = float("nan")
    with pytest.raises(DataError, match="not finite in row 0: try --precision fp32"):
        make_cache(tiny.checkpoint(tmp_path / "mad", made), shards, tmp_path / "c")


def test_shards_are_not_made_anew_under_a_cache(teacher: Path, tmp_path: Path) -> None:
    """What a teacher took days to say is not swept away with the shards that it spoke of."""
    shards = make_shards(tmp_path)
    assert teach(TeachOptions(teacher=teacher, shards=shards, rows=2, device="cpu", batch_size=2)) == 0
    assert (shards / "teachers" / "big" / "index.json").is_file()
    assert ShardSet.open(shards, verify=True).split("train").num_docs > 0
    with pytest.raises(DataError, match="also holds 'teachers', which is not of the shards: move it"):
        make_shards(tmp_path, seed=1)


def test_the_index_says_what_it_is(teacher: Path, cache: TeacherCache) -> None:
    index = json.loads((cache.path / "index.json").read_text())
    assert index["method"] == "sampled"
    assert index["teacher"]["path"].startswith(str(teacher))
    assert len(index["teacher"]["weights_sha256"]) == 64
    size = sum(path.stat().st_size for path in cache.path.glob("*.bin"))
    assert index["bytes_per_token"] == pytest.approx(size / (CUT["rows"] * SEQ_LEN))
    assert 1 < index["mean_entries"] <= 50
    assert sorted(path.name for path in cache.path.iterdir()) == ["index.json", "row_bytes.bin", "rows_00000.bin"]
