"""What `smelter teach --method chunks` stores is what the teacher says of the text, however it was interrupted."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smelter.__main__ import main
from smelter.base.errors import ConfigError, DataError
from smelter.config import DataConfig
from smelter.data import BatchStream
from smelter.distillation import teach_chunks
from smelter.distillation.cache_writer import begin_folder
from smelter.distillation.chunk_cache import ChunkTeacher
from smelter.distillation.teach_chunks import BLOCK, Window, windows
from smelter.distillation.teacher import CheckpointTeacher
from smelter.run.load import load_model
from smelter.run.metrics import read_metrics
from smelter.tokens.alignment import TeacherTokenizer
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenize import TokenizeOptions, tokenize
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny
from tests.distillation.chunking import make_chunks, make_shards, other_teacher, other_tokenizer
from tests.distillation.test_teacher import SIZES
from tests.test_train import losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a teacher with another tokenizer, and what it said in `chunks`."""
    made = tmp_path_factory.mktemp("chunks")
    make_shards(made)
    other_teacher(made / "teacher")
    make_chunks(made / "teacher", made / "shards", made / "chunks")
    return made


def direct(teacher: Path, raw: bytes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Ends and log-probabilities of the teacher's tokens of a text that fits its context, by the whole logits."""
    model, tokenizer, _ = load_model(teacher)
    ids = tokenizer.encode_bytes(raw)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[tokenizer.eos_id, *ids[:-1]]])))
    own = F.log_softmax(logits[0], -1).gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
    return np.cumsum(tokenizer.token_num_bytes[ids]), own.double().numpy()


def test_every_chunk_has_the_likelihood_that_the_teacher_gives_it(folder: Path) -> None:
    shards = ShardSet.open(folder / "shards")
    teacher = ChunkTeacher.open(folder / "chunks", shards)
    split, checked = shards.split("train"), 0
    for doc in range(split.num_docs):
        ids = split.doc(doc)
        raw = shards.tokenizer.decode_bytes(ids)
        if len(other_tokenizer().encode_bytes(raw)) > 60:
            continue
        found = teacher.chunks(doc, 0, len(ids) + 1)
        assert found.ends[-1] == -1  # eos
        ends, values = direct(folder / "teacher", raw)
        student = np.cumsum(shards.tokenizer.token_num_bytes[ids])
        for start, end, value in {
            *zip(found.starts.tolist(), found.ends.tolist(), found.log_probs.tolist(), strict=True)
        }:
            if start >= 0:
                first = 0 if start == 0 else student[start - 1]
                inside = (ends > first) & (ends <= student[end])
                assert value == pytest.approx(float(values[inside].sum()), rel=2e-3, abs=1e-4)
                checked += 1
        assert found.ends[len(ids) - 1] == len(ids) - 1
    assert checked > 100
    nats = -np.nansum(np.fromfile(folder / "chunks" / "chunks.f16", dtype="<f2").astype(np.float64))
    assert teacher.index["bits_per_byte"] == pytest.approx(nats / math.log(2) / split.num_bytes, rel=1e-6)
    assert 1 < teacher.index["tokens_per_chunk"] < 3


@pytest.mark.parametrize(("size", "context"), [(0, 4), (1, 4), (4, 4), (5, 4), (23, 4), (23, 5), (3, 2), (40, 64)])
def test_windows_predict_each_token_once_after_half_a_context(size: int, context: int) -> None:
    made = list(windows(7, size, context))
    scored = [token for window in made for token in range(window.done + 1, window.end + 1)]
    assert scored == list(range(1, size + 1))
    for window in made:
        assert window.document == 7
        assert 0 < window.end - window.start <= context
        # The first new token sees half a context, or all there is.
        assert window.done + 1 - window.start > context // 2 or window.start == 0


def test_a_long_document_is_read_in_windows(folder: Path, tmp_path: Path) -> None:
    """What a window scores is what the model says after the window's own tokens."""
    text = tiny.CODE[:900]
    tokens = other_tokenizer().encode(text)
    (tmp_path / "t").mkdir()
    other_tokenizer().save(tmp_path / "t" / "tokenizer.json")
    model, own, _ = load_model(folder / "teacher")
    teacher = CheckpointTeacher(folder, model)
    reader = teach_chunks.Reader(teacher, TeacherTokenizer(tmp_path / "t"), own.eos_id, 40, 3)
    (spelling,) = reader.tokenizer.spell([text.encode()])
    assert spelling is not None
    (found,) = reader.log_probs([spelling])
    ids = [own.eos_id, *tokens]
    assert len(list(windows(0, len(tokens), 40))) > 5
    for window in windows(0, len(tokens), 40):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids[window.start : window.end]])))[0]
        targets = torch.tensor(ids[window.start + 1 : window.end + 1])
        values = F.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)[window.done - window.start :]
        np.testing.assert_allclose(found[window.done : window.end], values.numpy(), rtol=1e-4, atol=1e-5)
    assert list(windows(0, len(tokens), 40))[1] == Window(0, 20, 40, 60)


