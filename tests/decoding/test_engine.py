"""The engine against `smelter.decoding.generate`: joining, leaving, neighbours and the cache never change an answer."""

import queue
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from smelter.decoding import engine as engine_module
from smelter.decoding.engine import Engine, EngineBusy, EngineStopped
from smelter.decoding.generate import generate
from smelter.decoding.kv_cache import KVCache
from smelter.decoding.prompts import make_prompt
from smelter.decoding.request import Piece, Request
from smelter.kernels import head as screened
from tests import tiny

CONTEXT = tiny.TINY.max_seq_len


def make_engine(**options: Any) -> Engine:
    made = Engine(tiny.model(), tiny.tokenizer(), **{"num_slots": 3} | options)
    made.start()
    return made


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make_engine()
    yield made
    made.stop()


class Asked:
    """One request's pieces as they come."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.queue: queue.Queue[Piece] = queue.Queue()
        self.pieces: list[Piece] = []
        (self.answer,) = engine.submit([request], [self.queue.put])

    def next(self) -> Piece:
        piece = self.queue.get(timeout=60)
        self.pieces.append(piece)
        return piece

    def all(self) -> "Asked":
        while not self.pieces or self.pieces[-1].end is None:
            self.next()
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> list[int]:
        return [token.id for piece in self.pieces for token in piece.tokens]

    @property
    def finish(self) -> str:
        end = self.pieces[-1].end
        assert end is not None
        return end.finish


def alone_ids(prompt: Any, **options: Any) -> list[int]:
    """What `generate` writes, without special tokens, which add nothing to a text."""
    (found,) = tiny.write(tiny.model(), [prompt], **options)
    return [i for i in found.ids if tiny.tokenizer().decode_bytes([i])]


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(256) for _ in range(numbers.randrange(1, 70))] for _ in range(count)]


# --- equality with generate ------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"temperature": 1.5}])
def test_many_at_once_equal_one_at_a_time(engine: Engine, sampling: dict[str, Any]) -> None:
    """Ten prompts through three slots: they join and leave while others are decoded."""
    eos = tiny.tokenizer().eos_id
    prompts, lengths = random_prompts(10), [1, 3, 30, 7, 50, 2, 90, 5, 12, 20]
    requests = [
        Request(prompt, max_tokens=length, seed=100 + i, stop_ids=[eos], num_top=0, **sampling)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    asked = [Asked(engine, request) for request in requests]
    for each, request in zip(asked, requests, strict=True):
        (alone,) = generate(tiny.model(), tiny.tokenizer(), [request])
        each.all()
        spelling = [i for i in alone.ids if tiny.tokenizer().decode_bytes([i])]
        assert each.ids == spelling
        assert each.finish == alone.finish
        told = [token.logprob for piece in each.pieces for token in piece.tokens]
        expected = [p for i, p in zip(alone.ids, alone.logprobs, strict=True) if tiny.tokenizer().decode_bytes([i])]
        assert told == pytest.approx(expected, abs=1e-4)


def test_a_frozen_model_answers_as_it_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows get their token from the screened head, their neighbours from all logits."""
    monkeypatch.setattr(screened, "MIN_PRODUCTS", 0)
    model, prompts = tiny.model(), random_prompts(8, seed=4)
    model.freeze()
    engine = Engine(model, tiny.tokenizer(), num_slots=5)
    settings: list[dict[str, Any]] = [{}, {}, {"temperature": 0.9}, {"num_top": 2}]
    requests = [Request(ids, max_tokens=20, seed=i, **settings[i % 4]) for i, ids in enumerate(prompts)]
    requests[1] = replace(requests[1], pending=b"de")
    asked = [Asked(engine, request) for request in requests]
    engine.start()
    for each, request in zip(asked, requests, strict=True):
        options = {"temperature": request.temperature, "seed": request.seed, "max_tokens": 20}
        spelt = alone_ids(request.ids, pending=[request.pending], **options)
        assert [token.id for piece in each.all().pieces for token in piece.tokens][-len(spelt) + 1 :] == spelt[1:]
        told = {token.logprob is not None for piece in each.pieces for token in piece.tokens}
        assert told == {request.num_top is not None}
    engine.stop()


