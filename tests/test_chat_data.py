"""Batches with conversations: prompts are no targets, ends are, whatever a row cuts; shares and weights as asked."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelter.__main__ import main
from smelter.base.errors import ConfigError, DataError
from smelter.config import DataConfig
from smelter.data import BatchStream
from smelter.evaluation.bpb import compressor_baselines, document_nats, nll_rows, validation_loss
from smelter.tokens.chat import stop_ids
from smelter.tokens.roles import SpecialTokens
from smelter.tokens.shards import ShardSet, Split
from smelter.tokens.tokenizer import Tokenizer
from smelter.tokens.windows import IGNORED, eval_windows, spread_windows
from tests import tiny
from tests.evaluation.bits import bits_of_split

TOKENS = tiny.tokenizer()
EOS, END = stop_ids(TOKENS)
SENTINELS = {TOKENS.fim_prefix_id, TOKENS.fim_suffix_id, TOKENS.fim_middle_id}


def write_shards(folder: Path, records: list[dict[str, Any]], tokens: Tokenizer = TOKENS) -> ShardSet:
    """Shards of records."""
    (folder / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokens.save(folder / "t.json")
    arguments = ["--tokenizer", str(folder / "t.json"), "--out", str(folder / "s")]
    assert main(["tokenize", str(folder / "r.jsonl"), *arguments]) == 0
    return ShardSet.open(folder / "s")


def records(kinds: str = "text instruct") -> list[dict[str, Any]]:
    """Documents of 5 to 300 tokens, and conversations of long and short questions and answers, some with weights."""
    made: list[dict[str, Any]] = []
    for number, piece in enumerate(tiny.CODE.split("\n\n")):
        split = "train" if number % 4 else "val"
        if "text" in kinds:
            made.append({"kind": "text", "text": piece + "\n", "split": split, "id": f"t{number}"})
        if "instruct" in kinds:
            other = piece.upper() + f" {number}\n"
            question, answer = (other, f"answer {number}") if number % 2 else (f"question {number}", other)
            response = {"teacher": "t", "text": answer, "weight": 2.0 if number % 5 == 0 else 1.0}
            record = {"kind": "instruct", "prompt": question, "responses": [response], "split": split}
            made.append(record | {"id": f"i{number}"})
    return made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Both kinds."""
    return write_shards(tmp_path_factory.mktemp("chat"), records())


def stream(shards: ShardSet, config: DataConfig | None = None, **changes: Any) -> BatchStream:
    """Rows of 64 tokens, 12 a step, 3 a batch."""
    values = {"seq_len": 64, "seed": 5, "device_batch_size": 3, "rows_per_step": 12} | changes
    return BatchStream(shards.split("train"), shards.tokenizer, config or DataConfig(fim_rate=0.0), **values)


@dataclass(frozen=True)
class Place:
    """A target in a row: its document, its place there, whether it belongs to a prompt."""

    doc: int
    at: int
    is_prompt: bool


def places(split: Split) -> dict[tuple[int, ...], list[Place]]:
    """Where each run of six tokens occurs among the documents, ends included."""
    found: dict[tuple[int, ...], list[Place]] = {}
    for doc in range(split.num_docs):
        ids = split.doc_with_eos(doc).tolist()
        num_prompt = 0 if split.num_prompt is None else int(split.num_prompt[doc])
        for at in range(5, len(ids)):
            found.setdefault(tuple(ids[at - 5 : at + 1]), []).append(Place(doc, at, at < num_prompt))
    return found


@pytest.mark.parametrize("seq_len", [24, 64, 500])
@pytest.mark.parametrize("share", [-1.0, 0.5, 1.0])
def test_prompts_are_no_targets_and_all_else_is_wherever_a_row_cuts(
    shards: ShardSet, seq_len: int, share: float
) -> None:
    """Checked against the documents alone: six tokens in a row tell where a target stands."""
    split = shards.split("train")
    known, checked = places(split), Counter[bool]()
    made = stream(shards, DataConfig(fim_rate=0.0, instruct_share=share), seq_len=seq_len)
    for step in range(1 + 600 // seq_len):
        for batch in made.step(step, 0, 1):
            for inputs, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):  # type: ignore[arg-type]
                tokens = [*inputs.tolist()]
                for column in range(5, seq_len - 1):
                    run = tuple(tokens[column - 4 : column + 2])
                    candidates = known.get(run, [])
                    if len(candidates) != 1 or EOS in run[:-1]:
                        continue
                    (place,) = candidates
                    assert (targets[column] == IGNORED) == place.is_prompt
                    assert weights[column] == (0 if place.is_prompt else split.weights[place.doc])  # type: ignore[index]
                    checked[place.is_prompt] += 1
    assert min(checked[True], checked[False]) > 200