def test_the_same_tokenizer_has_a_chunk_at_every_token(folder: Path, tmp_path: Path) -> None:
    teacher = tiny.checkpoint(tmp_path / "same", tiny.model())
    made = make_chunks(teacher, folder / "shards", tmp_path / "out")
    assert made.index["tokens_per_chunk"] == 1
    assert made.index["num_not_spelt"] == 0


def test_stopped_and_killed_it_writes_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert BLOCK == 64
    monkeypatch.setattr(teach_chunks, "BLOCK", 8)
    make_chunks(folder / "teacher", folder / "shards", tmp_path / "whole")
    append = teach_chunks._Writer.append
    calls = iter(range(100))

    def interrupted(self: Any, values: bytes, states: bytes) -> None:
        number = next(calls)
        append(self, values, states)
        if number == 1:
            signal.raise_signal(signal.SIGTERM)
        if number == 3:
            with (self.folder / "chunks.f16").open("ab") as file:
                file.write(b"\x01" * 33)  # of a block that was being written
            raise KeyboardInterrupt

    monkeypatch.setattr(teach_chunks._Writer, "append", interrupted)
    command = teach_chunks.TeachChunksOptions(
        teacher=folder / "teacher", shards=folder / "shards", out=tmp_path / "out", device="cpu"
    )
    assert teach_chunks.teach_chunks(command) == 128 + signal.SIGTERM
    assert "goes on from there" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "unfinished.json").read_text())
    with pytest.raises(DataError, match="not finished"):
        ChunkTeacher.open(tmp_path / "out", ShardSet.open(folder / "shards"))
    with pytest.raises(KeyboardInterrupt):
        teach_chunks.teach_chunks(command)
    states = tmp_path / "out" / "states.u1"
    states.write_bytes(states.read_bytes()[:-3] + bytes(2))  # a torn block
    writer = teach_chunks._Writer(tmp_path / "out", {}, ShardSet.open(folder / "shards").split("train"))
    assert writer.num_docs == 24
    begin_folder(tmp_path / "out", settings)
    assert teach_chunks.teach_chunks(command) == 0
    for name in ("chunks.f16", "states.u1", "index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert teach_chunks.teach_chunks(command) == 0
    assert "complete already" in capsys.readouterr().out
    assert main([*command_line(folder, tmp_path / "out"), "--context", "32"]) == 2
    assert "context = 32 (there: 64)" in capsys.readouterr().err


def command_line(folder: Path, out: Path) -> list[str]:
    paths = ["--teacher", str(folder / "teacher"), "--shards", str(folder / "shards"), "--out", str(out)]
    return ["teach", *paths, "--method", "chunks", "--device", "cpu"]


def test_documents_that_the_teacher_cannot_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["def f():\n    return 1\n", "cafe\u0301 = 1\n", "x = 'é'\n", "y = 2\n"]
    with (tmp_path / "records.jsonl").open("w") as file:
        for number, text in enumerate([*texts, "val = 1\n"]):
            side = "val" if number == 4 else "train"
            file.write(json.dumps({"kind": "text", "id": str(number), "text": text, "split": side}) + "\n")
    tiny.tokenizer().save(tmp_path / "tokenizer.json")
    made = TokenizeOptions(
        records=(tmp_path / "records.jsonl",), out=tmp_path / "shards", tokenizer=tmp_path / "tokenizer.json"
    )
    tokenize(made)
    teacher = save_folder(tmp_path / "hf", normalizer={"type": "NFC"})
    found = make_chunks(teacher, tmp_path / "shards", tmp_path / "out")
    assert found.index["num_not_spelt"] == 1
    assert "passed over of 4 documents: 1 whose bytes" in capsys.readouterr().out
    split = ShardSet.open(tmp_path / "shards").split("train")
    with_chunks = [bool((found.chunks(doc, 0, len(split.doc(doc))).starts >= 0).any()) for doc in range(4)]
    readable = [b"e\xcc\x81" not in tiny.tokenizer().decode_bytes(split.doc(doc)) for doc in range(4)]
    assert with_chunks == readable


def save_folder(folder: Path, **changes: Any) -> Path:
    """A random Qwen3 of Transformers with the other tokenizer, as its own file has it, and changes to that."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=720, initializer_range=0.3, bos_token_id=None, eos_token_id=other_tokenizer().eos_id,
        pad_token_id=None, **SIZES, head_dim=8,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    other_tokenizer().save(folder / "tokenizer.json")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | changes))
    return folder


def test_a_model_of_transformers_says_the_same_through_transformers(folder: Path, tmp_path: Path) -> None:
    """Held against its own loss on one document, read by its own tokenizer class."""
    transformers = pytest.importorskip("transformers")
    made = make_chunks(save_folder(tmp_path / "hf"), folder / "shards", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf" / "tokenizer.json"))
    shards = ShardSet.open(folder / "shards")
    split = shards.split("train")
    doc = int(np.argmin(np.abs(np.diff(split.offsets) - 60)))
    text = shards.tokenizer.decode(split.doc(doc))
    ids = torch.tensor([[other_tokenizer().eos_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        nats = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    found = made.chunks(doc, 0, len(split.doc(doc)))
    last = found.ends == np.arange(len(found.ends))
    assert -float(found.log_probs[last].sum()) == pytest.approx(nats, rel=2e-3)


def test_other_shards_and_another_tokenizer_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ShardSet.open(make_shards(tmp_path / "others", seed=3))
    with pytest.raises(ConfigError, match="other shards than"):
        ChunkTeacher.open(folder / "chunks", others)
    records = folder / "corpus.jsonl"
    retokenized = tokenize(TokenizeOptions(records=(records,), out=tmp_path / "shards", vocab_size=400))
    with pytest.raises(ConfigError, match="other tokenizer than"):
        ChunkTeacher.open(folder / "chunks", ShardSet.open(retokenized))
    with pytest.raises(DataError, match="--method chunks"):
        ChunkTeacher.open(tmp_path / "none", others)
    assert main(["teach", "--method=chunks", "--teacher", str(folder / "teacher"), "--shards", str(folder)]) == 2
    assert "index.json" in capsys.readouterr().err
    assert main([*command_line(folder, tmp_path / "x"), "--context", "1"]) == 2
    assert "--context = 1" in capsys.readouterr().err


def test_damage_is_noticed(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet.open(folder / "shards")
    copy = make_chunks(folder / "teacher", folder / "shards", tmp_path / "out").path
    raw = (copy / "chunks.f16").read_bytes()
    (copy / "chunks.f16").write_bytes(raw[:-1] + b"\x01")
    with pytest.raises(DataError, match="contents have changed"):
        ChunkTeacher.open(copy, shards, verify=True)
    (copy / "chunks.f16").write_bytes(raw[:-2])
    with pytest.raises(DataError, match=r"chunks.f16: has [\d,]+ bytes instead of"):
        ChunkTeacher.open(copy, shards)
    (copy / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not what `smelter teach --method chunks` writes"):
        ChunkTeacher.open(copy, shards)


TRAIN = (
    *("--vocab-size=512", "--hidden-size=32", "--num-layers=1", "--num-heads=2", "--num-kv-heads=1", "--head-dim=16"),
    *("--intermediate-size=48", "--max-seq-len=64", "--total-batch-size=256", "--device-batch-size=2", "--log-every=1"),
    *("--precision=fp32", "--no-use-torch-compile", "--device=cpu", "--warmup-steps=2", "--sample-every=0"),
    *("--eval-every=0", "--eval-tokens=128"),
)


def train(folder: Path, run: Path, *options: str) -> list[str]:
    return ["train", *TRAIN, "--shards", str(folder / "shards"), "--run-dir", str(run), *options]


def test_chunks_of_a_batch_are_those_of_the_text_in_its_rows(folder: Path) -> None:
    """Also under fill-in-the-middle: the teacher's chunk is the very text of the student's tokens."""
    shards = ShardSet.open(folder / "shards")
    teacher = ChunkTeacher.open(folder / "chunks", shards)
    stream = BatchStream(
        shards.split("train"), shards.tokenizer, DataConfig(fim_rate=0.5), seq_len=64, seed=0, device_batch_size=4,
        rows_per_step=4, chunk_teachers=[teacher],
    )  # fmt: skip
    split = shards.split("train")
    known: dict[tuple[int, ...], set[float]] = {}
    for doc in range(split.num_docs):
        ids = split.doc(doc).tolist()
        found = teacher.chunks(doc, 0, len(ids))
        for start, end, value in zip(found.starts.tolist(), found.ends.tolist(), found.log_probs.tolist(), strict=True):
            if start >= 0:
                known.setdefault(tuple(ids[start : end + 1]), set()).add(value)
    shares = []
    for step in range(6):
        batch = stream.batch(step, 0, 0, 1)
        (chunks,) = batch.chunks
        assert chunks.starts.shape == batch.targets.shape
        for row in range(4):
            for place in np.flatnonzero(chunks.starts[row].numpy() >= 0).tolist():
                start, end = int(chunks.starts[row, place]), int(chunks.ends[row, place])
                assert start <= place <= end
                value = float(chunks.log_probs[row, place])
                assert value in known[tuple(batch.targets[row, start : end + 1].tolist())]
        shares.append(float((chunks.starts >= 0).float().mean()))
    assert 0.4 < np.mean(shares) < 0.9  # rearranged documents keep their prefix at most
    plain = BatchStream(
        split, shards.tokenizer, DataConfig(fim_rate=0.0), seq_len=64, seed=0, device_batch_size=4, rows_per_step=4,
        chunk_teachers=[teacher],
    )  # fmt: skip
    assert float((plain.batch(0, 0, 0, 1).chunks[0].starts >= 0).float().mean()) > 0.8


def test_a_student_learns_from_chunks_and_goes_on_after_a_stop(folder: Path, tmp_path: Path) -> None:
    options = ("--chunk-teachers", str(folder / "chunks"), "--fim-rate", "0.3")
    assert main(train(folder, tmp_path / "whole", *options, "--num-steps", "4", "--cooldown-fraction", "0")) == 0
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["chunk_loss"] > 0 for row in rows)
    assert all(row["loss"] < row["ce_loss"] + row["chunk_loss"] for row in rows)
    for steps in ("2", "4"):
        command = train(folder, tmp_path / "parts", *options, "--num-steps", steps, "--cooldown-fraction", "0")
        assert main(command) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    # With no share it is the plain loss, bit for bit but for what is logged.
    assert main(train(folder, tmp_path / "none", "--num-steps", "3", "--fim-rate", "0.3")) == 0
    zero = (*options, "--chunk-weight", "0", "--num-steps", "3")
    assert main(train(folder, tmp_path / "zero", *zero)) == 0
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler trips over warnings of its own that are made errors
def test_compiled_equals_eager(folder: Path, tmp_path: Path) -> None:
    options = ("--chunk-teachers", str(folder / "chunks"), "--num-steps", "3")
    assert main(train(folder, tmp_path / "eager", *options)) == 0
    assert main(train(folder, tmp_path / "compiled", *options, "--use-torch-compile")) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher(folder: Path, tmp_path: Path) -> None:
    """A teacher trained on the text: with the chunks' loss the student ends nearer to it than with the text alone."""
    records = folder / "corpus.jsonl"
    other_tokenizer().save(tmp_path / "other.json")
    own = tokenize(TokenizeOptions(records=(records,), out=tmp_path / "shards", tokenizer=tmp_path / "other.json"))
    options = ("--shards", str(own), "--vocab-size", "700", "--num-steps", "150", "--fim-rate", "0")
    assert main(train(folder, tmp_path / "teacher", *options)) == 0
    chunks = make_chunks(tmp_path / "teacher", folder / "shards", tmp_path / "chunks").path
    ends = {}
    for name, weight in (("text", "0"), ("chunks", "1")):
        learn = ("--chunk-teachers", str(chunks), "--chunk-weight", weight, "--fim-rate", "0", "--num-steps", "200")
        assert main(train(folder, tmp_path / name, *learn)) == 0
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        ends[name] = float(np.mean([row["chunk_loss"] for row in rows[-20:]]))
        assert ends[name] < rows[0]["chunk_loss"]
    print(f"divergence to the teacher: {ends}")
    assert ends["chunks"] < 0.8 * ends["text"]


def test_a_tokenizer_file_alone_is_enough_to_spell(tmp_path: Path) -> None:
    other_tokenizer().save(tmp_path / "t.json")
    assert TeacherTokenizer(tmp_path / "t.json").hash == Tokenizer.load(tmp_path / "t.json").hash