def test_mixed_sampling_in_one_batch(engine: Engine) -> None:
    """Rows of one step differ in every parameter."""
    prompt = random_prompts(1, seed=3)[0]
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}]
    asked = [Asked(engine, Request(prompt, max_tokens=20, seed=9, **setting)) for setting in settings]
    for each, setting in zip(asked, settings, strict=True):
        (alone,) = tiny.write(tiny.model(), [prompt], max_tokens=20, seed=9, **setting)
        assert each.all().ids == [i for i in alone.ids if tiny.tokenizer().decode_bytes([i])]


@pytest.mark.parametrize("suffix", [None, "", "\n    return text\n"])
def test_text_equals_complete(engine: Engine, suffix: str | None) -> None:
    """Healing and infilling included: the prompt ends inside a word."""
    prompt = "def dedent(text):\n    marg"
    made = make_prompt(tiny.tokenizer(), CONTEXT, prompt, suffix, max_tokens=24)
    assert made.pending
    expected = tiny.complete(prompt, suffix, max_tokens=24, temperature=0.7, seed=5)
    request = Request(
        made.ids, made.pending, max_tokens=24, temperature=0.7, seed=5, stop_ids=[tiny.tokenizer().eos_id]
    )
    asked = Asked(engine, request).all()
    assert asked.text == expected
    (alone,) = generate(tiny.model(), tiny.tokenizer(), [request])
    assert asked.finish == alone.finish
    raw = b"".join(token.raw for piece in asked.pieces for token in piece.tokens)
    assert raw.decode("utf-8", "replace") == asked.text


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_one_token_is_one_that_the_caller_did_not_have(engine: Engine, max_tokens: int) -> None:
    """The model spells ` ch` again with two tokens before it goes on."""
    made = make_prompt(tiny.tokenizer(), CONTEXT, tiny.CODE[220:300], None, max_tokens=max_tokens)
    asked = Asked(engine, Request(made.ids, made.pending, max_tokens=max_tokens, num_top=2)).all()
    tokens, end = [token for piece in asked.pieces for token in piece.tokens], asked.pieces[-1].end
    assert len(tokens) == max_tokens
    assert end is not None
    assert (end.num_tokens, end.finish) == (max_tokens, "length")
    assert all(token.logprob is not None and len(token.top) == 2 for token in tokens)
    assert "".join(token.raw.decode() for token in tokens) == asked.text != ""


def test_a_long_prompt_is_read_in_pieces_while_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 8)
    engine = make_engine()
    writing = Asked(engine, Request([5, 6, 7], max_tokens=90))
    writing.next()
    long = random_prompts(1, seed=8)[0] * 3
    reading = Asked(engine, Request(long[:64], max_tokens=10)).all()
    assert reading.ids == alone_ids(long[:64], max_tokens=10)
    assert writing.all().ids == alone_ids([5, 6, 7], max_tokens=90)
    engine.stop()


# --- prompts that begin alike ----------------------------------------------------------------------


def test_what_an_earlier_prompt_left_is_not_read_again(engine: Engine) -> None:
    prompt = random_prompts(1, seed=4)[0][:5] * 10
    first = Asked(engine, Request(prompt, max_tokens=4)).all()
    longer = [*prompt, *alone_ids(prompt, max_tokens=4), 9]
    assert first.ids == longer[50:-1]
    again = Asked(engine, Request(longer, max_tokens=6)).all()
    end = again.pieces[-1].end
    assert end is not None
    # The last token of the first answer was never read.
    assert end.num_cached == len(prompt) + 3
    assert again.ids == alone_ids(longer, max_tokens=6)
    assert engine.counts.cached_tokens == len(prompt) + 3