def test_ends_of_answers_are_targets(shards: ShardSet) -> None:
    """What makes a model stop: the end of the message, and eos after it."""
    ends = Counter[str]()
    made = stream(shards, DataConfig(fim_rate=1.0))
    for batch in (batch for step in range(12) for batch in made.step(step, 0, 1)):
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            for column in range(1, len(inputs) - 1):
                if inputs[column] == END and inputs[column + 1] == EOS:  # of a document, not of a question
                    ends["eos"] += targets[column] == EOS
                    ends["end"] += targets[column - 1] == END
                    ends["all"] += 1
    assert ends["all"] > 5
    assert ends["end"] == ends["eos"] == ends["all"]


def test_conversations_are_never_rearranged(shards: ShardSet) -> None:
    config = DataConfig(fim_rate=1.0, instruct_share=1.0)
    rows = stream(shards, config)
    assert not any(SENTINELS & set(rows.row(i).tolist()) for i in range(60))
    mixed = stream(shards, DataConfig(fim_rate=1.0))
    for i in range(60):
        ids = mixed.row(i).tolist()
        pieces = " ".join(map(str, ids)).split(f" {EOS} ")
        for piece in pieces:
            held = set(map(int, piece.split()))
            assert not (SENTINELS & held and TOKENS.im_start_id in held)


# ---------------------------------------------------------------- mixing


@given(share=st.sampled_from([0.01, 0.1, 1 / 3, 0.5, 0.9, 0.99]), first=st.integers(0, 10**7))
@settings(max_examples=40)
def test_every_stretch_of_rows_has_its_share(shards: ShardSet, share: float, first: int) -> None:
    made = stream(shards, DataConfig(fim_rate=0.0, instruct_share=share))
    kinds = [made._allotted(first + i) for i in range(200)]
    for length in (10, 100, 200):
        assert abs(sum(kind for kind, _ in kinds[:length]) - length * share) <= 1
    for kind in (0, 1):  # each stream is read row by row, none left out
        numbers = [number for which, number in kinds if which == kind]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else share < 0.02


def test_rows_are_of_one_kind_and_an_epoch_of_each_is_whole(shards: ShardSet) -> None:
    split, made = shards.split("train"), stream(shards, DataConfig(fim_rate=0.0, instruct_share=0.25))
    assert split.num_prompt is not None
    for kind, chats in ((0, False), (1, True)):
        docs = [i for i in range(split.num_docs) if split.is_chat(i) == chats]
        expected = Counter(token for doc in docs for token in split.doc_with_eos(doc).tolist())
        documents = made._kinds[kind]
        found = Counter[int]()
        for index in range(10**4):
            which, number = made._allotted(index)
            if which == kind and number < documents.rows_per_epoch:
                found.update(made.row(index)[1:].tolist())
            elif which == kind:
                break
        assert found <= expected
        assert expected.total() - found.total() < 64


@given(index=st.integers(0, 10**6), share=st.sampled_from([-1.0, 0.0, 0.3, 1.0]))
@settings(max_examples=60)
def test_a_row_is_a_function_of_its_number(shards: ShardSet, index: int, share: float) -> None:
    config = DataConfig(instruct_share=share)
    one, two = stream(shards, config), stream(shards, config)
    for other in (0, index + 1, 17):
        two.row(other)
    mine, again = one._row(index), two._row(index)
    for name in ("tokens", "is_target", "weights"):
        assert getattr(mine, name).tobytes() == getattr(again, name).tobytes()


def test_a_share_of_what_is_not_there_is_an_error(tmp_path: Path, shards: ShardSet) -> None:
    folders = [tmp_path / kind for kind in ("text", "instruct")]
    for folder in folders:
        folder.mkdir()
    plain, chats = (write_shards(folder, records(folder.name)) for folder in folders)
    for share in (0.5, 1.0):
        with pytest.raises(DataError, match=r"instruct_share.* no conversations"):
            stream(plain, DataConfig(instruct_share=share))
    for share in (0.5, 0.0):
        with pytest.raises(DataError, match=r"instruct_share.* no plain documents"):
            stream(chats, DataConfig(instruct_share=share))
    stream(plain, DataConfig(instruct_share=0.0)).row(0)
    stream(chats, DataConfig(instruct_share=1.0)).row(0)
    with pytest.raises(ConfigError, match="instruct_share"):
        DataConfig(instruct_share=1.5)
    for weight in (0.0, float("nan")):
        with pytest.raises(ConfigError, match="instruct_weight"):
            DataConfig(instruct_weight=weight)


def test_the_weight_of_conversations_multiplies_theirs(shards: ShardSet) -> None:
    one, three = (
        stream(shards, DataConfig(fim_rate=0.0, instruct_weight=weight), seq_len=200).batch(0, 1, 0, 1)
        for weight in (1.0, 3.0)
    )
    assert one.weights is not None
    assert three.weights is not None
    assert (one.targets == three.targets).all()
    ratios = three.weights[one.weights > 0] / one.weights[one.weights > 0]
    assert set(ratios.tolist()) == {1.0, 3.0}
    assert ((one.weights == 0) == (one.targets == IGNORED)).all()


