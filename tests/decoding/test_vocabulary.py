"""A model whose embedding has more rows than there are tokens writes what it would write without the others."""

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smelter.__main__ import main
from smelter.decoding.engine import Engine
from smelter.decoding.generate import Prompt, complete_many, generate
from smelter.decoding.healing import take_back
from smelter.decoding.request import Piece, Request
from smelter.evaluation.gaps import InfillCase, fill_in, samples
from smelter.kernels import head as screened
from smelter.model import Model
from tests import tiny

TOKENS = tiny.tokenizer(280)
WIDE = 400


def pair() -> tuple[Model, Model]:
    """A model with 400 rows, of which the 120 that are no tokens are always likelier, and the one without them."""
    wide, narrow = tiny.model(vocab_size=WIDE), tiny.model(vocab_size=280)
    with torch.no_grad():
        wide.embed_tokens.weight[280:] *= 8
        narrow.load_state_dict(wide.state_dict() | {"embed_tokens.weight": wide.embed_tokens.weight[:280]})
        hidden = wide(torch.tensor([TOKENS.encode(tiny.CODE)[:90]]))
        assert int(wide.logits(hidden).argmax(dim=-1).min()) >= 280
    narrow.quantize_weights()
    return wide, narrow


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5},
    {"temperature": 1.0, "top_k": 300},
    {"temperature": 1.0, "top_p": 0.9},
]
REQUESTS = [
    Request(ids, pending, max_tokens=12, seed=cut, num_top=num_top, stop_ids=[TOKENS.eos_id], **sampling)
    for cut in (300, 1_003)
    for ids, pending in (take_back(TOKENS, TOKENS.encode(tiny.CODE[:cut])[-40:]), ([5, 6, 7], b""))
    for num_top in (None, 3)
    for sampling in SAMPLING
]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_batch_writes_tokens_alone(monkeypatch: pytest.MonkeyPatch, is_frozen: bool) -> None:
    monkeypatch.setattr(screened, "MIN_PRODUCTS", 0)
    wide, narrow = pair()
    if is_frozen:
        wide.freeze()
        narrow.freeze()
    rows, expected = (generate(model, TOKENS, REQUESTS) for model in (wide, narrow))
    assert [row.ids for row in rows] == [row.ids for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def until_end(pieces: queue.Queue[Piece]) -> list[Piece]:
    found = [pieces.get(timeout=60)]
    while found[-1].end is None:
        found.append(pieces.get(timeout=60))
    return found


def test_the_engine_writes_them_too() -> None:
    """Log-probabilities are those of `generate`: over the tokens alone."""
    wide, narrow = pair()
    queues: list[queue.Queue[Piece]] = [queue.Queue() for _ in REQUESTS]
    engine = Engine(wide, TOKENS, num_slots=4)
    requests = [*REQUESTS[:-1], replace(REQUESTS[-1], pending=b"", scored_ids=REQUESTS[-1].ids)]
    engine.submit(requests, [each.put for each in queues])
    engine.start()
    collected = [until_end(each) for each in queues]
    engine.stop()
    for row, pieces in zip(generate(narrow, TOKENS, requests), collected, strict=True):
        assert "".join(piece.text for piece in pieces) == row.text.close()
        written = [token for piece in pieces for token in piece.tokens]
        if row.logprobs and not row.request.pending and all(TOKENS.decode_bytes([i]) for i in row.ids):
            assert [token.logprob for token in written] == pytest.approx(row.logprobs, abs=1e-4)
        for token in (*written, *(token for piece in pieces for token in piece.prompt)):
            assert all(i < 280 for i, _ in token.top)
    prompt = [token.logprob for piece in collected[-1] for token in piece.prompt][1:]
    ids = torch.tensor([REQUESTS[-1].ids])
    with torch.no_grad():
        logprobs = narrow.logits(narrow(ids))[0].log_softmax(dim=-1)
    assert prompt == pytest.approx([float(row[i]) for row, i in zip(logprobs, ids[0, 1:], strict=False)], abs=1e-4)


def test_evaluation_and_samples_write_them_too() -> None:
    wide, narrow = pair()
    cases = [InfillCase(0, tiny.CODE[: 900 + 40 * i], "", tiny.CODE[1_000 + 40 * i : 1_500]) for i in range(6)]
    prompts = [Prompt(case.prefix, case.suffix) for case in cases]
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"max_tokens": 16, "temperature": temperature}
        assert complete_many(wide, TOKENS, prompts, **options) == complete_many(narrow, TOKENS, prompts, **options)
    assert fill_in(wide, TOKENS, cases) == fill_in(narrow, TOKENS, cases)
    docs = [TOKENS.encode(tiny.CODE[i : i + 3_000]) for i in (0, 5_000)]
    assert samples(wide, TOKENS, 2, docs.__getitem__) == samples(narrow, TOKENS, 2, docs.__getitem__)


@pytest.mark.parametrize("options", [["--prompt", "import te"], ["--suffix", "x"], ["--chat", "a", "--seed", "3"]])
def test_the_command_writes_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    outputs = []
    for name, model in zip("ab", pair(), strict=True):
        run = tiny.checkpoint(tmp_path / name, model, TOKENS)
        assert main(["complete", str(run), *options, "--max-tokens", "12", "--device", "cpu"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""