@pytest.mark.parametrize("suffix", ["", "\n    return text\n"])
def test_files_sent_ahead_are_not_read_again(engine: Engine, suffix: str) -> None:
    """An editor warms the server up with them alone, and asks for no token."""
    files = tiny.CODE[:60], tiny.CODE[60:100]
    ahead = make_prompt(tiny.tokenizer(), CONTEXT, "", "", max_tokens=0, extra=files)
    warmed = Asked(engine, Request(ahead.ids, ahead.pending, max_tokens=0)).all()
    end = warmed.pieces[-1].end
    assert end is not None
    assert (warmed.text, warmed.ids, end.finish) == ("", [], "length")
    assert (end.num_prompt, end.num_cached, end.num_tokens) == (len(ahead.ids), 0, 0)
    asked = make_prompt(tiny.tokenizer(), CONTEXT, "def f(te", suffix, max_tokens=8, extra=files)
    request = Request(asked.ids, asked.pending, max_tokens=8)
    answer = Asked(engine, request).all()
    end = answer.pieces[-1].end
    assert end is not None
    assert end.num_cached >= len(ahead.ids) - 1
    assert end.num_cached < end.num_prompt
    (alone,) = generate(tiny.model(), tiny.tokenizer(), [request])
    assert answer.text == alone.text.close()


def test_a_prompt_in_work_is_shared_too(engine: Engine) -> None:
    prompt = list(range(40))
    asked = [Asked(engine, Request(prompt, max_tokens=30, temperature=1.0, seed=seed)) for seed in range(3)]
    for seed, each in enumerate(asked):
        (alone,) = tiny.write(tiny.model(), [prompt], max_tokens=30, temperature=1.0, seed=seed)
        assert each.all().ids == [i for i in alone.ids if tiny.tokenizer().decode_bytes([i])]
    assert [each.pieces[-1].end.num_cached for each in asked if each.pieces[-1].end] == [0, 39, 39]


def test_slots_keep_what_they_hold_when_rows_move() -> None:
    """Many prompts with common beginnings, in random order: every answer as alone."""
    engine = make_engine(num_slots=4)
    numbers, stems = random.Random(1), [list(range(20, 50)), list(range(90, 60, -1)), [7] * 30]
    requests = [
        Request([*numbers.choice(stems), *[numbers.randrange(200) for _ in range(numbers.randrange(1, 9))]], b"", n)
        for n in [numbers.randrange(1, 25) for _ in range(40)]
    ]
    asked = [Asked(engine, request) for request in requests]
    for each, request in zip(asked, requests, strict=True):
        (alone,) = tiny.write(tiny.model(), [request.ids], max_tokens=request.max_tokens)
        assert each.all().ids == [i for i in alone.ids if tiny.tokenizer().decode_bytes([i])]
    assert engine.counts.cached_tokens > 30 * 20
    engine.stop()


def test_cache_rows_are_moved_and_copied() -> None:
    cache = KVCache(tiny.TINY, 3, 8, torch.float32, "cpu")
    cache.keys.copy_(torch.randn_like(cache.keys))
    cache.values.copy_(torch.randn_like(cache.values))
    before = cache.keys.clone(), cache.values.clone()
    cache.swap(0, 2, 5)
    cache.copy(1, 0, 3)
    for now, then in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(now[:, 2, :, :5], then[:, 0, :, :5])
        assert torch.equal(now[:, 0, :, 3:5], then[:, 2, :, 3:5])
        assert torch.equal(now[:, 0, :, :3], then[:, 1, :, :3])
        assert torch.equal(now[:, :, :, 5:], then[:, :, :, 5:])


# --- ends ------------------------------------------------------------------------------------------


