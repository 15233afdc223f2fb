"""What becomes of pieces in a row: lengths, peeks, cuts, and what training makes of the sentinels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from smelter.base.errors import DataError
from smelter.config import DataConfig
from smelter.data import BatchStream
from smelter.tokens.shards import ShardSet
from tests import tiny
from tests.tokens.test_shards import record, tokenize, write_lines

TOKENS = tiny.tokenizer()
EOS = TOKENS.eos_id
SENTINELS = (TOKENS.fim_prefix_id, TOKENS.fim_suffix_id, TOKENS.fim_middle_id)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Some 45 documents of code."""
    folder = tmp_path_factory.mktemp("data")
    pieces = [piece + "\n" for piece in tiny.CODE.split("\n\n")]
    records = [record(number, text=piece) for number, piece in enumerate(pieces)]
    TOKENS.save(folder / "tokenizer.json")
    corpus = write_lines(folder / "corpus.jsonl", records)
    assert tokenize(corpus, "--tokenizer", folder / "tokenizer.json", "--out", folder / "shards") == 0
    return ShardSet.open(folder / "shards")


def stream(shards: ShardSet, config: DataConfig, seq_len: int = 64) -> BatchStream:
    """12 rows a step, 3 a batch."""
    split = shards.split("train")
    return BatchStream(split, shards.tokenizer, config, seq_len=seq_len, seed=5, device_batch_size=3, rows_per_step=12)


def test_short_pieces_are_the_same_text_with_more_gaps(shards: ShardSet) -> None:
    def starts(fim_piece_tokens: int) -> tuple[int, int]:
        rows = stream(shards, DataConfig(fim_rate=1.0, fim_piece_tokens=fim_piece_tokens), seq_len=512)
        ids = np.concatenate([rows.row(index) for index in range(40)])
        return int((ids == SENTINELS[0]).sum()), int((ids != TOKENS.pad_id).sum())

    (few, tokens), (many, more_tokens) = starts(0), starts(40)
    assert many > 2 * few
    assert more_tokens > 0.97 * tokens  # no room is lost
    plain = stream(shards, DataConfig(fim_rate=0.0, fim_piece_tokens=40), seq_len=512)
    whole = stream(shards, DataConfig(fim_rate=0.0), seq_len=512)
    assert all((plain.row(index) == whole.row(index)).all() for index in range(12))


def test_peeks_stand_in_what_is_not_rearranged(shards: ShardSet) -> None:
    rows = stream(shards, DataConfig(fim_rate=0.0, fim_peek_tokens=8), seq_len=512)
    ids = np.concatenate([rows.row(index) for index in range(20)])
    assert (ids == SENTINELS[0]).sum() == 0
    assert (ids == SENTINELS[2]).sum() > 40
    with pytest.raises(DataError, match="fim_middle_token"):
        stream(shards, DataConfig(fim_rate=0.0, fim_peek_tokens=8, fim_middle_token="<MID>"))


def test_words_are_cut_in_what_is_rearranged_and_in_what_is_not(shards: ShardSet) -> None:
    def bytes_a_token(fim_rate: float, fim_cut_rate: float) -> float:
        rows = stream(shards, DataConfig(fim_rate=fim_rate, fim_cut_rate=fim_cut_rate), seq_len=512)
        ids = [int(i) for index in range(20) for i in rows.row(index) if i not in (TOKENS.pad_id, *SENTINELS)]
        return len(TOKENS.decode_bytes(ids)) / len(ids)

    for fim_rate in (0.0, 1.0):
        whole, cut = bytes_a_token(fim_rate, 0.0), bytes_a_token(fim_rate, 0.125)
        assert 1.05 < whole / cut < 1.25, fim_rate


def test_positions_skip_where_a_middle_begins_and_nowhere_else(shards: ShardSet) -> None:
    data = DataConfig(fim_rate=0.5, fim_peek_tokens=8)
    assert stream(shards, data, seq_len=512).batch(0, 0, 0, 1).positions is None
    skipping = stream(shards, replace(data, fim_position_skip=50), seq_len=512)
    skips = []
    for step in range(6):
        batch, plain = skipping.batch(step, 0, 0, 1), stream(shards, data, seq_len=512).batch(step, 0, 0, 1)
        assert torch.equal(batch.inputs, plain.inputs)
        assert batch.positions is not None
        assert (batch.positions[:, 0] == 0).all()
        steps, is_middle = batch.positions.diff(), batch.inputs[:, 1:] == SENTINELS[2]
        assert (steps[~is_middle] == 1).all()
        skips += (steps[is_middle] - 1).tolist()
    assert 0.2 < np.mean([skip == 0 for skip in skips]) < 0.45
    assert (min(skips), max(skips) > 40, max(skips) <= 50) == (0, True, True)
    assert np.mean(skips) == pytest.approx(0.7 * 25, rel=0.15)


def test_the_bridge_says_early_what_the_middle_begins_with(shards: ShardSet) -> None:
    plain, bridged = (
        DataConfig(fim_rate=0.9, fim_spm_rate=0.3),
        DataConfig(fim_rate=0.9, fim_spm_rate=0.3, fim_bridge=True),
    )
    num_changed = 0
    for step in range(12):
        batch, other = (stream(shards, data).batch(step, 0, 0, 1) for data in (plain, bridged))
        assert torch.equal(batch.inputs, other.inputs)
        for inputs, targets, changed in zip(batch.inputs, batch.targets, other.targets, strict=True):
            expected = targets.clone()
            for at in torch.nonzero(inputs == SENTINELS[1]).flatten().tolist():
                middles = torch.nonzero(inputs[at:] == SENTINELS[2]).flatten().tolist()
                if middles and at and inputs[at - 1] != SENTINELS[0]:
                    expected[at - 1] = expected[at] = targets[at + middles[0]]
            assert torch.equal(changed, expected)
            num_changed += int((changed != targets).sum())
    assert num_changed > 20


def test_middles_in_prefix_first_order_weigh_more(shards: ShardSet) -> None:
    rows = stream(shards, DataConfig(fim_rate=0.9, fim_spm_rate=0.4, fim_middle_weight=3.0))
    for step in range(6):
        batch = rows.batch(step, 0, 0, 1)
        assert batch.weights is not None
        for inputs, weights in zip(batch.inputs.tolist(), batch.weights.tolist(), strict=True):
            is_psm = in_middle = False
            for at, token in enumerate(inputs):
                if token == SENTINELS[0]:
                    is_psm = at + 1 < len(inputs) and inputs[at + 1] != SENTINELS[1]
                in_middle = (in_middle or token == SENTINELS[2]) and token != EOS
                assert weights[at] == (3.0 if is_psm and in_middle else 1.0)