def test_without_conversations_batches_are_what_they_were(tmp_path: Path) -> None:
    """The hashes are of the program before it knew conversations."""
    lines = [
        {
            "kind": "text",
            "text": f"def f{i}(x):\n    return 'é漢{i * i}' + x * {i}\n\n" * (i % 7 + 1),
            "split": "train" if i % 4 else "val",
        }
        for i in range(40)
    ]
    old = Tokenizer.train([], 261, SpecialTokens(im_start="", im_end=""))
    assert old.hash == "3d871449b62d782b5ca15a81d2cf8b65e6dfeaf30c2546c3106406c35af19e1b"
    made, digest = write_shards(tmp_path, lines, old), hashlib.sha256()
    for step in (0, 1, 50):
        for batch in stream(made, DataConfig(fim_rate=0.5, use_document_mask=True)).step(step, 0, 1):
            assert batch.weights is None
            assert batch.doc_ids is not None
            for tensor in (batch.inputs, batch.targets, batch.doc_ids):
                digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "911f4920402597f1a3fb02b68d5e66ccf802dfb2758def1e851890ef6a46151b"


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 16), (64, 20), (500, 250)])
def test_evaluation_scores_text_and_answers_once(shards: ShardSet, seq_len: int, stride: int) -> None:
    split = shards.split("val")
    begins, ends = split.written
    expected = [t for i in range(split.num_docs) for t in split.doc(i)[begins[i] : ends[i]].tolist()]
    scored: list[int] = []
    for inputs, targets in eval_windows(split, seq_len, stride):
        is_scored = np.flatnonzero(targets != IGNORED)
        assert len(is_scored)
        assert (np.diff(is_scored) == 1).all()
        assert (inputs[is_scored[1:]] == targets[is_scored[:-1]]).all()
        scored += targets[is_scored].tolist()
    assert scored == expected
    assert int(TOKENS.token_num_bytes[scored].sum()) == split.num_bytes
    spread = [targets for _, targets in spread_windows(split, seq_len, 10**9, EOS)]
    assert all((targets != IGNORED).any() for targets in spread)
    assert [t for targets in spread for t in targets[targets != IGNORED].tolist()] == expected


def test_bits_per_byte_of_an_answer_is_given_its_question(tmp_path: Path) -> None:
    """The model's surprise at the answer after the prompt, divided by the answer's bytes."""
    answer = {"teacher": "t", "text": "return x + 1\n"}
    record = {"kind": "instruct", "prompt": "Add one.", "responses": [answer]}
    held_out: list[dict[str, Any]] = [record | {"split": "val"}, {"kind": "text", "text": "abc\n", "split": "val"}]
    made = write_shards(tmp_path, [*held_out, {"kind": "text", "text": "y", "split": "train"}])
    model, split = tiny.model(), made.split("val")
    begin, end = (int(each[0]) for each in split.written)
    ids = np.array([[EOS, *split.doc(0).tolist()]])
    targets = np.full((1, ids.shape[1] - 1), IGNORED)
    targets[0, begin:end] = ids[0, begin + 1 : end + 1]
    expected = float(nll_rows(model, ids[:, :-1], targets).sum())
    nats = document_nats(model, split, stride=48)
    assert nats[0] == pytest.approx(expected, rel=1e-6)
    bpb = nats.sum() / np.log(2) / len(b"return x + 1\nabc\n")
    assert bits_of_split(model, split, stride=48) == pytest.approx(bpb, rel=1e-6)
    assert validation_loss(model, split, 10**6, tokenizer=TOKENS)[1] == pytest.approx(bpb, rel=1e-6)


@pytest.mark.slow
def test_evaluate_fills_in_lines_of_texts_and_compresses_what_it_scores(tmp_path: Path) -> None:
    """Conversations have no lines to fill in: the model never saw them rearranged."""
    answers = [{"teacher": "t", "text": f"conversation = {i}\n" * 4} for i in range(9)]
    held_out: list[dict[str, Any]] = [
        {"kind": "instruct", "prompt": "Go on.", "responses": answers, "split": "val"},
        {"kind": "text", "text": "plain_text = 1\n" * 3, "split": "val"},
        {"kind": "text", "text": "x", "split": "train"},
    ]
    made = write_shards(tmp_path, held_out)
    run = tiny.checkpoint(tmp_path / "run", tiny.model(), shards=str(made.path))
    assert main(["evaluate", str(run), "--max-infill", "20", "--device", "cpu"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["infill_cases"] == 3
    assert {sample["expected"] for sample in results["samples"]} == {"plain_text = 1"}
    scored = [*(answer["text"].encode() for answer in answers), b"plain_text = 1\n" * 3]
    assert results["val_bytes"] == sum(map(len, scored))
    assert results["gzip_bpb"] == compressor_baselines(scored).gzip