def test_stop_strings_across_tokens(engine: Engine) -> None:
    prompt = [5, 6, 7]
    (alone,) = tiny.write(tiny.model(), [prompt], max_tokens=30)
    text = tiny.tokenizer().decode(alone.ids)
    borders = [len(tiny.tokenizer().decode(alone.ids[:i])) for i in range(3, 30)]
    border = next(b for b in borders if text[b - 1 : b + 1].isascii() and text.find(text[b - 1 : b + 1]) == b - 1)
    stop = text[border - 1 : border + 1]
    asked = Asked(engine, Request(prompt, max_tokens=30, stops=["never", stop])).all()
    assert asked.text == text[: border - 1]
    end = asked.pieces[-1].end
    assert end is not None
    assert (end.finish, end.stop) == ("stop", stop)
    raw = b"".join(token.raw for piece in asked.pieces for token in piece.tokens)
    assert raw.decode("utf-8", "replace") == asked.text


def test_an_answer_out_of_time_ends_with_a_line_break(engine: Engine) -> None:
    prompt: list[int] = [5, 6, 7]
    written = alone_ids(prompt, max_tokens=30)
    breaking = next(i for i in written[4:] if i not in written[:4])
    engine._batch._bytes_of[breaking] = b"x\n  y"
    asked = Asked(engine, Request(prompt, max_tokens=90, max_seconds=0.0)).all()
    assert asked.ids == written[: written.index(breaking) + 1]
    assert asked.text.endswith("x\n  y")
    assert asked.finish == "time"
    asked = Asked(engine, Request(prompt, max_tokens=30, max_seconds=60.0)).all()
    assert (asked.ids, asked.finish) == (written, "length")


def test_an_answer_ends_before_a_line_indented_less(engine: Engine) -> None:
    prompt: list[int] = [5, 6, 7]
    written = alone_ids(prompt, max_tokens=30)
    breaking = next(i for i in written[4:] if i not in written[:4])
    engine._batch._bytes_of[breaking] = b"x\n    y\n  z"
    asked = Asked(engine, Request(prompt, max_tokens=30, n_indent=4, num_top=0)).all()
    assert asked.text.endswith("x\n    y\n  ")
    end = asked.pieces[-1].end
    assert end is not None
    assert (end.finish, end.stop) == ("length", None)
    raw = b"".join(token.raw for piece in asked.pieces for token in piece.tokens)
    assert raw.decode("utf-8", "replace") == asked.text
    assert Asked(engine, Request(prompt, max_tokens=30, n_indent=2)).all().ids == written


def test_prompt_logprobs(engine: Engine) -> None:
    prompt = random_prompts(1, seed=12)[0][:40]
    asked = Asked(engine, Request(prompt, max_tokens=0, scored_ids=prompt, num_top=2)).all()
    told = asked.pieces[0].prompt
    model = tiny.model()
    with torch.no_grad():
        logprobs = model.logits(model(torch.tensor([prompt])))[0].log_softmax(dim=-1)
    assert [token.id for token in told] == prompt
    assert told[0].logprob is None
    expected = [float(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
    assert [token.logprob for token in told[1:]] == pytest.approx(expected, abs=1e-3)
    assert [token.top[0][0] for token in told[1:]] == logprobs[:-1].argmax(dim=-1).tolist()
    assert asked.finish == "length"
    assert asked.ids == []


def test_ids_without_a_token_are_never_written() -> None:
    """The embedding has more rows than the tokenizer has tokens."""
    engine = Engine(tiny.model(vocab_size=4_096), tiny.tokenizer(), num_slots=1)
    engine.start()
    asked = Asked(engine, Request([5, 6], max_tokens=60, temperature=2.0)).all()
    assert asked.finish == "length"
    engine.stop()


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_cancelled_answers_free_their_slots(engine: Engine) -> None:
    """In work, being read and in the queue."""
    slow = [Asked(engine, Request([5, 6, i], max_tokens=90)) for i in range(6)]
    slow[0].next()
    engine.cancel([each.answer for each in slow])
    for each in slow:
        each.all()
    assert {each.finish for each in slow} <= {"cancelled", "length"}
    assert slow[5].finish == "cancelled"
    wait_until(lambda: engine.num_active == engine.num_waiting == 0)
    asked = [Asked(engine, Request([5, 6, i], max_tokens=9)) for i in range(3)]
    assert [each.all().ids for each in asked] == [alone_ids([5, 6, i], max_tokens=9) for i in range(3)]


def test_the_queue_has_an_end() -> None:
    engine = Engine(tiny.model(), tiny.tokenizer(), num_slots=2, max_queue=1)  # not started: nothing leaves
    answers: list[Piece] = []
    engine.submit([Request([1])] * 2, [answers.append] * 2)
    engine.submit([Request([1])], [answers.append])
    with pytest.raises(EngineBusy):
        engine.submit([Request([1])], [answers.append])
    engine.start()
    wait_until(lambda: sum(piece.end is not None for piece in answers) == 3)
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.submit([Request([1])], [answers.append])


def test_a_stopped_engine_tells_who_waits() -> None:
    engine = make_engine(num_slots=1)
    asked = [Asked(engine, Request([5, i], max_tokens=90)) for i in range(3)]
    asked[0].next()
    engine.stop()
    assert [each.all().finish for each in asked][-1] == "cancelled"


def test_a_defect_reaches_who_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def broken(_rows: list[Any], _hidden: torch.Tensor) -> None:
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(engine._batch, "_choose", broken)
        assert Asked(engine, Request([5], max_tokens=3)).all().finish == "error"
        assert "a defect" in capfd.readouterr().err
    # It was of that request: the next ones are served, in every slot.
    asked = [Asked(engine, Request([5, i], max_tokens=9)) for i in range(4)]
    assert [each.all().ids for each in asked] == [alone_ids([5, i], max_tokens=9) for i in range(4)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_is_gone_takes_no_request(engine: Engine) -> None:
    def broken(_: Piece) -> None:
        raise ZeroDivisionError("nobody can be told")

    engine.submit([Request([5], max_tokens=3)], [broken])
    wait_until(lambda: not engine._thread.is_alive())
    with pytest.raises(EngineStopped):
        engine.submit([Request([5])], [print])


def test_a_defect_of_no_request_stops_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(engine, "_drop_cancelled", broken)
    monkeypatch.setattr(engine, "_fits", lambda _: False)
    with engine._changed:
        engine._changed.notify_all()
    assert Asked(engine, Request([5], max_tokens=3)).all().finish == "error"
    assert "a defect" in capfd.readouterr().err
    with pytest.raises(EngineStopped, match="a defect"):
        engine.submit([Request([5])], [print])


def test_short_prompts_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unequal lengths, some cancelled, one for its log-probabilities: every answer as alone."""
    engine = Engine(tiny.model(), tiny.tokenizer(), num_slots=6)  # not started: all wait
    prompts = random_prompts(9, seed=2)
    prompts = [prompt[: 1 + 5 * index] for index, prompt in enumerate(prompts)]
    requests = [Request(prompt, max_tokens=12) for prompt in prompts]
    requests[4] = Request(prompts[4], max_tokens=0, scored_ids=prompts[4])
    asked = [Asked(engine, request) for request in requests]
    engine.cancel([asked[2].answer])
    read: list[int] = []
    forward = engine._batch.model.forward

    def counted(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        read.append(tokens.numel())
        return forward(tokens, **options)

    monkeypatch.setattr(engine._batch.model, "forward", counted)
    engine.start()
    for index, each in enumerate(asked):
        expected = [] if index in (2, 4) else alone_ids(prompts[index], max_tokens=12)
        assert each.all().ids == expected
    assert asked[2].finish == "cancelled"
    assert [token.id for token in asked[4].pieces[0].prompt] == prompts[4]
    assert read[0] > 3 * len(prompts[3])
    engine.stop()
